"""Conversations as tokens: the tokenizer's own chat template, without loading `transformers`."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

THOUGHT_END = "</think>"


class Chat:
    """Renders prompts and responses with the tokenizer and chat template of `folder` (tokenizer.json and its config).

    Raises:
        ValueError: the folder lacks the tokenizer, its chat template or one of the special tokens.
    """

    def __init__(self, folder: Path) -> None:
        files = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if not all(f.exists() for f in files):
            raise ValueError(
                f"{folder} holds no tokenizer (tokenizer.json, tokenizer_config.json): name another folder"
            )
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(files[0]))
        described: dict[str, Any] = json.loads(files[1].read_text(encoding="utf-8"))
        if "chat_template" not in described:
            raise ValueError(f"{files[1]} has no chat_template: export the tokenizer with one")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self.template = environment.from_string(described["chat_template"])
        self.names = {k: token_name(described.get(k)) for k in ("bos_token", "eos_token", "pad_token")}
        self.eos, self.pad = self._id(self.names["eos_token"]), self._id(self.names["pad_token"])

    @cached_property
    def thought_end(self) -> int:
        """The id of the token that ends a thought.

        Raises:
            ValueError: the tokenizer spells it in several, as that of an adopted model may.
        """
        return self._id(THOUGHT_END)

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {token!r}: train it with the special tokens of the recipe")
        return found

    def prompt(self, question: str) -> list[int]:
        """The question, up to where the model's thought begins."""
        messages = [{"role": "user", "content": question}]
        text = self.template.render(messages=messages, add_generation_prompt=True, **self.names)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def response(self, thought: str, final: str) -> list[int]:
        """What follows the prompt: the thought, its end, the answer and the end of the text."""
        text = f"{thought}\n{THOUGHT_END}\n{final}"
        return [*self.tokenizer.encode(text, add_special_tokens=False).ids, self.eos]

    def text(self, tokens: list[int]) -> str:
        """Tokens as text, thought marks included, padding and end left out."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def token_name(token: Any) -> str:
    """A special token as tokenizer_config.json gives it, as a string or described; empty where there is none."""
    return token["content"] if isinstance(token, dict) else str(token or "")

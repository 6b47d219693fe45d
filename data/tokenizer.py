"""The tokenizer: byte-level BPE with single digits, and the special tokens and chat form of DeepSeek-R1."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
# Never found in a document's text by the tokenize stage: there they are ordinary characters.
CONTROL = (BOS, EOS, PAD, FIM_BEGIN, FIM_HOLE, FIM_END)
# As in R1's own tokenizer these are added tokens that decoding keeps, and that are found in raw text.
SPOKEN = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
BYTES = 256
LEAST = BYTES + len(CONTROL) + len(SPOKEN)

# Words with their leading blank, runs of other signs, and white space that leaves a blank for the next word.
PIECES = r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+|\p{N}"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<｜User｜>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<｜Assistant｜>"
    "{% if message['reasoning_content'] is defined %}<think>\n{{ message['reasoning_content'] }}\n</think>\n{% endif %}"
    "{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on `texts`; ties are broken by the library in a fixed order, so equal texts give equal files.

    Raises:
        ValueError: the vocabulary cannot hold the bytes and the special tokens.
    """
    if vocab_size < LEAST:
        raise ValueError(f"vocab_size {vocab_size} is less than the {LEAST} of all bytes and special tokens: raise it")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*CONTROL, *SPOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_spoken_tokens(tokenizer)


def _with_spoken_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with the role and thought marks as added tokens that are not special."""
    described = json.loads(tokenizer.to_str())
    for token in described["added_tokens"]:
        token["special"] = token["content"] in CONTROL
    return Tokenizer.from_str(json.dumps(described))


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and a tokenizer_config.json that `transformers.AutoTokenizer` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, text in {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(described, ensure_ascii=False, indent=1, sort_keys=True) + "\n",
    }.items():
        part = folder / f"{name}.tmp"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)


def load(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def load_for_documents(folder: Path) -> Tokenizer:
    """The same for raw documents: a control token spelled out in a text is text, and cannot end the document."""
    tokenizer = load(folder)
    tokenizer.encode_special_tokens = True
    return tokenizer


def pieces(text: str, most: int = 1 << 17) -> list[str]:
    """A text in pieces of at most `most` characters, for encoding in bounded memory.

    A cut lies before white space that follows something else. No piece of the pre-tokenizer reaches over such a place,
    so the tokens of the pieces are the tokens of the whole; only a stretch of `most` / 2 characters without white space
    is cut inside (the text still comes back exactly).
    """
    cut: list[str] = []
    at = 0
    while len(text) - at > most:
        end = at + most
        for place in range(end, at + most // 2, -1):
            if text[place].isspace() and not text[place - 1].isspace():
                end = place
                break
        cut.append(text[at:end])
        at = end
    return [*cut, text[at:]]

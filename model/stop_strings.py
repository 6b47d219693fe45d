"""Text as its tokens come, cut before the first stop string; what may yet belong to one is held back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for bytes that are not a whole character yet


@dataclass(frozen=True)
class Wording:
    """How tokens read as text, and the strings that end a response.

    Raises:
        ValueError: a stop string is empty.
    """

    text: Callable[[list[int]], str]
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise ValueError(f"the stop strings {list(self.stop)} hold an empty one, which ends all responses: drop it")


class Speech:
    """The text of one response. `said` is what has been handed out of it, never any of a stop string."""

    def __init__(self, wording: Wording) -> None:
        self.wording, self.said, self.stopped = wording, "", False
        self._tokens: list[int] = []
        self._shown = self._read = 0  # tokens before `_read` are in the text; those from `_shown` on are its last piece
        self._held = ""

    def add(self, token: int) -> str:
        """What may be handed out since this token; nothing after a stop string, which sets `stopped`."""
        self._tokens.append(token)
        # A tokenizer may treat a text's first token in its own way, so each piece is decoded behind the one before it.
        before = self.wording.text(self._tokens[self._shown : self._read])
        now = self.wording.text(self._tokens[self._shown :])
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return ""
        self._shown, self._read = self._read, len(self._tokens)
        return self._hand_out(now[len(before) :])

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        before = self.wording.text(self._tokens[self._shown : self._read])
        rest = self._hand_out(self.wording.text(self._tokens[self._shown :])[len(before) :])
        held, self._held = self._held, ""
        self.said += held
        return rest + held

    def _hand_out(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self.wording.stop) if at >= 0]
        if found:
            self.stopped, self._held, ready = True, "", text[: min(found)]
        else:
            safe = len(text) - max((_overlap(text, stop) for stop in self.wording.stop), default=0)
            ready, self._held = text[:safe], text[safe:]
        self.said += ready
        return ready


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text with which the stop string begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

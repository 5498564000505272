"""Text of tokens as they come: no half characters, and nothing of a text that is to stop the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

_BROKEN: Final = "\ufffd"
_PATIENCE: Final = 8
"""Tokens that may wait for the rest of a character: more than the bytes of any."""

_TAIL: Final = 8


class TextFlow:
    """Turns new tokens into text, piece by piece; all pieces together are the text that the tokenizer decodes.

    Args:
        tokenizer: What decodes.
        stop: Texts that end the answer; they and what follows are no part of it.
        after: Tokens before the first, where the text goes on from them (a space between words is then kept).

    Attributes:
        stopped: Whether one of the texts was met; nothing comes after it.
    """

    def __init__(self, tokenizer: Any, *, stop: Sequence[str] = (), after: Sequence[int] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._ids = list(after[-_TAIL:])
        self._from, self._read = 0, len(self._ids)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; returns the text that is sure now, which may be empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._sure(self._new(patient=True), last=False)

    def end(self) -> str:
        """The rest, when no token follows."""
        return "" if self.stopped else self._sure(self._new(patient=False), last=True)

    def _new(self, *, patient: bool) -> str:
        text = self._decoded(len(self._ids))
        if patient and text.endswith(_BROKEN) and len(self._ids) - self._read < _PATIENCE:
            return ""
        new = text[len(self._decoded(self._read)) :]
        self._from, self._read = self._read, len(self._ids)
        return new

    def _decoded(self, end: int) -> str:
        text = self._tokenizer.decode(
            self._ids[self._from : end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text if isinstance(text, str) else "".join(text)

    def _sure(self, new: str, *, last: bool) -> str:
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)

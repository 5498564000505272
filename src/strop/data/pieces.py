"""Plain texts cut into consecutive pieces that together are the text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

# Pieces of a plain text file: long enough for context, short enough that a file gives pieces to hold out.
PIECE_CHARACTERS: Final = 4_000

# A text without line ends is cut at spaces, so that the tokenizer never reads more at once.
MOST_CHARACTERS: Final = 1_000_000


def split_text(text: str, most: int = MOST_CHARACTERS) -> list[str]:
    """Cut a text into consecutive parts of at most `most` characters, behind a space where there is one."""
    parts: list[str] = []
    begin = 0
    while len(text) - begin > most:
        space = max(text.rfind(space, begin, begin + most) for space in " \n")
        end = space + 1 if space > begin else begin + most
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]


def pieces(lines: Iterable[tuple[int, str]], characters: int = PIECE_CHARACTERS) -> Iterator[tuple[int, str]]:
    """Consecutive pieces of numbered lines: `(first line, piece)`; trailing blank lines are left out."""
    held: list[str] = []
    size, first, filled = 0, None, False
    for number, line in lines:
        first = number if first is None else first
        held.append(line)
        size += len(line)
        blank = not line.strip()
        filled = filled or not blank
        if filled and ((size >= characters and blank) or size >= 2 * characters):
            yield first, "".join(held)
            held, size, first, filled = [], 0, None, False
    if filled and first is not None:
        yield first, "".join(held)


def text_pieces(text: str, *, characters: int = PIECE_CHARACTERS) -> list[tuple[int, str]]:
    """Cut a plain text into consecutive pieces that together are the text: `(first line, piece)`.

    A piece ends at the first blank line after `characters` characters, or at the first line end after twice that.
    """
    return list(pieces(enumerate(text.splitlines(keepends=True), start=1), characters))

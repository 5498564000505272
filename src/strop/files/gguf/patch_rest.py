"""What a file holds outside its tensors (header, padding, what follows), kept as pieces of another file's.

    copies   their count (at most 256), and of each: a place in the other's, how many bytes are taken over from there,
             and how many new ones follow them
    texts    the length of all new bytes, and a stream of them

Metadata changes in a few texts, and a vocabulary of megabytes stays: so it is taken over from both sides of them. No
promise is made to find the fewest pieces, only that they give the same bytes.
"""

from __future__ import annotations

import numpy as np

from strop.files.gguf.patch_streams import Cursor, number, stream

MAX_REST_BYTES = 96 << 20
"""The most that may stand outside the tensors of a file; three times the longest header that is read."""

_PROBE_BYTES = 48
_MAX_COPIES = 256


def pack_rest(before: bytes, after: bytes) -> tuple[bytes, int]:
    """What makes `after` of `before`, and how many bytes are new."""
    copies, texts = _pieces(before, after)
    table = b"".join(number(value) for copy in copies for value in copy)
    return number(len(copies)) + table + number(len(texts)) + stream(texts), len(texts)


def unpack_rest(cursor: Cursor, before: bytes, nbytes: int) -> tuple[bytes, int]:
    """Undo `pack_rest`; `nbytes` is the length that is needed.

    Raises:
        FileFormatError: the pieces lie outside `before`, or do not make `nbytes`.
    """
    count = cursor.number("the number of copies", _MAX_COPIES)
    most = len(before), len(before), nbytes
    copies = [[cursor.number("a copy", one) for one in most] for _ in range(count)]
    texts = cursor.stream(cursor.number("the length of the texts", nbytes), "the texts")
    parts: list[bytes] = []
    made = used = 0
    for start, length, fresh in copies:
        if start + length > len(before) or used + fresh > len(texts) or made + length + fresh > nbytes:
            raise cursor.error("a copy reaches past what there is to copy; it is damaged")
        parts += [before[start : start + length], texts[used : used + fresh]]
        made, used = made + length + fresh, used + fresh
    if made != nbytes or used != len(texts):
        raise cursor.error(f"the copies make {made:,} bytes, {nbytes:,} are needed; it is damaged")
    return b"".join(parts), used


def _pieces(before: bytes, after: bytes) -> tuple[list[tuple[int, int, int]], bytes]:
    """Copies and texts: as far as both agree, then on from the first probe of `before` that comes again."""
    copies: list[tuple[int, int, int]] = []
    texts: list[bytes] = []
    here = there = 0  # in `before`, in `after`
    while there < len(after):
        length = _agree(before, after, here, there)
        start, stop = here, there + length
        here, there = _again(before, after, here + length, stop)
        if len(copies) == _MAX_COPIES - 1:
            there = len(after)
        copies.append((start, length, there - stop))
        texts.append(after[stop:there])
    return copies, b"".join(texts)


def _agree(before: bytes, after: bytes, here: int, there: int) -> int:
    """How many bytes from the two places on are the same."""
    most, length, step = min(len(before) - here, len(after) - there), 0, 256
    while length < most:
        count = min(step, most - length)
        left = np.frombuffer(before, np.uint8, count, here + length)
        differ = left != np.frombuffer(after, np.uint8, count, there + length)
        if differ.any():
            return length + int(differ.argmax())
        length, step = length + count, 2 * step
    return length


def _again(before: bytes, after: bytes, here: int, there: int) -> tuple[int, int]:
    """The next places from which both go on alike: probes of `before` at growing steps are looked for in `after`."""
    step, place = 0, here
    while place < len(before):
        found = after.find(before[place : place + _PROBE_BYTES], there)
        if found >= 0 and place + _PROBE_BYTES <= len(before):
            while place > here and found > there and before[place - 1] == after[found - 1]:
                place, found = place - 1, found - 1
            return place, found
        step += max(_PROBE_BYTES, step // 2)
        place = here + step
    return len(before), len(after)

"""The streams of a patch: numbers that moved, as gaps, signs and sizes, each squeezed by what squeezes it best.

Of n numbers of a field, m moved, each by d = after - before modulo 2^bits, taken as -2^(bits - 1) < d <= 2^(bits - 1):

    gaps     numbers that stayed before each one that moved, in one of two ways:
             Rice code: gap >> k ones and a zero, for all gaps; then the k low bits of each; highest bits first
             bytes: 255 means "255, and go on"
    signs    a bit each, highest first; 1 where d < 0
    sizes    |d| - 1 in the bytes of a number, the lowest byte of all of them first

Moved at random with density p and by +-1, a number costs at least h(p) + p bits, h(p) = -p log2 p - (1-p) log2 (1-p):
0.1414 + 0.02 at 2%. Gaps are geometric then, and a Rice code takes 0.4% more than h(2%), whatever the size of a tensor
(Golomb, "Run-length encodings", 1966; Rice, JPL 79-22); bytes with a Huffman code do better where densities are mixed.
A bitmap in any compressor of the standard library takes 20 to 40% more. Signs are as long as their entropy already;
sizes are mostly zeros. Each stream takes the shortest of: nothing (zeros alone), as it is, deflate with Huffman codes
alone (best for bytes of gaps), deflate, LZMA2 without contexts (best for sizes and texts). bz2 was never the shortest.

Whole numbers of 7 bits a byte, the lowest first, the highest bit set where another follows, give counts and lengths.
"""

from __future__ import annotations

import lzma
import zlib
from typing import Any, Final

import numpy as np

from strop.errors import FileFormatError
from strop.files.gguf.block_fields import Bytes, Field, Numbers

Gaps = np.ndarray[Any, np.dtype[np.int64]]

STAYED, MOVED_RICE, MOVED_BYTES, ANEW = 0, 1, 2, 3
"""How a field is kept: nothing moved; what moved, in one of two ways; all its numbers anew, byte by byte as sizes."""

_AS_IT_IS, _DEFLATE, _LZMA2, _ZEROS = 0, 1, 2, 3
_LZMA: Final[list[dict[str, Any]]] = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20, "lc": 0, "lp": 0, "pb": 0}]
_MORE: Final = 255


class Cursor:
    """A place in a patch, moved on by what is read; nothing is read past its end."""

    def __init__(self, data: memoryview, place: int, end: int, path: str) -> None:
        self.data = data
        self.place = place
        self.end = end
        self.path = path

    def error(self, text: str) -> FileFormatError:
        """A refusal that names the place."""
        return FileFormatError(f"{self.path}: at byte {self.place:,}: {text}")

    def take(self, count: int, what: str) -> memoryview:
        """The next `count` bytes, which must be there."""
        if count > self.end - self.place:
            raise self.error(f"{what} takes {count:,} bytes, and {self.end - self.place:,} are left; it is damaged")
        start = self.place
        self.place += count
        return self.data[start : self.place]

    def number(self, what: str, most: int) -> int:
        """A whole number from 0 to `most`."""
        value = shift = 0
        while True:
            (byte,) = self.take(1, what)
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
            if shift >= 63:
                raise self.error(f"{what} has more than 63 bits; it is damaged")
        if value > most:
            raise self.error(f"{what} is {value:,}; at most {most:,} can be; it is damaged")
        return value

    def stream(self, nbytes: int, what: str) -> bytes:
        """A stream that holds exactly `nbytes`; no more than that is ever made of it."""
        codec = self.number(f"the kind of {what}", _ZEROS)
        packed = self.take(self.number(f"the length of {what}", self.end - self.place), what)
        if codec == _AS_IT_IS:
            found, whole = bytes(packed), True
        elif codec == _ZEROS:
            found, whole = bytes(nbytes), not packed
        else:
            try:
                if codec == _DEFLATE:
                    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
                    found = inflate.decompress(packed, nbytes + 1)
                    whole = inflate.eof and not inflate.unused_data
                else:
                    unpack = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA)
                    found = unpack.decompress(packed, nbytes + 1)
                    whole = unpack.eof and not unpack.unused_data
            except (zlib.error, lzma.LZMAError, EOFError) as error:
                raise self.error(f"{what} cannot be unpacked ({error}); it is damaged") from None
        if len(found) != nbytes or not whole:
            raise self.error(f"{what} does not hold the {nbytes:,} bytes that it should; it is damaged")
        return found


def number(value: int) -> bytes:
    """A whole number in as many bytes as it needs.

    >>> number(300).hex()
    'ac02'
    """
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    return bytes([*result, value])


def stream(raw: bytes) -> bytes:
    """Bytes as a stream: the kind, the length, and the shortest that was found."""
    kinds = [(_AS_IT_IS, raw)]
    if raw.count(0) == len(raw):
        kinds = [(_ZEROS, b"")]
    elif len(raw) > 16:
        for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
            deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
            kinds.append((_DEFLATE, deflate.compress(raw) + deflate.flush()))
        if min(len(packed) for _, packed in kinds) < 0.98 * len(raw):  # slow, and of no use where deflate is none
            kinds.append((_LZMA2, lzma.compress(raw, lzma.FORMAT_RAW, filters=_LZMA)))
    kind, packed = min(kinds, key=lambda one: len(one[1]))
    return bytes([kind]) + number(len(packed)) + packed


def pack_field(before: Numbers, after: Numbers, field: Field) -> tuple[bytes, int]:
    """What makes `after` of `before`, both the field's numbers of the same blocks, and how many moved."""
    mask = field.dtype.type((1 << field.bits) - 1)
    moves = (after - before) & mask  # unsigned, modulo 2^bits
    places = np.flatnonzero(moves)
    if not places.size:
        return bytes([STAYED]), 0
    moves = moves[places]
    falls = moves > 1 << (field.bits - 1)
    sizes = np.where(falls, ~moves & mask, moves - moves.dtype.type(1))  # |d| - 1
    gaps = np.diff(places, prepend=-1) - 1
    moved = min(_rice(gaps), _in_bytes(gaps), key=len)
    packed = moved + stream(np.packbits(falls).tobytes()) + stream(_by_byte(sizes))
    if places.size > before.size // 4:
        packed = min(packed, bytes([ANEW]) + stream(_by_byte(after)), key=len)
    return packed, int(places.size)


def unpack_field(cursor: Cursor, blocks: Bytes, field: Field, where: str) -> tuple[Numbers | None, int]:
    """Undo `pack_field` on the blocks of the base: the numbers after (None where none moved), and how many moved.

    Raises:
        FileFormatError: the streams are not those of so many numbers.
    """
    how = cursor.number(f"{where}: how it is kept", ANEW)
    if how == STAYED:
        return None, 0
    before, mask = field.read(blocks), field.dtype.type((1 << field.bits) - 1)
    if how == ANEW:
        after = _of_bytes(cursor.stream(before.nbytes, f"{where}: the numbers"), field) & mask
        return after, int(np.count_nonzero(after != before))
    count = cursor.number(f"{where}: how many moved", before.size)
    read = _read_rice if how == MOVED_RICE else _read_bytes
    gaps = read(cursor, count, before.size, f"{where}: the gaps")
    places = np.cumsum(gaps) + np.arange(len(gaps))
    if not 0 < count == len(gaps) or places[-1] >= before.size:
        raise cursor.error(f"{where}: the gaps are not those of {count:,} of {before.size:,} numbers; it is damaged")
    signs = np.frombuffer(cursor.stream(-(-count // 8), f"{where}: the signs"), np.uint8)
    falls = np.unpackbits(signs, count=count).astype(bool)
    sizes = _of_bytes(cursor.stream(count * field.nbytes, f"{where}: the sizes"), field)
    moves = np.where(falls, ~sizes, sizes + sizes.dtype.type(1))
    after = before.copy()
    after[places] = (after[places] + moves) & mask
    return after, count


def _rice(gaps: Gaps) -> bytes:
    """What moved, in Rice code: the count, k, the length of the first stream, both streams."""
    bits = [(low + 1) * gaps.size + int((gaps >> low).sum()) for low in range(int(gaps.mean()).bit_length() + 1)]
    low = bits.index(min(bits))
    ends = np.cumsum((gaps >> low) + 1)
    ones = np.ones(ends[-1], np.uint8)
    ones[ends - 1] = 0
    heads = np.packbits(ones).tobytes()
    tails = np.packbits((gaps.reshape(-1, 1) >> np.arange(low - 1, -1, -1) & 1).astype(np.uint8)).tobytes()
    counts = number(gaps.size) + number(low) + number(len(heads))
    return bytes([MOVED_RICE]) + counts + stream(heads) + stream(tails)


def _read_rice(cursor: Cursor, count: int, size: int, what: str) -> Gaps:
    """Undo `_rice`, but for the count; fewer gaps where the streams hold fewer."""
    low = cursor.number(f"{what}: k", (size // max(1, count)).bit_length())  # more would save nothing
    length = cursor.number(f"{what}: the length", (count + (size >> low) + 7) // 8)
    heads = np.unpackbits(np.frombuffer(cursor.stream(length, what), np.uint8))
    ends = np.flatnonzero(heads == 0)[:count]
    raw = cursor.stream((count * low + 7) // 8, f"{what}: the low bits")
    tails = np.unpackbits(np.frombuffer(raw, np.uint8), count=count * low).reshape(count, low)
    high = np.diff(ends, prepend=-1) - 1
    return (high << low) + (tails @ (1 << np.arange(low - 1, -1, -1)))[: len(high)]


def _in_bytes(gaps: Gaps) -> bytes:
    """What moved, gaps in bytes: the count, the length of the stream, the stream."""
    ends = np.cumsum(gaps // _MORE + 1)
    steps = np.full(ends[-1], _MORE, np.uint8)
    steps[ends - 1] = gaps % _MORE
    return bytes([MOVED_BYTES]) + number(gaps.size) + number(len(steps)) + stream(steps.tobytes())


def _read_bytes(cursor: Cursor, count: int, size: int, what: str) -> Gaps:
    """Undo `_in_bytes`, but for the count; none where the last byte says "go on"."""
    length = cursor.number(f"{what}: the length", count + size // _MORE)
    steps = np.frombuffer(cursor.stream(length, what), np.uint8)
    ends = np.flatnonzero(steps != _MORE)
    if not len(steps) or steps[-1] == _MORE:
        return np.empty(0, np.int64)
    return np.diff(np.cumsum(steps, dtype=np.int64)[ends], prepend=0)


def _by_byte(numbers: Numbers) -> bytes:
    """Numbers byte by byte: the lowest of all of them, then the next."""
    return np.ascontiguousarray(numbers.view(np.uint8).reshape(numbers.size, -1).T).tobytes()


def _of_bytes(raw: bytes, field: Field) -> Numbers:
    """Undo `_by_byte`."""
    planes = np.frombuffer(raw, np.uint8).reshape(field.nbytes, -1)
    return np.ascontiguousarray(planes.T).view(field.dtype).reshape(-1)

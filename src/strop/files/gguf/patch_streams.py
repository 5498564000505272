"""The streams of a patch: numbers that moved, as gaps, signs and sizes, each squeezed by what squeezes it best.

Of n numbers of a field, m moved, each by d = after - before modulo 2^bits, taken as -2^(bits - 1) < d <= 2^(bits - 1):

    gaps     numbers that stayed before each one that moved; a byte of 255 means "255, and go on"
    signs    a bit each, the highest first; 1 where d < 0
    sizes    |d| - 1 in the bytes of a number, the lowest byte of all of them first

Moved at random with density p and by +-1, a number costs at least h(p) + p bits, h(p) = -p log2 p - (1-p) log2 (1-p):
0.1414 + 0.02 at 2%. A gap is then geometric, its bytes are independent of each other, and a Huffman code of them stays
within 1 to 2% of h; a bitmap in any of the three compressors of the standard library takes 20 to 40% more. Signs are as
long as their entropy already; sizes are mostly zeros. Each stream takes the shortest of: as it is, deflate with Huffman
codes alone (best for gaps), deflate, LZMA2 without contexts (sizes, texts). bz2 was never shorter than all of these.

Whole numbers of 7 bits a byte, the lowest first, the highest bit set where another follows, give counts and lengths.
"""

from __future__ import annotations

import lzma
import zlib
from typing import Any, Final

import numpy as np

from strop.errors import FileFormatError
from strop.files.gguf.block_fields import Field, Numbers

STAYED, MOVED, ANEW = 0, 1, 2
"""How a field is kept: nothing moved; what moved; all its numbers anew, in the bytes of sizes."""

_AS_IT_IS, _DEFLATE, _LZMA2 = 0, 1, 2
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
        codec = self.number(f"the kind of {what}", _LZMA2)
        packed = self.take(self.number(f"the length of {what}", self.end - self.place), what)
        if codec == _AS_IT_IS:
            found, whole = bytes(packed), True
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
    if len(raw) > 8:
        for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
            deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
            kinds.append((_DEFLATE, deflate.compress(raw) + deflate.flush()))
        kinds.append((_LZMA2, lzma.compress(raw, lzma.FORMAT_RAW, filters=_LZMA)))
    kind, packed = min(kinds, key=lambda one: len(one[1]))
    return bytes([kind]) + number(len(packed)) + packed


def pack_field(before: Numbers, after: Numbers, field: Field) -> tuple[bytes, int]:
    """What makes `after` of `before`, both the field's numbers of the same blocks, and how many moved."""
    mask = field.dtype.type((1 << field.bits) - 1)
    moves = after - before & mask  # unsigned, modulo 2^bits
    places = np.flatnonzero(moves)
    if not places.size:
        return bytes([STAYED]), 0
    moves = moves[places]
    falls = moves > 1 << field.bits - 1
    sizes = np.where(falls, ~moves & mask, moves - moves.dtype.type(1))  # |d| - 1
    gaps = _gaps(places)
    packed = b"".join(
        [
            bytes([MOVED]),
            number(places.size),
            number(len(gaps)),
            stream(gaps),
            stream(np.packbits(falls).tobytes()),
            stream(_by_byte(sizes)),
        ]
    )
    if places.size > before.size // 4:
        packed = min(packed, bytes([ANEW]) + stream(_by_byte(after)), key=len)
    return packed, int(places.size)


def unpack_field(cursor: Cursor, before: Numbers, field: Field, where: str) -> tuple[Numbers | None, int]:
    """Undo `pack_field`: the numbers after (None where none moved), and how many moved.

    Raises:
        FileFormatError: the streams are not those of so many numbers.
    """
    how = cursor.number(f"{where}: how it is kept", ANEW)
    if how == STAYED:
        return None, 0
    if how == ANEW:
        raw = cursor.stream(before.nbytes, f"{where}: the numbers")
        after = _of_bytes(raw, field) & field.dtype.type((1 << field.bits) - 1)
        return after, int(np.count_nonzero(after != before))
    count = cursor.number(f"{where}: how many moved", before.size)
    length = cursor.number(f"{where}: the length of the gaps", count + before.size // _MORE)
    places = _places(cursor.stream(length, f"{where}: the gaps"))
    if len(places) != count or (count and places[-1] >= before.size):
        raise cursor.error(f"{where}: the gaps are not those of {count:,} of {before.size:,} numbers; it is damaged")
    signs = np.frombuffer(cursor.stream(-(-count // 8), f"{where}: the signs"), np.uint8)
    falls = np.unpackbits(signs, count=count).astype(bool)
    sizes = _of_bytes(cursor.stream(count * field.nbytes, f"{where}: the sizes"), field)
    moves = np.where(falls, ~sizes, sizes + sizes.dtype.type(1))
    after = before.copy()
    after[places] = after[places] + moves & field.dtype.type((1 << field.bits) - 1)
    return after, count


def _gaps(places: np.ndarray[Any, Any]) -> bytes:
    gaps = np.diff(places, prepend=-1) - 1
    ends = np.cumsum(gaps // _MORE + 1)
    result = np.full(ends[-1], _MORE, np.uint8)
    result[ends - 1] = gaps % _MORE
    return result.tobytes()


def _places(gaps: bytes) -> np.ndarray[Any, Any]:
    """Undo `_gaps`; a last byte that says "go on" leads nowhere, and its place is missing."""
    steps = np.frombuffer(gaps, np.uint8)
    ends = np.flatnonzero(steps != _MORE)
    if steps.size and steps[-1] == _MORE:
        return np.empty(0, np.int64)
    return np.cumsum(steps, dtype=np.int64)[ends] + np.arange(len(ends))


def _by_byte(numbers: Numbers) -> bytes:
    """Numbers byte by byte: the lowest of all of them, then the next."""
    return np.ascontiguousarray(numbers.view(np.uint8).reshape(numbers.size, -1).T).tobytes()


def _of_bytes(raw: bytes, field: Field) -> Numbers:
    """Undo `_by_byte`."""
    planes = np.frombuffer(raw, np.uint8).reshape(field.nbytes, -1)
    return np.ascontiguousarray(planes.T).view(field.dtype).reshape(-1)

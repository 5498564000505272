"""A second reader of patches, written from the format's description alone: bit by bit, in plain Python, and slow.

A field is a list of numbers, a number the places of its bits in a block (8 * byte + bit), the lowest first.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

Number = list[int]


class Tensor(NamedTuple):
    """Where a tensor of the base lies, in the order of the file."""

    type: str
    start: int
    nbytes: int


def whole(first: int, count: int, nbytes: int) -> list[Number]:
    return [[8 * (first + nbytes * place) + bit for bit in range(8 * nbytes)] for place in range(count)]


def nibble(byte: int, high: int) -> Number:
    return [8 * byte + 4 * high + bit for bit in range(4)]


def q6_k_code(value: int) -> Number:
    """As ggml's dequantize_row_q6_K: halves of 128 values, each four groups of 32."""
    half, group, place = value // 128, value % 128 // 32, value % 32
    low = nibble(64 * half + 32 * (group % 2) + place, group // 2)
    return [*low, *(8 * (128 + 32 * half + place) + 2 * group + bit for bit in range(2))]


FIELDS: dict[str, tuple[int, list[list[Number]]]] = {
    "q4_0": (18, [whole(0, 1, 2), [nibble(2 + code % 16, code // 16) for code in range(32)]]),
    "q8_0": (34, [whole(0, 1, 2), whole(2, 32, 1)]),
    "q6_k": (210, [[q6_k_code(value) for value in range(256)], whole(192, 16, 1), whole(208, 1, 2)]),
    "mxfp4": (17, [whole(0, 1, 1), [nibble(1 + code % 16, code // 16) for code in range(32)]]),
    "f16": (2, [whole(0, 1, 2)]),
    "f32": (4, [whole(0, 1, 4)]),
}


class Reader:
    """What is left of a patch."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, count: int) -> bytes:
        assert len(self.data) >= count
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def length(self) -> int:
        value = shift = 0
        while True:
            (byte,) = self.take(1)
            value += (byte % 128) << shift
            if byte < 128:
                return value
            shift += 7

    def stream(self, nbytes: int) -> bytes:
        (kind,) = self.take(1)
        packed = self.take(self.length())
        if kind == 1:
            packed = zlib.decompress(packed, -15)
        elif kind == 2:
            filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20, "lc": 0, "lp": 0, "pb": 0}]
            packed = lzma.decompress(packed, lzma.FORMAT_RAW, filters=filters)
        elif kind == 3:
            packed = bytes(nbytes)
        assert len(packed) == nbytes
        return packed


def bits_of(data: bytes) -> list[int]:
    """Highest first."""
    return [byte >> 7 - bit & 1 for byte in data for bit in range(8)]


def moved(reader: Reader, how: int, size: int, width: int) -> dict[int, int]:
    """Which numbers moved, and by how much."""
    count = reader.length()
    gaps: list[int] = []
    if how == 1:
        low, length = reader.length(), reader.length()
        heads, tails = bits_of(reader.stream(length)), bits_of(reader.stream((count * low + 7) // 8))
        for place in range(count):
            gap = 0
            while heads.pop(0):
                gap += 1
            for bit in tails[place * low : (place + 1) * low]:
                gap = 2 * gap + bit
            gaps.append(gap)
    else:
        gap = 0
        for byte in reader.stream(reader.length()):
            gap += byte
            if byte < 255:
                gaps.append(gap)
                gap = 0
    signs, sizes = bits_of(reader.stream((count + 7) // 8)), reader.stream(count * width)
    moves, place = {}, -1
    for number, gap in enumerate(gaps):
        place += gap + 1
        size_of = 1 + int.from_bytes(sizes[number::count], "little")
        moves[place] = -size_of if signs[number] else size_of
    assert len(moves) == count
    assert place < size
    return moves


def restore_field(reader: Reader, blocks: list[int], field: list[Number]) -> None:
    """Move what moved in one field of blocks, each an int whose bit 8 * byte + bit is the block's."""
    (how,) = reader.take(1)
    size, bits = len(field) * len(blocks), len(field[0])
    width = max(1, bits // 8)
    anew = reader.stream(size * width) if how == 3 else b""
    moves = {} if how in (0, 3) else moved(reader, how, size, width)
    for place in range(size) if how == 3 else moves:
        block, number = divmod(place, len(field))
        before = sum((blocks[block] >> bit & 1) << weight for weight, bit in enumerate(field[number]))
        after = int.from_bytes(anew[place::size], "little") if how == 3 else (before + moves[place]) % (1 << bits)
        for weight, bit in enumerate(field[number]):
            blocks[block] ^= (blocks[block] >> bit & 1 ^ after >> weight & 1) << bit


def restore(base: bytes, tensors: Sequence[Tensor], patch: bytes) -> bytes:
    """The tuned file; every tensor is smaller than a piece."""
    assert patch[:8] == b"STRPATCH"
    assert hashlib.sha256(patch[:-32]).digest() == patch[-32:]
    version, length = struct.unpack("<II", patch[8:16])
    assert version == 1
    header = json.loads(patch[16 : 16 + length])
    assert header["base"] == {"bytes": len(base), "sha256": hashlib.sha256(base).hexdigest()}
    reader = Reader(patch[16 + length : -32])
    ends = [0, *(one.start + one.nbytes for one in tensors)]
    starts = [*(one.start for one in tensors), len(base)]
    gaps = [start - end for start, end in zip(starts, ends, strict=True)]
    order, rest_bytes = list(range(len(tensors))), header["tuned"]["bytes"] - sum(one.nbytes for one in tensors)
    if reader.take(1) == b"\1":
        order = list(struct.unpack(f"<{len(tensors)}I", reader.stream(4 * len(tensors))))
        gaps = list(struct.unpack(f"<{len(gaps)}Q", reader.stream(8 * len(gaps))))
    gaps[0] = rest_bytes - sum(gaps[1:])
    old_rest = b"".join(base[end:start] for start, end in zip(starts, ends, strict=True))
    copies = [[reader.length() for _ in range(3)] for _ in range(reader.length())]
    texts, rest = Reader(reader.stream(reader.length())), b""
    for start, count, fresh in copies:
        rest += old_rest[start : start + count] + texts.take(fresh)
    result, left = b"", Reader(rest)
    for number, gap in zip(order, gaps, strict=False):
        tensor = tensors[number]
        size, fields = FIELDS[tensor.type]
        raw = base[tensor.start : tensor.start + tensor.nbytes]
        blocks = [int.from_bytes(raw[place : place + size], "little") for place in range(0, len(raw), size)]
        for field in fields:
            restore_field(reader, blocks, field)
        result += left.take(gap) + b"".join(block.to_bytes(size, "little") for block in blocks)
    assert not reader.data
    result += left.data
    assert header["tuned"] == {"bytes": len(result), "sha256": hashlib.sha256(result).hexdigest()}
    return result

"""GGML's tensor types: their numbers in a file, and how many bytes a block of how many values takes.

Every type that a GGUF file may name is listed, so that one that strop does not decode is refused by its name. A name in
lower case is what stands behind `--format gguf:`.

    value = d * q                  q4_0 q5_0 q8_0    32 values with a float16 d
    value = d * q + m              q4_1 q5_1         32 values with a float16 d and m
    value = d * sc * q - dmin * m  q2_k q4_k q5_k    256 values, sc and m for each 16 (q2_k) or 32
    value = d * sc * q             q3_k q6_k         256 values, sc for each 16

A row (the last dimension) is a whole number of blocks. Where a model's width is not, `fallback` says which type the
tensor takes instead, as llama.cpp does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from strop.errors import FormatError, nearest


class GgmlType(NamedTuple):
    """One type: its name, its number in a file, the values in a block, and the bytes that they take."""

    name: str
    number: int
    block: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.block_bytes / self.block

    def row_bytes(self, columns: int, *, where: str = "weight") -> int:
        """Bytes of a row of `columns` values.

        Raises:
            FormatError: The row is not a whole number of blocks; the message names the type that would do.
        """
        if columns % self.block:
            raise FormatError(
                f"{where}: a row of {columns:,} values is not divisible by the block of {self.block} that "
                f"{self.name} has; {fallback(self.name, columns)} takes such a row"
            )
        return columns // self.block * self.block_bytes

    def nbytes(self, shape: Sequence[int], *, where: str = "weight") -> int:
        """Bytes of a tensor of `shape` (the row last); a shape without dimensions holds one value.

        Raises:
            FormatError: As `row_bytes`.
        """
        *rows, columns = shape or (1,)
        return math.prod(rows) * self.row_bytes(columns, where=where)


_ALL = (
    GgmlType("f32", 0, 1, 4),
    GgmlType("f16", 1, 1, 2),
    GgmlType("q4_0", 2, 32, 18),
    GgmlType("q4_1", 3, 32, 20),
    GgmlType("q5_0", 6, 32, 22),
    GgmlType("q5_1", 7, 32, 24),
    GgmlType("q8_0", 8, 32, 34),
    GgmlType("q8_1", 9, 32, 36),
    GgmlType("q2_k", 10, 256, 84),
    GgmlType("q3_k", 11, 256, 110),
    GgmlType("q4_k", 12, 256, 144),
    GgmlType("q5_k", 13, 256, 176),
    GgmlType("q6_k", 14, 256, 210),
    GgmlType("q8_k", 15, 256, 292),
    GgmlType("iq2_xxs", 16, 256, 66),
    GgmlType("iq2_xs", 17, 256, 74),
    GgmlType("iq3_xxs", 18, 256, 98),
    GgmlType("iq1_s", 19, 256, 50),
    GgmlType("iq4_nl", 20, 32, 18),
    GgmlType("iq3_s", 21, 256, 110),
    GgmlType("iq2_s", 22, 256, 82),
    GgmlType("iq4_xs", 23, 256, 136),
    GgmlType("i8", 24, 1, 1),
    GgmlType("i16", 25, 1, 2),
    GgmlType("i32", 26, 1, 4),
    GgmlType("i64", 27, 1, 8),
    GgmlType("f64", 28, 1, 8),
    GgmlType("iq1_m", 29, 256, 56),
    GgmlType("bf16", 30, 1, 2),
    GgmlType("tq1_0", 34, 256, 54),
    GgmlType("tq2_0", 35, 256, 66),
    GgmlType("mxfp4", 39, 32, 17),
    GgmlType("nvfp4", 40, 64, 36),
    GgmlType("q1_0", 41, 128, 18),
    GgmlType("q2_0", 42, 64, 18),
)

TYPES: Mapping[str, GgmlType] = MappingProxyType({one.name: one for one in _ALL})
"""Every type by its name."""

BY_NUMBER: Mapping[int, GgmlType] = MappingProxyType({one.number: one for one in _ALL})
"""Every type by its number in a file."""

_SMALLER_BLOCKS: Mapping[str, str] = MappingProxyType(
    {"q2_0": "q4_0", "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
)


def type_named(name: str) -> GgmlType:
    """The type of a name, in either case.

    Raises:
        FormatError: There is none; the message names the nearest.

    >>> type_named("Q4_K").bits_per_weight
    4.5
    """
    found = TYPES.get(name.lower())
    if found is None:
        raise FormatError(f"{name!r} is not a type of GGUF files{nearest(name.lower(), TYPES)}")
    return found


def fallback(name: str, columns: int) -> str:
    """The type that a row of `columns` values takes where `name` is asked for.

    `name` itself where the row is a whole number of its blocks; otherwise, as llama.cpp chooses, a type of at least as
    many bits in blocks of 32 (q4_k: q5_0, q5_k: q5_1, q6_k: q8_0, q2_k and q3_k: q4_0), or f16 where 32 does not
    divide the row either.

    Raises:
        FormatError: There is no type `name`.

    >>> fallback("q4_k", 512), fallback("q4_k", 96), fallback("q4_k", 100), fallback("q4_0", 100)
    ('q4_k', 'q5_0', 'f16', 'f16')
    """
    wanted = type_named(name)
    if columns % wanted.block == 0:
        return wanted.name
    smaller = TYPES[_SMALLER_BLOCKS.get(wanted.name, wanted.name)]
    return smaller.name if columns % smaller.block == 0 else "f16"

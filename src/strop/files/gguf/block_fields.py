"""What a block of a GGUF type holds, field by field, as whole numbers: in numpy alone, and without loss.

    blocks of bytes [n, bytes]  <->  codes (0 to 2^bits - 1), scales, or values (a float's bits), [n * count] a field

Every bit of a block belongs to one field, so that fields written one after the other give the block again, whatever
its bytes are. The layouts are those of `small_blocks` and `k_blocks` (and of ggml-common.h for the types that only
others write); codes stand in the order of the values. Types whose bytes are places in a codebook (iq1_s to iq3_xxs) or
hold codes in base 3 (tq1_0) have a byte as their code.

What the numbers stand for is not known here: that is `blocks`, which needs torch. Nothing here does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Numbers = np.ndarray[Any, np.dtype[Any]]
Role = Literal["codes", "scales", "values"]


class Plane(NamedTuple):
    """Bits of a field that lie together in bytes `start` to `stop` of a block.

    Of each `width` bytes first the bits at `shifts[0]` of all, then those at `shifts[1]`, ...: `bits` bits of each,
    which stand at bit `to` of the field's number.
    """

    start: int
    stop: int
    width: int
    shifts: tuple[int, ...]
    bits: int
    to: int = 0


@dataclass(frozen=True)
class Field:
    """One kind of number in a block.

    Attributes:
        role: codes, scales (minimums and sums with them), or the values of a type that has no blocks.
        bits: of one number.
        planes: where the bits lie; a number of 16 bits and more lies in one plane, little endian.
    """

    role: Role
    bits: int
    planes: tuple[Plane, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The unsigned type that holds one number, little endian."""
        return np.dtype(f"<u{self.nbytes}")

    @property
    def nbytes(self) -> int:
        """Bytes of `dtype`."""
        return max(1, self.bits // 8)

    @property
    def count(self) -> int:
        """Numbers of one block."""
        first = self.planes[0]
        return (first.stop - first.start) // self.nbytes * len(first.shifts)

    def read(self, blocks: Bytes) -> Numbers:
        """The field's numbers of blocks, uint8 [n, bytes], as `dtype` [n * count]."""
        first = self.planes[0]
        if self.bits >= 8:
            return np.ascontiguousarray(blocks[:, first.start : first.stop]).reshape(-1).view(self.dtype)
        result = np.zeros((len(blocks), self.count), np.uint8)
        for plane in self.planes:
            shifts = np.array(plane.shifts, np.uint8).reshape(-1, 1)
            packed = blocks[:, plane.start : plane.stop].reshape(len(blocks), -1, 1, plane.width)
            part = packed >> shifts & (1 << plane.bits) - 1  # [n, bytes / width, shifts, width]
            result |= part.reshape(len(blocks), -1) << plane.to
        return result.reshape(-1)

    def write(self, numbers: Numbers, blocks: Bytes) -> None:
        """Put numbers, `dtype` [n * count], into blocks, uint8 [n, bytes]; other fields stay as they are."""
        first = self.planes[0]
        if self.bits >= 8:
            blocks[:, first.start : first.stop] = numbers.view(np.uint8).reshape(len(blocks), -1)
            return
        for plane in self.planes:
            mask = (1 << plane.bits) - 1
            parts = numbers.reshape(len(blocks), -1, len(plane.shifts), plane.width) >> plane.to & mask
            packed = blocks[:, plane.start : plane.stop].reshape(len(blocks), -1, plane.width)
            for place, shift in enumerate(plane.shifts):
                packed = packed & (0xFF ^ mask << shift) | parts[:, :, place] << shift
            blocks[:, plane.start : plane.stop] = packed.reshape(len(blocks), -1)


def _spread(start: int, stop: int, width: int, bits: int, to: int = 0) -> Plane:
    """Bytes full of numbers of `bits` bits."""
    return Plane(start, stop, width, tuple(range(0, 8, bits)), bits, to)


def _whole(role: Role, start: int, stop: int, bits: int) -> Field:
    """Numbers of whole bytes, one after the other."""
    return Field(role, bits, (Plane(start, stop, stop - start, (0,), bits),))


def _half(start: int) -> Field:
    """A float16 that scales."""
    return _whole("scales", start, start + 2, 16)


def _codes(*planes: Plane) -> Field:
    return Field("codes", sum(plane.bits for plane in planes), planes)


def _scales(*planes: Plane) -> Field:
    return Field("scales", sum(plane.bits for plane in planes), planes)


_SIX_BITS: Final = (
    _scales(Plane(4, 12, 8, (0,), 6)),  # sc and m of the first four groups
    _scales(Plane(12, 16, 4, (0, 4), 4), Plane(4, 12, 8, (6,), 2, to=4)),  # of the last four
)

FIELDS: Final[Mapping[str, tuple[Field, ...]]] = MappingProxyType(
    {
        "q4_0": (_half(0), _codes(_spread(2, 18, 16, 4))),
        "q4_1": (_half(0), _half(2), _codes(_spread(4, 20, 16, 4))),
        "q5_0": (_half(0), _codes(_spread(6, 22, 16, 4), _spread(2, 6, 1, 1, to=4))),
        "q5_1": (_half(0), _half(2), _codes(_spread(8, 24, 16, 4), _spread(4, 8, 1, 1, to=4))),
        "q8_0": (_half(0), _whole("codes", 2, 34, 8)),
        "q8_1": (_half(0), _half(2), _whole("codes", 4, 36, 8)),
        "q2_k": (
            _scales(Plane(0, 16, 16, (0,), 4)),
            _scales(Plane(0, 16, 16, (4,), 4)),
            _codes(_spread(16, 80, 32, 2)),
            _half(80),
            _half(82),
        ),
        "q3_k": (
            _codes(_spread(32, 96, 32, 2), _spread(0, 32, 32, 1, to=2)),
            _scales(_spread(96, 104, 8, 4), _spread(104, 108, 4, 2, to=4)),
            _half(108),
        ),
        "q4_k": (_half(0), _half(2), *_SIX_BITS, _codes(_spread(16, 144, 32, 4))),
        "q5_k": (_half(0), _half(2), *_SIX_BITS, _codes(_spread(48, 176, 32, 4), _spread(16, 48, 32, 1, to=4))),
        "q6_k": (
            _codes(_spread(0, 128, 64, 4), _spread(128, 192, 32, 2, to=4)),
            _whole("scales", 192, 208, 8),
            _half(208),
        ),
        "q8_k": (
            _whole("scales", 0, 4, 32),
            _whole("codes", 4, 260, 8),
            _whole("scales", 260, 292, 16),
        ),
        "iq4_nl": (_half(0), _codes(_spread(2, 18, 16, 4))),
        "iq4_xs": (
            _half(0),
            _scales(_spread(4, 8, 1, 4), _spread(2, 4, 1, 2, to=4)),
            _codes(_spread(8, 136, 16, 4)),
        ),
        "mxfp4": (_whole("scales", 0, 1, 8), _codes(_spread(1, 17, 16, 4))),
        "nvfp4": (_whole("scales", 0, 4, 8), _codes(_spread(4, 36, 8, 4))),
        "q1_0": (_half(0), _codes(_spread(2, 18, 1, 1))),
        "q2_0": (_half(0), _codes(_spread(2, 18, 1, 2))),
        "tq1_0": (_whole("codes", 0, 52, 8), _half(52)),
        "tq2_0": (_codes(_spread(0, 64, 32, 2)), _half(64)),
        "iq1_s": (_half(0), _whole("codes", 2, 50, 8)),
        "iq1_m": (_whole("codes", 0, 56, 8),),
        "iq2_xxs": (_half(0), _whole("codes", 2, 66, 8)),
        "iq2_xs": (_half(0), _whole("codes", 2, 74, 8)),
        "iq2_s": (_half(0), _whole("codes", 2, 82, 8)),
        "iq3_xxs": (_half(0), _whole("codes", 2, 98, 8)),
        "iq3_s": (_half(0), _whole("codes", 2, 110, 8)),
        **{name: (_whole("values", 0, 1, 8),) for name in ("i8",)},
        **{name: (_whole("values", 0, 2, 16),) for name in ("f16", "bf16", "i16")},
        **{name: (_whole("values", 0, 4, 32),) for name in ("f32", "i32")},
        **{name: (_whole("values", 0, 8, 64),) for name in ("f64", "i64")},
    }
)
"""The fields of every type that a file may name."""

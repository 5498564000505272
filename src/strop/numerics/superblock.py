"""Superblocks, as GGUF's Q4_K has them: groups whose scales and minimums are themselves 6-bit codes.

    value = d * sc * q - dmin * m       q: 0 to 15, sc and m: 0 to 63, d and dmin: float16

256 inputs of a row are a superblock with one d and one dmin, 32 of them a group with its own sc and m: 4 + 2 * 6 / 32 +
2 * 16 / 256 = 4.5 bits a weight. Both products are exact in float32, so the only rounding is that of the difference,
and any order of the operations gives the same bits. The byte layout of a file belongs to `files`.

Where the minimum is a group's own smallest value (zero if that is positive), and the scale spans its range, this is the
plain grid; a search for better ones is `methods.superblocks`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from strop.errors import FormatError
from strop.numerics.formats import IntFormat
from strop.numerics.groups import group_range, plan_shape
from strop.numerics.packing import pack, unpack
from strop.numerics.scales import check_finite_range, smallest_positive
from strop.numerics.scheme import SUB_BITS, SUPER_SIZE, Scheme

_TOP = (1 << SUB_BITS) - 1


@dataclass(frozen=True, eq=False)
class SuperScale:
    """The scales and minimums of a weight's groups, each a 6-bit multiple of a number that its superblock shares.

    Attributes:
        scale: d, float16 [out, in / 256], not negative.
        minimum: dmin, float16 [out, in / 256], not negative.
        sub_scale: sc of every group, uint8 [out, in / 256 * 6], packed.
        sub_minimum: m of every group, likewise.
    """

    scale: Tensor
    minimum: Tensor
    sub_scale: Tensor
    sub_minimum: Tensor

    def scales(self) -> Tensor:
        """The step of every group, d * sc, float32 [out, groups]; 0 where a group has but one value."""
        return _products(self.scale, self.sub_scale)

    def minimums(self) -> Tensor:
        """What every group subtracts, dmin * m, float32 [out, groups]."""
        return _products(self.minimum, self.sub_minimum)

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """D and dmin as they are, and the codes of the groups, int16 [out, groups]."""
        rows, blocks = self.scale.shape
        codes = (unpack(part, SUB_BITS, blocks * 8).view(rows, -1) for part in (self.sub_scale, self.sub_minimum))
        sub_scale, sub_minimum = (part.to(torch.int16) for part in codes)
        return self.scale, self.minimum, sub_scale, sub_minimum

    @classmethod
    def of_codes(cls, scale: Tensor, minimum: Tensor, sub_scale: Tensor, sub_minimum: Tensor) -> SuperScale:
        """Undo `unpacked`."""
        return cls(scale, minimum, pack(sub_scale, SUB_BITS), pack(sub_minimum, SUB_BITS))

    def where(self, mine: Tensor, other: SuperScale) -> SuperScale:
        """Each superblock that is true in `mine`, bool [out, in / 256], and the other's where it is false."""
        packed = mine.repeat_interleave(8 * SUB_BITS // 8, dim=1)
        return SuperScale(
            torch.where(mine, self.scale, other.scale),
            torch.where(mine, self.minimum, other.minimum),
            torch.where(packed, self.sub_scale, other.sub_scale),
            torch.where(packed, self.sub_minimum, other.sub_minimum),
        )


def super_scale_of(scale: Tensor, minimum: Tensor, *, where: str = "weight") -> SuperScale:
    """Round scales and minimums to superblocks: the largest of eight becomes code 63, the others the nearest.

    Args:
        scale: float32 [out, groups], not negative; a multiple of eight groups.
        minimum: What is subtracted, likewise.
        where: The weight's name, for messages.

    Raises:
        FormatError: One is so large that float16 cannot hold a 63rd of it.
    """
    d, sub_scale = _nested(scale, where)
    dmin, sub_minimum = _nested(minimum, where)
    return SuperScale(d, dmin, sub_scale, sub_minimum)


def plain_super_scale(groups: Tensor, form: IntFormat, *, where: str = "weight") -> SuperScale:
    """The superblocks of a weight's own ranges: groups [out, groups, size] in, before the codes are chosen.

    Raises:
        FormatError: The weight holds NaN or infinite values, or as `super_scale_of`.
    """
    low, high = group_range(groups)
    check_finite_range(low, high, where=where)
    low = low.clamp_(max=0.0)
    return super_scale_of((high - low) / form.steps, -low, where=where)


def check_super_scale(given: SuperScale, scheme: Scheme, shape: tuple[int, int], *, where: str) -> SuperScale:
    """Refuse superblocks of another scheme or shape.

    Raises:
        FormatError: The scheme has none, or a part has another shape or dtype.
    """
    if scheme.super_size is None:
        raise FormatError(f"{where}: {scheme.name} has no superblocks; give it a scale")
    parts = {"super_scale": given.scale, "super_minimum": given.minimum}
    parts |= {"sub_scale": given.sub_scale, "sub_minimum": given.sub_minimum}
    for name, (size, dtype) in super_parts(scheme, shape).items():
        if tuple(parts[name].shape) != size or parts[name].dtype != dtype:
            raise FormatError(
                f"{where}: {name} is {list(parts[name].shape)} {parts[name].dtype}, needed {list(size)} {dtype}"
            )
    return given


def super_parts(scheme: Scheme, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the four parts by the names under which `QuantizedTensor.tensors` has them."""
    rows, groups = plan_shape(shape, scheme)
    blocks = shape[1] // SUPER_SIZE
    whole, packed = (rows, blocks), (rows, groups * SUB_BITS // 8)
    return {
        "super_scale": (whole, scheme.scale_dtype),
        "super_minimum": (whole, scheme.scale_dtype),
        "sub_scale": (packed, torch.uint8),
        "sub_minimum": (packed, torch.uint8),
    }


def _nested(values: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Values [out, groups] to the float16 number of each superblock and the packed codes of the groups."""
    blocks = values.float().view(values.shape[0], -1, 8)  # [out, groups] -> [out, in / 256, 8]
    largest = blocks.amax(dim=-1)
    unit = (largest / _TOP).clamp_(min=smallest_positive(torch.float16)).half()
    # Among float16's subnormal numbers the nearest may be so small that code 63 falls short of the largest by more than
    # half a code: then the next one.
    short = torch.isfinite(unit) & (largest > (_TOP + 0.5) * unit.float())
    unit = torch.where(short, (unit.view(torch.int16) + 1).view(torch.float16), unit)
    unit = torch.where(largest > 0, unit, torch.zeros_like(unit))
    if not torch.isfinite(unit).all():
        raise FormatError(
            f"{where}: the scales of a superblock overflow float16, whose largest value is 65504; scale the weights "
            "down, or quantize per channel (int4), whose scales are float32"
        )
    divisor = torch.where(unit > 0, unit.float(), torch.inf).unsqueeze(-1)
    codes = (blocks / divisor).round_().clamp_(0, _TOP).to(torch.uint8)
    return unit, pack(codes.view(values.shape), SUB_BITS)


def _products(unit: Tensor, packed: Tensor) -> Tensor:
    """Unit * code of every group, float32 [out, groups]; exact."""
    rows, blocks = unit.shape
    codes = unpack(packed, SUB_BITS, blocks * 8).view(rows, blocks, 8)
    return (codes * unit.float().unsqueeze(-1)).view(rows, -1)

"""Searched rounding to nearest: the scale of each group that leaves the least error, weighted by the inputs it meets.

Scales around the one that covers the group's range are tried, and the one kept has the least sum of
mean_square[in] * (weight - rounded)^2, as llama.cpp's importance matrix and AutoRound's starting point have it. Nothing
but the scale (and the zero point that follows from it) moves, so the result is an ordinary tensor of the same scheme.
MXFP4's scales are tried a power of two apart; Q4_K's, two to a group, have a search of their own, `superblocks`.
"""

from __future__ import annotations

from torch import Tensor

from strop.methods.base import Statistics, check_statistics, weighted_error
from strop.methods.superblocks import search_super_scale
from strop.numerics.formats import CodebookFormat, FloatFormat, IntFormat
from strop.numerics.groups import split
from strop.numerics.observers import search_range
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scales import scale_of_range
from strop.numerics.scheme import Granularity, Mode, Scheme


def search(
    weight: Tensor, scheme: Scheme, statistics: Statistics | None = None, *, where: str = "weight"
) -> QuantizedTensor:
    """Round a weight [out, in] to a scheme's grid whose scales were searched.

    Never worse than plain rounding by `weighted_error`: the plain scale is the first candidate, and the plain result is
    returned where the whole tensor gained nothing (double quantization rounds scales once more, after the search).

    Args:
        weight: Any float dtype.
        scheme: The grid.
        statistics: The inputs' mean squares, which weigh each column's error; without them all columns weigh the same.
        where: The weight's name, for messages.

    Raises:
        FormatError: As `quantize_tensor`.
        DataError: The statistics do not fit the weight.
    """
    mean_square = None if statistics is None else check_statistics(statistics, weight, where=where)
    if scheme.super_size is not None and isinstance(scheme.format, IntFormat):  # keeps the plain superblocks that serve
        weights = None if mean_square is None else _importance(mean_square, weight.shape[0], scheme)
        super_scale = search_super_scale(split(weight.detach(), scheme), scheme.format, weights, where=where)
        return quantize_tensor(weight, scheme, super_scale=super_scale, where=where)
    plain = quantize_tensor(weight, scheme, where=where)  # refuses what cannot be quantized, before the search
    scale, zero_point = searched_scale(weight, scheme, mean_square, where=where)
    found = quantize_tensor(weight, scheme, scale=scale, zero_point=zero_point, where=where)
    return min(plain, found, key=lambda result: weighted_error(weight, result, statistics))


def searched_scale(
    weight: Tensor, scheme: Scheme, importance: Tensor | None = None, *, where: str = "weight"
) -> tuple[Tensor, Tensor | None]:
    """The scales (and zero points, in the format's own codes) of least sum of importance[in] * (weight - rounded)^2.

    Args:
        weight: [out, in], any float dtype, finite.
        scheme: The grid.
        importance: float32 [in], not negative; None weighs all columns the same.
        where: The weight's name, for messages.
    """
    groups = split(weight.detach(), scheme)
    low, high = search_range(
        groups,
        scheme.format,
        scheme.mode,
        factors=_factors(scheme),
        scale_dtype=scheme.scale_dtype,
        shared=scheme.granularity is Granularity.TENSOR,
        importance=None if importance is None else _importance(importance, weight.shape[0], scheme),
    )
    return scale_of_range(low, high, scheme, where=where)


def _factors(scheme: Scheme) -> list[float]:
    """Multiples of the plain range to try: the fewer the bits, the further down, for there clipping pays."""
    if scheme.has_power_scale:
        return [0.25, 0.5, 2.0]  # 2 leaves none of the largest values out
    if isinstance(scheme.format, CodebookFormat | FloatFormat):
        return [percent / 100 for percent in range(72, 109, 3)]
    lowest = {2: 30, 3: 40, 4: 60}.get(scheme.bits, 80)
    factors = [percent / 100 for percent in range(lowest, 113, 2)]
    if scheme.mode is Mode.SYMMETRIC_FULL:
        factors += [-factor for factor in factors]  # the side with the one code more may be the other
    return factors


def _importance(mean_square: Tensor, rows: int, scheme: Scheme) -> Tensor:
    """Mean squares [in] in the shape that multiplies groups: [1, groups, size], or [blocks, 1, size] for codebooks."""
    if scheme.granularity is Granularity.BLOCK:
        return split(mean_square.expand(rows, -1), scheme)
    return split(mean_square.unsqueeze(0), scheme)

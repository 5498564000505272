"""Clipping: the range of each group that leaves the least error of the output, as AWQ clips.

    minimise over factors f of the group's own range     d H d^T,    d = rounded(w, f * range) - w  [size]

H is the part of the inputs' second moments that belongs to the group: errors of inputs that move together add up, which
`search`, with the diagonal alone, does not see. AWQ (arXiv 2306.00978) measures the same on a sample of the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strop.methods.base import Statistics, check_statistics, output_error
from strop.methods.search import search
from strop.numerics import grid
from strop.numerics.groups import group_range, row_chunks, split
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scales import fit_scale, scale_of_range, stored_zero_point
from strop.numerics.scheme import Granularity, Mode, Scheme


def clip(
    weight: Tensor, scheme: Scheme, statistics: Statistics | None = None, *, where: str = "weight"
) -> QuantizedTensor:
    """Round a weight [out, in], each group over the range that leaves the least output error.

    Never worse than plain rounding by `output_error`. Schemes whose scales span rows (one for the whole weight, blocks
    of a codebook) and layers without second moments get searched rounding instead.

    Args:
        weight: Any float dtype.
        scheme: The grid.
        statistics: The inputs' second moments; None for a layer that no input reached.
        where: The weight's name, for messages.

    Raises:
        FormatError: As `quantize_tensor`.
        DataError: The statistics do not fit the weight.
    """
    plain = quantize_tensor(weight, scheme, where=where)
    if statistics is None or statistics.hessian is None:
        return search(weight, scheme, statistics, where=where)
    check_statistics(statistics, weight, where=where)
    hessian = statistics.hessian.to(weight.device)
    if scheme.granularity in (Granularity.CHANNEL, Granularity.GROUP):
        low, high = _clipped_range(split(weight.detach(), scheme), scheme, hessian)
        scale, zero_point = scale_of_range(low, high, scheme, where=where)
        found = quantize_tensor(weight, scheme, scale=scale, zero_point=zero_point, where=where)
    else:
        found = search(weight, scheme, statistics, where=where)
    return min(plain, found, key=lambda result: output_error(weight, result, hessian))


def _clipped_range(groups: Tensor, scheme: Scheme, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The best multiple of the range of each of [rows, groups, size]: two of [rows, groups]."""
    _, count, size = groups.shape
    parts = [slice(start, start + size) for start in range(0, count * size, size)]
    moments = torch.stack([hessian[part, part] for part in parts])  # [groups, size, size]
    low, high = group_range(groups)
    low, high = low.clamp_(max=0.0), high.clamp_(min=0.0)
    best = torch.ones_like(low)
    for rows in row_chunks(groups.shape[0], count * size):
        x = groups[rows].float()
        least = torch.full_like(low[rows], torch.inf)
        for factor in _factors(scheme):
            ends = (factor * low[rows], factor * high[rows])
            start, end = ends if factor > 0 else ends[::-1]
            scale, zero_point = fit_scale(start, end, scheme.format, scheme.mode, scale_dtype=scheme.scale_dtype)
            zero = None if zero_point is None else stored_zero_point(zero_point, scheme.format).unsqueeze(-1)
            spread = scale.float().unsqueeze(-1)
            lost = grid.rounded(x, spread, spread, zero, scheme.format).sub_(x).transpose(0, 1)  # [groups, rows, size]
            error = (torch.bmm(lost, moments) * lost).sum(dim=-1).t()
            better = error < least
            least = torch.where(better, error, least)
            best[rows] = torch.where(better, factor, best[rows])
    mirrored = best < 0
    return torch.where(mirrored, high, low) * best, torch.where(mirrored, low, high) * best


def _factors(scheme: Scheme) -> list[float]:
    """Multiples of the range, the whole of it first: the fewer the bits, the further down."""
    lowest = {2: 30, 3: 40}.get(scheme.bits, 50)
    factors = [1.0, *(percent / 100 for percent in range(lowest, 106, 5) if percent != 100)]
    if scheme.mode is Mode.SYMMETRIC_FULL:
        factors += [-factor for factor in factors]
    return factors

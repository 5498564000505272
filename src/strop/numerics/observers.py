"""Observers: the range that a grid should cover, from the values themselves.

An observer takes groups [..., size] and returns (xmin, xmax) [...], float32. Covering everything (`minmax`) never
clips; leaving out the outermost values (`percentile`) or searching the clip (`mse`) gives the many a finer step at the
price of the few. `search_range` is the search itself, which `methods.search` uses with weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from strop.errors import FormatError, nearest
from strop.numerics import grid
from strop.numerics.formats import Format
from strop.numerics.groups import group_range, row_chunks, rows_of
from strop.numerics.scales import fit_scale, stored_zero_point
from strop.numerics.scheme import Mode

PERCENTILE = 99.99
"""Share of the values that `percentile` covers, in percent."""

_CLIPS = tuple(step / 50 for step in range(49, 14, -1))  # 0.98, 0.96, ... 0.30 of the range
_GAIN = 1e-5  # an error must fall by this share to count: more than float32 sums can err by
_TENSOR_ROW = 4096  # a whole tensor is searched in rows of this many values


class Observer(Protocol):
    """Groups [..., size], the format and mode that will hold them, to the range (xmin, xmax) [...] to cover."""

    def __call__(self, groups: Tensor, form: Format, mode: Mode, /) -> tuple[Tensor, Tensor]:
        """Observe the range."""
        ...


def observer(name: str) -> Observer:
    """The observer of a name.

    Raises:
        FormatError: There is none of that name.
    """
    if name not in OBSERVERS:
        raise FormatError(f"unknown observer {name!r}{nearest(name, OBSERVERS)}; there are {', '.join(OBSERVERS)}")
    return OBSERVERS[name]


def minmax(groups: Tensor, form: Format, mode: Mode) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value."""
    low, high = group_range(groups.reshape(-1, 1, groups.shape[-1]))
    return low.view(groups.shape[:-1]), high.view(groups.shape[:-1])


def percentile(groups: Tensor, form: Format, mode: Mode) -> tuple[Tensor, Tensor]:
    """The range that covers 99.99% of the values.

    Symmetric grids: the 99.99th percentile of the magnitudes, on both sides, no wider than the values. Asymmetric: the
    0.01st and the 99.99th percentile. Between two values, linear in rank (numpy's default).
    """
    low, high = minmax(groups, form, mode)
    x = groups.float()
    if mode is Mode.ASYMMETRIC:
        return -_quantile(-x, PERCENTILE / 100), _quantile(x, PERCENTILE / 100)
    magnitude = _quantile(x.abs(), PERCENTILE / 100)
    return torch.maximum(low, -magnitude), torch.minimum(high, magnitude)


def mse(groups: Tensor, form: Format, mode: Mode) -> tuple[Tensor, Tensor]:
    """The range, from 100% down to 30% of the values' own in steps of 2%, whose grid has the least squared error."""
    size = groups.shape[-1]
    if groups.numel() > size:
        low, high = search_range(groups.reshape(-1, 1, size), form, mode, factors=_CLIPS)
        return low.view(groups.shape[:-1]), high.view(groups.shape[:-1])
    # A single group, such as a whole weight, in rows: the zeros that fill the last one are on every grid.
    flat = torch.nn.functional.pad(groups.reshape(-1), (0, -size % _TENSOR_ROW if size > _TENSOR_ROW else 0))
    rows = flat.view(-1, 1, min(size, _TENSOR_ROW))
    low, high = search_range(rows, form, mode, factors=_CLIPS, shared=True)
    return low.view(groups.shape[:-1]), high.view(groups.shape[:-1])


OBSERVERS: Mapping[str, Observer] = MappingProxyType({"minmax": minmax, "percentile": percentile, "mse": mse})
"""Every observer by name."""


def search_range(
    groups: Tensor,
    form: Format,
    mode: Mode,
    *,
    factors: Sequence[float],
    scale_dtype: torch.dtype = torch.float32,
    shared: bool = False,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The multiple of each group's own range whose grid has the least squared error.

    Error of a group: sum over its values of importance * (x - rounded(x))^2, in float32. The group's own range (factor
    1) is tried first and kept unless another factor is better; a negative factor mirrors the range.

    Args:
        groups: [rows, groups, size], any float dtype.
        form: The number format of the codes.
        mode: Where the grid lies.
        factors: What to try.
        scale_dtype: The dtype in which scales are stored.
        shared: One range for all groups.
        importance: float32, broadcasts with groups, not negative; None for 1.

    Returns:
        (xmin, xmax), float32 [rows, groups], or [1, 1] when shared.
    """
    low, high = group_range(groups)
    chunks = list(row_chunks(groups.shape[0], groups[0].numel()))
    problems = [[chunk] for chunk in chunks]  # each chunk searches its own ranges while it is in cache
    if shared:
        low, high = low.min().view(1, 1), high.max().view(1, 1)
        problems = [chunks]
    low, high = low.clamp_(max=0.0), high.clamp_(min=0.0)
    best_factor = torch.ones_like(low)
    for problem in problems:
        mine = slice(None) if shared else problem[0]
        pieces = [(groups[rows].float(), _root(importance, rows)) for rows in problem]
        best_error: Tensor | None = None
        for factor in (1.0, *factors):
            start, end = _scaled(low[mine], high[mine], factor)
            scale, zero_point = fit_scale(start, end, form, mode, scale_dtype=scale_dtype)
            zero = None if zero_point is None else stored_zero_point(zero_point, form).unsqueeze(-1)
            errors = [_errors(x, scale.float().unsqueeze(-1), zero, form, root) for x, root in pieces]
            error = torch.cat(errors).sum().view(1, 1) if shared else errors[0]
            if best_error is None:
                best_error = error
                continue
            better = error < best_error * (1 - _GAIN)  # never true of NaN, which an overflowing scale gives
            best_error = torch.where(better, error, best_error)
            best_factor[mine] = torch.where(better, factor, best_factor[mine])
    mirrored = best_factor < 0
    start, end = torch.where(mirrored, high, low) * best_factor, torch.where(mirrored, low, high) * best_factor
    return start, end


def _scaled(low: Tensor, high: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """A range times a factor, still in order."""
    return (low * factor, high * factor) if factor > 0 else (high * factor, low * factor)


def _root(importance: Tensor | None, rows: slice) -> Tensor | None:
    """The root of the importance of a slice of rows; one row serves all."""
    return None if importance is None else rows_of(importance, rows).sqrt()


def _errors(x: Tensor, scale: Tensor, zero_point: Tensor | None, form: Format, root: Tensor | None) -> Tensor:
    """Squared error of each group of [rows, groups, size] on a grid, weighted by root^2: [rows, groups]."""
    difference = grid.rounded(x, scale, scale, zero_point, form).sub_(x)
    if root is not None:
        difference.mul_(root)
    return difference.square_().sum(dim=-1)


def _quantile(x: Tensor, share: float) -> Tensor:
    """The value below which `share` of the last dimension lies, linear between ranks; any number of values."""
    rank = share * (x.shape[-1] - 1)
    below = math.floor(rank)
    lower = x.kthvalue(below + 1, dim=-1).values
    if rank == below:
        return lower
    upper = x.kthvalue(below + 2, dim=-1).values
    return lower + (upper - lower) * (rank - below)

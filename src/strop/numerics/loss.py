"""What rounding did to a weight: squared error, largest error, and how much of it the grid could only clip.

The weight is gone through a bounded piece at a time; beside it only its codes, one byte each, are held.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from strop.numerics import grid
from strop.numerics.formats import Format, IntFormat
from strop.numerics.groups import row_chunks, rows_of, split, spread
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme

_SWEEPS = 6
_FOLDED = 1.5
"""Scales count as folded where they explain this many times the squared error that is left."""


@dataclass(frozen=True)
class RoundingLoss:
    """How far a quantized weight W' [out, in] is from the weight W that it was made of.

    Attributes:
        squared_error: sum of (W - W')^2.
        squared_weight: sum of W^2.
        largest_error: the largest |W - W'|.
        saturated: how many values of W lie outside their grid: beyond its outermost value by more than half a step, a
            step being the distance of the two outermost values on that side, and by more than rounding the scale to its
            dtype explains. They can only be clipped; a value that rounds to the outermost code is not among them.
        values: how many there are.
    """

    squared_error: float
    squared_weight: float
    largest_error: float
    saturated: int
    values: int

    @property
    def relative_error(self) -> float:
        """||W - W'||^2 / ||W||^2; 0 for a weight of zeros."""
        return self.squared_error / self.squared_weight if self.squared_weight > 0 else 0.0

    @property
    def saturation(self) -> float:
        """The share of the values that is saturated, 0 to 1."""
        return self.saturated / self.values


def rounding_loss(weight: Tensor, quantized: QuantizedTensor) -> RoundingLoss:
    """Compare a weight [out, in], any float dtype, with what it was rounded to; sums are taken in float64."""
    scheme = quantized.scheme
    groups = split(weight.detach(), scheme)
    codes = split(quantized.stored_codes(), scheme)  # what fills a short last block is code 0 here, and left out below
    scale = spread(quantized.scales())
    zero = None if quantized.zero_point is None else spread(quantized.zero_point)
    minimums = quantized.minimums()
    minimum = None if minimums is None else spread(minimums)
    low, high = _reach(scheme)
    lost = whole = largest = 0.0
    saturated, left = 0, weight.numel()
    for rows in row_chunks(groups.shape[0], groups[0].numel()):
        x, own_scale = groups[rows].float(), rows_of(scale, rows)
        own_zero = None if zero is None else rows_of(zero, rows)
        restored = grid.values(codes[rows], own_scale, own_zero, scheme.format)
        raised = x
        if minimum is not None:
            restored -= rows_of(minimum, rows)
            raised = x + rows_of(minimum, rows)
        places = raised / torch.where(own_scale == 0, torch.inf, own_scale)  # such a group has a single value
        if own_zero is not None:
            places += own_zero.float() + _least(scheme.format)
        outside = ((places < low) | (places > high)).reshape(-1)[:left]
        error = restored.sub_(x).reshape(-1)[:left]
        left -= error.numel()
        saturated += int(outside.sum())
        largest = max(largest, float(error.abs().max()))
        lost += float(error.double().square_().sum())
        whole += float(x.double().square_().sum())
    return RoundingLoss(lost, whole, largest, saturated, weight.numel())


def fold_scales(weight: Tensor, quantized: QuantizedTensor) -> tuple[Tensor, Tensor] | None:
    """The scales of its rows and columns that a method folded into other layers before it rounded a weight.

    AWQ and SmoothQuant round diag(r) W diag(c). The r and c are found again as those of least squared error from what
    was rounded, in turns; rounding hardly shifts them, for they are means over whole rows and columns. Columns that a
    method clipped hard, because little comes in there, look like scaled ones and are taken for such.

    Args:
        weight: W, [out, in].
        quantized: What was made of it.

    Returns:
        r [out, 1] and c [1, in], float32; None where the weight itself is as near, so that nothing was folded.
    """
    original, made = weight.detach().float(), quantized.dequantize()
    square, product = original.square(), original * made
    rows, columns = torch.ones(original.shape[0], 1), torch.ones(1, original.shape[1])
    for _ in range(_SWEEPS):
        columns = _ratio(rows.t() @ product, rows.square().t() @ square)
        rows = _ratio(product @ columns.t(), square @ columns.square().t())
    del square, product
    near = (original * rows).mul_(columns).sub_(made).square_().sum().item()
    far = made.sub_(original).square_().sum().item()
    return (rows, columns) if far > _FOLDED * near else None


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Part / whole, 1 where that says nothing."""
    known = (whole > 0) & (part != 0)
    return torch.where(known, part / whole, 1.0)


def _least(form: Format) -> int:
    return form.qmin if isinstance(form, IntFormat) else 0


def _reach(scheme: Scheme) -> tuple[float, float]:
    """The values, in units of the scale, beyond which the grid clips by more than half its outermost step."""
    form = scheme.format
    if isinstance(form, IntFormat):
        low, high = form.qmin - 0.5, form.qmax + 0.5
    else:
        levels = sorted(set(form.values()))
        low, high = levels[0] - (levels[1] - levels[0]) / 2, levels[-1] + (levels[-1] - levels[-2]) / 2
    if scheme.has_power_scale:
        return low, high  # powers of two are chosen, not rounded to
    # A scale that is rounded down by half a unit leaves the largest value so far outside.
    slack = (torch.finfo(scheme.scale_dtype).eps / 2 + 1e-6) * max(-low, high)
    return low - slack, high + slack

"""Rounding that trains: the values of a grid, with gradients to the weight, to an offset, to scales and to zero points.

    values = s * (clamp(round(w / s + v) + z, 0, 2^b - 1) - z)          integers; v is the offset, in steps

Forward is `numerics.grid` itself, on w + v * s, so that `settled` (which is `quantize_tensor` on the very same numbers)
stores bit for bit what a loss was measured with; other formats than integers come for free. Backward passes straight
through the rounding (Bengio, Leonard and Courville, 2013). Where the grid does not clip,

    d values / d w = 1      d values / d v = s      d values / d s = (values - w) / s      d values / d z = 0

and where it does, 0, 0, values / s and -s ("Learned Step Size Quantization", Esser and others, 2020; "LSQ+", Bhalgat
and others, 2020). Scales here are those that are stored: `stored_scale` rounds them on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from strop.numerics import grid
from strop.numerics.codebook import level_table, nest
from strop.numerics.formats import CodebookFormat, FloatFormat, IntFormat
from strop.numerics.groups import plan_shape, restore, row_chunks, rows_of, split, spread
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scales import smallest_positive
from strop.numerics.scheme import Scheme


def round_through(
    weight: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """The values of the grid nearest to weight + offset * scale.

    Args:
        weight: [out, in], float32.
        scheme: The grid.
        scale: Float32 in the stored shape, each a number that the scheme's scale dtype holds.
        zero_point: Stored codes (0 to 2^b - 1, whole) as float32, in the stored shape; exactly where asymmetric.
        offset: [out, in], float32, in multiples of the scale.

    Returns:
        [out, in], float32: what `settled` of the same arguments dequantizes to. Gradients reach all four tensors.
    """
    apply = cast(Callable[..., Tensor], _Round.apply)  # pyright: ignore[reportUnknownMemberType]
    return apply(weight, offset, scale, zero_point, scheme)


def settled(
    weight: Tensor,
    scheme: Scheme,
    scale: Tensor,
    zero_point: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    where: str = "weight",
) -> QuantizedTensor:
    """The quantized tensor whose values `round_through` gives for the same arguments."""
    form, moved = scheme.format, weight.detach()
    if offset is not None:
        moved = restore(
            _moved(split(moved, scheme), split(offset.detach(), scheme), spread(scale.detach())), _sizes(weight)
        )
    own_zero = None
    if zero_point is not None and isinstance(form, IntFormat):
        own_zero = (zero_point.detach() + form.qmin).to(torch.int8 if form.signed else torch.uint8)
    return quantize_tensor(moved, scheme, scale=scale.detach(), zero_point=own_zero, where=where)


def stored_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """A scale as it is stored, in float32, the gradient passing straight through.

    Rounded to the scheme's scale dtype and kept within what that holds: not infinite, and not 0 where it was not.
    """
    dtype = scheme.scale_dtype
    magnitude = scale.detach().abs().clamp_(smallest_positive(dtype), torch.finfo(dtype).max)
    stored = torch.copysign(magnitude, scale.detach()).to(dtype).float()
    return straight(torch.where(scale.detach() == 0, 0.0, stored), scale)


def whole(x: Tensor, lowest: int, highest: int) -> Tensor:
    """X rounded to whole numbers from `lowest` to `highest`, the gradient passing straight through."""
    return straight(x.detach().round().clamp_(lowest, highest), x)


def steps_between(weight: Tensor, scheme: Scheme, scale: Tensor) -> Tensor | None:
    """How far apart the two values around each weight lie on the grid, in multiples of its scale.

    Returns:
        [out, in], float32; None for integers, where it is 1.
    """
    form = scheme.format
    if isinstance(form, IntFormat):
        return None
    if isinstance(form, CodebookFormat):
        levels = level_table(form, weight.device)
    else:
        assert isinstance(form, FloatFormat)
        codes = torch.arange(256, device=weight.device).to(torch.uint8)
        levels = grid.values(codes, torch.ones((), device=weight.device), None, form)
        levels = levels[levels.abs() <= form.max_value]
    levels = torch.sort(levels).values
    size = spread(scale)
    places = split(weight, scheme) / torch.where(size == 0, 1.0, size)
    above = torch.searchsorted(levels, places.contiguous(), right=True).clamp_(1, levels.numel() - 1)
    return restore(levels[above] - levels[above - 1], _sizes(weight))


def beside(
    weight: Tensor, chosen: QuantizedTensor, scale: Tensor, zero_point: Tensor | None = None, *, where: str = "weight"
) -> Tensor:
    """The weight, moved no further than it takes for it to round to the values that were chosen for it.

    Where the nearest value was chosen it stays as it is. Elsewhere it is mirrored in the threshold between the two
    values around it or, from further away than that, becomes the chosen value.

    Args:
        weight: [out, in], float32.
        chosen: Its values on the grid of `scale` and `zero_point`.
        scale: As `round_through`.
        zero_point: As `round_through`.
        where: The weight's name, for messages.
    """
    scheme, values = chosen.scheme, chosen.dequantize()
    nearest = settled(weight, scheme, scale, zero_point, where=where).dequantize()
    unit = restore(split(torch.ones_like(weight), scheme) * spread(scale).abs(), _sizes(weight))
    steps = steps_between(weight, scheme, scale)
    if steps is not None:
        unit *= steps
    way = values - weight
    beyond = way.abs()
    least = beyond - 0.49 * unit
    moved = weight + torch.minimum(torch.maximum(2 * (beyond - 0.5 * unit), least), beyond).copysign(way)
    return torch.where(nearest == values, weight, moved)


def straight(value: Tensor, x: Tensor) -> Tensor:
    """`value`, exactly, with the gradient of x."""
    return cast(Callable[..., Tensor], _Straight.apply)(value, x)  # pyright: ignore[reportUnknownMemberType]


class _Round(torch.autograd.Function):
    """Both ways a piece of the weight at a time; what is kept is the result and where the grid did not clip."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, offset: Tensor | None, scale: Tensor, zero_point: Tensor | None, scheme: Scheme
    ) -> Tensor:
        plan_shape(tuple(weight.shape), scheme)
        groups, size = split(weight, scheme), spread(scale)
        offsets = None if offset is None else split(offset, scheme)
        value_scale = spread(nest(scale).dequantize()) if scheme.double_quant else size
        zeros = None if zero_point is None else spread(zero_point)
        values = torch.empty(groups.shape, dtype=torch.float32, device=weight.device)
        inside = torch.empty(groups.shape, dtype=torch.bool, device=weight.device)
        for rows in row_chunks(groups.shape[0], groups[0].numel()):
            own = rows_of(size, rows)
            x = groups[rows] if offsets is None else _moved(groups[rows], offsets[rows], own)
            zero = None if zeros is None else rows_of(zeros, rows)
            inside[rows] = grid.inside(x, own, zero, scheme.format)
            values[rows] = grid.rounded(x, own, rows_of(value_scale, rows), zero, scheme.format)
        ctx.scheme = scheme
        ctx.save_for_backward(groups, values, inside, scale, zero_point)
        return restore(values, _sizes(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        groups, values, inside, scale, zero_point = ctx.saved_tensors
        shape, scheme = _sizes(grads[0]), ctx.scheme
        to_weight, to_offset, to_scale, to_zero = ctx.needs_input_grad[:4]
        grad, size = split(grads[0], scheme), spread(scale)
        passed = torch.empty_like(values)
        scale_sums = torch.zeros(groups.shape[:-1], device=groups.device)
        zero_sums = torch.zeros_like(scale_sums) if to_zero else None
        for rows in row_chunks(groups.shape[0], groups[0].numel()):
            torch.mul(grad[rows], inside[rows], out=passed[rows])
            if to_scale:  # inside (values - w), outside values
                part = torch.mul(grad[rows], values[rows])
                scale_sums[rows] = part.addcmul_(passed[rows], groups[rows], value=-1).sum(dim=-1)
            if zero_sums is not None:
                zero_sums[rows] = torch.sub(grad[rows], passed[rows]).sum(dim=-1)
        divisor = torch.where(scale == 0, 1.0, scale)
        for_scale = _summed(scale_sums, scale) / divisor if to_scale else None
        for_zero = None if zero_sums is None else -scale * _summed(zero_sums, zero_point)
        for_offset = restore(passed * size, shape) if to_offset else None
        return restore(passed, shape) if to_weight else None, for_offset, for_scale, for_zero, None


def _moved(groups: Tensor, offset: Tensor, scale: Tensor) -> Tensor:
    """W + v * s of [rows, groups, size]."""
    return torch.addcmul(groups, offset, scale)


def _summed(sums: Tensor, like: Tensor) -> Tensor:
    """Sums of each group [rows, groups] in the shape of the scales."""
    return sums.sum().view(1, 1) if like.numel() == 1 else sums.view(like.shape)


class _Straight(torch.autograd.Function):
    """x + (value - x) would not be `value` to the last bit."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def _sizes(weight: Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return rows, columns

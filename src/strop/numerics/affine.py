"""Affine quantization: code = clamp(round(x / scale) + zero_point), restored = (code - zero_point) * scale.

`quantize` and `dequantize` are the two formulas, on any shapes that broadcast, in float32; scales keep the dtype in
which they are stored, and codes are chosen against that stored value. `fake_quantize` is the two in one with a
gradient, for any scheme, codebooks and floats included. `choose_scale` (from `scales`) finds scale and zero point.

What the rounding costs: with a range that covers the values, at most half a stored step plus the number of steps times
the scale's own rounding error; the full-range mode clips one side and can err by one step there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from strop.kernels import operations
from strop.numerics import accelerated
from strop.numerics.formats import IntFormat
from strop.numerics.groups import plan_shape, restore, row_chunks, split
from strop.numerics.laid import lay_grid
from strop.numerics.scales import choose_scale
from strop.numerics.scheme import Scheme

__all__ = ["choose_scale", "dequantize", "fake_quantize", "quantize"]


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, form: IntFormat) -> Tensor:
    """Codes clamp(round(x / scale) + zero_point, qmin, qmax); ties round to even.

    Args:
        x: Values, any float dtype; worked on in float32.
        scale: Broadcasts with x; not zero.
        zero_point: Broadcasts with x, in the format's own codes; None for zero.
        form: The integers there are.

    Returns:
        int8 (uint8 for unsigned formats), the shape of x and scale together.

    >>> quantize(torch.tensor([250.0]), torch.tensor(1000 / 255), None, IntFormat("uint8", 8, signed=False)).tolist()
    [64]
    """
    codes = torch.round(x.float() / scale.float())
    if zero_point is not None:
        codes += zero_point
    return codes.clamp_(form.qmin, form.qmax).to(torch.int8 if form.signed else torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The values that codes stand for: (codes - zero_point) * scale, float32."""
    values = codes.float()
    if zero_point is not None:
        values -= zero_point
    return values * scale.float()


def fake_quantize(
    weight: Tensor, scheme: Scheme, *, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """Round a weight to a scheme's grid and stay differentiable.

    The values are bitwise those of `quantize_tensor(weight, ...).dequantize(weight.dtype)`. The gradient passes
    straight through (Bengio, Leonard and Courville, 2013), and is zero where the grid clips: more than half a step
    beyond an integer's outermost codes, beyond the largest level of a float or codebook. A grid that covers the
    weight's own range clips nothing, so there every gradient passes; only the full-range grid is short on one side, and
    grids whose scales are coarse (MXFP4, Q4_K) may be short anywhere.

    Args:
        weight: [out, in], any float dtype; worked on in float32.
        scheme: The grid.
        scale: Scales to use instead of those of the weight's own range, as in `quantize_tensor`; no gradient.
        zero_point: Zero points that go with them, as `choose_scale` returns them.

    Returns:
        [out, in], the weight's dtype.

    Raises:
        FormatError: As `quantize_tensor`.
    """
    apply = cast(Callable[..., Tensor], _FakeQuantize.apply)  # pyright: ignore[reportUnknownMemberType]
    return apply(weight, scheme, scale, zero_point)


class _FakeQuantize(torch.autograd.Function):
    """Forward rounds a piece of the weight at a time; backward needs only where the grid clipped, if anywhere.

    The kernels round it in one pass, and keep where it clipped as one bit a value.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scheme: Scheme, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
        plan_shape(tuple(weight.shape), scheme)
        ctx.size = None
        if (made := accelerated.fake_quantize(weight, scheme, scale, zero_point)) is not None:
            ctx.save_for_backward(made.mask)
            ctx.size = made.size
            return made.values
        shape = (weight.shape[0], weight.shape[1])
        groups = split(weight, scheme)
        laid = lay_grid(groups, scheme, shape, scale=scale, zero_point=zero_point)
        result = torch.empty(groups.shape, dtype=weight.dtype, device=weight.device)
        inside = torch.empty(groups.shape, dtype=torch.bool, device=weight.device) if laid.clips else None
        for rows in row_chunks(groups.shape[0], groups[0].numel()):
            x = groups[rows].float()
            if inside is not None:
                inside[rows] = laid.inside(x, rows)
            result[rows] = laid.rounded(x, rows)
        ctx.save_for_backward(None if inside is None else restore(inside, shape))
        return restore(result, shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        if ctx.size is not None and inside is not None:  # packed by the kernels
            (grad,) = grads
            if not torch.is_grad_enabled() and (
                (masked := operations.mask_gradient(grad.contiguous(), inside, ctx.size)) is not None
            ):
                return masked, None, None, None
            inside = operations.unpacked_mask(inside, grad.numel(), ctx.size).view(grad.shape)
        return (grads[0] if inside is None else grads[0] * inside), None, None, None

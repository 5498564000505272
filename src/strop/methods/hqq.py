"""HQQ, half-quadratic quantization: the scales of least |weight - rounded|^p with p below 1, without data.

A norm with p below 1 forgives a few large errors and asks for many small ones, as weights with outliers need it. It is
split in two (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023,
https://mobiusml.github.io/hqq_blog/): with an auxiliary error e,

    min over e, scale    |e|^p + beta / 2 * (e - (w - rounded))^2

    e       the errors shrunk:   sign(d) * max(0, |d| - |d|^(p-1) / beta),   d = w - rounded
    scale   what then fits best:  <w - e, q - z> / <q - z, q - z>,           q and z the codes and the zero point

in turn, beta growing by kappa each time, until little gets better. For every group what was best by sum |d|^p is kept,
the plain scale to begin with, so that no group is worse than rounded to nearest. (Starting from a clipped range reaches
a smaller sum, and a larger output error on real models: `benchmarks/LOG.md`, 2026-11-25.)

Deviations, and why:
- The paper keeps the scale and moves a real-valued zero point, to mean(q - (w - e) / scale). Stored zero points are
  integers (as compressed-tensors has them), and symmetric grids, floats and codebooks have none. Rounded to an integer
  the formula moves nothing (it did in none of 240,000 groups of two models), so here z stays and the scale moves, by
  the same least squares.
- Errors are measured in steps of the group's grid. In the weights' own unit, as the authors' code has it, 1 / beta lies
  far above any error of a weight, and e is always 0.
- The scale moves twice as far as its least squares say: they move it by what is left of the shrunk errors, a short
  step, and with the double of it fewer steps lead to a smaller sum (`benchmarks/LOG.md`, 2026-11-25).
- The authors' code stops the whole tensor when mean |d| rises; here each group stops when it gains little, and is then
  left out of the work.

On a CPU the scales of integer grids are found by a native kernel, group by group (`kernels.searches`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from strop.errors import UsageError
from strop.kernels.searches import hqq_scales
from strop.methods.base import Statistics
from strop.numerics import grid
from strop.numerics.formats import Format, IntFormat
from strop.numerics.groups import plan_shape, row_chunks, split
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scales import settle_scale, stored_zero_point
from strop.numerics.scheme import Granularity, Scheme

_STRIDE = 2.0
"""How far a scale moves, in multiples of the change that least squares ask for."""

_GAIN = 3e-3
"""Share by which a group's sum of powers must fall for it to go on; what falls by less is left as it was."""

_LEAST = 1e-20
"""Errors below this share of a step count as this, so that they have a logarithm."""

_PIECE = 1 << 20
"""Values solved for together."""

_CACHED = 1 << 16
"""Values measured at a time, few enough that they and what is made of them stay in cache."""

_CROWDED = 0.8
"""Share of the groups that must still gain for those that do not to be dragged along: leaving them out is a copy."""


def hqq(
    weight: Tensor,
    scheme: Scheme,
    statistics: Statistics | None = None,
    *,
    where: str = "weight",
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> QuantizedTensor:
    """Round a weight [out, in] to a scheme's grid whose scales are found by half-quadratic splitting.

    Never worse than plain rounding by the mean of |weight - rounded|^p.

    Args:
        weight: Any float dtype.
        scheme: The grid.
        statistics: Not used: the method needs no data.
        where: The weight's name, for messages.
        p: The norm, above 0 and at most 1.
        beta: How strongly e is held to the error, per squared step.
        kappa: What beta is multiplied by after each iteration, at least 1.
        iterations: At most so many; they end early where no group gains.

    Raises:
        FormatError: As `quantize_tensor`.
        UsageError: An option out of its range.
    """
    _check_options(p, beta, kappa, iterations)
    shape = (weight.shape[0], weight.shape[1])
    plan_shape(tuple(weight.shape), scheme, where=where)
    groups = split(weight.detach(), scheme)
    scale, zero_point = settle_scale(groups, scheme, shape, None, None, where=where)
    whole = scheme.granularity is Granularity.TENSOR
    values = groups.reshape(
        (1, -1) if whole else (-1, groups.shape[-1])
    )  # [groups, size]: what shares a scale in a row
    scales = scale.float().reshape(-1, 1).clone()
    zeros = None if zero_point is None else stored_zero_point(zero_point, scheme.format).float().view(-1, 1)
    for piece in row_chunks(*values.shape, values=_PIECE):
        zero = None if zeros is None else zeros[piece]
        part: tuple[Tensor, Tensor, Tensor | None, Scheme] = (values[piece].float(), scales[piece], zero, scheme)
        options: dict[str, Any] = {"p": p, "beta": beta, "kappa": kappa, "iterations": iterations}
        if not _solve_natively(*part, **options):
            _solve(*part, **options)
    found = quantize_tensor(weight, scheme, scale=scales.view(scale.shape), zero_point=zero_point, where=where)
    if not scheme.double_quant:
        return found
    plain = quantize_tensor(
        weight, scheme, where=where
    )  # rounding the scales once more may have spoiled what was found
    return min(plain, found, key=lambda result: power_error(weight, result, p))


def power_error(weight: Tensor, quantized: QuantizedTensor, p: float = 0.7) -> float:
    """Mean over the weight [out, in] of |weight - quantized|^p: the error that HQQ makes small."""
    restored = quantized.dequantize()
    total = 0.0
    for part in row_chunks(*weight.shape):
        total += (weight[part].float() - restored[part]).abs_().pow_(p).sum(dtype=torch.float64).item()
    return total / weight.numel()


def _solve_natively(x: Tensor, scales: Tensor, zero: Tensor | None, scheme: Scheme, **options: Any) -> bool:
    """`_solve` by the native kernel; False, and nothing done, where it has no such grid."""
    form = scheme.format
    if not isinstance(form, IntFormat):
        return False
    ends = (form.qmin, form.qmax) if zero is None else (0, form.steps)
    return hqq_scales(x, scales, zero, ends, scheme.scale_dtype, stride=_STRIDE, gain=_GAIN, **options)


def _solve(
    x: Tensor,
    scales: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    *,
    p: float,
    beta: float,
    kappa: float,
    iterations: int,
) -> None:
    """Put the best scales that were met in place of those given.

    Args:
        x: float32 [groups, size].
        scales: float32 [groups, 1], values that the scheme's dtype holds; those to begin with.
        zero: Stored zero points like them, float32, or None.
        scheme: The grid.
        p: As `hqq`.
        beta: As `hqq`.
        kappa: As `hqq`.
        iterations: As `hqq`.
    """
    scale, best = scales.clone(), scales.clone()
    bar = torch.full_like(scales, torch.inf)  # what a sum must be below
    going = torch.ones_like(scales, dtype=torch.bool)  # whether a group gained each time
    numbers = torch.arange(len(x), device=x.device)  # the rows of `scales` that are worked on
    for _ in range(iterations + 1):
        total, pull, strength = _measured(x, scale, zero, scheme.format, p, beta)
        going &= total < bar
        left = int(going.count_nonzero())
        best, bar = torch.where(going, scale, best), total * (1 - _GAIN)
        if left == 0:
            break
        change = pull.div_(strength).mul_(_STRIDE).add_(1.0).clamp_(min=0.5)  # NaN where all codes are 0, and no gain
        scale = (scale * change).to(scheme.scale_dtype).float()
        beta *= kappa
        if left < _CROWDED * len(x):
            scales[numbers] = best
            kept = going.view(-1).nonzero().view(-1)
            x, scale, going = x[kept], scale[kept], going[kept]
            best, bar, numbers = best[kept], bar[kept], numbers[kept]
            zero = None if zero is None else zero[kept]
    scales[numbers] = best


def _measured(
    x: Tensor, scale: Tensor, zero: Tensor | None, form: Format, p: float, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each group: sum |d|^p in the weight's unit, <w - e - scale * (q - z), q - z> / scale, <q - z, q - z>.

    w - e less the grid's value is what of an error is not shrunk away: the error, but at most |d|^(p - 1) / beta of it.
    """
    one = torch.ones((), device=x.device)
    total, pull, strength = (torch.empty_like(scale) for _ in range(3))
    for rows in row_chunks(*x.shape, values=_CACHED):
        error = x[rows] / scale[rows]
        codes = grid.rounded(error, one, one, None if zero is None else zero[rows], form)
        error.sub_(codes)
        size = error.abs().clamp_(min=_LEAST)
        most = size.log2().mul_(p - 1).sub_(math.log2(beta)).exp2_()  # half the time of pow
        torch.sum(size.mul_(most), dim=1, keepdim=True, out=total[rows])
        torch.sum(torch.clamp(error, -most, most).mul_(codes), dim=1, keepdim=True, out=pull[rows])
        torch.sum(codes.square_(), dim=1, keepdim=True, out=strength[rows])
    return total.mul_(scale.abs().pow_(p)).mul_(beta), pull, strength


def _check_options(p: float, beta: float, kappa: float, iterations: int) -> None:
    if not 0 < p <= 1:
        raise UsageError(f"hqq: p lies above 0 and at most at 1, got {p:g}")
    if beta <= 0 or kappa < 1 or iterations < 1:
        raise UsageError(
            f"hqq: beta is positive, kappa and iterations at least 1; got {beta:g}, {kappa:g} and {iterations}"
        )

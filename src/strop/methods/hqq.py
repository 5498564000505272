"""HQQ, half-quadratic quantization: the scales of least |weight - rounded|^p with p below 1, without data.

A norm with p below 1 forgives a few large errors and asks for many small ones, as weights with outliers need it. It is
split in two (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023,
https://mobiusml.github.io/hqq_blog/): with an auxiliary error e,

    min over e, scale    |e|^p + beta / 2 * (e - (w - rounded))^2

    e       the errors shrunk:   sign(d) * max(0, |d| - |d|^(p-1) / beta),   d = w - rounded
    scale   what then fits best:  <w - e, q - z> / <q - z, q - z>,           q and z the codes and the zero point

in turn, beta growing by kappa each time, until nothing gets better. For every group what was best by sum |d|^p is kept,
the plain scale to begin with, so that no group is worse than rounded to nearest. (Starting from a clipped range reaches
a smaller sum, and a larger output error on real models: `benchmarks/LOG.md`, 2026-11-25.)

Deviations, and why:
- The paper keeps the scale and moves a real-valued zero point, to mean(q - (w - e) / scale). Stored zero points are
  integers (as compressed-tensors has them), and symmetric grids, floats and codebooks have none. Rounded to an integer
  the formula moves nothing (it did in none of 240,000 groups of two models), so here z stays and the scale moves, by
  the same least squares.
- Errors are measured in steps of the group's grid. In the weights' own unit, as the authors' code has it, 1 / beta lies
  far above any error of a weight, and e is always 0.
- The authors' code stops the whole tensor when mean |d| rises; here each group stops when it gains nothing, and is then
  left out of the work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strop.errors import UsageError
from strop.methods.base import Statistics
from strop.numerics import grid
from strop.numerics.formats import Format
from strop.numerics.groups import plan_shape, row_chunks, split
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scales import settle_scale, stored_zero_point
from strop.numerics.scheme import Granularity, Scheme

_GAIN = 1e-3
"""Share by which a group's sum of powers must fall for it to go on; what falls by less is left as it was."""

_LEAST = 1e-20
"""Errors below this share of a step count as this, so that they have a logarithm."""

_PIECE = 1 << 18
"""Values worked on at a time."""


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
        _solve(values[piece].float(), scales[piece], zero, scheme, p=p, beta=beta, kappa=kappa, iterations=iterations)
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
    form = scheme.format
    scale = scales.clone()
    going = torch.arange(len(x), device=x.device)  # the groups that still gain
    least = torch.full_like(scales, torch.inf)
    for _ in range(iterations + 1):
        places, error, total, size, power = _powers(x, scale, zero, form, p)
        better = (total < least * (1 - _GAIN)).squeeze(1)
        if not better.all():
            kept = better.nonzero().squeeze(1)
            if not len(kept):
                return
            x, scale, total, going = x[kept], scale[kept], total[kept], going[kept]
            places, error, size, power = places[kept], error[kept], size[kept], power[kept]
            zero = None if zero is None else zero[kept]
        least = total
        scales[going] = scale
        shrunk = size.sub_(power.div_(size * beta)).clamp_(min=0.0).copysign_(error)
        target = error.sub_(shrunk).add_(places)  # (w - e) / scale
        change = (target * places).sum(dim=1, keepdim=True) / places.square_().sum(dim=1, keepdim=True)
        new = (scale * change).to(scheme.scale_dtype).float()
        scale = torch.where(torch.isfinite(new) & (new * scale > 0), new, scale)
        beta *= kappa


def _powers(
    x: Tensor, scale: Tensor, zero: Tensor | None, form: Format, p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of groups x on a grid: q - z, d in steps, sum |d|^p in the weight's unit [groups, 1], |d|, |d|^p."""
    steps = x / scale
    one = torch.ones((), device=x.device)
    places = grid.rounded(steps, one, one, zero, form)
    error = steps.sub_(places)
    size = error.abs().clamp_(min=_LEAST)
    power = size.log2().mul_(p).exp2_()  # half the time of pow
    return places, error, power.sum(dim=1, keepdim=True) * scale.abs() ** p, size, power


def _check_options(p: float, beta: float, kappa: float, iterations: int) -> None:
    if not 0 < p <= 1:
        raise UsageError(f"hqq: p lies above 0 and at most at 1, got {p:g}")
    if beta <= 0 or kappa < 1 or iterations < 1:
        raise UsageError(
            f"hqq: beta is positive, kappa and iterations at least 1; got {beta:g}, {kappa:g} and {iterations}"
        )

"""Scale and zero point of a range, of a weight's groups, or given from outside; rounded to the dtype that stores them.

Scales live in the shape in which they are stored: [1, 1], [out, 1], [out, groups], or [blocks] for codebooks. Zero points
go with them in the format's own codes (`qmin` to `qmax`); `stored_zero_point` turns them into what is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strop.errors import FormatError
from strop.numerics.formats import CodebookFormat, FloatFormat, Format, IntFormat
from strop.numerics.groups import group_range, plan_shape
from strop.numerics.scheme import Granularity, Mode, Scheme


def choose_scale(
    xmin: Tensor | float,
    xmax: Tensor | float,
    form: Format,
    mode: Mode,
    *,
    scale_dtype: torch.dtype = torch.float32,
    where: str = "range",
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that map the range [xmin, xmax], widened to contain zero, onto a format.

        symmetric, signed     s = max(-xmin, xmax) / ((2^b - 1) / 2)
        symmetric, unsigned   s = xmax / qmax
        full-range symmetric  s = (xmin or xmax, the larger in magnitude) / -2^(b-1), negative where xmax is the larger
        asymmetric            s = (xmax - xmin) / (2^b - 1),  z = clamp(round(qmin - xmin / s))
        8-bit float           s = max(-xmin, xmax) / the format's largest value
        codebook              s = max(-xmin, xmax)

    Args:
        xmin: Smallest values, any shape.
        xmax: Largest values, the same shape.
        form: The number format of the codes.
        mode: Where the grid lies.
        scale_dtype: The dtype in which the scale is stored. A scale too small for it becomes its smallest positive
            value; the scale of an all-zero range is 1 (a codebook's is 0).
        where: What the range belongs to, for messages.

    Returns:
        The scale in `scale_dtype`, and the zero point in the format's own codes (int8, or uint8 for unsigned formats) or
        None without one.

    Raises:
        FormatError: The range is not finite, the scale overflows its dtype, or the format cannot hold the range.

    >>> scale, zero_point = choose_scale(-20.0, 1000.0, IntFormat("uint8", 8, signed=False), Mode.ASYMMETRIC)
    >>> scale.item(), zero_point.item()
    (4.0, 5)
    """
    low = torch.as_tensor(xmin, dtype=torch.float32).clamp(max=0.0)
    high = torch.as_tensor(xmax, dtype=torch.float32).clamp(min=0.0)
    check_finite_range(low, high, where=where)
    magnitude = torch.maximum(-low, high)
    if isinstance(form, CodebookFormat):
        return magnitude, None
    if isinstance(form, FloatFormat):
        ideal = magnitude / form.max_value
    elif mode is Mode.ASYMMETRIC:
        ideal = (high - low) / form.steps
    elif not form.signed:
        _check_unsigned(low, form, mode, where)
        ideal = high / form.qmax
    elif mode is Mode.SYMMETRIC:
        ideal = magnitude / (form.steps / 2)
    else:
        ideal = magnitude / -form.qmin
    scale = _store_scale(ideal, magnitude, scale_dtype, where)
    if mode is Mode.SYMMETRIC_FULL:
        scale = torch.where(high > -low, -scale, scale)
    if not isinstance(form, IntFormat) or mode is not Mode.ASYMMETRIC:
        return scale, None
    zero_point = torch.round(form.qmin - low / scale.float()).clamp_(form.qmin, form.qmax)
    return scale, zero_point.to(torch.int8 if form.signed else torch.uint8)


def default_scale(groups: Tensor, scheme: Scheme, *, where: str = "weight") -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover the whole range of each group of `split`, in their stored shapes."""
    seen = groups.reshape(1, 1, -1) if scheme.granularity is Granularity.TENSOR else groups
    low, high = group_range(seen)
    return scale_of_range(low, high, scheme, where=where)


def scale_of_range(low: Tensor, high: Tensor, scheme: Scheme, *, where: str) -> tuple[Tensor, Tensor | None]:
    """`choose_scale` for observed ranges [rows, groups], in the stored shape."""
    if scheme.granularity is Granularity.BLOCK:
        low, high = low.view(-1), high.view(-1)
    return choose_scale(low, high, scheme.format, scheme.mode, scale_dtype=scheme.scale_dtype, where=where)


def check_scale(
    scale: Tensor, zero_point: Tensor | None, scheme: Scheme, shape: tuple[int, int], *, where: str
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points given from outside, in the stored dtype.

    Raises:
        FormatError: Shape, dtype or values do not fit the scheme.
    """
    size = plan_shape(shape, scheme, where=where)
    if tuple(scale.shape) != size:
        raise FormatError(f"{where}: {scheme.name} has scales of shape {list(size)}, got {list(scale.shape)}")
    stored = scale.to(scheme.scale_dtype)
    is_codebook = scheme.granularity is Granularity.BLOCK
    if not torch.isfinite(stored).all() or (not is_codebook and (stored == 0).any()):
        raise FormatError(f"{where}: scales must be finite and not zero in {scheme.scale_dtype}")
    if (zero_point is None) == (scheme.mode is Mode.ASYMMETRIC):
        needed = "a zero point beside its scale" if zero_point is None else "no zero point"
        raise FormatError(f"{where}: {scheme.name} takes {needed}")
    if zero_point is not None:
        if tuple(zero_point.shape) != size:
            raise FormatError(
                f"{where}: {scheme.name} has zero points of shape {list(size)}, got {list(zero_point.shape)}"
            )
        form = scheme.format
        if isinstance(form, IntFormat) and form.signed and zero_point.dtype == torch.uint8:
            raise FormatError(
                f"{where}: zero points are given in the codes of {form.name} ({form.qmin} to {form.qmax}), as choose_scale "
                "returns them; these are stored ones (uint8): add qmin in a signed dtype"
            )
    return stored, zero_point


def stored_zero_point(zero_point: Tensor, scheme: Scheme) -> Tensor:
    """A zero point in the format's own codes, as it is stored: uint8, less qmin."""
    smallest = scheme.format.qmin if isinstance(scheme.format, IntFormat) else 0
    return (zero_point.to(torch.int16) - smallest).to(torch.uint8)


def check_finite_range(low: Tensor, high: Tensor, *, where: str) -> None:
    """Refuse a range that NaN or an infinity reached.

    Raises:
        FormatError: It did.
    """
    if torch.isfinite(low).all() and torch.isfinite(high).all():
        return
    kind = "NaN" if torch.isnan(low).any() or torch.isnan(high).any() else "infinite"
    raise FormatError(
        f"{where}: holds {kind} values, which no scale can carry; find the step that wrote them (training that "
        "diverged, a damaged file) and quantize finite weights"
    )


def smallest_positive(dtype: torch.dtype) -> float:
    """The smallest positive number of a float dtype, subnormal.

    >>> smallest_positive(torch.float16) == 2.0**-24
    True
    """
    limits = torch.finfo(dtype)
    return limits.smallest_normal * limits.eps


def _store_scale(ideal: Tensor, magnitude: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """A positive scale rounded to the dtype that holds it: never zero, 1 for a range of zeros, overflow refused."""
    stored = ideal.clamp(min=smallest_positive(dtype)).to(dtype)
    stored = torch.where(magnitude > 0, stored, torch.ones_like(stored))
    if not torch.isfinite(stored).all():
        raise FormatError(
            f"{where}: a scale of {ideal.max().item():.4g} overflows {str(dtype).removeprefix('torch.')} (largest "
            f"{torch.finfo(dtype).max:.6g}); store scales in float32 (-sf32) or quantize per channel, whose scales are float32"
        )
    return stored


def _check_unsigned(low: Tensor, form: IntFormat, mode: Mode, where: str) -> None:
    """Refuse what an unsigned grid without a zero point cannot hold."""
    if mode is Mode.SYMMETRIC_FULL:
        raise FormatError(f"{where}: the full-range grid needs a signed format, got {form.name}; use int{form.bits}")
    if low.min() < 0:
        raise FormatError(
            f"{where}: {form.name} without a zero point starts at 0 and the range at {low.min().item():.6g}; "
            f"use the asymmetric scheme, or int{form.bits}"
        )

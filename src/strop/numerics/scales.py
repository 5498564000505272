"""Scale and zero point of a range, of a weight's groups, or given from outside; rounded to the dtype that stores them.

Scales live in the shape in which they are stored: [1, 1], [out, 1], [out, groups], or [blocks] for codebooks. Zero
points go with them in the format's own codes (`qmin` to `qmax`); `stored_zero_point` turns them into what is stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from strop.errors import FormatError
from strop.numerics.formats import CodebookFormat, FloatFormat, Format, IntFormat
from strop.numerics.groups import group_range, plan_shape
from strop.numerics.scheme import E8M0, Granularity, Mode, Scheme


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
        MXFP4 (E8M0 scales)   s = 2^(floor(log2(max(-xmin, xmax))) - 2)
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
        The scale in `scale_dtype`, and the zero point in the format's own codes (int8, or uint8 for unsigned formats)
        or None without one.

    Raises:
        FormatError: The range is not finite, the scale overflows its dtype, or the format cannot hold the range.

    >>> scale, zero_point = choose_scale(-20.0, 1000.0, IntFormat("uint8", 8, signed=False), Mode.ASYMMETRIC)
    >>> scale.item(), zero_point.item()
    (4.0, 5)
    """
    low, high = _float32(xmin).clamp(max=0.0), _float32(xmax).clamp(min=0.0)
    check_finite_range(low, high, where=where)
    if isinstance(form, IntFormat) and not form.signed and mode is not Mode.ASYMMETRIC:
        _check_unsigned(low, form, mode, where)
    scale, zero_point = fit_scale(low, high, form, mode, scale_dtype=scale_dtype)
    _check_overflow(scale, where)
    return scale, zero_point


def fit_scale(
    low: Tensor, high: Tensor, form: Format, mode: Mode, *, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """`choose_scale` for float32 ranges, finite and holding zero, unchecked: a scale that overflows is infinite."""
    magnitude = torch.maximum(-low, high)
    if isinstance(form, CodebookFormat):
        return magnitude.abs_(), None  # of zeros alone it would have the sign that one of them had
    if scale_dtype == E8M0:
        ideal = _power_of_two(magnitude, form)
    elif isinstance(form, FloatFormat):
        ideal = magnitude / form.max_value
    elif mode is Mode.ASYMMETRIC:
        ideal = (high - low) / form.steps
    elif not form.signed:
        ideal = high / form.qmax
    elif mode is Mode.SYMMETRIC:
        ideal = magnitude / (form.steps / 2)
    else:
        ideal = magnitude / -form.qmin
    scale = ideal.clamp_(min=smallest_positive(scale_dtype)).to(scale_dtype)
    scale = torch.where(magnitude > 0, scale, torch.ones_like(scale))
    if not isinstance(form, IntFormat) or mode is Mode.SYMMETRIC:
        return scale, None
    if mode is Mode.SYMMETRIC_FULL:
        return torch.where(high > -low, -scale, scale), None
    zero_point = torch.round(form.qmin - low / scale.float()).clamp_(form.qmin, form.qmax)
    return scale, zero_point.to(torch.int8 if form.signed else torch.uint8)


def _power_of_two(magnitude: Tensor, form: Format) -> Tensor:
    """2^(floor(log2(magnitude)) - the power of the format's largest value), at most 2^127, exactly.

    OCP Microscaling Formats (MX) v1.0, section 6.3. What lies between the format's largest value and the next power of
    two (6 and 8 in MXFP4) is clipped.
    """
    power = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32)  # 0 for float32's subnormals
    largest = form.max_value if isinstance(form, FloatFormat) else 1.0
    return power.mul_(0.5 ** math.floor(math.log2(largest))).clamp_(max=2.0**127)


def settle_scale(
    groups: Tensor,
    scheme: Scheme,
    shape: tuple[int, int],
    scale: Tensor | None,
    zero_point: Tensor | None,
    *,
    where: str,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of a weight's groups (of `groups.split`), in their stored shapes.

    Those given are checked; where none is given, those that cover the whole range of each group.

    Raises:
        FormatError: The weight holds NaN or infinite values, or the scale does not fit the scheme.
    """
    low, high = group_range(groups)
    if scale is not None:
        check_finite_range(low, high, where=where)
        return _check_scale(scale, zero_point, scheme, shape, where=where)
    if scheme.granularity is Granularity.TENSOR:
        low, high = low.min().view(1, 1), high.max().view(1, 1)
    return scale_of_range(low, high, scheme, where=where)


def scale_of_range(low: Tensor, high: Tensor, scheme: Scheme, *, where: str) -> tuple[Tensor, Tensor | None]:
    """`choose_scale` for observed ranges [rows, groups], in the stored shape."""
    if scheme.granularity is Granularity.BLOCK:
        low, high = low.view(-1), high.view(-1)
    return choose_scale(low, high, scheme.format, scheme.mode, scale_dtype=scheme.scale_dtype, where=where)


def stored_zero_point(zero_point: Tensor, form: Format) -> Tensor:
    """A zero point in the format's own codes, as it is stored: uint8, less qmin."""
    smallest = form.qmin if isinstance(form, IntFormat) else 0
    return (zero_point.to(torch.int16) - smallest).to(torch.uint8)


def check_finite_range(low: Tensor, high: Tensor, *, where: str) -> None:
    """Refuse a range that NaN or an infinity reached.

    Raises:
        FormatError: It did.
    """
    ends = torch.stack([low.min(), high.max()])  # NaN is the smallest and the largest of its kind
    if torch.isfinite(ends).all():
        return
    kind = "NaN" if torch.isnan(ends).any() else "infinite"
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


def _float32(x: Tensor | float) -> Tensor:
    """A number or tensor in float32, on the tensor's device (`as_tensor` would move it to the default one)."""
    return x.float() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float32, device="cpu")


def _check_overflow(scale: Tensor, where: str) -> None:
    """Refuse scales that their dtype cannot hold."""
    if torch.isfinite(scale.float()).all():
        return
    limit = torch.finfo(scale.dtype).max
    advice = "scale the weights down"
    if scale.dtype != torch.float32:
        advice = "quantize per channel, whose scales are float32, or store float32 scales (-sf32)"
    name = str(scale.dtype).removeprefix("torch.")
    raise FormatError(f"{where}: a scale overflows {name}, whose largest value is {limit:.6g}; {advice}")


def _check_unsigned(low: Tensor, form: IntFormat, mode: Mode, where: str) -> None:
    """Refuse what an unsigned grid without a zero point cannot hold."""
    if mode is Mode.SYMMETRIC_FULL:
        raise FormatError(f"{where}: the full-range grid needs a signed format, got {form.name}; use int{form.bits}")
    if low.min() < 0:
        raise FormatError(
            f"{where}: {form.name} without a zero point starts at 0 and the range at {low.min().item():.6g}; "
            f"use the asymmetric scheme, or int{form.bits}"
        )


def _check_scale(
    scale: Tensor, zero_point: Tensor | None, scheme: Scheme, shape: tuple[int, int], *, where: str
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points given from outside, in the stored dtype.

    Raises:
        FormatError: Shape, dtype or values do not fit the scheme.
    """
    size = plan_shape(shape, scheme, where=where)
    if tuple(scale.shape) != size:
        raise FormatError(f"{where}: {scheme.name} has scales of shape {list(size)}, got {list(scale.shape)}")
    stored = scale.detach().to(scheme.scale_dtype)
    is_codebook = scheme.granularity is Granularity.BLOCK
    values = stored.float()  # E8M0 has no comparisons of its own
    if not torch.isfinite(values).all() or (not is_codebook and (values == 0).any()):
        raise FormatError(f"{where}: scales must be finite and not zero in {scheme.scale_dtype}")
    if scheme.has_power_scale and (scale.float() <= 0).any():
        raise FormatError(f"{where}: the scales of {scheme.name} are powers of two, and so positive")
    if (zero_point is None) == (scheme.mode is Mode.ASYMMETRIC):
        needed = "a zero point beside its scale" if zero_point is None else "no zero point"
        raise FormatError(f"{where}: {scheme.name} takes {needed}")
    if zero_point is not None and isinstance(scheme.format, IntFormat):
        _check_zero_point(zero_point, scheme.format, size, where)
    return stored, zero_point


def _check_zero_point(zero_point: Tensor, form: IntFormat, size: tuple[int, ...], where: str) -> None:
    """Refuse zero points of another shape, and stored ones, which lie elsewhere in a signed format."""
    if tuple(zero_point.shape) != size:
        raise FormatError(
            f"{where}: zero points must have the scales' shape {list(size)}, got {list(zero_point.shape)}"
        )
    if form.signed and zero_point.dtype == torch.uint8:
        raise FormatError(
            f"{where}: zero points are given in the codes of {form.name} ({form.qmin} to {form.qmax}), as choose_scale "
            "returns them; these are stored ones (uint8): add qmin in a signed dtype"
        )
    if zero_point.min() < form.qmin or zero_point.max() > form.qmax:
        raise FormatError(
            f"{where}: zero points of {form.name} lie from {form.qmin} to {form.qmax}, got {zero_point.min().item():g} "
            f"to {zero_point.max().item():g}"
        )

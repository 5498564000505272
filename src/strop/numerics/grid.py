"""One grid, three families: codes on it, values of codes, and rounding to it, whichever format the codes have.

Everything works on float32 groups [rows, groups, size] with scales (and zero points) that broadcast. Codes here are the
stored ones: uint8, an integer's code less the format's smallest, a float's bit pattern, a codebook's position. `rounded`
gives the very bits that `values(codes(...))` gives, without going through codes; zero points are stored codes too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strop.numerics import codebook
from strop.numerics.formats import FloatFormat, Format, IntFormat


def codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, form: Format) -> Tensor:
    """Stored codes of x, uint8."""
    if isinstance(form, IntFormat):
        return _integer_places(x, scale, zero_point, form).to(torch.uint8)
    if isinstance(form, FloatFormat):
        return _float_cast(x, scale, form).view(torch.uint8)
    return codebook.nearest_codes(x, scale, form)


def values(stored: Tensor, scale: Tensor, zero_point: Tensor | None, form: Format) -> Tensor:
    """What stored codes stand for, float32."""
    if isinstance(form, IntFormat):
        return _centre(stored.float(), zero_point, form).mul_(scale)
    if isinstance(form, FloatFormat):
        return stored.view(form.dtype).float().mul_(scale)
    return codebook.level_values(stored, scale, form)


def rounded(x: Tensor, scale: Tensor, value_scale: Tensor, zero_point: Tensor | None, form: Format) -> Tensor:
    """x moved to a value of the grid, float32: bitwise `values(codes(x, scale), value_scale)`.

    The two scales differ under double quantization alone, where codes are chosen before the scales are rounded.
    """
    if isinstance(form, IntFormat):
        return _centre(_integer_places(x, scale, zero_point, form), zero_point, form).mul_(value_scale)
    if isinstance(form, FloatFormat):
        return _float_cast(x, scale, form).float().mul_(value_scale)
    return codebook.level_values(codebook.nearest_codes(x, scale, form), value_scale, form)


def inside(x: Tensor, scale: Tensor, zero_point: Tensor | None, form: Format) -> Tensor:
    """Where x lies within the grid: within half a step of an integer's ends, within the largest level otherwise. Bool."""
    places = x / scale
    if isinstance(form, IntFormat):
        if zero_point is not None:
            places += zero_point.float() + form.qmin
        return (places >= form.qmin - 0.5) & (places <= form.qmax + 0.5)
    return places.abs_() <= (form.max_value if isinstance(form, FloatFormat) else 1.0)


def _integer_places(x: Tensor, scale: Tensor, zero_point: Tensor | None, form: IntFormat) -> Tensor:
    """Stored codes as float32: clamp(round(x / scale) + zero point, 0, steps)."""
    places = (x / scale).round_()
    places += -form.qmin if zero_point is None else zero_point
    return places.clamp_(0, form.steps)


def _centre(places: Tensor, zero_point: Tensor | None, form: IntFormat) -> Tensor:
    """Stored codes (float32, changed in place) less the code of zero."""
    places -= -form.qmin if zero_point is None else zero_point
    return places


def _float_cast(x: Tensor, scale: Tensor, form: FloatFormat) -> Tensor:
    """x / scale in the float format, saturated: e4m3 would make NaN of what lies beyond its largest value."""
    return (x / scale).clamp_(-form.max_value, form.max_value).to(form.dtype)

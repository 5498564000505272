"""One grid, three families: codes on it, values of codes, and rounding to it, whichever format the codes have.

Everything works on float32 groups [rows, groups, size] with scales (and zero points) that broadcast. Codes here are
the stored ones: uint8, an integer's code less the format's smallest, a float's bit pattern, a codebook's position; zero
points are stored codes too. `rounded` gives the very bits that `values(codes(...))` gives, without going through codes.
Inputs are left as they are.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from strop.numerics import codebook
from strop.numerics.formats import CodebookFormat, FloatFormat, Format, IntFormat
from strop.numerics.packing import unpack


def codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, form: Format) -> Tensor:
    """Stored codes of x, uint8."""
    if isinstance(form, IntFormat):
        places = _integer_places(x, scale, zero_point, form)
        return places.add_(-form.qmin if zero_point is None else zero_point).to(torch.uint8)
    if isinstance(form, FloatFormat):
        return _float_codes(_float_places(x, scale, form), form)
    return codebook.nearest_codes(x, scale, form)


def noisy_codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, form: Format, noise: Tensor) -> Tensor:
    """Stored codes of one of the two neighbours of x, the upper one with the share of the way that x has gone to it.

    Over many draws the mean of the values is x, wherever the grid does not clip it; a value on the grid keeps its code.

    Args:
        x: float32 [rows, groups, size].
        scale: Broadcasts with x.
        zero_point: Stored codes, or None.
        form: The number format of the codes.
        noise: Uniform in [0, 1), the shape of x.
    """
    places = x / scale
    if isinstance(form, IntFormat):
        below = places.floor()
        below += noise < places.sub_(below)
        below += -form.qmin if zero_point is None else zero_point
        return below.clamp_(0, form.steps).to(torch.uint8)
    levels, level_codes = _ascending(form, x.device)
    places.nan_to_num_(0.0).clamp_(levels[0], levels[-1])  # a block of zeros has a scale of zero
    below = torch.bucketize(places, levels, right=True).sub_(1).clamp_(max=levels.numel() - 2)
    low, high = levels[below], levels[below + 1]
    below += noise < (places - low) / (high - low)
    return level_codes[below]


@functools.cache
def _ascending(form: FloatFormat | CodebookFormat, device: torch.device) -> tuple[Tensor, Tensor]:
    """The finite values of a format, ascending, each once, float32, and the codes that they have, uint8."""
    levels = torch.tensor(sorted(set(form.values())), dtype=torch.float32, device=device)
    one = torch.ones(1, 1, 1, device=device)
    return levels, codes(levels.view(1, 1, -1), one, None, form).view(-1)


def values(stored: Tensor, scale: Tensor, zero_point: Tensor | None, form: Format) -> Tensor:
    """What stored codes stand for, float32."""
    if isinstance(form, IntFormat):
        return _places_of(stored, zero_point, form).mul_(scale)
    if isinstance(form, FloatFormat):
        return _floats_of(stored, form).mul_(scale)
    return codebook.level_values(stored, scale, form)


def packed_values(
    packed: Tensor, groups: int, size: int, scale: Tensor, zero_point: Tensor | None, form: Format
) -> Tensor:
    """`values` of packed rows: uint8 [rows, bytes] to float32 [rows, groups, size]."""
    if isinstance(form, CodebookFormat) and form.bits == 4 and groups * size == 2 * packed.shape[1]:
        return codebook.packed_level_values(packed, scale, form)
    stored = unpack(packed, form.bits, groups * size)
    return values(stored.view(-1, groups, size), scale, zero_point, form)


def rounded(x: Tensor, scale: Tensor, value_scale: Tensor, zero_point: Tensor | None, form: Format) -> Tensor:
    """The values of the grid nearest to x, float32: bitwise `values(codes(x, scale), value_scale)`.

    The two scales differ under double quantization alone, where codes are chosen before the scales are rounded.
    """
    if isinstance(form, IntFormat):
        return _integer_places(x, scale, zero_point, form).mul_(value_scale)
    if isinstance(form, FloatFormat):
        return _float_places(x, scale, form).mul_(value_scale)
    return codebook.level_values(codebook.nearest_codes(x, scale, form), value_scale, form)


def inside(x: Tensor, scale: Tensor, zero_point: Tensor | None, form: Format) -> Tensor:
    """Where the grid does not clip x: within half a step of an integer's ends, else within the largest level. Bool."""
    places = x / scale
    if not isinstance(form, IntFormat):
        return places.abs_() <= (form.max_value if isinstance(form, FloatFormat) else 1.0)
    return _unclipped(places, zero_point, form)


def rounded_and_inside(
    x: Tensor, scale: Tensor, value_scale: Tensor, zero_point: Tensor | None, form: Format
) -> tuple[Tensor, Tensor]:
    """`rounded` and `inside`, bit for bit; of integers with one division for both."""
    if not isinstance(form, IntFormat):
        return rounded(x, scale, value_scale, zero_point, form), inside(x, scale, zero_point, form)
    places = x / scale
    values = _within(places.round(), zero_point, form).mul_(value_scale)
    return values, _unclipped(places, zero_point, form)


def _unclipped(places: Tensor, zero_point: Tensor | None, form: IntFormat) -> Tensor:
    """Where x / scale, which is written over, lies within half a step of the grid's ends."""
    places += -form.qmin if zero_point is None else zero_point
    return places.sub_(form.steps / 2).abs_() <= (form.steps + 1) / 2  # one comparison: they are the slow part


def _integer_places(x: Tensor, scale: Tensor, zero_point: Tensor | None, form: IntFormat) -> Tensor:
    """Steps from zero, clamp(round(x / scale) + z, qmin, qmax) - z, float32; a zero is 0.0, never -0.0."""
    return _within((x / scale).round_(), zero_point, form)


def _within(places: Tensor, zero_point: Tensor | None, form: IntFormat) -> Tensor:
    """round(x / scale), which is written over, within the grid."""
    if zero_point is None:
        return places.add_(0.0).clamp_(form.qmin, form.qmax)  # -0.0 becomes the 0.0 that a code stands for
    places += zero_point
    places.clamp_(0, form.steps)
    places -= zero_point
    return places


def _places_of(stored: Tensor, zero_point: Tensor | None, form: IntFormat) -> Tensor:
    """Steps from zero of stored codes, float32."""
    if zero_point is None:
        # uint8 wraps around, so that its bits read as int8 are the signed difference: one byte a code, not four.
        return (stored - -form.qmin).view(torch.int8).float() if form.signed else stored.float()
    return stored.float().sub_(zero_point)


def _float_places(x: Tensor, scale: Tensor, form: FloatFormat) -> Tensor:
    """Values of the float format nearest to x / scale, saturated, float32.

    Rounds to a multiple of 2^(power - mantissa_bits), the power read off the float32's own exponent field: exact, and
    thirty times as fast as torch's casts to 8-bit floats (some versions of which make NaN of what is beyond 448).
    """
    places = (x / scale).clamp_(-form.max_value, form.max_value)
    powers = (places.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^power, 0 for float32's subnormals
    steps = powers.clamp_(min=form.min_normal).mul_(2.0**-form.mantissa_bits)
    return places.div_(steps).round_().mul_(steps)


def _float_codes(places: Tensor, form: FloatFormat) -> Tensor:
    """Codes of values of the float format, uint8: the bits of a float16 of the same exponent field, its low end cut."""
    bits = places.mul(2.0 ** (form.bias - 15)).half().view(torch.int16)
    codes = (bits >> (10 - form.mantissa_bits)) & ((1 << (form.bits - 1)) - 1)
    return (codes | (bits >> (16 - form.bits)) & (1 << (form.bits - 1))).to(torch.uint8)


def _floats_of(stored: Tensor, form: FloatFormat) -> Tensor:
    """The values of float codes, float32: their bits moved into a float16, whose bias is the larger."""
    bits, sign = stored.to(torch.int16), 1 << (form.bits - 1)
    halves = (bits & (sign - 1)) << (10 - form.mantissa_bits) | (bits & sign) << (16 - form.bits)
    return halves.view(torch.float16).float().mul_(2.0 ** (15 - form.bias))

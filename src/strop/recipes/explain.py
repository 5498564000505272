"""`explain`: a number's bits in any format, an affine mapping worked step by step, a weight's histogram on a grid.

Every figure comes from `strop.numerics`, the code that quantizes models; what is written here are the steps in words. A
result knows itself as text (`lines()`) and as plain data (`to_dict()`). Pictures of weights are drawn by
`strop.recipes.tensor_picture`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strop.errors import FormatError, UsageError, nearest
from strop.numerics.affine import choose_scale, dequantize, quantize
from strop.numerics.codebook import nearest_codes
from strop.numerics.formats import FORMATS, CodebookFormat, FloatBits, FloatFormat, Format, IntFormat
from strop.numerics.scheme import Mode, parse_format
from strop.recipes.tensor_picture import TensorExplanation, explain_tensor

__all__ = [
    "AffineExplanation",
    "BitsExplanation",
    "TensorExplanation",
    "explain_affine",
    "explain_bits",
    "explain_tensor",
]

# --- one number -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BitsExplanation:
    """One number in one format.

    `fields` are the parts of the code by name, each a string of zeros and ones; `meanings` say in words what each part
    contributes, and `formula` how they give `stored`. `below` and `above` are the format's values next to `stored`;
    None where there is none.
    """

    value: float
    format: str
    fields: tuple[tuple[str, str], ...]
    meanings: tuple[str, ...]
    formula: str
    stored: float
    below: float | None
    above: float | None

    @property
    def bits(self) -> str:
        """The whole code."""
        return "".join(part for _, part in self.fields)

    @property
    def error(self) -> float:
        """What storing changed: stored - value; NaN where either is."""
        return 0.0 if self.stored == self.value else self.stored - self.value

    def lines(self) -> list[str]:
        """Return the explanation as text."""
        widths = ", ".join(f"{len(part)} {name}" for name, part in self.fields)
        wide = max(len(part) for _, part in self.fields)
        lines = [f"{_text(self.value)} in {self.format}: {widths} bit{'s' if len(self.bits) > 1 else ''}"]
        for (name, part), meaning in zip(self.fields, self.meanings, strict=True):
            lines.append(f"  {name:<12} {part:<{wide}}  {meaning}")
        lines.append(f"  {'bits':<12} {' '.join(part for _, part in self.fields)}")
        lines.append(f"  {'stored':<12} {self.formula}")
        lines.append(f"  {'error':<12} {self._error_text()}")
        beside = [f"{_text(self.below)} below" if self.below is not None else "none below"]
        beside.append(f"{_text(self.above)} above" if self.above is not None else "none above")
        lines.append(f"  {'neighbours':<12} {', '.join(beside)}")
        return lines

    def _error_text(self) -> str:
        if not math.isfinite(self.error):
            return "the format cannot hold this number"
        share = f", {abs(self.error / self.value):.2g} of the value" if self.value and self.error else ""
        return f"{_text(self.error)}{share}"

    def to_dict(self) -> dict[str, Any]:
        """Return every part; infinities and NaN as text, since JSON has none."""
        parts: dict[str, Any] = {"value": _plain(self.value), "format": self.format} | dict(self.fields)
        return parts | {
            "bits": self.bits,
            "stored": _plain(self.stored),
            "error": _plain(self.error),
            "below": _plain(self.below),
            "above": _plain(self.above),
        }


def explain_bits(value: float, format: str) -> BitsExplanation:
    """Write a number in a format and show the bits.

    Args:
        value: the number; it is rounded to the nearest that the format has.
        format: a name of `FORMATS`. Integer formats show two's complement without any scale; codebooks the nearest
        level.

    Raises:
        FormatError: the format is unknown, or an integer or a level was asked for NaN.
    """
    form = _format(format)
    if isinstance(form, FloatFormat) and (form.has_nan or not math.isnan(value)):
        return _float_bits(form, value)
    if not math.isfinite(value):
        raise FormatError(
            f"{form.name} holds finite numbers only, got {value}; floats (fp16, fp8_e5m2) have infinity and NaN"
        )
    if isinstance(form, FloatFormat):
        return _float_bits(form, value)
    return _int_bits(form, value) if isinstance(form, IntFormat) else _level_bits(form, value)


def _format(name: str) -> Format:
    form = FORMATS.get(name.strip().lower())
    if form is None:
        try:
            element = parse_format(name).scheme.format.name
        except FormatError:
            element = ""
        if element:
            raise FormatError(
                f"{name!r} is a grid with scales, not a number format; its codes are {element}: explain bits --format "
                f"{element}, or explain tensor for what it does to a weight."
            )
        raise FormatError(
            f"unknown number format {name!r}{nearest(name.lower(), FORMATS)}; there are {', '.join(FORMATS)}."
        )
    return form


def _float_bits(form: FloatFormat, value: float) -> BitsExplanation:
    found = form.decompose(value)
    sign, exponent, significand = found.fields
    ones = (1 << form.mantissa_bits) - 1
    special = not math.isfinite(found.stored)
    if special:
        power = "all ones, which with this significand means infinity or NaN"
        fraction = "no digits of a number here"
        formula = _text(found.stored)
    else:
        lead, field = (1, found.exponent) if found.exponent else (0, 1)
        power = f"{found.exponent} - bias {form.bias} = {found.power}, so times 2^{found.power}"
        if not found.exponent:
            power = f"0: a subnormal number or zero, times 2^({field} - {form.bias}) = 2^{found.power}"
        fraction = f"{lead} + {found.significand} / {ones + 1} = {_exact(found.fraction)}"
        formula = f"{'-' if found.sign else ''}2^{found.power} * {_exact(found.fraction)} = {_exact(found.stored)}"
    below, above = _float_neighbours(found)
    return BitsExplanation(
        value=value,
        format=form.name,
        fields=(("sign", sign), ("exponent", exponent), ("significand", significand)),
        meanings=("negative" if found.sign else "positive", power, fraction),
        formula=formula,
        stored=found.stored,
        below=below,
        above=above,
    )


def _float_neighbours(found: FloatBits) -> tuple[float | None, float | None]:
    """Return the finite values next to the stored one, below and above."""
    form = found.format
    if math.isnan(found.stored):
        return None, None
    if math.isinf(found.stored):
        return (form.max_value, None) if found.stored > 0 else (None, -form.max_value)

    def moved(by: int) -> float | None:
        # Magnitudes are numbered in order by exponent and significand taken as one integer.
        place = (found.exponent << form.mantissa_bits) + found.significand
        place = (-place if found.sign else place) + by
        exponent, significand = divmod(abs(place), 1 << form.mantissa_bits)
        if exponent >> form.exponent_bits:
            return None
        value = form.value_of(int(place < 0), exponent, significand)
        return value if math.isfinite(value) else None

    return moved(-1), moved(1)


def _int_bits(form: IntFormat, value: float) -> BitsExplanation:
    code = min(max(round(value), form.qmin), form.qmax)
    pattern = f"{code % (1 << form.bits):0{form.bits}b}"
    kind = "two's complement" if form.signed else "unsigned"
    meaning = f"{kind}: whole numbers from {form.qmin} to {form.qmax}; a scale maps others (explain affine)"
    return BitsExplanation(
        value=value,
        format=form.name,
        fields=(("code", pattern),),
        meanings=(meaning,),
        formula=f"round({_text(value)}), kept within [{form.qmin}, {form.qmax}] = {code}",
        stored=float(code),
        below=float(code - 1) if code > form.qmin else None,
        above=float(code + 1) if code < form.qmax else None,
    )


def _level_bits(form: CodebookFormat, value: float) -> BitsExplanation:
    code = int(nearest_codes(torch.tensor([[[value]]]), torch.ones(1, 1, 1), form).item())
    levels = sorted(set(form.levels))
    place = bisect_left(levels, form.levels[code])
    return BitsExplanation(
        value=value,
        format=form.name,
        fields=(("code", f"{code:0{form.bits}b}"),),
        meanings=(f"level {code} of {len(form.levels)} in [-1, 1]; a block's largest magnitude is its scale",),
        formula=f"level[{code}] = {_text(form.levels[code])}",
        stored=form.levels[code],
        below=levels[place - 1] if place else None,
        above=levels[place + 1] if place + 1 < len(levels) else None,
    )


# --- an affine mapping ------------------------------------------------------------------------------------------------

_MODES = {"symmetric": Mode.SYMMETRIC, "symmetric-full": Mode.SYMMETRIC_FULL, "asymmetric": Mode.ASYMMETRIC}
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class AffineExplanation:
    """A value sent through an affine grid and back; `steps` are the calculations in words, a name and a text each."""

    xmin: float
    xmax: float
    format: str
    scheme: str
    value: float
    scale: float
    zero_point: int
    code: int
    restored: float
    clipped: bool
    steps: tuple[tuple[str, str], ...]

    @property
    def error(self) -> float:
        """What the way there and back changed: restored - value."""
        return self.restored - self.value

    def lines(self) -> list[str]:
        """Return the explanation as text."""
        title = f"{self.scheme} {self.format} over [{_text(self.xmin)}, {_text(self.xmax)}], value {_text(self.value)}"
        return [title, *(f"  {name:<11} {text}" for name, text in self.steps)]

    def to_dict(self) -> dict[str, Any]:
        """Return scale, zero point, code, restored value and what was asked."""
        return {
            "scale": self.scale,
            "zero_point": self.zero_point,
            "code": self.code,
            "restored": self.restored,
            "error": self.error,
            "clipped": self.clipped,
            "value": self.value,
            "range": [self.xmin, self.xmax],
            "format": self.format,
            "scheme": self.scheme,
        }


def explain_affine(xmin: float, xmax: float, format: str, scheme: str, value: float) -> AffineExplanation:
    """Work an affine quantization of one value, step by step.

    The scale is kept in float32, as a per-channel scale is in a file, and printed with the fewest digits that mean it.

    Args:
        xmin: smallest value that must be held; the range is widened to contain zero, so that zero is exact.
        xmax: largest value.
        format: int2 to int8, uint2 to uint8.
        scheme: symmetric, symmetric-full or asymmetric.
        value: the value to send through and back.

    Raises:
        UsageError: range or value are not finite, or the range runs backwards; all problems are named.
        FormatError: the format is no integer format, the scheme is unknown, or the two do not go together.
    """
    mode, form = _mode_and_format(scheme, format)
    _check_range(xmin, xmax, value)
    scale, zero_point = choose_scale(xmin, xmax, form, mode, where=f"range [{_text(xmin)}, {_text(xmax)}]")
    x = torch.tensor(value, dtype=torch.float32)
    codes = quantize(x, scale, zero_point, form)
    zero = 0 if zero_point is None else int(zero_point.item())
    step = _shortest(scale)
    unclipped = round(float((x / scale).item())) + zero
    code, restored = int(codes.item()), _shortest(dequantize(codes, scale, zero_point))
    low, high = min(xmin, 0.0), max(xmax, 0.0)
    steps = [("codes", f"{form.name} holds {form.qmin} to {form.qmax}: {form.steps} steps")]
    if (low, high) == (xmin, xmax):
        steps.append(("range", f"[{_text(low)}, {_text(high)}] contains zero, so zero will be exact"))
    else:
        steps.append(
            ("range", f"widened to [{_text(low)}, {_text(high)}]: it must contain zero, so that zero is exact")
        )
    steps.append(("scale", f"{_scale_formula(low, high, form, mode)} = {_text(step)}"))
    if zero_point is None:
        steps.append(("zero point", "0: the scheme is symmetric, code 0 stands for 0.0"))
    else:
        raw = f"round({form.qmin} - {_signed(low)} / {_text(step)})"
        steps.append(("zero point", f"round(qmin - xmin / scale) = {raw} = {zero}"))
    places = f"round({_text(value)} / {_signed(step)}) + {_signed(zero)} = {unclipped - zero} + {_signed(zero)}"
    steps.append(("code", f"round(value / scale) + zero point = {places} = {unclipped}"))
    if code != unclipped:
        steps.append(("clipped", f"{unclipped} lies outside [{form.qmin}, {form.qmax}], so the code is {code}"))
    steps.append(
        ("restored", f"(code - zero point) * scale = ({code} - {_signed(zero)}) * {_signed(step)} = {_text(restored)}")
    )
    bound = (
        "beyond half a step: the value was clipped" if code != unclipped else f"half a step is {_text(abs(step) / 2)}"
    )
    steps.append(("error", f"restored - value = {_text(restored - value)}; {bound}"))
    return AffineExplanation(
        xmin=xmin,
        xmax=xmax,
        format=form.name,
        scheme=scheme.strip().lower().replace("_", "-"),
        value=value,
        scale=step,
        zero_point=zero,
        code=code,
        restored=restored,
        clipped=code != unclipped,
        steps=tuple(steps),
    )


def _mode_and_format(scheme: str, format: str) -> tuple[Mode, IntFormat]:
    mode = _MODES.get(scheme.strip().lower().replace("_", "-"))
    form = FORMATS.get(format.strip().lower())
    problems = []
    if mode is None:
        problems.append(f"unknown scheme {scheme!r}{nearest(scheme, _MODES)}; there are {', '.join(_MODES)}.")
    if not isinstance(form, IntFormat):
        known = [name for name, other in FORMATS.items() if isinstance(other, IntFormat)]
        problems.append(f"{format!r} is no integer format{nearest(format, known)}; there are {', '.join(known)}.")
    if mode is None or not isinstance(form, IntFormat):
        raise FormatError(" ".join(problems))
    return mode, form


def _check_range(xmin: float, xmax: float, value: float) -> None:
    problems = [
        f"{name} is {number}; a number that float32 holds is needed."
        for name, number in (("xmin", xmin), ("xmax", xmax), ("value", value))
        if not math.isfinite(number) or abs(number) > _LARGEST
    ]
    if xmin > xmax:
        problems.append(f"the range runs from {_text(xmin)} down to {_text(xmax)}; give the smaller number first.")
    if problems:
        raise UsageError(" ".join(problems))


def _scale_formula(low: float, high: float, form: IntFormat, mode: Mode) -> str:
    if low == high:
        return "nothing but zero to hold, any scale does"
    if mode is Mode.SYMMETRIC_FULL:
        return f"value of largest magnitude / qmin = {_text(high if high > -low else low)} / {form.qmin}"
    if mode is Mode.SYMMETRIC and form.signed:
        return f"largest magnitude / ((2^{form.bits} - 1) / 2) = {_text(max(-low, high))} / {_text(form.steps / 2)}"
    return f"(xmax - xmin) / (qmax - qmin) = ({_text(high)} - {_signed(low)}) / ({form.qmax} - {_signed(form.qmin)})"


# --- numbers as text --------------------------------------------------------------------------------------------------


def _text(number: float | None) -> str:
    """Return a number with up to 10 digits, without a trailing `.0`."""
    return "none" if number is None else f"{number + 0.0:.10g}"  # + 0.0: minus zero is zero


def _exact(number: float) -> str:
    """Return a number with every digit it has, up to 17."""
    return f"{number:.17g}"


def _signed(number: float) -> str:
    """Return a number as it stands after an operator: a negative one in brackets."""
    return f"({_text(number)})" if number < 0 else _text(number)


def _shortest(single: Tensor) -> float:
    """Return a float32 as the decimal number with the fewest digits that rounds to it."""
    return float(str(np.float32(single.item())))


def _plain(number: float | None) -> float | str | None:
    return number if number is None or math.isfinite(number) else str(number)

"""Number formats: what each can hold, and how a real number is written in it.

Three families, each a frozen value: `IntFormat` (the codes of an affine grid), `FloatFormat` (sign, exponent,
significand) and `CodebookFormat` (a short table of levels in [-1, 1]). `FORMATS` names them all; a new format is a new
instance.

Nothing here touches a weight: scales and zero points are the business of `affine`, the choice among them of `scheme`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class IntFormat:
    """Integers of `bits` bits, two's complement when `signed`.

    >>> IntFormat("int4", 4, signed=True).values()
    range(-8, 8)
    >>> IntFormat("uint8", 8, signed=False).qmax
    255
    """

    name: str
    bits: int
    signed: bool

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return self.qmin + self.steps

    @property
    def steps(self) -> int:
        """Number of steps from the smallest code to the largest: 2^bits - 1."""
        return (1 << self.bits) - 1

    def values(self) -> range:
        """Every code, in order."""
        return range(self.qmin, self.qmax + 1)


@dataclass(frozen=True)
class CodebookFormat:
    """A table of `2^bits` levels in [-1, 1]; a code is a position in the table, the scale a block's largest magnitude.

    The levels keep the order in which files number them, which need not be ascending (FP4's is not).
    """

    name: str
    levels: tuple[float, ...]

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return (len(self.levels) - 1).bit_length()

    def values(self) -> tuple[float, ...]:
        """Every level, in the order of the codes."""
        return self.levels


@dataclass(frozen=True)
class FloatBits:
    """One number as a float format stores it: the raw bit fields and the value that they mean.

    `exponent` and `significand` are the raw fields; the value is (-1)^sign * 2^power * fraction, the fraction being
    1.significand for normal numbers and 0.significand for subnormal ones.
    """

    format: FloatFormat
    given: float
    sign: int
    exponent: int
    significand: int

    @property
    def bits(self) -> str:
        """The whole code as a string of zeros and ones, the sign first."""
        return "".join(self.fields)

    @property
    def fields(self) -> tuple[str, str, str]:
        """Sign, exponent and significand, each as a string of zeros and ones."""
        form = self.format
        return (
            str(self.sign),
            f"{self.exponent:0{form.exponent_bits}b}",
            f"{self.significand:0{form.mantissa_bits}b}",
        )

    @property
    def code(self) -> int:
        """The whole code as an unsigned integer."""
        return int(self.bits, 2)

    @property
    def power(self) -> int:
        """The power of two that the exponent field means (the smallest one for subnormal numbers)."""
        return max(self.exponent, 1) - self.format.bias

    @property
    def fraction(self) -> float:
        """The significand as a number: in [1, 2) for normal numbers, in [0, 1) for subnormal ones."""
        return (self.exponent > 0) + self.significand / (1 << self.format.mantissa_bits)

    @property
    def stored(self) -> float:
        """The value that is stored, exactly (an infinity where the format overflowed and has one)."""
        return self.format.value_of(self.sign, self.exponent, self.significand)

    @property
    def error(self) -> float:
        """What storing changed: `stored - given`."""
        return self.stored - self.given


@dataclass(frozen=True)
class FloatFormat:
    """A binary float: 1 sign bit, `exponent_bits`, `mantissa_bits`, bias 2^(exponent_bits - 1) - 1 (IEEE 754).

    `has_infinity=False` is the `fn` kind of OCP's 8-bit float specification (e4m3): the top exponent holds ordinary
    numbers, and only the code of all ones is NaN; with `has_nan=False` (e2m1, the element of MXFP4) that code is a
    number too. `dtype` is torch's name for the same format, None where torch has none for a single number.

    >>> FORMATS["fp16"].decompose(7.32).fields
    ('0', '10001', '1101010010')
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    dtype: torch.dtype | None
    has_infinity: bool = True
    has_nan: bool = True

    @property
    def bits(self) -> int:
        """Bits of one number."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field to get the power of two."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def max_value(self) -> float:
        """The largest finite value."""
        return self.value_of(0, *self._largest)

    @property
    def min_normal(self) -> float:
        """The smallest positive value with a full significand."""
        return 2.0 ** (1 - self.bias)

    @property
    def min_subnormal(self) -> float:
        """The smallest positive value of all."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    def values(self) -> tuple[float, ...]:
        """Every finite value, ascending, each once; only for formats of at most 16 bits.

        Raises:
            ValueError: The format has more than 16 bits, so the list would not fit on any screen or in any memory.
        """
        if self.bits > 16:
            raise ValueError(f"{self.name} has 2^{self.bits} codes; list the values of a format of at most 16 bits")
        positive = {
            self.value_of(0, exponent, significand)
            for exponent in range(1 << self.exponent_bits)
            for significand in range(1 << self.mantissa_bits)
        }
        finite = sorted(value for value in positive if math.isfinite(value))
        return (*(-value for value in reversed(finite) if value), *finite)

    def value_of(self, sign: int, exponent: int, significand: int) -> float:
        """The value of the raw bit fields, exactly."""
        top = (1 << self.exponent_bits) - 1
        ones = (1 << self.mantissa_bits) - 1
        if exponent == top and self.has_infinity:
            magnitude = math.nan if significand else math.inf
        elif exponent == top and significand == ones and self.has_nan:
            magnitude = math.nan
        else:
            whole = significand + ((1 << self.mantissa_bits) if exponent else 0)
            magnitude = math.ldexp(whole, max(exponent, 1) - self.bias - self.mantissa_bits)
        return -magnitude if sign else magnitude

    def decompose(self, x: float) -> FloatBits:
        """Write `x` in this format, rounding to nearest, ties to even, in one step.

        A magnitude that rounds beyond `max_value` becomes infinity; in a format without infinity it stays `max_value`
        (OCP's saturating conversion).

        Raises:
            ValueError: `x` is NaN and the format has none.
        """
        sign = int(math.copysign(1.0, x) < 0)
        top = (1 << self.exponent_bits) - 1
        ones = (1 << self.mantissa_bits) - 1
        overflow = (top, 0) if self.has_infinity else self._largest
        if math.isnan(x):
            if not self.has_nan:
                raise ValueError(f"{self.name} has no NaN")
            return FloatBits(self, x, sign, top, 1 << (self.mantissa_bits - 1) if self.has_infinity else ones)
        if math.isinf(x):
            return FloatBits(self, x, sign, *overflow)
        magnitude = Fraction(abs(x))
        power = max(math.frexp(abs(x))[1] - 1, 1 - self.bias)  # frexp's fraction is in [0.5, 1)
        whole = round(magnitude / Fraction(2) ** (power - self.mantissa_bits))  # ties to even
        if whole >= 2 << self.mantissa_bits:  # rounded up to the next power of two
            whole, power = whole >> 1, power + 1
        exponent = power + self.bias if whole >> self.mantissa_bits else 0
        significand = whole & ones
        if exponent > top or not math.isfinite(self.value_of(0, exponent, significand)):
            exponent, significand = overflow
        return FloatBits(self, x, sign, exponent, significand)

    @property
    def _largest(self) -> tuple[int, int]:
        """Exponent and significand of `max_value`."""
        top = (1 << self.exponent_bits) - 1
        ones = (1 << self.mantissa_bits) - 1
        if self.has_infinity:
            return top - 1, ones
        return top, ones - 1 if self.has_nan else ones


Format = IntFormat | FloatFormat | CodebookFormat


def _nf4_levels() -> tuple[float, ...]:
    """NF4's levels: quantiles of N(0, 1), seven below zero, zero, eight above, divided by the largest.

    QLoRA (Dettmers and others, 2023), section 3. The paper's own formula gives only four of the sixteen; the tail
    probability 0.9677083 and probabilities spaced evenly in float32, as bitsandbytes has them, give all sixteen.
    """
    quantile = NormalDist().inv_cdf
    cpu = torch.device("cpu")
    above = [quantile(p.item()) for p in torch.linspace(0.9677083, 0.5, 9, dtype=torch.float32, device=cpu)[:-1]]
    below = [-quantile(p.item()) for p in torch.linspace(0.9677083, 0.5, 8, dtype=torch.float32, device=cpu)[:-1]]
    levels = torch.tensor(sorted([*below, 0.0, *above]), dtype=torch.float32, device=cpu)
    return tuple(level.item() for level in levels / levels.max())


def _fp4_levels() -> tuple[float, ...]:
    """FP4's levels as bitsandbytes numbers them: a sign bit, then 0, 1/16, 8, 12, 4, 6, 2, 3 twelfths in float32."""
    magnitudes = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], dtype=torch.float32, device="cpu")
    return tuple(level.item() for level in torch.cat([magnitudes, -magnitudes]) / 12.0)


def _all_formats() -> dict[str, Format]:
    e4m3 = FloatFormat("fp8", 4, 3, torch.float8_e4m3fn, has_infinity=False)
    formats: dict[str, Format] = {
        "fp32": FloatFormat("fp32", 8, 23, torch.float32),
        "fp16": FloatFormat("fp16", 5, 10, torch.float16),
        "bf16": FloatFormat("bf16", 8, 7, torch.bfloat16),
        "fp8": e4m3,
        "fp8_e4m3": e4m3,
        "fp8_e5m2": FloatFormat("fp8_e5m2", 5, 2, torch.float8_e5m2),
        "mxfp4": FloatFormat("mxfp4", 2, 1, None, has_infinity=False, has_nan=False),
    }
    for bits in range(2, 9):
        formats[f"int{bits}"] = IntFormat(f"int{bits}", bits, signed=True)
    for bits in range(2, 9):
        formats[f"uint{bits}"] = IntFormat(f"uint{bits}", bits, signed=False)
    formats["nf4"] = CodebookFormat("nf4", _nf4_levels())
    formats["fp4"] = CodebookFormat("fp4", _fp4_levels())
    return formats


FORMATS: Mapping[str, Format] = MappingProxyType(_all_formats())
"""Every number format by name; `fp8` and `fp8_e4m3` are one, and `mxfp4` is the element of MXFP4, e2m1."""

"""The schemes that every property is tested on, and weights that are hard to quantize."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from strop.numerics import FloatFormat, Mode, Scheme, parse_scheme
from strop.numerics.groups import split

INTEGER_TEXTS = [
    *(f"int{bits}" for bits in range(2, 9)),
    *(f"int{bits}-g8" for bits in range(2, 9)),
    *(f"int{bits}-g8-{mode}" for bits in range(2, 9) for mode in ("asym", "full")),
    "int4-asym",
    "int3-full",
    "int8-tensor",
    "int4-tensor-asym",
    "int2-tensor-full",
    "int4-g8-sf32",
    "int4-g8-sbf16",
    "int8-g8-asym-sbf16",
    "int5-sf16",
    "uint4-g8-asym",
    "uint8-asym",
]
CODEBOOK_TEXTS = ["nf4", "nf4-dq", "fp4", "fp4-dq", "nf4-g32", "fp4-g128-dq"]
FLOAT_TEXTS = ["fp8", "fp8_e5m2", "fp8-g8", "fp8-tensor"]
ALL_TEXTS = [*INTEGER_TEXTS, *CODEBOOK_TEXTS, *FLOAT_TEXTS]

COLUMNS = 24


def stored_scale(scheme: Scheme, scale: Tensor) -> Tensor:
    """Scales as stored, in float64 and in the shape that multiplies a weight cut into groups."""
    spread = scale.view(-1, 1, 1) if scale.ndim == 1 else scale.unsqueeze(-1)
    return spread.double()


def ideal_scale(scheme: Scheme, groups: Tensor) -> Tensor:
    """The scale before it is rounded to its dtype, by the documented formulas, in float64 [rows, groups, 1]."""
    x = groups.double()
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    if scheme.granularity.value == "tensor":
        low, high = low.min().view(1, 1, 1), high.max().view(1, 1, 1)
    magnitude = torch.maximum(-low, high)
    if isinstance(scheme.format, FloatFormat):
        return magnitude / torch.finfo(scheme.format.dtype).max
    if scheme.mode is Mode.ASYMMETRIC:
        return (high - low) / (2**scheme.bits - 1)
    if scheme.mode is Mode.SYMMETRIC:
        return magnitude / ((2**scheme.bits - 1) / 2)
    return torch.where(high > -low, -1.0, 1.0) * magnitude / 2 ** (scheme.bits - 1)


def overflows(weight: Tensor, scheme: Scheme) -> bool:
    """Whether a scale of this weight is too large for float16 (from 65520 on it would round to infinity)."""
    is_half = scheme.scale_dtype == torch.float16
    return is_half and bool((ideal_scale(scheme, split(weight, scheme)).abs() >= 65520).any())


@st.composite
def hard_weights(draw: st.DrawFn, columns: int = COLUMNS) -> Tensor:
    """Weights [1 to 3, columns] from subnormal to 1e7, with constant, zero, one-sided and outlier rows."""
    rows = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    weight = torch.randn((rows, columns), generator=generator)
    for row in range(rows):
        kind = draw(st.sampled_from(["normal", "constant", "zero", "positive", "negative", "outlier", "mixed"]))
        if kind == "constant":
            weight[row] = 1.0
        elif kind == "zero":
            weight[row] = 0.0
        elif kind == "positive":
            weight[row] = weight[row].abs() + 0.5
        elif kind == "negative":
            weight[row] = -weight[row].abs() - 0.5
        elif kind == "outlier":
            weight[row, draw(st.integers(0, columns - 1))] = 1000.0
        elif kind == "mixed":
            weight[row, : columns // 2] = 0.0
        weight[row] *= draw(st.sampled_from([1e-42, 1e-38, 1e-20, 1e-9, 1e-6, 1e-5, 1e-3, 1.0, 300.0, 1e7]))
    return weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


def named(texts: list[str]) -> list[Scheme]:
    """The schemes of texts."""
    return [parse_scheme(text) for text in texts]

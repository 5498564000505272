"""Stochastic rounding: one of the two neighbours, without bias, and the same bits for the same seed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strop.methods import METHODS, rtn, stochastic
from strop.numerics import fake_quantize, pack, parse_scheme, quantize_tensor
from tests.numerics.schemes import hard_weights

TEXTS = ["int2-g32", "int4", "int4-g32-full", "int3-g32-asym", "int8-tensor", "uint8-asym"]
TEXTS += ["nf4", "fp4", "fp8", "fp8_e5m2", "mxfp4", "q4_k"]


def weight() -> Tensor:
    return torch.randn(4, 256, generator=torch.Generator().manual_seed(0))


def neighbours(text: str) -> tuple[Tensor, Tensor]:
    """The grid's values next to `weight()` below and above, each the other where the grid ends, by trying all codes."""
    quantized, x = quantize_tensor(weight(), parse_scheme(text)), weight()
    below, above = torch.full_like(x, -torch.inf), torch.full_like(x, torch.inf)
    for code in range(1 << quantized.scheme.bits):
        whole = torch.full((4, 256) if quantized.codes.ndim == 2 else (1024,), code)
        codes = pack(whole, quantized.scheme.bits)
        level = dataclasses.replace(quantized, codes=codes).dequantize()
        below = torch.where((level <= x) & (level > below), level, below)
        above = torch.where((level >= x) & (level < above), level, above)
    return torch.where(below.isinf(), above, below), torch.where(above.isinf(), below, above)


@pytest.mark.parametrize("text", TEXTS)
def test_only_the_two_neighbours_are_ever_chosen_and_their_mean_is_the_weight(text: str) -> None:
    """Five deviations of a mean of 300 draws; where the grid ends, there is its end alone."""
    scheme, x, draws = parse_scheme(text), weight(), 300
    below, above = neighbours(text)
    total = torch.zeros(4, 256, dtype=torch.float64)
    for seed in range(draws):
        rounded = stochastic(x, scheme, seed=seed).dequantize()
        assert ((rounded == below) | (rounded == above)).all()
        total += rounded
    gap, target = (above - below).double(), torch.minimum(torch.maximum(x, below), above)
    error = total / draws - target
    assert (error.abs() <= 5 * gap / 2 / draws**0.5 + 1e-6).all()
    assert error.mean().abs() <= 5 * gap.square().mean().sqrt() / 2 / (draws * 1024) ** 0.5
    nearest = rtn(x, scheme).dequantize()
    assert ((nearest == below) | (nearest == above)).all()
    assert (gap > 0).double().mean() > 0.9


@pytest.mark.parametrize("text", TEXTS)
def test_a_seed_and_a_name_give_the_same_bits_and_others_give_others(text: str) -> None:
    scheme = parse_scheme(text)
    first = stochastic(weight(), scheme, seed=3, where="layer")
    assert first.codes.equal(stochastic(weight(), scheme, seed=3, where="layer").codes)
    assert not first.codes.equal(stochastic(weight(), scheme, seed=4, where="layer").codes)
    assert not first.codes.equal(stochastic(weight(), scheme, seed=3, where="other").codes)


@given(hard_weights(256), st.sampled_from(TEXTS), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_what_lies_on_the_grid_stays_there(weight: Tensor, text: str, seed: int) -> None:
    """Up to float32's own rounding, which may leave a value a hair beside its level."""
    scheme = parse_scheme(text)
    weight = weight.float().clamp(-1e4, 1e4)
    once = quantize_tensor(weight, scheme)
    parts = {"super_scale": once.super_scale} if once.super_scale is not None else {"scale": once.scale}
    if once.zero_point is not None:
        parts["zero_point"] = once.zero_point.to(torch.int16) + (scheme.format.qmin if scheme.format.signed else 0)
    generator = torch.Generator().manual_seed(seed)
    again = quantize_tensor(once.dequantize(), scheme, generator=generator, **parts)
    step = once.scales().abs().amax()
    assert (again.dequantize() - once.dequantize()).abs().amax() <= 8 * step
    moved = again.dequantize() != once.dequantize()
    assert moved.float().mean() < 0.02


def test_a_value_is_rounded_up_as_often_as_it_has_gone_up() -> None:
    """0.3 of a step: 30% of many draws; the scale is that of a value of 7.5."""
    row = torch.full((1, 40001), 0.3)
    row[0, 0] = 7.5
    rounded = stochastic(row, parse_scheme("int4"))
    assert set(rounded.dequantize()[0, 1:].tolist()) == {0.0, 1.0}
    assert rounded.dequantize()[0, 1:].mean().item() == pytest.approx(0.3, abs=0.01)
    assert fake_quantize(row, parse_scheme("int4"))[0, 1:].count_nonzero() == 0


def test_the_table_holds_it() -> None:
    assert METHODS["stochastic"] is stochastic

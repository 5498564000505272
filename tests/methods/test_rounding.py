"""Rounding that trains: what was seen is what is stored, to the bit, and the gradients are those of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strop.methods.rounding import round_through, settled, steps_between, stored_scale, whole
from strop.numerics import fake_quantize, parse_scheme, quantize_tensor
from strop.numerics.groups import split, spread
from tests.numerics.schemes import ALL_TEXTS, COLUMNS


def setting(text: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """A weight, scales and zero points that are somewhat off its range, and offsets."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, COLUMNS, generator=generator)
    scheme = parse_scheme(text)
    plain = quantize_tensor(weight, scheme)
    scale = plain.scales() * (0.6 + 0.5 * torch.rand(plain.scales().shape, generator=generator))
    zero = None if plain.zero_point is None else plain.zero_point.float() + 0.3
    return weight, scale, zero, torch.rand(weight.shape, generator=generator) - 0.5


@pytest.mark.parametrize("text", ALL_TEXTS)
@pytest.mark.parametrize("moved", [False, True], ids=["weight", "weight and offset"])
def test_what_training_sees_is_what_is_stored(text: str, moved: bool) -> None:
    scheme = parse_scheme(text)
    weight, scale, zero, offset = setting(text)
    scale = stored_scale(scale, scheme)
    zero = None if zero is None else whole(zero, 0, 2**scheme.bits - 1)
    unit = steps_between(weight, scheme, scale)
    offset = offset if unit is None else offset * unit
    arguments = (weight, scheme, scale, zero, offset if moved else None)
    seen, stored = round_through(*arguments), settled(*arguments)
    assert torch.equal(seen.view(torch.int32), stored.dequantize().view(torch.int32))
    assert torch.equal(stored.scales(), scale) or scheme.double_quant
    assert moved != torch.equal(seen, round_through(weight, scheme, scale, zero))


@pytest.mark.parametrize("text", ["int3-g8", "int4-g8-asym", "int2-g8-full", "nf4", "fp8-g8"])
def test_the_plain_scales_give_plain_rounding(text: str) -> None:
    weight, *_ = setting(text)
    plain = quantize_tensor(weight, parse_scheme(text))
    zero = None if plain.zero_point is None else plain.zero_point.float()
    assert torch.equal(
        round_through(weight, plain.scheme, plain.scales(), zero), fake_quantize(weight, parse_scheme(text))
    )


@pytest.mark.parametrize("text", ["int2-g8", "int3-g8-asym", "int4-g8-full", "int3", "int4-tensor", "int8-tensor-asym"])
def test_gradients_are_those_of_the_formula_in_float64(text: str) -> None:
    """The oracle spells the formula out, each rounding as x + (round(x) - x) with the bracket held constant."""
    scheme = parse_scheme(text)
    weight, scale, zero, offset = setting(text)
    scale = stored_scale(scale, scheme)
    zero = None if zero is None else zero.round().clamp(0, 2**scheme.bits - 1)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    mine = {"w": weight, "s": scale, "v": offset} | ({} if zero is None else {"z": zero})
    mine = {name: x.clone().requires_grad_() for name, x in mine.items()}
    (round_through(mine["w"], scheme, mine["s"], mine.get("z"), mine["v"]) * direction).sum().backward()
    oracle = {name: x.detach().double().requires_grad_() for name, x in mine.items()}
    ratio = split(oracle["w"], scheme) / spread(oracle["s"]) + split(oracle["v"], scheme)
    rounded = ratio + (ratio.round() - ratio).detach()
    if zero is None:
        lowest = -(2 ** (scheme.bits - 1))
        codes = rounded.clamp(lowest, lowest + 2**scheme.bits - 1)
    else:
        codes = (rounded + spread(oracle["z"])).clamp(0, 2**scheme.bits - 1) - spread(oracle["z"])
    (codes * spread(oracle["s"]) * split(direction, scheme)).sum().backward()
    for name, expected in oracle.items():
        found = mine[name].grad
        assert found is not None
        assert expected.grad is not None
        assert expected.grad.abs().max() > 0
        torch.testing.assert_close(found.double(), expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["int4-g8", "int4", "int4-g8-sbf16", "fp8-g8", "nf4"])
def test_scales_are_rounded_as_they_are_stored_and_stay_usable(text: str) -> None:
    scheme = parse_scheme(text)
    scale = torch.tensor([0.1234567, -0.7654321, 1e-30, -1e-30, 1e30, 0.0], requires_grad=True)
    stored = stored_scale(scale, scheme)
    assert torch.equal(stored, stored.to(scheme.scale_dtype).float())
    assert torch.isfinite(stored).all()
    assert torch.equal(stored.sign(), scale.sign())
    assert torch.equal(stored[:2], scale[:2].to(scheme.scale_dtype).float())
    stored.sum().backward()
    assert scale.grad is not None
    assert torch.equal(scale.grad, torch.ones_like(scale))


def test_steps_between_values_are_those_of_the_format() -> None:
    assert steps_between(torch.ones(2, 8), parse_scheme("int4-g8"), torch.ones(2, 1)) is None
    weight = torch.tensor([[0.9, 0.05, -0.9, 0.0] * 8])
    unit = steps_between(weight, parse_scheme("nf4-g32"), torch.ones(1))
    assert unit is not None
    torch.testing.assert_close(unit[0, :3], torch.tensor([1 - 0.7229568, 0.0795803, 1 - 0.6961928]), rtol=0, atol=1e-6)
    unit = steps_between(torch.tensor([[300.0, 9.0, -0.002, 500.0]]), parse_scheme("fp8"), torch.ones(1, 1))
    assert unit is not None
    assert unit[0].tolist() == [32.0, 1.0, 2.0**-9, 32.0]

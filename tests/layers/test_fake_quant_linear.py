"""`FakeQuantLinear` trains through exactly the values that it is then stored as."""

from __future__ import annotations

import pytest
import torch

from strop.errors import FormatError
from strop.layers.base import dense_weight, linear_shape
from strop.layers.fake_quant_linear import FakeQuantLinear
from strop.numerics.affine import fake_quantize
from strop.numerics.scheme import parse_scheme

SCHEMES = ["int8", "int4-g32", "int4-g32-full", "int3-g32-asym", "int2-g32", "nf4", "nf4-dq"]


def _fake(scheme: str, dtype: torch.dtype = torch.float32) -> FakeQuantLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator).to(dtype)
    return FakeQuantLinear(weight, torch.randn(48, generator=generator).to(dtype), parse_scheme(scheme))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_converted_layer_holds_the_fake_values_bitwise_and_answers_the_same(scheme, dtype):
    fake = _fake(scheme, dtype)
    real = fake.to_quant_linear()
    seen = fake_quantize(fake.weight, fake.scheme)
    assert torch.equal(real.qtensor.dequantize(dtype), seen)
    assert torch.equal(dense_weight(fake), seen)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(real(x), fake(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_still_bitwise_after_a_training_step(scheme):
    fake = _fake(scheme)
    optimizer = torch.optim.AdamW(fake.parameters(), lr=0.05)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    before = fake.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        fake(x).square().sum().backward()
        optimizer.step()
    assert not torch.equal(fake.weight, before)
    assert torch.equal(
        fake.to_quant_linear().qtensor.dequantize(torch.float32), fake_quantize(fake.weight, fake.scheme)
    )


def test_forward_sees_the_rounded_weight_and_gradients_reach_the_trained_one():
    fake = _fake("int2-g32")
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    y = fake(x)
    assert not torch.allclose(y, x @ fake.weight.t() + fake.bias, atol=1e-3)
    y.sum().backward()
    assert torch.allclose(fake.weight.grad, x.sum(0).expand(48, 64), atol=1e-5)  # straight through: no value is clipped
    assert torch.allclose(fake.bias.grad, torch.full((48,), 4.0))


def test_bf16_activations_over_fp32_weights_see_what_the_converted_layer_computes():
    fake = _fake("int4-g32")
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(fake(x), fake.to_quant_linear()(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fake(x.float()), fake.to_quant_linear()(x.float()))


def test_a_shape_that_does_not_divide_is_refused():
    with pytest.raises(FormatError, match="31"):
        FakeQuantLinear(torch.randn(4, 31), None, parse_scheme("int4-g32"))


def test_shape_is_out_in():
    assert linear_shape(_fake("int8")) == (48, 64)

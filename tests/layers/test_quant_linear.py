"""`QuantLinear` computes what its dequantized weight computes, keeps only codes, and never loses a bit of them."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from strop.layers.base import dense_weight, linear_bias, linear_shape
from strop.layers.quant_linear import QuantLinear
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme

SCHEMES = ["int8", "int4-g32", "int4-g32-full", "int3-g32-asym", "int8-tensor", "nf4", "nf4-dq", "fp4", "fp8"]


def _layer(scheme: str, *, bias: bool = True, out: int = 48, in_features: int = 64, seed: int = 0) -> QuantLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, in_features, generator=generator)
    return QuantLinear(
        quantize_tensor(weight, parse_scheme(scheme)), torch.randn(out, generator=generator) if bias else None
    )


def _input(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_is_that_of_a_dense_layer_over_the_dequantized_weight(scheme, dtype):
    layer = _layer(scheme).to(dtype)
    x = _input(2, 5, 64, dtype=dtype)
    expected = functional.linear(x, layer.qtensor.dequantize(dtype), layer.bias)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_of_the_input_is_that_of_a_dense_layer(scheme):
    layer = _layer(scheme)
    dense = nn.Linear(64, 48)
    dense.weight.data, dense.bias.data = layer.dense_weight(), layer.bias.data.clone()
    ours, theirs = (_input(2, 5, 64).requires_grad_() for _ in range(2))
    upstream = _input(2, 5, 48)
    layer(ours).backward(upstream)
    dense(theirs).backward(upstream)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_bias_that_is_made_trainable_gets_its_gradient():
    layer = _layer("int4-g32")
    layer.bias.requires_grad_()
    layer(_input(2, 5, 64)).sum().backward()
    assert torch.allclose(layer.bias.grad, torch.full((48,), 10.0))


@pytest.mark.parametrize("scheme", ["int4-g32", "nf4-dq"])
def test_nothing_of_the_size_of_the_dense_weight_is_saved_for_backward(scheme):
    layer = _layer(scheme, out=96, in_features=128)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(_input(1, 2, 128).requires_grad_())
    assert saved, "the backward pass needs the codes"
    bytes_saved = sum(t.numel() * t.element_size() for t in saved)
    assert bytes_saved <= layer.qtensor.nbytes
    assert all(t.numel() < 96 * 128 for t in saved)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_casting_leaves_codes_and_scales_bit_equal(scheme, cast):
    layer = _layer(scheme)
    before = {name: tensor.clone() for name, tensor in layer.qtensor.tensors().items()}
    order = list(layer.state_dict())
    moved = nn.Sequential(layer)
    getattr(moved, cast)()
    after = layer.qtensor.tensors()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    assert layer.bias.dtype == {"bfloat16": torch.bfloat16, "half": torch.float16, "double": torch.float64}[cast]
    assert list(layer.state_dict()) == order


def test_casting_keeps_the_parameter_objects_that_an_optimizer_may_hold():
    layer = _layer("int4-g32")
    before = {name: id(parameter) for name, parameter in layer.named_parameters()}
    layer.to(torch.bfloat16)
    assert {name: id(parameter) for name, parameter in layer.named_parameters()} == before


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_goes_round_bit_for_bit(scheme):
    layer, other = _layer(scheme), _layer(scheme, seed=1)
    other.load_state_dict(layer.state_dict(), strict=True)
    for name, tensor in layer.qtensor.tensors().items():
        assert torch.equal(other.qtensor.tensors()[name], tensor)
    x = _input(3, 64)
    assert torch.equal(layer(x), other(x))


def test_weight_tensors_are_frozen_parameters_and_single_numbers_are_buffers():
    layer = _layer("nf4-dq")
    assert all(not parameter.requires_grad for parameter in layer.parameters())
    assert set(dict(layer.named_parameters())) == {"codes", "nested_codes", "nested_scale", "bias"}
    assert set(dict(layer.named_buffers())) == {"nested_offset"}


def test_under_autocast_it_computes_in_autocasts_dtype_forward_and_backward():
    layer = _layer("int4-g32")
    x = _input(2, 64).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = functional.linear(x.bfloat16(), layer.qtensor.dequantize(torch.bfloat16), layer.bias.bfloat16())
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_it_can_be_copied_and_put_on_the_meta_device():
    layer = _layer("int4-g32")
    x = _input(3, 64)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert all(parameter.is_meta for parameter in copy.deepcopy(layer).to("meta").parameters())


def test_shape_weight_and_bias_are_read_as_of_any_linear_layer():
    layer = _layer("int4-g32")
    assert linear_shape(layer) == (48, 64)
    assert torch.equal(dense_weight(layer), layer.qtensor.dequantize(torch.float32))
    assert linear_bias(layer) is layer.bias
    assert linear_bias(_layer("int8", bias=False)) is None


@settings(deadline=None, max_examples=25)
@given(
    out=st.integers(1, 9),
    groups=st.integers(1, 3),
    scheme=st.sampled_from(["int2-g32", "int3-g32", "int4-g32-asym", "int5", "int6-g32", "nf4", "fp4-dq"]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_width_computes_as_its_dense_weight(out, groups, scheme, seed):
    layer = _layer(scheme, out=out, in_features=32 * groups, seed=seed, bias=False)
    x = torch.randn(2, 32 * groups, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(layer(x), functional.linear(x, layer.dense_weight()))

"""MXFP4 and Q4_K in linear layers: their parts are parameters like any other's, and never lose a bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from strop.layers.fake_quant_linear import FakeQuantLinear
from strop.layers.quant_linear import QuantLinear
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme

TEXTS = ["mxfp4", "q4_k"]
PARTS = {
    "mxfp4": ["codes", "scale"],
    "q4_k": ["codes", "super_scale", "super_minimum", "sub_scale", "sub_minimum"],
}


def layer_of(text: str, *, seed: int = 0) -> QuantLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 512, generator=generator) * 0.1
    return QuantLinear(quantize_tensor(weight, parse_scheme(text)), torch.randn(24, generator=generator))


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 512, generator=torch.Generator().manual_seed(9)).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", TEXTS)
def test_forward_and_backward_are_those_of_a_dense_layer(text: str, dtype: torch.dtype) -> None:
    layer = layer_of(text).to(dtype)
    x, same = inputs(dtype).requires_grad_(), inputs(dtype).requires_grad_()
    out = layer(x)
    expected = functional.linear(same, layer.qtensor.dequantize(dtype), layer.bias)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert x.grad is not None
    assert same.grad is not None
    assert torch.equal(x.grad, same.grad)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("text", TEXTS)
def test_casting_leaves_every_part_bit_equal(text: str, cast: torch.dtype) -> None:
    layer = layer_of(text)
    before = {name: part.clone() for name, part in layer.qtensor.tensors().items()}
    assert list(before) == PARTS[text]
    assert [name for name, _ in layer.named_parameters()] == [*PARTS[text], "bias"]
    nn.Sequential(layer).to(cast)
    for name, part in layer.qtensor.tensors().items():
        assert part.dtype == before[name].dtype
        assert bits(part).equal(bits(before[name]))
    assert layer.bias is not None
    assert layer.bias.dtype == cast


@pytest.mark.parametrize("text", TEXTS)
def test_state_dicts_copies_and_files_go_round_bit_for_bit(text: str) -> None:
    layer, other = layer_of(text), layer_of(text, seed=1)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True), strict=True)
    for same in (other, copy.deepcopy(layer)):
        for name, part in layer.qtensor.tensors().items():
            assert bits(same.qtensor.tensors()[name]).equal(bits(part))
        assert torch.equal(same(inputs()), layer(inputs()))


@pytest.mark.parametrize("text", TEXTS)
def test_what_was_trained_through_the_grid_is_what_is_stored(text: str) -> None:
    weight = torch.randn(24, 512, generator=torch.Generator().manual_seed(2))
    trained = FakeQuantLinear(weight, None, parse_scheme(text))
    (loss,) = torch.autograd.grad(trained(inputs()).square().sum(), trained.weight)
    assert loss.abs().sum() > 0
    stored = trained.to_quant_linear()
    assert torch.equal(stored.dense_weight(), trained.dense_weight())
    assert torch.equal(stored(inputs()), trained(inputs()))

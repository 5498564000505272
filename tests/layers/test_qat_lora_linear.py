"""An adapter that is rounded with its base: merging is what training computed, and its gradients are LoRA's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from strop.errors import FormatError
from strop.layers.base import dense_weight, linear_shape
from strop.layers.grids import CodeMoves, RangeGrid, ZeroMoves
from strop.layers.input_rounding import input_rounding
from strop.layers.lora_linear import LoraLinear
from strop.layers.qat_lora_linear import QatLoraLinear
from strop.layers.quant_linear import QuantLinear
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_format

FORMATS = ["gguf:q4_0", "gguf:q8_0", "gguf:q4_k", "int4-g32", "int2-g32", "int4", "nf4", "mxfp4"]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _layer(text: str, *, base: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> QatLoraLinear:
    if base is None:
        base = nn.Linear(256, 48, dtype=dtype)
        base.weight.data = torch.randn(48, 256, generator=_generator()).to(dtype)
        base.bias.data = torch.randn(48, generator=_generator(1)).to(dtype)
    adapter = LoraLinear(base, 4, 8.0, generator=_generator(2))
    adapter.lora_B.data.normal_(std=0.2, generator=_generator(3))
    return QatLoraLinear(adapter, RangeGrid(parse_format(text).scheme, (48, 256)))


def _x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, 256, generator=_generator(4)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", FORMATS)
def test_the_merged_layer_is_bitwise_what_training_computed(text, dtype):
    layer = _layer(text, dtype=dtype)
    merged = layer.to_quant_linear()
    by_hand = quantize_tensor(dense_weight(layer.adapter.base).float() + layer.adapter.change(), layer.scheme)
    assert torch.equal(merged.qtensor.codes, by_hand.codes)
    assert torch.equal(merged(_x(dtype)), layer(_x(dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(merged(_x(dtype)), layer(_x(dtype)))
    assert torch.equal(dense_weight(layer), merged.dense_weight())


@pytest.mark.parametrize("kind", ["int8", "codes"])
def test_a_base_held_in_fewer_bits_merges_as_it_trained(kind):
    weight, scheme = torch.randn(48, 256, generator=_generator()), parse_format("gguf:q4_0").scheme
    held = quantize_tensor(weight, scheme if kind == "codes" else parse_format("int8-g32").scheme)
    adapter = LoraLinear(QuantLinear(held, torch.randn(48)), 4, 8.0, generator=_generator(2))
    layer = QatLoraLinear(adapter, CodeMoves(held, 0.05) if kind == "codes" else RangeGrid(scheme, (48, 256)))
    if kind == "codes":  # a fresh adapter moves nothing
        assert torch.equal(layer.to_quant_linear().qtensor.codes, held.codes)
    adapter.lora_B.data.normal_(std=0.2, generator=_generator(3))
    merged = layer.to_quant_linear()
    assert torch.equal(merged(_x()), layer(_x()))
    if kind == "codes":
        moved = (merged.qtensor.stored_codes() != held.stored_codes()).float().mean()
        assert 0.04 < moved <= 0.05


def test_gradients_are_those_of_lora_over_the_rounded_weight():
    layer, x = _layer("int4-g32"), _x().requires_grad_()
    sent = torch.randn(2, 5, 48, generator=_generator(6))
    layer(x).backward(sent)
    a, b = (p.detach().clone().requires_grad_() for p in (layer.adapter.lora_A, layer.adapter.lora_B))
    base = dense_weight(layer.adapter.base)
    summed = base + layer.adapter.scaling * b @ a
    through = summed + (layer.dense_weight() - summed).detach()  # straight through, by hand
    y = _x() @ through.t()
    y.backward(sent)
    torch.testing.assert_close(layer.adapter.lora_A.grad, a.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.adapter.lora_B.grad, b.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, sent @ layer.dense_weight(), rtol=1e-4, atol=1e-4)
    assert layer.adapter.base.weight.grad is None


def test_gradients_of_zero_moves_are_formed_with_the_mean_input_of_each_group():
    scheme = parse_format("int4-g32-asym").scheme
    held = quantize_tensor(torch.randn(48, 256, generator=_generator()), scheme)
    adapter = LoraLinear(QuantLinear(held), 4, 8.0, generator=_generator(2))
    adapter.lora_B.data.normal_(std=0.2, generator=_generator(3))
    layer = QatLoraLinear(adapter, ZeroMoves(held, 0.5))
    sent = torch.randn(2, 5, 48, generator=_generator(6))
    layer(_x()).backward(sent)
    a, b = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
    change = adapter.scaling * b @ a
    means = change.view(48, 8, 32).mean(-1, keepdim=True).expand(48, 8, 32).reshape(48, 256)  # what zero points can do
    (_x() @ means.t()).backward(sent)
    torch.testing.assert_close(adapter.lora_A.grad, a.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.lora_B.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_without_rounding_it_is_the_plain_adapter_and_inputs_are_rounded_where_asked():
    layer = _layer("gguf:q4_0")
    layer.rounds = False
    assert torch.equal(layer(_x()), layer.adapter(_x()))
    layer.rounds, layer.inputs = True, input_rounding("q8_0")
    seen = input_rounding("q8_0")(_x())
    assert not torch.equal(seen, _x())
    assert torch.equal(layer(_x()), layer.to_quant_linear()(seen))


def test_dropout_is_refused_and_the_shape_is_the_bases():
    adapter = LoraLinear(nn.Linear(256, 48), 4, 8.0, dropout=0.1, generator=_generator())
    with pytest.raises(FormatError, match="dropout"):
        QatLoraLinear(adapter, RangeGrid(parse_format("int4-g32").scheme, (48, 256)))
    assert linear_shape(_layer("int4-g32")) == (48, 256)


def test_an_adapter_over_codes_learns_a_change_far_below_a_step():
    scheme = parse_format("int4-g32").scheme
    held = quantize_tensor(torch.randn(48, 256, generator=_generator()), scheme)
    adapter = LoraLinear(QuantLinear(held), 4, 8.0, generator=_generator(2))
    layer = QatLoraLinear(adapter, CodeMoves(held, 1.0))
    x = torch.randn(256, 8, generator=_generator(3)).repeat_interleave(32, 1)
    x += 0.1 * torch.randn(256, 256, generator=_generator(6))
    change = 0.05 * torch.randn(48, 1, generator=_generator(4)) * torch.randn(8, generator=_generator(5))
    with torch.no_grad():
        wanted = x @ (held.dequantize() + change.repeat_interleave(32, 1)).t()
        before = (layer(x) - wanted).square().mean()
    optimizer = torch.optim.Adam([adapter.lora_A, adapter.lora_B], lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        (layer(x) - wanted).square().mean().backward()
        optimizer.step()
    assert (layer(x) - wanted).square().mean() < 0.2 * before

"""`LoraLinear` starts without effect, trains only itself, stays fp32 and computes what PEFT computes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from strop.errors import ConfigError
from strop.layers.base import dense_weight, linear_bias
from strop.layers.lora_linear import LoraLinear
from strop.layers.quant_linear import QuantLinear
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _bases() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    conv = Conv1D(48, 64)
    conv.bias.data.normal_()
    quant = QuantLinear(quantize_tensor(torch.randn(48, 64), parse_scheme("nf4-dq")), torch.randn(48))
    return {"linear": nn.Linear(64, 48), "without-bias": nn.Linear(64, 48, bias=False), "conv1d": conv, "quant": quant}


def _trained(base: nn.Module, **settings: object) -> LoraLinear:
    layer = LoraLinear(base, **({"rank": 4, "alpha": 8.0, "generator": _generator()} | settings))
    layer.lora_B.data.normal_(generator=_generator(1))
    return layer


@pytest.mark.parametrize("kind", list(_bases()))
def test_a_fresh_adapter_changes_nothing(kind):
    base = _bases()[kind]
    x = torch.randn(2, 3, 64)
    expected = base(x)
    assert torch.equal(LoraLinear(base, 4, 8.0, generator=_generator())(x), expected)


@pytest.mark.parametrize("kind", list(_bases()))
def test_forward_is_that_of_the_merged_weight(kind):
    layer = _trained(_bases()[kind])
    x = torch.randn(2, 3, 64)
    bias = linear_bias(layer)
    merged = x @ dense_weight(layer).t() + (0 if bias is None else bias)
    assert torch.allclose(layer(x), merged, atol=1e-4)
    assert not torch.allclose(layer(x), layer.base(x), atol=1e-2)


@pytest.mark.parametrize(("rank_stabilised", "scaling"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
def test_scaling_is_alpha_over_rank_or_over_its_root(rank_stabilised, scaling):
    layer = _trained(nn.Linear(64, 48), rank_stabilised=rank_stabilised)
    assert torch.allclose(layer.change(), scaling * layer.lora_B.detach() @ layer.lora_A.detach())


@pytest.mark.parametrize("kind", list(_bases()))
def test_only_the_adapter_gets_gradients(kind):
    layer = _trained(_bases()[kind])
    layer(torch.randn(2, 64)).square().sum().backward()
    trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert trained == {"lora_A", "lora_B"}
    assert {name for name, parameter in layer.named_parameters() if parameter.requires_grad} == trained


def test_start_follows_the_generator_and_peft_s_bounds():
    first, again, other = (LoraLinear(nn.Linear(64, 48), 4, 8.0, generator=_generator(s)) for s in (0, 0, 1))
    assert torch.equal(first.lora_A, again.lora_A)
    assert not torch.equal(first.lora_A, other.lora_A)
    reference = nn.Linear(64, 4, bias=False)
    nn.init.kaiming_uniform_(reference.weight, a=math.sqrt(5), generator=_generator(0))
    assert torch.allclose(first.lora_A, reference.weight, rtol=1e-5)


def test_narrowing_the_model_leaves_the_adapter_in_fp32_and_widening_is_followed():
    layer = _trained(nn.Linear(64, 48))
    before = layer.lora_B.detach().clone()
    identity = id(layer.lora_B)
    nn.Sequential(layer).to(torch.bfloat16)
    assert layer.base.weight.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert id(layer.lora_B) == identity
    assert torch.equal(layer.lora_B, before)
    assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16
    assert nn.Sequential(layer).double()[0].lora_A.dtype == torch.float64


def test_bf16_activations_give_gradients_in_fp32():
    layer = _trained(nn.Linear(64, 48)).to(torch.bfloat16)
    layer(torch.randn(2, 64).bfloat16()).float().square().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32
    assert layer.lora_A.grad.abs().sum() > 0


def test_dropout_acts_on_the_adapter_in_training_only():
    layer = _trained(nn.Linear(64, 48), dropout=0.5)
    x = torch.randn(2, 64)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer(x))


def test_impossible_settings_are_refused_together():
    with pytest.raises(ConfigError, match=r"rank is 0.*dropout is 1\.5"):
        LoraLinear(nn.Linear(64, 48), 0, 8.0, dropout=1.5, generator=None)


def test_on_the_meta_device_it_allocates_nothing():
    layer = LoraLinear(nn.Linear(64, 48, device="meta"), 4, 8.0, generator=None)
    assert layer.lora_A.is_meta
    assert layer.lora_B.is_meta

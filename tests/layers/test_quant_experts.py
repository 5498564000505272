"""Experts over codes compute what transformers computes with the dequantized parameter, and hold nothing dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig

from strop.errors import FormatError
from strop.layers.quant_experts import (
    QuantExperts,
    compute_experts,
    expert_weights,
    install_experts,
    quant_experts,
    restore_experts,
)
from strop.layers.surgery import attach_lora, coverage, experts, linear_modules
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from tests.tiny import tiny_input, tiny_model


def gpt_oss() -> Any:
    """Experts held as [experts, in, out], with biases and gates in turn."""
    config = GptOssConfig(
        vocab_size=304, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.1,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def mixture(family: str) -> Any:
    return gpt_oss() if family == "gpt_oss" else tiny_model(family)


def rounded(model: Any, grid: str) -> Any:
    for name, weights in expert_weights(model).items():
        parameter, scheme = model.get_parameter(name), parse_scheme(grid)
        install_experts(
            model,
            name,
            [quantize_tensor(weights.dense(parameter, own).contiguous(), scheme) for own in range(weights.count)],
        )
    return model


def logits(model: nn.Module) -> Tensor:
    return model(tiny_input()).logits


@pytest.mark.parametrize("grid", ["int4-g32", "int8-tensor", "int4-g32-asym", "nf4-dq", "fp8"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_logits_are_those_of_the_dequantized_experts(family: str, grid: str) -> None:
    model, dense = rounded(mixture(family), grid), mixture(family)
    assert len(quant_experts(model)) == 4
    for name, held in quant_experts(model).items():
        assert not torch.equal(dense.get_parameter(name), held.dense_parameter())
        dense.get_parameter(name).data.copy_(held.dense_parameter())
    dense.set_experts_implementation("eager")
    with torch.no_grad():
        found, expected = logits(model), logits(dense)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if family == "gpt_oss" else 0)
    for name in list(quant_experts(model)):
        restore_experts(model, name, torch.float32)
        assert torch.equal(model.get_parameter(name), dense.get_parameter(name))
    with torch.no_grad():
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_a_number_that_is_no_experts_is_nobodys() -> None:
    owner = tiny_model("mixtral").model.layers[0].mlp.experts
    x, weights = torch.randn(3, 64), torch.full((3, 2), 0.5)
    index = torch.tensor([[0, 4], [4, 1], [4, 4]])  # 4 experts: transformers puts the number past the last for none
    found = compute_experts(owner, x, index, weights)
    assert not found[2].any()
    assert found[:2].any(dim=1).all()
    owner.config._experts_implementation = "eager"
    assert torch.equal(owner(x, index, weights), found)


def test_an_adapter_trains_through_frozen_experts_with_the_gradients_of_the_dense_ones() -> None:
    grads = []
    for dense in (False, True):
        model = rounded(tiny_model("qwen3_moe"), "int4-g32")
        if dense:
            for name in list(quant_experts(model)):
                restore_experts(model, name, torch.float32)
        attach_lora(model, "q_proj", rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
        saved: list[tuple[int, ...]] = []

        def pack(tensor: Tensor, saved: list[tuple[int, ...]] = saved) -> Tensor:
            if tensor.is_floating_point():
                saved.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = logits(model).square().mean()
        assert any(sorted(shape)[-2:] == [64, 128] for shape in saved) is dense  # no dense weight of an expert is kept
        loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all("lora" in name for name in trained)
        grads.append(trained)
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-7)


def test_a_cast_leaves_codes_and_scales_as_they_are() -> None:
    model = rounded(tiny_model("mixtral"), "int4")
    before = {name: held.dense_parameter() for name, held in quant_experts(model).items()}
    model.to(torch.bfloat16)
    assert all(torch.equal(held.dense_parameter(), before[name]) for name, held in quant_experts(model).items())
    with torch.no_grad():
        assert logits(model).dtype == torch.bfloat16


def test_codes_are_not_listed_as_experts_that_nothing_reaches() -> None:
    model = tiny_model("mixtral")
    assert experts(model) == sorted(expert_weights(model), key=experts(model).index)
    rounded(model, "int4-g32")
    assert experts(model) == []
    assert len(linear_modules(model)) == 8
    assert 0 < coverage(model, list(linear_modules(model))) < 1


def test_experts_of_several_formats_are_refused() -> None:
    one, other = (quantize_tensor(torch.randn(4, 32), parse_scheme(grid)) for grid in ("int4", "int8"))
    with pytest.raises(FormatError, match=r"one format.*int4 \[4, 32\], int8 \[4, 32\]"):
        QuantExperts([one, other])

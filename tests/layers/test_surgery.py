"""Linear layers are found by type and position in every family, chosen by name, suffix or pattern, and exchanged."""

from __future__ import annotations

import fnmatch

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from strop.errors import FormatError, TargetError
from strop.layers import surgery
from strop.layers.base import dense_weight, linear_shape
from strop.layers.fake_quant_linear import FakeQuantLinear
from strop.layers.lora_linear import LoraLinear
from strop.layers.quant_linear import QuantLinear
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from tests.tiny import FAMILIES, tiny_input, tiny_model

ALL_FAMILIES = [*FAMILIES, "qwen3_moe"]
LINEARS_PER_BLOCK = {"llama": 7, "qwen3": 7, "gemma": 7, "gpt2": 4, "falcon": 4, "mixtral": 4, "qwen3_moe": 4}


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_input()).logits


def _attach(model: nn.Module, targets: object = "all-linear", **settings: object) -> list[str]:
    settings = {"rank": 4, "alpha": 8.0, "generator": torch.Generator().manual_seed(0)} | settings
    return surgery.attach_lora(model, targets, **settings)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_linear_of_the_blocks_is_found_and_neither_head_nor_embedding(family, tied):
    model = tiny_model(family, tied=tied)
    found = surgery.linear_modules(model)
    assert len(found) == 2 * LINEARS_PER_BLOCK[family]
    ends = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    for name, module in found.items():
        assert model.get_submodule(name) is module
        assert isinstance(module, (nn.Linear, Conv1D))
        assert id(module) not in ends
    everything = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    assert list(found) == [name for name in everything if name != head]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_experts_in_one_tensor_are_listed_and_left_alone(family):
    model = tiny_model(family)
    listed = surgery.experts(model)
    assert bool(listed) == (family in ("mixtral", "qwen3_moe"))
    before = {name: model.get_parameter(name).clone() for name in listed}
    surgery.quantize_linears(model, parse_scheme("int4-g32"))
    assert surgery.experts(model) == listed
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_coverage_says_how_much_of_a_mixture_the_linears_hold():
    dense, mixture = tiny_model("llama", tied=True), tiny_model("mixtral")
    names = list(surgery.linear_modules(mixture))
    by_hand = sum(mixture.get_submodule(name).weight.numel() for name in names) / mixture.num_parameters()
    assert surgery.coverage(mixture, names) == pytest.approx(by_hand)
    assert surgery.coverage(mixture, names) < 0.2 < 0.6 < surgery.coverage(dense, list(surgery.linear_modules(dense)))
    surgery.quantize_linears(mixture, parse_scheme("int4-g32"))
    assert surgery.coverage(mixture, names) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("targets", "pattern"),
    [
        ("all-linear", "*"),
        ("q_proj", "*.q_proj"),
        ("self_attn.q_proj", "*.self_attn.q_proj"),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("model.layers.1.*", "model.layers.1.*"),
        ("mlp.*", "*.mlp.*"),
        (["q_proj", "v_proj"], "*.[qv]_proj"),
        ("q_proj, v_proj", "*.[qv]_proj"),
        (["q_proj", "*.q_proj"], "*.q_proj"),
    ],
)
def test_targets_are_names_suffixes_or_patterns(targets, pattern):
    model = tiny_model("llama")
    expected = [name for name in surgery.linear_modules(model) if fnmatch.fnmatchcase(name, pattern)]
    assert expected
    assert surgery.select(model, targets) == expected


def test_a_suffix_matches_whole_parts_only():
    with pytest.raises(TargetError):
        surgery.select(tiny_model("llama"), "proj")


def test_a_target_that_matches_nothing_is_an_error_with_the_suffixes_there_are():
    with pytest.raises(TargetError) as caught:
        surgery.select(tiny_model("llama"), ["qproj", "q_proj", "attention.*"])
    message = str(caught.value)
    assert "'qproj'" in message
    assert "did you mean 'q_proj'" in message
    assert "'attention.*'" in message
    assert "there are all-linear, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in message


@pytest.mark.parametrize(
    ("family", "target", "reason"),
    [
        ("mixtral", "experts.down_proj", "3-D"),
        ("mixtral", "experts", "3-D"),
        ("llama", "lm_head", "output head"),
        ("llama", "embed_tokens", "embedding"),
        ("mixtral", "gate", "matches no linear layer"),
        ("llama", "", "no target"),
    ],
)
def test_what_cannot_be_targeted_says_why(family, target, reason):
    with pytest.raises(TargetError, match=reason):
        surgery.select(tiny_model(family, tied=False), target)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_replace_can_be_undone(family):
    model = tiny_model(family)
    before = _logits(model)
    name = next(iter(surgery.linear_modules(model)))
    out_features, in_features = linear_shape(model.get_submodule(name))
    old = surgery.replace(model, name, nn.Linear(in_features, out_features))
    assert not torch.allclose(_logits(model), before, atol=1e-3)
    assert not model.get_submodule(name).training
    surgery.replace(model, name, old)
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("base", ["dense", "nf4-dq"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_fresh_adapter_on_every_linear_has_no_effect_and_trains_alone(family, base):
    model = tiny_model(family)
    if base != "dense":
        surgery.quantize_linears(model, parse_scheme(base))
    before = _logits(model)
    names = _attach(model)
    assert names == list(surgery.linear_modules(model)) == list(surgery.lora_modules(model))
    assert torch.equal(_logits(model), before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"{name}.lora_{part}" for name in names for part in "AB"]
    adapters = surgery.detach_lora(model)
    assert list(adapters) == names
    assert not surgery.lora_modules(model)
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("base", ["dense", "int4-g32"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_adapter_tensor_gets_a_gradient(family, checkpointing, base):
    model = tiny_model(family)
    if base != "dense":
        surgery.quantize_linears(model, parse_scheme(base))
    _attach(model)
    for adapter in surgery.lora_modules(model).values():
        adapter.lora_B.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    model(tiny_input(), labels=tiny_input(), use_cache=False).loss.backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
    ]
    assert not silent


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(family)
        surgery.quantize_linears(model, parse_scheme("int4-g32"))
        _attach(model)
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        model(tiny_input(), labels=tiny_input(), use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_the_same_generator_gives_the_same_adapter_and_settings_reach_it():
    def start(seed: int) -> list[LoraLinear]:
        model = tiny_model("llama")
        generator = torch.Generator().manual_seed(seed)
        _attach(model, "q_proj", rank=3, alpha=6.0, dropout=0.25, rank_stabilised=True, generator=generator)
        return list(surgery.lora_modules(model).values())

    first, again, other = start(0), start(0), start(1)
    assert all(torch.equal(a.lora_A, b.lora_A) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].lora_A, other[0].lora_A)
    assert not torch.equal(first[0].lora_A, first[1].lora_A)
    assert (first[0].rank, first[0].alpha, first[0].dropout) == (3, 6.0, 0.25)
    assert first[0].scaling == pytest.approx(6.0 / 3**0.5)


def test_a_second_adapter_on_the_same_layer_is_refused():
    model = tiny_model("llama")
    _attach(model, "q_proj")
    with pytest.raises(TargetError, match="adapter already"):
        _attach(model)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_quantized_linears_are_out_in_whatever_the_layer_was_and_keep_their_bias(family):
    model, scheme = tiny_model(family), parse_scheme("int4-g32")
    before = {
        name: (dense_weight(module).clone(), module.bias) for name, module in surgery.linear_modules(model).items()
    }
    names = surgery.quantize_linears(model, scheme)
    assert names == list(before)
    for name, (weight, bias) in before.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        assert torch.equal(layer.dense_weight(), quantize_tensor(weight.contiguous(), scheme).dequantize())
        assert (layer.bias is None) == (bias is None)
        assert bias is None or torch.equal(layer.bias, bias)
    assert torch.isfinite(_logits(model)).all()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_eight_bits_change_little_and_two_bits_change_much(family):
    exact = _logits(tiny_model(family))
    error = {}
    for scheme in ("int8", "int2"):
        model = tiny_model(family)
        surgery.quantize_linears(model, parse_scheme(scheme))
        error[scheme] = ((_logits(model) - exact).norm() / exact.norm()).item()
    assert error["int8"] < 0.25 * error["int2"]


@pytest.mark.parametrize("scheme", ["int4-g32", "nf4"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_fake_quantized_model_converts_to_one_with_bitwise_equal_logits(family, scheme):
    model = tiny_model(family)
    names = surgery.attach_fake_quant(model, parse_scheme(scheme))
    assert all(isinstance(model.get_submodule(name), FakeQuantLinear) for name in names)
    assert all(model.get_submodule(name).weight.requires_grad for name in names)
    before = _logits(model)
    assert surgery.convert_fake_quant(model) == names
    assert all(isinstance(model.get_submodule(name), QuantLinear) for name in names)
    assert torch.equal(_logits(model), before)


def test_converting_a_model_without_fake_layers_is_an_error():
    with pytest.raises(TargetError, match="no fake-quantized layer"):
        surgery.convert_fake_quant(tiny_model("llama"))


def test_shapes_that_do_not_divide_are_all_named_before_anything_is_changed():
    model = tiny_model("llama")
    with pytest.raises(FormatError) as caught:
        surgery.quantize_linears(model, parse_scheme("int4-g48"))
    assert str(caught.value).count("is not divisible by group size 48") == 14
    assert "model.layers.1.mlp.down_proj" in str(caught.value)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_a_weight_that_is_not_finite_is_refused_by_name():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj"):
        surgery.quantize_linears(model, parse_scheme("int4-g32"))


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(FormatError, match="did you mean 'search'"):
        surgery.quantize_linears(tiny_model("llama"), parse_scheme("int8"), "q_proj", "serch")


def test_a_layer_that_is_not_dense_is_not_rounded_again():
    model = tiny_model("llama")
    surgery.quantize_linears(model, parse_scheme("int8"), "q_proj")
    with pytest.raises(TargetError, match="QuantLinear"):
        surgery.quantize_linears(model, parse_scheme("int4-g32"))
    surgery.quantize_linears(model, parse_scheme("int4-g32"), "k_proj")


def test_a_model_without_lists_of_blocks_is_one_block():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2)))
    assert list(surgery.linear_modules(model)) == ["0", "1.0"]


def test_convolutions_are_no_experts():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4))])
    assert surgery.experts(model) == []
    assert list(surgery.linear_modules(model)) == ["layers.0.1"]

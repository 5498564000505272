"""`load` opens every family: dense, rounded while loading, and from quantized folders, with the same result."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from strop.layers import surgery
from strop.layers.quant_linear import QuantLinear
from strop.models import load
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from tests.models.common import edit_json, edit_weights, logits, quant_linears, quantized_copy, rounded, same_weights
from tests.tiny import FAMILIES, tiny_folder, tiny_input, tiny_model, tiny_tokenizer

ALL_FAMILIES = [*FAMILIES, "qwen3_moe"]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_full_precision_folder_opens_bit_for_bit(tmp_path, family):
    opened = load(tiny_folder(tmp_path, family))
    assert same_weights(opened.model, tiny_model(family))
    assert torch.allclose(logits(opened.model), logits(tiny_model(family)), atol=1e-5)
    assert opened.scheme is None
    assert opened.adapter is None
    assert opened.source == str(tmp_path / family)
    assert not opened.model.training
    assert opened.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert opened.tokenizer.chat_template == tiny_tokenizer().chat_template


@pytest.mark.parametrize("scheme", ["int8", "int4-g32-asym", "nf4-dq"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_format_rounds_while_loading_as_rounding_afterwards_does(tmp_path, family, scheme):
    opened = load(tiny_folder(tmp_path, family), scheme)
    expected = rounded(family, scheme)
    assert same_weights(opened.model, expected)
    assert list(quant_linears(opened.model)) == list(surgery.linear_modules(tiny_model(family)))
    assert opened.scheme == parse_scheme(scheme)
    assert torch.allclose(logits(opened.model), logits(expected), atol=1e-5)


@pytest.mark.parametrize(
    "scheme", ["int8", "int4-g32", "int4-g32-full", "int3-g32", "int4-g32-asym", "nf4", "nf4-dq", "fp4"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral"])
def test_codes_of_a_quantized_folder_land_bit_for_bit(tmp_path, family, scheme):
    model = rounded(family, scheme, experts=False)
    opened = load(quantized_copy(tiny_folder(tmp_path, family), model, tmp_path / "quantized"))
    assert same_weights(opened.model, model)
    assert opened.scheme == parse_scheme(scheme)
    linears = dict.fromkeys(surgery.linear_modules(model), parse_scheme(scheme))
    assert torch.equal(logits(opened.model), logits(load(tmp_path / family, linears).model))


def test_reading_a_quantized_folder_makes_no_dense_weight(tmp_path, monkeypatch):
    from strop.numerics.qtensor import QuantizedTensor

    folder = quantized_copy(tiny_folder(tmp_path, "llama"), rounded("llama", "int4-g32"), tmp_path / "quantized")
    monkeypatch.setattr(QuantizedTensor, "dequantize", lambda *_: pytest.fail("codes were dequantized while opening"))
    assert len(quant_linears(load(folder).model)) == 14


@pytest.mark.parametrize("scheme", ["int4-g32", "nf4"])
def test_the_same_format_may_be_named_for_a_quantized_folder(tmp_path, scheme):
    model = rounded("llama", scheme)
    folder = quantized_copy(tiny_folder(tmp_path, "llama"), model, tmp_path / "quantized")
    assert same_weights(load(folder, scheme).model, model)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_folder_that_bitsandbytes_wrote_opens_with_its_logits(tmp_path, family, double_quant):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    source = tiny_folder(tmp_path, family)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(tmp_path / "theirs")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    theirs.train()  # its evaluation mode packs anew with rounded scales on some CPUs; there is no dropout here
    opened = load(tmp_path / "theirs")
    assert list(quant_linears(opened.model)) == list(surgery.linear_modules(tiny_model(family)))
    assert opened.scheme == parse_scheme("nf4-dq" if double_quant else "nf4")
    assert opened.tokenizer is None
    assert torch.allclose(logits(opened.model), logits(theirs), atol=1e-5)
    for name, layer in quant_linears(opened.model).items():
        assert torch.equal(layer.codes, quantize_tensor(_dense(tiny_model(family), name), parse_scheme("nf4")).codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_folder_in_the_layout_of_the_compressed_tensors_library_opens(tmp_path, symmetric):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    dense, expected = tiny_model("llama"), {}
    folder = tiny_folder(tmp_path, "llama")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in surgery.linear_modules(dense):
            weight = tensors.pop(f"{name}.weight")
            groups = weight.unflatten(1, (-1, 32))
            state = {"weight": weight, "weight_scale": groups.abs().amax(-1) / 7.5}
            if not symmetric:
                state["weight_scale"] = (groups.amax(-1) - groups.amin(-1)) / 15
                state["weight_zero_point"] = (-8 - groups.amin(-1) / state["weight_scale"]).round().to(torch.int8)
            packed = compressor.compress(state, scheme)
            expected[name] = compressor.decompress(packed, scheme)["weight"]
            tensors.update({f"{name}.{part}": value for part, value in packed.items()})

    edit_weights(folder, edit)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    edit_json(
        folder / "config.json",
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        },
    )
    opened = load(folder)
    assert opened.scheme == parse_scheme("int4-g32-sf32" if symmetric else "int4-g32-asym-sf32")
    layers = quant_linears(opened.model)
    assert layers.keys() == expected.keys()
    assert all(torch.equal(layer.dense_weight(), expected[name]) for name, layer in layers.items())


def test_a_folder_whose_tool_skipped_every_layer_opens_dense(tmp_path):
    folder = tiny_folder(tmp_path, "falcon")
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    opened = load(folder)
    assert opened.scheme is None
    assert same_weights(opened.model, tiny_model("falcon"))


@pytest.mark.parametrize("form", [None, "int4-g32"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_and_untied_heads_open_as_they_were(tmp_path, family, tied, form):
    opened = load(tiny_folder(tmp_path, family, tied=tied), form)
    head, embedding = opened.model.get_output_embeddings(), opened.model.get_input_embeddings()
    assert (head.weight is embedding.weight) is tied
    assert torch.equal(head.weight, tiny_model(family, tied=tied).get_output_embeddings().weight)


@pytest.mark.parametrize("form", [None, "nf4"])
@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_open_with_their_new_rows(tmp_path, tied, form):
    model = tiny_model("llama", tied=tied)
    model.resize_token_embeddings(320, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    opened = load(tmp_path / "resized", form)
    assert torch.equal(opened.model.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert torch.equal(opened.model.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert opened.model.config.vocab_size == 320


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_dtype_auto_is_the_checkpoints_and_another_is_obeyed(tmp_path, saved):
    folder = tiny_folder(tmp_path, "llama", dtype=saved)
    assert load(folder).model.dtype == saved
    assert load(folder, dtype="float16").model.dtype == torch.float16
    assert load(folder, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_16_bit_model_keeps_the_scales_of_its_file(tmp_path):
    model = rounded("llama", "int8")
    folder = quantized_copy(tiny_folder(tmp_path, "llama"), model, tmp_path / "quantized")
    opened = load(folder, dtype="bfloat16")
    for name, layer in quant_linears(opened.model).items():
        assert layer.scale.dtype == torch.float32
        assert torch.equal(layer.scale, model.get_submodule(name).scale)
    assert logits(opened.model).dtype == torch.bfloat16


def test_a_format_with_another_dtype_is_the_cast_model_rounded(tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    expected = load(folder, dtype="bfloat16").model
    surgery.quantize_linears(expected, parse_scheme("int4-g32"))
    assert same_weights(load(folder, "int4-g32", dtype="bfloat16").model, expected)


def test_a_rounding_of_ones_own_is_given_every_layer_by_name(tmp_path):
    seen = {}

    def rounding(name: str, weight: torch.Tensor):
        seen[name] = weight.shape
        return quantize_tensor(weight, parse_scheme("int4-g32"), where=name)

    opened = load(tiny_folder(tmp_path, "gpt2"), "int4-g32", rounding=rounding)
    assert seen == {
        name: (layer.out_features, layer.in_features) for name, layer in quant_linears(opened.model).items()
    }


def test_sharded_folders_open(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert same_weights(load(tmp_path / "sharded").model, model)
    assert same_weights(load(tmp_path / "sharded", "nf4").model, rounded("llama", "nf4"))


def test_a_checkpoint_without_the_decoders_prefix_opens(tmp_path):
    folder = tiny_folder(tmp_path, "llama", tied=True)
    quantized = quantized_copy(folder, rounded("llama", "int4-g32", tied=True), tmp_path / "quantized")
    for path in (folder, quantized):
        edit_weights(path, _without_prefix)
    assert same_weights(load(folder).model, tiny_model("llama", tied=True))
    assert same_weights(load(quantized).model, rounded("llama", "int4-g32", tied=True))


def test_tokenizer_is_left_out_on_request_and_none_where_there_is_none(tmp_path):
    folder = tiny_folder(tmp_path, "llama", tokenizer=tiny_tokenizer(chat_template=False))
    assert load(folder, tokenizer=False).tokenizer is None
    assert load(folder).require_tokenizer().chat_template is None
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    assert load(tmp_path / "bare").tokenizer is None


@pytest.mark.parametrize("form", [None, "nf4"])
def test_a_hub_id_opens_from_the_local_cache(tmp_path, monkeypatch, form):
    home = tmp_path / "cache" / "models--org--name"
    snapshot, blobs = home / "snapshots" / ("0" * 40), home / "blobs"
    for folder in (snapshot, blobs, home / "refs"):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    saved = tmp_path / "saved"
    tiny_model("llama").save_pretrained(saved, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(saved)
    for number, path in enumerate(sorted(saved.iterdir())):  # the cache holds links to files without names
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    opened = load("org/name", form)
    assert opened.source == str(snapshot)
    assert same_weights(opened.model, tiny_model("llama") if form is None else rounded("llama", form))
    assert opened.tokenizer is not None


@pytest.mark.parametrize("part", ["best", "last", "model"])
def test_a_run_opens_as_its_best_part_or_else_its_last(tmp_path, part):
    order = ["best", "last", "model"]
    for seed, name in enumerate(order[order.index(part) :]):
        shutil.move(tiny_folder(tmp_path, "llama", seed=seed), tmp_path / "run" / name)
    opened = load(tmp_path / "run")
    assert opened.source == str(tmp_path / "run" / part)
    assert same_weights(opened.model, tiny_model("llama", seed=0))


def test_an_opened_model_carries_no_trace_of_the_hook(tmp_path):
    opened = load(tiny_folder(tmp_path, "llama"), "int4-g32")
    assert not hasattr(opened.model.config, "quantization_config")
    assert not hasattr(opened.model, "hf_quantizer")
    opened.model.half()  # transformers refuses this for models that it takes for quantized
    assert opened.model.get_submodule("model.layers.0.mlp.up_proj").scale.dtype == torch.float16
    assert opened.model.dtype == torch.float16


def test_opening_prints_nothing_and_leaves_transformers_settings_alone(tmp_path, capfd):
    from transformers.utils import logging

    folder = tiny_folder(tmp_path, "llama")
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    load(folder, "int4-g32")
    sys.stdout.flush()
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rounded_model_generates_as_its_dense_twin(tmp_path, family):
    opened = load(tiny_folder(tmp_path, family), "int4-g32")
    dense = tiny_model(family)
    for name, layer in quant_linears(opened.model).items():
        weight = dense.get_submodule(name).weight
        weight.data = layer.dense_weight().t().contiguous() if family == "gpt2" else layer.dense_weight()
    prompt = tiny_input(rows=1, length=6)
    mask = torch.ones_like(prompt)
    ours, theirs = (
        model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for model in (opened.model, dense)
    )
    assert torch.equal(ours, theirs)


def _dense(model: torch.nn.Module, name: str) -> torch.Tensor:
    from strop.layers.base import dense_weight

    return dense_weight(model.get_submodule(name)).contiguous()


def _without_prefix(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def test_only_the_layers_inside_the_blocks_are_rounded(tmp_path):
    opened = load(tiny_folder(tmp_path, "llama", tied=False), "int8")
    assert not isinstance(opened.model.lm_head, QuantLinear)
    assert torch.equal(opened.model.lm_head.weight, tiny_model("llama", tied=False).lm_head.weight)

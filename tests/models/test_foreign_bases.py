"""GPTQ and AWQ folders are bases like any other: opened bit for bit, trained over, merged, compared, not rounded again.

The other side is the slow decoder of `tests.files.packing_oracle`, whose dense model must answer the same.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from strop.errors import FileFormatError, FormatError, ModelError, UsageError
from strop.layers.int8_linear import OutlierInt8Linear
from strop.layers.surgery import linear_modules
from strop.models import load
from strop.recipes.compare import compare
from strop.recipes.export import export
from strop.recipes.merge import merge
from strop.recipes.quantize import quantize
from tests.files.packing_oracle import gptq_layer, gptq_weight, random_layer
from tests.models.common import edit_json, edit_weights, logits, quant_linears
from tests.models.foreign import FIELDS, foreign_folder
from tests.recipes.helpers import short
from tests.tiny import tiny_chat_file, tiny_folder, tiny_tokenizer


@pytest.mark.parametrize(
    ("kind", "family"),
    [(kind, "llama") for kind in FIELDS] + [("gptq", "gpt2"), ("gptq-order", "gpt2"), ("awq", "falcon")],
)
def test_a_folder_opens_with_the_weights_that_its_tool_meant(tmp_path, kind, family):
    folder, expected = foreign_folder(tmp_path, kind, family)
    opened = load(folder)
    layers = quant_linears(opened.model)
    assert list(layers) == list(linear_modules(expected))
    for name, layer in layers.items():
        weight = expected.get_submodule(name).weight
        assert layer.dense_weight().equal(weight.t() if family == "gpt2" else weight), name
    assert torch.allclose(logits(opened.model), logits(expected), atol=1e-5)
    assert opened.format == ("int4-g32" if kind == "gptq" else "int4-g32-asym")
    assert opened.tokenizer is not None


@pytest.mark.parametrize("kind", ["gptq-order", "awq"])
def test_the_same_format_may_be_named_and_another_may_not(tmp_path, kind):
    folder, _ = foreign_folder(tmp_path, kind)
    assert load(folder, "int4-g32-asym").scheme.name == "int4-g32-asym"
    with pytest.raises(FormatError, match="is quantized already, as int4-g32-asym"):
        load(folder, "nf4")


@pytest.mark.parametrize("kind", ["gptq", "gptq-order", "awq"])
def test_a_base_is_trained_over_merged_and_compared(tmp_path, kind):
    folder, expected = foreign_folder(tmp_path, kind)
    data = tiny_chat_file(tmp_path / "chat.jsonl")
    run = short(folder, data, tmp_path / "run", method="qlora", learning_rate=1e-2)
    opened = load(run.path, dtype="float32")
    layer = opened.model.model.layers[0].mlp.up_proj
    assert layer.base.dense_weight().equal(expected.get_submodule("model.layers.0.mlp.up_proj").weight)
    assert (logits(opened.model) - logits(expected)).abs().max() > 1e-3
    merged = merge(run.path, tmp_path / "merged")
    assert merged.max_logit_difference <= 1e-5
    assert merged.effect == pytest.approx(1, abs=1e-3)
    assert torch.allclose(logits(load(tmp_path / "merged").model), logits(opened.model), atol=1e-4)
    table = compare([folder, tmp_path / "merged"], data, speed=False)
    assert len(table.models) == 2


@pytest.mark.parametrize(("kind", "how"), [("gptq", "moved"), ("gptq-order", "rounded again")])
def test_a_grid_of_gptq_goes_to_gguf_code_by_code_where_it_is_one(tmp_path, kind, how):
    folder, expected = foreign_folder(tmp_path, kind)
    result = export(folder, tmp_path / "out.gguf", format="gguf:q4_0", verify=False)
    assert {one.how for one in result.tensors if "_proj" in "".join(one.sources)} == {how}
    for name, layer in quant_linears(load(tmp_path / "out.gguf").model).items():
        assert layer.dense_weight().equal(expected.get_submodule(name).weight) is (how == "moved")


def test_activation_order_is_rounded_anew_where_a_merge_is_to_be_quantized(tmp_path):
    folder, _ = foreign_folder(tmp_path, "gptq-order")
    run = short(folder, tiny_chat_file(tmp_path / "chat.jsonl"), tmp_path / "run", method="qlora", targets=["q_proj"])
    merge(run.path, tmp_path / "merged", format="int4-g32-asym", force=True)
    layers = quant_linears(load(tmp_path / "merged").model)
    assert len(layers) == 14
    assert all(getattr(layer, "group_index", None) is None for layer in layers.values())


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_what_is_quantized_is_not_quantized_again_nor_trained_whole(tmp_path, kind):
    folder, _ = foreign_folder(tmp_path, kind)
    with pytest.raises(FormatError, match="is quantized already"):
        quantize(folder, format="int4-g32", output=tmp_path / "out")
    for method, extra in (("lora", {}), ("full", {}), ("qat", {"format": "int8"})):
        with pytest.raises(UsageError, match=r"train an adapter over it \(--method qlora\)"):
            short(folder, tiny_chat_file(tmp_path / "chat.jsonl"), tmp_path / "run", method=method, **extra)


def test_experts_of_a_gptq_folder_open_one_by_one(tmp_path):
    folder = tiny_folder(tmp_path, "mixtral")
    dense = {}

    def edit(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            weight = tensors.pop(name)
            codes, zeros, scales = random_layer(
                *weight.shape, weight.shape[1] // 32, 4, symmetric=True, seed=len(dense)
            )
            packed = gptq_layer(codes, zeros, scales, 4, version="gptq")
            dense[name] = gptq_weight(packed, 4, version="gptq")
            tensors.update({f"{name.removesuffix('.weight')}.{part}": value for part, value in packed.items()})

    edit_weights(folder, edit)
    edit_json(folder / "config.json", quantization_config=FIELDS["gptq"])
    opened = load(folder)
    plain = tiny_folder(tmp_path / "plain", "mixtral")
    edit_weights(plain, lambda tensors: tensors.update(dense))
    assert torch.allclose(logits(opened.model), logits(load(plain).model), atol=1e-5)
    assert opened.format == "int4-g32"


def test_experts_in_activation_order_are_refused_by_name(tmp_path):
    folder = tiny_folder(tmp_path, "mixtral")

    def edit(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            rows, columns = tensors.pop(name).shape
            codes, zeros, scales = random_layer(rows, columns, columns // 32, 4, symmetric=True)
            index = [column // 32 for column in reversed(range(columns))]
            packed = gptq_layer(codes, zeros, scales, 4, version="gptq", index=index)
            tensors.update({f"{name.removesuffix('.weight')}.{part}": value for part, value in packed.items()})

    edit_weights(folder, edit)
    edit_json(folder / "config.json", quantization_config=FIELDS["gptq"])
    with pytest.raises(FormatError, match=r"experts\.0\.w1: its groups are in activation order"):
        load(folder)


def test_a_configuration_in_a_file_of_its_own_is_found(tmp_path):
    folder, expected = foreign_folder(tmp_path, "gptq")
    edit_json(folder / "config.json", quantization_config=None)
    (folder / "quantize_config.json").write_text(json.dumps(FIELDS["gptq"] | {"quant_method": None}))
    assert torch.allclose(logits(load(folder).model), logits(expected), atol=1e-5)


def test_a_head_that_is_quantized_too_opens(tmp_path):
    folder, expected = foreign_folder(tmp_path, "gptq", tied=False)
    codes, zeros, scales = random_layer(304, 64, 2, 4, symmetric=True)
    packed = gptq_layer(codes, zeros, scales, 4, version="gptq")
    head = gptq_weight(packed, 4, version="gptq")

    def edit(tensors):
        del tensors["lm_head.weight"]
        tensors.update({f"lm_head.{part}": value for part, value in packed.items()})

    edit_weights(folder, edit)
    expected.lm_head.weight.data.copy_(head)
    opened = load(folder)
    assert torch.allclose(logits(opened.model), logits(expected), atol=1e-4)
    run = short(folder, tiny_chat_file(tmp_path / "chat.jsonl"), tmp_path / "run", method="qlora")
    merge(run.path, tmp_path / "merged", force=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quant_method": "awq", "version": "gemv"}, r"the layout 'gemv'; gemm is read; open the model that it was"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "hqq"}, "quantized as 'hqq'; strop reads compressed-tensors, bitsandbytes, gptq, awq"),
        ({"quant_method": "fp8"}, "quantized as 'fp8'"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, fields, words):
    folder, _ = foreign_folder(tmp_path, "gptq")
    edit_json(folder / "config.json", quantization_config=FIELDS["gptq"] | fields)
    with pytest.raises(ModelError, match=words):
        load(folder)


def test_every_damaged_layer_is_named(tmp_path):
    folder, _ = foreign_folder(tmp_path, "gptq")
    broken = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]

    def edit(tensors):
        del tensors[f"{broken[0]}.qzeros"]
        tensors[f"{broken[1]}.scales"][0, 0] = torch.inf

    edit_weights(folder, edit)
    with pytest.raises(FileFormatError) as caught:
        load(folder)
    assert all(name in str(caught.value) for name in broken)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_folder_of_8_bit_weights_that_bitsandbytes_wrote_opens_and_is_trained_over(tmp_path):
    source = tiny_folder(tmp_path, "llama")
    config = BitsAndBytesConfig(load_in_8bit=True)
    written = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    folder = tmp_path / "theirs"
    written.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    opened = load(folder)
    assert opened.format == "int8-a8-over6"
    layers = [name for name, module in opened.model.named_modules() if isinstance(module, OutlierInt8Linear)]
    assert len(layers) == 14
    for name in layers:
        layer = opened.model.get_submodule(name)
        assert layer.codes.equal(stored[f"{name}.weight"])
        assert layer.scale.flatten().equal(stored[f"{name}.SCB"] / 127)
    theirs = AutoModelForCausalLM.from_pretrained(folder)  # computes in fp16, whatever it is asked for
    assert (logits(opened.model) - logits(theirs)).norm() < 0.05 * logits(theirs).norm()
    run = short(folder, tiny_chat_file(tmp_path / "chat.jsonl"), tmp_path / "run", method="qlora")
    assert run.report["format"] == "int8-a8-over6"
    assert merge(run.path, tmp_path / "merged", force=True).stored == "float32"

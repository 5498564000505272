"""Quantizing: refused before any work or done whole, with a receipt that says what each layer lost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Llama4ForCausalLM, Llama4TextConfig

from strop.errors import FormatError, MissingInputError, ModelError, UsageError
from strop.files import saving
from strop.files.peft_adapter import BaseRecord, save_adapter
from strop.files.saving import save_model
from strop.files.shards import iter_tensors
from strop.layers.base import dense_weight
from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import attach_lora, linear_modules, quantize_linears
from strop.models import load
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from strop.recipes.quantize import quantize
from tests.tiny import tiny_chat_file, tiny_folder, tiny_input, tiny_model, tiny_tokenizer


class Listener:
    """Keeps what a recipe reports."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done: list[float] = []
        self.titles: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, title: str, total: float | None, unit: str) -> None:
        self.titles.append(f"{title} {total} {unit}")

    def advance(self, done: float, **fields: float | int | str) -> None:
        self.done.append(done)

    def finish(self) -> None:
        self.titles.append("end")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(tiny_input()).logits.float()


@pytest.mark.parametrize(
    ("family", "grid"),
    [("llama", "int4-g32"), ("llama", "nf4-dq"), ("llama", "int3-asym"), ("gpt2", "nf4"), ("falcon", "int8")],
)
def test_the_saved_model_is_the_source_rounded_to_nearest(tmp_path: Path, family: str, grid: str) -> None:
    source = tiny_folder(tmp_path, family)
    result = quantize(source, grid, output=tmp_path / "out")
    again = load(result.path)
    original = load(source)
    for name, module in linear_modules(again.model).items():
        assert isinstance(module, QuantLinear)
        expected = quantize_tensor(dense_weight(original.model.get_submodule(name)), parse_scheme(grid))
        assert module.qtensor.codes.equal(expected.codes), name
    assert again.tokenizer is not None
    assert again.tokenizer.chat_template == original.require_tokenizer().chat_template


def test_the_receipt_says_what_every_layer_lost(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "llama")
    result = quantize(source, "int4-g32", output=tmp_path / "out")
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert receipt == result.receipt
    original, again = load(source).model, load(tmp_path / "out").model
    assert [tensor["name"] for tensor in receipt["tensors"]] == list(linear_modules(original))
    for tensor in receipt["tensors"]:
        weight = dense_weight(original.get_submodule(tensor["name"])).double()
        lost = dense_weight(again.get_submodule(tensor["name"])).double() - weight
        assert tensor["relative_error"] == pytest.approx(float(lost.square().sum() / weight.square().sum()), rel=1e-5)
        assert tensor["max_error"] == pytest.approx(float(lost.abs().max()), rel=1e-5)
        assert tensor["shape"] == list(weight.shape)
        assert (tensor["requested"], tensor["actual"], tensor["reason"]) == ("int4-g32", "int4-g32", None)
    assert receipt["bits_per_weight"] == 4.5
    assert receipt["settings"] == {"method": "rtn", "observer": "minmax"}
    assert any("4.500 bits per weight" in line for line in result.lines())


def test_searched_scales_lose_less_than_nearest_rounding(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "llama")
    plain = quantize(source, "int3-g32", output=tmp_path / "plain").receipt
    searched = quantize(source, "int3-g32", output=tmp_path / "searched", method="search").receipt
    observed = quantize(source, "int3-g32", output=tmp_path / "observed", observer="mse").receipt
    errors = [sum(tensor["relative_error"] for tensor in receipt["tensors"]) for receipt in (plain, searched, observed)]
    assert errors[1] < errors[0]
    assert errors[2] < errors[0]


def test_calibration_weighs_the_search_and_held_out_rows_judge_it(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "llama")
    data = tiny_chat_file(tmp_path / "rows.jsonl", rows=40)
    listener = Listener()
    result = quantize(
        source, "int2-g32", output=tmp_path / "out", method="search", data=str(data), max_rows=32, reporter=listener
    )
    settings, held_out = result.receipt["settings"], result.receipt["held_out"]
    assert settings["calibration"]["rows"] == 24
    assert held_out["rows"] == 8
    assert held_out["kl"] > 0
    assert held_out["kl_99th"] >= held_out["kl"]
    assert 0 <= held_out["top1_agreement"] <= 1
    blind = quantize(source, "int2-g32", output=tmp_path / "blind", method="search")
    ours, theirs = dict(iter_tensors(tmp_path / "out")), dict(iter_tensors(blind.path))
    assert any(not ours[name].equal(theirs[name]) for name in ours), "the statistics changed nothing"
    assert any("held-out rows" in line for line in result.lines())
    assert listener.titles == ["calibrate and quantize 2 blocks", "end", "write the model 14 layers", "end"]
    assert 2 in listener.done


def test_the_held_out_figures_are_zero_and_one_where_nothing_was_lost(tmp_path: Path) -> None:
    source = tmp_path / "grid"  # every weight lies on the grid already
    model = tiny_model("llama")
    for module in linear_modules(model).values():
        module.weight.data = quantize_tensor(module.weight.data, parse_scheme("int4-g32-full")).dequantize()
    save_model(model, load(tiny_folder(tmp_path, "llama")).tokenizer, source)
    data = tiny_chat_file(tmp_path / "rows.jsonl", rows=16)
    held_out = quantize(source, "int4-g32-full", output=tmp_path / "out", data=str(data)).receipt["held_out"]
    assert held_out["kl"] < 1e-6
    assert held_out["top1_agreement"] == 1.0


def test_one_long_text_calibrates_with_its_first_windows_and_is_judged_on_its_last(tmp_path: Path) -> None:
    (tmp_path / "book.jsonl").write_text(
        json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 150}) + "\n"
    )
    result = quantize(
        tiny_folder(tmp_path, "llama"), "int4-g32", output=tmp_path / "out", data=str(tmp_path / "book.jsonl")
    )
    assert result.receipt["settings"]["calibration"]["rows"] > result.receipt["held_out"]["rows"] > 0


def test_layers_that_a_group_does_not_divide_are_all_refused_with_sizes_that_would(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "llama", intermediate_size=96)
    with pytest.raises(FormatError) as caught:
        quantize(source, "int4-g64", output=tmp_path / "out")
    text = str(caught.value)
    assert "2 layer(s) do not fit int4-g64" in text
    assert all(
        f"model.layers.{i}.mlp.down_proj: in_features 96 is not divisible by group size 64" in text for i in (0, 1)
    )
    assert "48" in text
    assert "--keep-indivisible" in text
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


@pytest.mark.parametrize(("grid", "reason"), [("int4-g64", "not divisible"), ("nf4", "no multiple of the block")])
def test_they_can_be_kept_and_are_listed_with_the_bits_that_result(tmp_path: Path, grid: str, reason: str) -> None:
    source = tiny_folder(tmp_path, "llama", intermediate_size=96, dtype=torch.bfloat16)
    result = quantize(source, grid, output=tmp_path / "out", keep_indivisible=True)
    kept = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert result.receipt["fallbacks"] == kept
    entries = {tensor["name"]: tensor for tensor in result.receipt["tensors"]}
    assert all(entries[name]["actual"] == "bfloat16" and reason in entries[name]["reason"] for name in kept)
    weights = {name: tensor["shape"][0] * tensor["shape"][1] for name, tensor in entries.items()}
    bits = {"int4-g64": 4.25, "nf4": 4.5}[grid]
    expected = sum(size * (16 if name in kept else bits) for name, size in weights.items()) / sum(weights.values())
    assert result.receipt["bits_per_weight"] == pytest.approx(expected)
    again = load(result.path).model
    assert {name for name, module in linear_modules(again).items() if isinstance(module, nn.Linear)} == set(kept)
    original = load(source).model
    assert all(again.get_submodule(name).weight.equal(original.get_submodule(name).weight) for name in kept)
    assert any("2 of these layers kept" in line for line in result.lines())


def test_kinds_of_layers_that_a_file_cannot_hold_are_refused_with_the_nearest(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "gpt2")
    with pytest.raises(FormatError, match=r"(?s)8 layer\(s\) do not fit int8.*Conv1D .*nearest format that can is nf4"):
        quantize(source, "int8", output=tmp_path / "out")
    with pytest.raises(FormatError, match="nothing would be quantized"):
        quantize(source, "int8", output=tmp_path / "out", keep_indivisible=True)


def test_experts_that_a_model_computes_its_own_way_are_left_alone_listed_and_said(tmp_path: Path) -> None:
    config = Llama4TextConfig(
        vocab_size=304, hidden_size=64, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=2,
        head_dim=16, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, interleave_moe_layer_step=1,
        pad_token_id=0, max_position_embeddings=256, attention_chunk_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    Llama4ForCausalLM(config).save_pretrained(tmp_path / "llama4")
    tiny_tokenizer().save_pretrained(tmp_path / "llama4")
    listener = Listener()
    result = quantize(tmp_path / "llama4", "int4-g32", output=tmp_path / "out", reporter=listener)
    assert len(result.receipt["left_alone"]) == 4
    assert any("experts" in note and "%" in note for note in listener.notes)
    assert any("experts are not quantized" in line for line in result.lines())
    source, opened = load(tmp_path / "llama4").model, load(result.path).model
    for name in result.receipt["left_alone"]:
        assert opened.get_parameter(name).equal(source.get_parameter(name))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"format": "gguf:q4_0"}, FormatError, "strop export.*int4-g32-full"),
        ({"format": "int9"}, FormatError, "int8"),
        ({"format": "int4-g32", "method": "gptkew"}, UsageError, "rtn, search"),
        ({"format": "int4-g32", "observer": "minmix"}, UsageError, "minmax"),
        ({"format": "int4-g32", "method": "search", "observer": "mse"}, UsageError, "leave the observer out"),
        ({"format": "int4-g32", "data": "nowhere.jsonl"}, MissingInputError, "nowhere"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    source = tiny_folder(tmp_path, "llama")
    with pytest.raises(error, match=words):
        quantize(source, **options, output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_quantized_models_adapters_and_existing_outputs_are_refused(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "llama")
    quantize(source, "int8", output=tmp_path / "int8")
    with pytest.raises(FormatError, match="quantized already"):
        quantize(tmp_path / "int8", "int4-g32", output=tmp_path / "out")
    attach_lora(model := tiny_model("llama"), rank=2, alpha=2.0, generator=torch.Generator())
    save_adapter(model, tmp_path / "adapter", base=BaseRecord(str(source)))
    with pytest.raises(UsageError, match="merge it first"):
        quantize(tmp_path / "adapter", "int8", output=tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "int8").iterdir()}
    with pytest.raises(UsageError, match="already holds files"):
        quantize(source, "int4-g32", output=tmp_path / "int8")
    assert {path.name: path.read_bytes() for path in (tmp_path / "int8").iterdir()} == before
    quantize(source, "int4-g32", output=tmp_path / "int8", overwrite=True)
    assert load(tmp_path / "int8").scheme == parse_scheme("int4-g32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_all_named_and_nothing_is_kept(tmp_path: Path, value: float) -> None:
    model = tiny_model("llama")
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj"]
    for name in names:
        model.get_submodule(name).weight.data[0, 0] = value
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises((FormatError, ModelError)) as caught:
        quantize(tmp_path / "bad", "int4-g32", output=tmp_path / "out")
    assert all(name in str(caught.value) for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device")])
def test_an_interruption_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    source = tiny_folder(tmp_path, "llama")
    quantize(source, "int8", output=tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def interrupted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(saving, "_write_configs", interrupted)  # the weights are written by then
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OSError):
        quantize(source, "int4-g32", output=tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out"]


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "llama")
    data = tiny_chat_file(tmp_path / "rows.jsonl", rows=12)
    folders = [
        quantize(source, "int4-g32", output=tmp_path / name, method="search", data=str(data)).path
        for name in ("one", "two")
    ]
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    receipts = [json.loads(files.pop("receipt.json")) for files in (one, two)]
    pages = [files.pop("receipt.html").decode() for files in (one, two)]
    assert one == two
    for receipt, page in zip(receipts, pages, strict=True):  # all but the time and the memory that it took
        assert receipt["made_by"].pop("seconds") > 0
        assert receipt["made_by"].pop("peak_bytes") > 0
        assert "It took" in page
    assert receipts[0] == receipts[1]
    assert len({re.sub(r"It took .*", "", page) for page in pages}) == 1


def test_quantizing_while_loading_equals_quantizing_a_loaded_model(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "qwen3", dtype=torch.bfloat16)
    quantize(source, "int4-g32-full", output=tmp_path / "out")
    loaded = load(source).model
    quantize_linears(loaded, parse_scheme("int4-g32-full"))
    assert logits(load(tmp_path / "out").model).equal(logits(loaded))

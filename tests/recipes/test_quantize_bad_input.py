"""Input that is too little, dead or broken: refused in words that help, or a fallback with a name; never silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP
from typer.testing import CliRunner

from strop.app.cli import app
from strop.errors import DataError, FormatError, MissingInputError, ModelError, StropError
from strop.files.saving import save_model
from strop.layers.base import dense_weight
from strop.layers.surgery import linear_modules
from strop.models import load
from strop.recipes.quantize import quantize
from tests.recipes.test_quantize import Listener, logits
from tests.tiny import tiny_chat_file, tiny_folder, tiny_model, tiny_tokenizer

METHODS = ("rtn", "search", "gptq", "hqq", "awq", "smooth")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_chat_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows=12))


def saved(folder: Path, change: Any = None, **sizes: Any) -> Path:
    """A llama of one block, with its weights changed before it is saved."""
    model = tiny_model("llama", num_hidden_layers=1, **sizes)
    if change is not None:
        with torch.no_grad():
            change(model)
    save_model(model, tiny_tokenizer(), folder / "model")
    return folder / "model"


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("", DataError, r"rows\.jsonl.*(empty|no row)"),
        ("\n\n", DataError, r"rows\.jsonl.*(empty|no row)"),
        ('{"text": ""}\n', StropError, r"rows\.jsonl"),
        ('{"text": "two words"}\n' * 50, DataError, r"rows\.jsonl: \d+ tokens calibrate, at least 64 are needed"),
        (json.dumps({"text": "a line that is too short"}) + "\n", DataError, r"at least 64 are needed; give more rows"),
    ],
    ids=["empty", "blank", "no-text", "one-line-repeated", "short"],
)
def test_rows_that_say_nothing_are_refused_with_what_is_needed(
    tmp_path: Path, text: str, error: type[Exception], words: str
) -> None:
    source = saved(tmp_path)
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(error, match=words):
        quantize(source, "int4-g32", output=tmp_path / "out", method="gptq", data=str(tmp_path / "rows.jsonl"))
    assert left(tmp_path) == ["model", "rows.jsonl"]


def test_rows_that_are_not_there_are_refused_before_the_model_is_read(tmp_path: Path) -> None:
    source = saved(tmp_path)
    with pytest.raises(MissingInputError, match="nowhere"):
        quantize(source, "int4-g32", output=tmp_path / "out", method="gptq", data=str(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_whose_inputs_are_always_zero_is_rounded_all_the_same(tmp_path: Path, data: str, method: str) -> None:
    source = saved(tmp_path, lambda model: model.model.layers[0].mlp.up_proj.weight.zero_())
    result = quantize(source, "int4-g32", output=tmp_path / "out", method=method, data=data)
    entries = {tensor["name"].rpartition(".")[2]: tensor for tensor in result.receipt["tensors"]}
    assert entries["up_proj"]["relative_error"] == 0.0
    assert 0 < entries["down_proj"]["relative_error"] < 0.05  # other data may reach it
    assert all(tensor["finite_scales"] for tensor in result.receipt["tensors"])
    assert logits(load(result.path).model).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_never_called_is_rounded_without_data_and_named(
    tmp_path: Path, data: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))))
    listener = Listener()
    result = quantize(source, "int4-g32", output=tmp_path / "out", method=method, data=data, reporter=listener)
    entries = {tensor["name"].rpartition(".")[2]: tensor for tensor in result.receipt["tensors"]}
    assert 0 < entries["up_proj"]["relative_error"] < 0.05
    said = [note for note in listener.notes if note.startswith("model.layers.0.mlp.up_proj: no calibration")]
    assert len(said) == 1
    assert said[0] in result.receipt["blocks"][0]["notes"]


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_a_hessian_of_rank_one_is_damped_and_gives_a_model(tmp_path: Path, data: str, method: str) -> None:
    def one_direction(model: Any) -> None:
        embedding = model.model.embed_tokens.weight
        embedding.copy_(embedding[7].clone().expand_as(embedding))  # every token is the same vector

    source = saved(tmp_path, one_direction)
    result = quantize(source, "int3-g32", output=tmp_path / "out", method=method, data=data)
    assert all(tensor["relative_error"] < 0.3 for tensor in result.receipt["tensors"])
    assert all(tensor["finite_scales"] for tensor in result.receipt["tensors"])
    assert logits(load(result.path).model).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_finite_are_refused_by_name_over_rows_too(tmp_path: Path, data: str, method: str) -> None:
    def broken(model: Any) -> None:
        model.model.layers[0].self_attn.v_proj.weight[1, 2] = float("inf")
        model.model.layers[0].mlp.gate_proj.weight[3, 5] = float("nan")

    source = saved(tmp_path, broken)
    with pytest.raises(ModelError, match=r"v_proj, model\.layers\.0\.mlp\.gate_proj: the weights hold NaN"):
        quantize(source, "int4-g32", output=tmp_path / "out", method=method, data=data)
    assert left(tmp_path) == ["model"]


@pytest.mark.parametrize("method", METHODS)
def test_activations_that_overflow_are_refused_by_the_layer_that_receives_them(
    tmp_path: Path, data: str, method: str
) -> None:
    def overflowing(model: Any) -> None:
        for part in ("gate_proj", "up_proj"):
            getattr(model.model.layers[0].mlp, part).weight.mul_(1e20)  # finite, and their product is not

    source = saved(tmp_path, overflowing)
    with pytest.raises((DataError, ModelError), match=r"layers\.0\.mlp\.down_proj.*not finite"):
        quantize(source, "int8", output=tmp_path / "out", method=method, data=data)
    assert left(tmp_path) == ["model"]


@pytest.mark.parametrize("width", [1, 31, 33, 172, 255, 257, 2688])
def test_widths_that_a_group_does_not_divide_are_refused_kept_by_name_or_rounded_by_channel(
    tmp_path: Path, width: int
) -> None:
    source = saved(tmp_path, intermediate_size=width)
    name = "model.layers.0.mlp.down_proj"
    if width % 128:
        with pytest.raises(FormatError, match=rf"{name}: in_features {width} is not divisible by group size 128"):
            quantize(source, "int4-g128", output=tmp_path / "out")
    with pytest.raises(FormatError):  # the other layers have 64 inputs
        quantize(source, "int4-g128", output=tmp_path / "out", keep_indivisible=width % 128 > 0)
    kept = quantize(source, "int4-g32", output=tmp_path / "kept", keep_indivisible=True)
    assert kept.receipt["fallbacks"] == ([name] if width % 32 else [])
    shares = {tensor["name"]: tensor["shape"][0] * tensor["shape"][1] for tensor in kept.receipt["tensors"]}
    share = shares[name] / sum(shares.values()) if width % 32 else 0.0
    assert kept.receipt["fallback_share"] == pytest.approx(share)
    whole = quantize(source, "int4", output=tmp_path / "whole")
    assert whole.receipt["fallbacks"] == []
    layers = linear_modules(load(whole.path).model)
    originals = linear_modules(load(source).model)
    assert all(dense_weight(layers[own]).shape == dense_weight(originals[own]).shape for own in layers)
    assert logits(load(whole.path).model).isfinite().all()


@pytest.mark.parametrize("method", ["gptq", "hqq", "awq"])
def test_odd_widths_go_through_methods_with_rows(tmp_path: Path, data: str, method: str) -> None:
    source = saved(tmp_path, intermediate_size=33)
    listener = Listener()
    result = quantize(
        source, "int4-g32", output=tmp_path / "out", method=method, data=data, keep_indivisible=True, reporter=listener
    )
    assert result.receipt["fallbacks"] == ["model.layers.0.mlp.down_proj"]
    assert result.receipt["held_out"]["kl"] < 1.0


def test_a_layer_that_no_row_reaches_is_rounded_without_data_and_named(tmp_path: Path, data: str) -> None:
    source = tiny_folder(tmp_path, "mixtral", num_hidden_layers=1, num_local_experts=8, num_experts_per_tok=1)
    result = quantize(source, "int4-g32", output=tmp_path / "out", method="gptq", data=data, max_rows=4)
    notes = " ".join(note for block in result.receipt["blocks"] for note in block["notes"])
    assert "starved" in notes
    assert all(tensor["finite_scales"] for tensor in result.receipt["tensors"])
    assert "starved" in (tmp_path / "out" / "receipt.html").read_text()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["-f", "int4-g96"], 2, ["in_features 64 is not divisible by group size 96"]),
        (["--budget", "0.5bits", "-d", "ROWS"], 2, ["smallest choice of formats needs"]),
        (["--budget", "1KB", "-d", "ROWS"], 2, ["1,000 bytes, and the smallest choice of formats needs"]),
        (["-f", "int2-g32", "-d", "ROWS", "--max-kl", "1e-9"], 1, ["past the gate", "To blame most: model.layers.0."]),
        (["-f", "int4-g32", "-d", "EMPTY"], 1, ["EMPTY"]),
        (["-f", "int4-g32", "-m", "gptq", "-d", "SHORT"], 1, ["at least 64 are needed"]),
    ],
)
def test_the_command_ends_with_the_code_that_says_whose_fault_it_is(
    tmp_path: Path, data: str, options: list[str], code: int, words: list[str]
) -> None:
    source = saved(tmp_path)
    places = {"ROWS": data, "EMPTY": str(tmp_path / "EMPTY.jsonl"), "SHORT": str(tmp_path / "SHORT.jsonl")}
    Path(places["EMPTY"]).touch()
    Path(places["SHORT"]).write_text(json.dumps({"text": "few words"}) + "\n")
    arguments = [places.get(option, option) for option in options]
    result = CliRunner().invoke(app, ["quantize", str(source), "-o", str(tmp_path / "out"), *arguments])
    assert result.exit_code == code, result.output
    told = " ".join(result.output.split())
    assert all(word in told for word in words), told
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()

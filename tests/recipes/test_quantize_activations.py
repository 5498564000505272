"""`quantize` to int8 weights and activations: static scales from data, every method, outliers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from strop.app.cli import app
from strop.calibrate.quantizing import layer_by_layer
from strop.errors import DataError, FormatError, GateError, UsageError
from strop.files.saving import save_model
from strop.layers.int8_linear import Int8Linear, OutlierInt8Linear
from strop.layers.surgery import linear_modules
from strop.methods import BLOCK_METHODS, METHODS
from strop.models import load
from strop.numerics.scheme import parse_scheme
from strop.recipes.quantize import quantize
from tests.methods.common import PLANTED, planted
from tests.tiny import tiny_chat_file, tiny_folder, tiny_input

METHODS_HERE = sorted({*METHODS, *BLOCK_METHODS} - {"rtn", "autoround", "autoround-best", "smooth-search"})


def static_scales(folder: Path) -> dict[str, float]:
    model = load(folder, tokenizer=False).model
    return {name: module.qtensor.activation_scale.item() for name, module in linear_modules(model).items()}  # type: ignore[union-attr]


def test_a_static_scale_is_fixed_from_the_rows_and_saved(tmp_path: Path) -> None:
    source, data = tiny_folder(tmp_path, "llama"), tiny_chat_file(tmp_path / "rows.jsonl", rows=24)
    scales = {}
    for observer in ("minmax", "average", "percentile", "entropy"):
        result = quantize(
            source, "int8-a8-static", output=tmp_path / observer, data=str(data), activation_observer=observer
        )
        assert result.receipt["settings"]["activation_observer"] == observer
        assert 0 < result.receipt["held_out"]["kl"] < 0.05
        scales[observer] = static_scales(tmp_path / observer)
    assert len({tuple(scales[name].values()) for name in ("minmax", "average", "entropy")}) == 3
    assert all(scales["entropy"][name] <= scale * 1.0001 for name, scale in scales["minmax"].items())


@pytest.mark.parametrize(("text", "kind"), [("int8-a8", Int8Linear), ("int8-a8-over6", OutlierInt8Linear)])
def test_dynamic_formats_need_no_data(tmp_path: Path, text: str, kind: type) -> None:
    source = tiny_folder(tmp_path, "qwen3")
    result = quantize(source, text, output=tmp_path / "out")
    opened = load(result.path)
    assert result.receipt["requested"] == text
    assert {type(module) for module in linear_modules(opened.model).values()} == {kind}
    with torch.inference_mode():
        assert opened.model(tiny_input()).logits.equal(load(source, format=text).model(tiny_input()).logits)


def test_a_static_scale_without_data_and_an_observer_without_use_are_refused(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "llama")
    with pytest.raises(UsageError, match=r"--data FILE\), or use int8-a8"):
        quantize(source, "int8-a8-static", output=tmp_path / "out")
    with pytest.raises(UsageError, match="int8-a8 fixes no scale"):
        quantize(source, "int8-a8", output=tmp_path / "out", activation_observer="entropy")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", METHODS_HERE)
def test_every_method_rounds_weights_that_are_multiplied_as_integers(tmp_path: Path, method: str) -> None:
    source, data = tiny_folder(tmp_path, "llama"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    text = "int8-a8" if method in METHODS else "int8-a8-static"
    result = quantize(source, text, output=tmp_path / "out", method=method, data=data)
    layers = linear_modules(load(result.path).model).values()
    assert all(isinstance(module, Int8Linear) and module.scheme.name == text for module in layers)
    assert 0 < result.receipt["held_out"]["kl"] < 0.05


@pytest.mark.parametrize(
    ("text", "observer"),
    [("int8-a8", "minmax"), ("int8-a8-static", "minmax"), ("int8-a8-static", "average"), ("int8-tensor-a8", "minmax")],
)
def test_smoothing_planted_outliers_lowers_the_kl_of_int8_products(tmp_path: Path, text: str, observer: str) -> None:
    source, data = planted(tmp_path), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    kl: dict[str, float] = {}
    for method in ("rtn", "smooth"):
        result = quantize(
            source, text, output=tmp_path / method, method=method, data=data, activation_observer=observer
        )
        kl[method] = result.receipt["held_out"]["kl"]
    notes = [note for block in result.receipt["blocks"] for note in block["notes"] if "q_proj" in note]
    channels = ", ".join(map(str, PLANTED))
    assert [f"input channels {channels} reach up to" in note for note in notes] == [True, True]
    assert kl["smooth"] < 0.5 * kl["rtn"]


def test_splitting_planted_outliers_off_lowers_the_kl_of_int8_products(tmp_path: Path) -> None:
    source, data = planted(tmp_path), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    whole, split = (
        quantize(source, text, output=tmp_path / text, data=data).receipt["held_out"]["kl"]
        for text in ("int8-a8", "int8-a8-over6")
    )
    assert split < 0.5 * whole


def test_a_killed_run_goes_on_with_the_same_static_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = tiny_folder(tmp_path, "llama"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    options: dict[str, Any] = {"data": data, "activation_observer": "entropy"}
    whole = static_scales(quantize(source, "int8-a8-static", output=tmp_path / "whole", **options).path)

    def interrupted(block: Any, *arguments: Any, **others: Any) -> Any:
        if block.name == "model.layers.1":
            raise KeyboardInterrupt
        return layer_by_layer(block, *arguments, **others)

    with monkeypatch.context() as patched:
        patched.setattr("strop.recipes.quantize.layer_by_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, "int8-a8-static", output=tmp_path / "out", **options)
    assert static_scales(quantize(source, "int8-a8-static", output=tmp_path / "out", **options).path) == whole


def test_the_gate_judges_the_rounding_of_activations_too(tmp_path: Path) -> None:
    source, data = planted(tmp_path), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    weights = quantize(source, "int8", output=tmp_path / "weights", data=data).receipt["held_out"]["kl"]
    with pytest.raises(GateError, match="past the gate"):
        quantize(source, "int8-a8-static", output=tmp_path / "out", data=data, max_kl=2 * weights)


def test_a_budget_and_a_repair_refuse_to_choose_roundings_of_activations(tmp_path: Path) -> None:
    source, data = tiny_folder(tmp_path, "llama"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    for options in (
        {"budget": "6bits", "formats": ("int4-g32-full", "int8-a8")},
        {"format": "int8-a8-static", "max_kl": 0.1, "repair": True},
    ):
        with pytest.raises(FormatError, match=r"choose among formats of weights.*--format int8-a8"):
            quantize(source, output=tmp_path / "out", data=data, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_layers_that_round_their_inputs_differently_stand_in_one_folder(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "llama")
    names = list(linear_modules(load(source, tokenizer=False).model))
    schemes = {name: parse_scheme("int8-a8-asym" if "mlp" in name else "int8-a8") for name in names}
    mixed = load(source, schemes)
    assert mixed.format == "mixed: int8-a8, int8-a8-asym"
    again = load(save_model(mixed.model, mixed.tokenizer, tmp_path / "out"))
    assert {name: module.scheme for name, module in linear_modules(again.model).items()} == schemes
    with torch.inference_mode():
        assert again.model(tiny_input()).logits.equal(mixed.model(tiny_input()).logits)
    schemes[names[0]] = parse_scheme("int4-g32")
    with pytest.raises(FormatError, match="packed differently"):
        save_model(load(source, schemes).model, mixed.tokenizer, tmp_path / "other")


def test_rows_on_which_the_model_overflows_fix_no_scale(tmp_path: Path) -> None:
    source, data = tiny_folder(tmp_path, "llama"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    opened = load(source)
    opened.model.get_parameter("model.layers.1.input_layernorm.weight").data.fill_(float("inf"))
    save_model(opened.model, opened.tokenizer, tmp_path / "broken")
    with pytest.raises(DataError, match=r"layers\.1\.self_attn"):
        quantize(tmp_path / "broken", "int8-a8-static", output=tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()


def test_the_command_line_chooses_the_observer_and_names_the_nearest(tmp_path: Path) -> None:
    source, data = tiny_folder(tmp_path, "llama"), tiny_chat_file(tmp_path / "rows.jsonl", rows=24)
    asked = ["quantize", str(source), "--format", "int8-a8-static", "--data", str(data), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*asked, "--activation-observer", "entropy"])
    assert result.exit_code == 0, result.output
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert receipt["settings"]["activation_observer"] == "entropy"
    wrong = CliRunner().invoke(app, [*asked, "--overwrite", "--activation-observer", "entropi"])
    assert wrong.exit_code != 0
    assert "did you mean 'entropy'?" in " ".join(wrong.stderr.split())


def test_experts_do_not_round_what_comes_in_and_are_refused_or_kept_by_name(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "mixtral")
    told = r"experts\.gate_up_proj: experts, which are computed with the activations that come; .* int8"
    with pytest.raises(FormatError, match=told):
        quantize(source, "int8-a8", output=tmp_path / "out")
    with pytest.raises(FormatError, match=r"the nearest format is int8"):
        load(source, format="int8-a8")
    result = quantize(source, "int8-a8", output=tmp_path / "out", keep_indivisible=True)
    opened = load(result.path)
    assert opened.format == "int8-a8"
    assert {type(module) for module in linear_modules(opened.model).values()} == {Int8Linear}
    assert len(result.receipt["fallbacks"]) == result.receipt["experts"] > 0

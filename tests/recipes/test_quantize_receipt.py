"""The receipt of a real run: true figures, intervals, the gate, who is to blame; data of the wrong kind is caught."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from strop import __version__
from strop.demo import everyday, model_path
from strop.errors import FormatError, GateError, UsageError
from strop.evaluation.divergence import Divergence, ReferenceLogits
from strop.evaluation.held_out import held_out_figures
from strop.evaluation.likelihood import Likelihood
from strop.files.receipts import Receipt, TensorReceipt
from strop.layers.surgery import linear_modules
from strop.models.opening import open_tokenizer
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scheme import parse_scheme
from strop.recipes.gate import Gate, layers_to_blame
from strop.recipes.quantize import quantize
from strop.scratch import Scratch
from tests.recipes.test_quantize import Listener
from tests.tiny import tiny_chat_file, tiny_folder, tiny_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_chat_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows=40))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("receipt"), "llama")


def test_a_receipt_holds_intervals_versions_shares_and_what_it_took(tmp_path: Path, source: Path, data: str) -> None:
    result = quantize(source, "int4-g32", output=tmp_path / "out", method="search", data=data, max_kl=5.0, seed=3)
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert receipt == result.receipt
    held = receipt["held_out"]
    for name in ("kl", "top1_agreement", "perplexity", "source_perplexity"):
        low, high = held[f"{name}_interval"]
        assert low <= held[name] <= high
    assert held["rows"] == held["rows_compared"] == 10
    parameters = sum(p.numel() for p in tiny_model("llama").parameters())
    rounded = sum(m.weight.numel() for m in linear_modules(tiny_model("llama")).values())
    assert receipt["parameters"] == parameters
    assert receipt["rounded_share"] == pytest.approx(rounded / parameters)
    assert receipt["fallback_share"] == 0.0
    assert receipt["weights_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert receipt["source_weights_bytes"] == (source / "model.safetensors").stat().st_size
    assert receipt["gate"] == {"max_kl": 5.0, "min_agreement": None, "passed": True, "repairs": 0}
    made = receipt["made_by"]
    assert (made["strop"], made["torch"], made["seed"]) == (__version__, torch.__version__, 3)
    assert made["seconds"] > 0
    assert made["peak_bytes"] >= 0
    assert all(tensor["finite_scales"] and 0 <= tensor["saturation"] < 0.1 for tensor in receipt["tensors"])
    page = (tmp_path / "out" / "receipt.html").read_text()
    assert "The gate is passed" in page
    assert all(tensor["name"] in page for tensor in receipt["tensors"])


@pytest.mark.parametrize("method", ["awq", "smooth"])
def test_scales_that_a_method_folds_are_not_counted_as_error(
    tmp_path: Path, source: Path, data: str, method: str
) -> None:
    plain = quantize(source, "int4-g32", output=tmp_path / "plain", method="rtn").receipt
    folded = quantize(source, "int4-g32", output=tmp_path / "folded", method=method, data=data).receipt
    assert any(tensor["folded"] for tensor in folded["tensors"])
    for ours, theirs in zip(folded["tensors"], plain["tensors"], strict=True):
        assert ours["relative_error"] < 2 * theirs["relative_error"]  # without the scales it is hundreds of times that


def test_scales_that_are_not_finite_are_refused() -> None:
    good = quantize_tensor(torch.ones(4, 32), parse_scheme("int4-g32"))
    assert good.scale is not None
    scale = good.scale.clone()
    scale[2, 0] = float("inf")
    broken = QuantizedTensor(good.codes, scale, None, good.scheme, good.shape)
    with pytest.raises(FormatError, match=r"mlp\.up: 1 of 4 scales as int4-g32 are not finite"):
        TensorReceipt.of("mlp.up", torch.ones(4, 32), broken, "int4-g32")


def test_shares_are_of_parameters_not_of_layers() -> None:
    large = TensorReceipt("large", (30, 10), "int4", "int4", None, 0.0, 0.0, 150)
    small = TensorReceipt("small", (10, 10), "int4", "float32", "why", 0.0, 0.0, 400)
    receipt = Receipt("base", "int4", {}, [large, small], parameters=1000)
    assert receipt.fallback_share == 0.25
    assert receipt.rounded_share == 0.3
    assert Receipt("base", "int4", {}, [large]).rounded_share is None


def test_held_out_rows_of_which_none_could_be_kept_are_no_judge() -> None:
    with Scratch(1) as scratch:
        divergence = Divergence(ReferenceLogits(3, scratch))
        with pytest.raises(UsageError, match="not a single one fit"):
            held_out_figures(Likelihood(3), Likelihood(3), divergence)


def test_a_figure_that_is_no_number_does_not_pass_a_gate() -> None:
    held = {"kl": float("nan"), "top1_agreement": float("nan")}
    assert len(Gate(0.1, 0.9).problems(held)) == 2


def test_the_layer_that_costs_most_is_blamed_first_and_repaired_first(tmp_path: Path, data: str) -> None:
    def one_bad(folder: Path) -> Path:
        model = tiny_model("llama")
        weight = model.model.layers[1].mlp.down_proj.weight
        with torch.no_grad():
            weight[:, ::32] *= 40  # one outlier a group: all else in it rounds to zero
        model.save_pretrained(folder)
        open_tokenizer(tiny_folder(folder.parent, "llama")).save_pretrained(folder)
        return folder

    source = one_bad(tmp_path / "bad")
    options: dict[str, Any] = {"data": data, "max_kl": 1e-6, "method": "rtn"}
    with pytest.raises(GateError, match=r"To blame most: model\.layers\.1\.mlp\.down_proj \(\d") as caught:
        quantize(source, "int4-g32-full", output=tmp_path / "out", **options)
    assert "Nothing was written" in str(caught.value)
    assert not (tmp_path / "out").exists()
    listener = Listener()
    with pytest.raises(GateError, match=r"every layer has the most bits.*To blame most: "):
        quantize(
            source, "int4-g32-full", output=tmp_path / "out", repair=True, formats=("int4-g32-full", "int6-g32"),
            reporter=listener, **options
        )  # fmt: skip
    assert "model.layers.1.mlp.down_proj first" in next(note for note in listener.notes if note.startswith("repair"))


@pytest.mark.parametrize(
    ("family", "grid", "method"),
    [
        ("mixtral", "int4-g32", "search"),
        ("gpt2", "nf4", "search"),
        ("qwen3", "int3-g32", "awq"),
        ("llama", "int4-g32", "smooth"),
    ],
)
def test_experts_transposed_and_folded_layers_are_blamed_for_no_more_than_they_do(
    tmp_path: Path, data: str, family: str, grid: str, method: str
) -> None:
    seen: dict[str, float] = {}
    source = tiny_folder(tmp_path, family)
    if family == "llama":  # inputs that differ a hundredfold, so that SmoothQuant folds large scales
        model = tiny_model(family)
        with torch.no_grad():
            for block in model.model.layers:
                block.input_layernorm.weight[::8] *= 100
                block.post_attention_layernorm.weight[::8] *= 100
        model.save_pretrained(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strop.recipes.quantize.layers_to_blame", lambda *a: seen.update(layers_to_blame(*a)) or seen)
        with pytest.raises(GateError, match="To blame most: "):
            quantize(source, grid, output=tmp_path / "out", method=method, data=data, max_kl=1e-9, max_rows=16)
    names = {tensor["name"] for tensor in quantize(source, grid, output=tmp_path / "all").receipt["tensors"]}
    assert seen.keys() == names
    assert list(seen.values()) == sorted(seen.values(), reverse=True)
    assert all(0 <= error < 0.2 for error in seen.values())  # a fold left in place, or a weight on its side: near 1


def test_a_repair_is_on_the_receipt_with_what_was_asked_for(tmp_path: Path, source: Path, data: str) -> None:
    free = quantize(source, "int2-g32-full", output=tmp_path / "free", method="search", data=data).receipt
    limit = free["held_out"]["kl"] * 0.5
    receipt = quantize(
        source, "int2-g32-full", output=tmp_path / "out", method="search", data=data, max_kl=limit, repair=True
    ).receipt
    assert receipt["gate"]["repairs"] >= 1
    assert receipt["held_out"]["kl"] <= limit
    assert {tensor["requested"] for tensor in receipt["tensors"]} == {"int2-g32-full"}
    assert len({tensor["actual"] for tensor in receipt["tensors"]}) > 1
    assert "Repaired" in (tmp_path / "out" / "receipt.html").read_text()


def test_calibrating_on_noise_is_caught_by_the_gate_that_the_right_data_pass(tmp_path: Path) -> None:
    tokenizer, rng = open_tokenizer(model_path()), random.Random(0)
    judging = [everyday.paragraph(rng) for _ in range(8)]
    noise = [tokenizer.decode([rng.randrange(10, len(tokenizer)) for _ in range(48)]) for _ in range(12)]
    for name, train in (("right", [everyday.paragraph(rng) for _ in range(12)]), ("wrong", noise)):
        (tmp_path / name).mkdir()
        for split, rows in (("train", train), ("valid", judging)):
            lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
            (tmp_path / name / f"{split}.jsonl").write_text(lines)
    options: dict[str, Any] = {"method": "gptq", "max_length": 64, "max_kl": 0.25}
    right = quantize(
        model_path(), "int2-g32-full", output=tmp_path / "model", data=str(tmp_path / "right"), **options
    ).receipt
    assert right["held_out"]["kl"] < 0.25
    with pytest.raises(GateError, match=r"past the gate on .* held-out rows: KL .*at most 0\.25.*To blame most: model"):
        quantize(model_path(), "int2-g32-full", output=tmp_path / "noise", data=str(tmp_path / "wrong"), **options)
    assert not (tmp_path / "noise").exists()

"""Quantizing over calibration rows: what was measured is what is stored, kills lose nothing, budgets are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.data.batches import eval_batches
from strop.errors import DataError, GateError, UsageError
from strop.files.saving import save_model
from strop.files.shards import iter_tensors
from strop.memory import PeakMemory, release_unused_memory
from strop.methods.sequential import layer_by_layer
from strop.models import load
from strop.recipes.calibration import CalibrationRows, calibration_rows
from strop.recipes.quantize import quantize
from tests.fresh import in_fresh_process
from tests.recipes.test_quantize import Listener
from tests.tiny import tiny_chat_file, tiny_folder, tiny_model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(iter_tensors(folder))


def equal(one: Path, other: Path) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def divergence(source: Path, made: Path, rows: CalibrationRows) -> tuple[float, int]:
    """KL of two folders on held-out rows, in nats per token, and how many tokens that are."""
    models = [load(folder, dtype="float32").model for folder in (source, made)]
    nats, count = 0.0, 0
    for batch in eval_batches(rows.held_out, 1):
        with torch.no_grad():
            p, q = (model(**batch.inputs()).logits.log_softmax(-1) for model in models)
        supervised = batch.labels[:, 1:] != -100
        nats += float((p.exp() * (p - q)).sum(-1)[:, :-1][supervised].sum())
        count += int(supervised.sum())
    return nats / count, count


@pytest.mark.parametrize(
    ("family", "grid"),
    [
        ("llama", "int3-g32"),
        ("gpt2", "nf4"),
        ("mixtral", "int4-g32"),
        ("llama", "int8-a8"),
        ("qwen3", "int8-a8-asym"),
        ("gemma", "int8-a8-static"),
    ],
)
def test_the_receipts_figures_are_those_of_the_model_that_was_written(tmp_path: Path, family: str, grid: str) -> None:
    source = tiny_folder(tmp_path, family)
    data = tiny_chat_file(tmp_path / "rows.jsonl", rows=24)
    result = quantize(source, grid, output=tmp_path / "out", method="search", data=str(data))
    held_out = result.receipt["held_out"]
    rows = calibration_rows(str(data), load(source).require_tokenizer(), max_rows=128, max_length=256)
    kl, count = divergence(source, result.path, rows)
    assert held_out["tokens"] == count
    # A token's largest input lies at a tie of its own scale (max / 127.5): float noise decides half a step there.
    assert held_out["kl"] == pytest.approx(kl, rel=5e-2 if "a8" in grid else 1e-3)
    low, high = held_out["kl_interval"]
    assert low <= held_out["kl"] <= high
    blocks = "transformer.h" if family == "gpt2" else "model.layers"
    assert [block["name"] for block in result.receipt["blocks"]] == [f"{blocks}.0", f"{blocks}.1"]
    assert all(block["held_out_error"] > 0 for block in result.receipt["blocks"])
    calibration = result.receipt["settings"]["calibration"]
    assert calibration["sha256"] == rows.sha256
    assert calibration["held_out_rows"] == len(rows.held_out)


def test_a_run_killed_between_blocks_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = tiny_folder(tmp_path, "llama"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    whole = quantize(source, "int3-g32", output=tmp_path / "whole", method="search", data=data).path
    worked: list[str] = []

    def working(until: str | None) -> Any:
        def run(block: Any, *arguments: Any, **options: Any) -> Any:
            if block.name == until:
                raise KeyboardInterrupt
            worked.append(block.name)
            return layer_by_layer(block, *arguments, **options)

        return run

    monkeypatch.setattr("strop.recipes.quantize.layer_by_layer", working("model.layers.1"))
    with pytest.raises(KeyboardInterrupt):
        quantize(source, "int3-g32", output=tmp_path / "out", method="search", data=data)
    assert worked == ["model.layers.0"]
    assert not (tmp_path / "out").exists()
    worked.clear()
    monkeypatch.setattr("strop.recipes.quantize.layer_by_layer", working(None))
    listener = Listener()
    again = quantize(source, "int3-g32", output=tmp_path / "out", method="search", data=data, reporter=listener).path
    assert worked == ["model.layers.1"]
    assert any("1 of 2 blocks were finished before" in note for note in listener.notes)
    assert equal(again, whole)
    assert sorted(path.name for path in tmp_path.iterdir() if "blocks" in path.name) == []


def test_blocks_of_another_plan_are_not_used(tmp_path: Path) -> None:
    source, data = tiny_folder(tmp_path, "llama"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    with pytest.raises(GateError):
        quantize(source, "int2-g32", output=tmp_path / "out", method="search", data=data, max_kl=0.0)
    listener = Listener()
    quantize(source, "int3-g32", output=tmp_path / "out", method="search", data=data, reporter=listener)
    assert not any("finished before" in note for note in listener.notes)
    assert equal(
        tmp_path / "out", quantize(source, "int3-g32", output=tmp_path / "new", method="search", data=data).path
    )


def test_past_the_gate_nothing_is_written_and_the_blocks_are_named(tmp_path: Path) -> None:
    source, data = tiny_folder(tmp_path, "llama"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    with pytest.raises(GateError, match=r"KL .* at most 1e-09 .*top-1 agreement .*model\.layers\.\d"):
        quantize(source, "int2-g32", output=tmp_path / "out", data=data, max_kl=1e-9, min_agreement=1.0)
    assert not (tmp_path / "out").exists()
    quantize(source, "int8", output=tmp_path / "fine", data=data, max_kl=1.0, min_agreement=0.1)
    with pytest.raises(UsageError, match="--data"):
        quantize(source, "int8", output=tmp_path / "blind", max_kl=1.0)


def test_rows_that_say_too_little_are_refused_and_copies_left_out(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "llama")
    (tmp_path / "short.jsonl").write_text('{"text": "two words"}\n')
    with pytest.raises(DataError, match=r"short\.jsonl: \d+ tokens calibrate, at least 64"):
        quantize(source, "int4-g32", output=tmp_path / "out", data=str(tmp_path / "short.jsonl"))
    line = json.dumps({"text": "the same line of text again and again and again " * 4})
    (tmp_path / "same.jsonl").write_text(f"{line}\n" * 20)
    listener = Listener()
    result = quantize(source, "int4-g32", output=tmp_path / "out", data=str(tmp_path / "same.jsonl"), reporter=listener)
    assert result.receipt["settings"]["calibration"]["rows"] == 1
    assert any("are copies and are left out" in note for note in listener.notes)
    assert any("nothing is left to compare on" in note for note in listener.notes)


def test_a_budget_that_is_too_small_is_refused_with_what_would_do(tmp_path: Path) -> None:
    source, data = tiny_folder(tmp_path, "llama"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    with pytest.raises(UsageError, match=r"max-memory: 1 MB are given, and \d+ MB are needed"):
        quantize(source, "int4-g32", output=tmp_path / "out", data=data, max_memory=1_000_000)
    assert not (tmp_path / "out").exists()


def peak_of_quantizing(source: str, data: str, output: str, budget: int) -> int:
    release_unused_memory()
    with PeakMemory() as memory:
        quantize(source, "int4-g32", output=output, method="search", data=data, max_memory=budget, max_rows=64)
    return memory.peak_bytes


def large_folder(tmp_path: Path, *, more_than: int) -> Path:
    """A model of 160 MB."""
    model = tiny_model(
        "llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    assert sum(p.numel() * p.element_size() for p in model.parameters()) > more_than
    save_model(model, load(tiny_folder(tmp_path, "llama")).tokenizer, tmp_path / "large")
    return tmp_path / "large"


def test_a_model_larger_than_the_budget_is_quantized_within_it(tmp_path: Path) -> None:
    budget = 100_000_000
    source = large_folder(tmp_path, more_than=budget)
    data = tiny_chat_file(tmp_path / "rows.jsonl", rows=64)
    peak = in_fresh_process(peak_of_quantizing, str(source), str(data), str(tmp_path / "out"), budget)
    assert peak <= budget, f"{peak / 1e6:.0f} MB of {budget / 1e6:.0f} MB"
    assert load(tmp_path / "out").scheme is not None

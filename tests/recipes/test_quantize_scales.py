"""`quantize` with scales trained end to end: nearer on rows that trained nothing, and the same promises as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from strop.calibrate.memory import MemoryPlan
from strop.errors import GateError, TrainingError, UsageError
from strop.memory import PeakMemory, release_unused_memory
from strop.models import load
from strop.recipes.calibration import calibration_rows
from strop.recipes.quantize import quantize
from strop.scratch import Scratch
from strop.training.scales import train_scales
from tests.fresh import in_fresh_process
from tests.recipes.helpers import same, short, tensors
from tests.recipes.test_quantize import Listener
from tests.recipes.test_quantize_calibrated import divergence, equal, large_folder
from tests.tiny import tiny_chat_file, tiny_folder


def test_a_real_model_comes_nearer_on_rows_that_trained_nothing(material: Path, tmp_path: Path) -> None:
    source, data = material / "models" / "stories260K", material / "data" / "tinystories_4M_lowercase.txt"
    kl = {}
    for steps in (0, 12):
        result = quantize(
            source,
            "int3-g4",
            output=tmp_path / f"{steps}",
            method="search",
            data=str(data),
            max_rows=40,
            max_length=96,
            scale_steps=steps,
        )
        kl[steps] = result.receipt["held_out"]["kl"]
        assert result.receipt["settings"].get("scale_steps", 0) == steps
    assert kl[12] < 0.85 * kl[0]


def test_the_receipt_is_that_of_the_model_that_was_written(tmp_path: Path) -> None:
    source, data = tiny_folder(tmp_path, "qwen3"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    plain = quantize(source, "int2-g32", output=tmp_path / "plain", method="search", data=data).receipt
    result = quantize(source, "int2-g32", output=tmp_path / "out", method="search", data=data, scale_steps=10)
    rows = calibration_rows(data, load(source).require_tokenizer(), max_rows=128, max_length=256)
    kl, _ = divergence(source, result.path, rows)
    assert result.receipt["held_out"]["kl"] == pytest.approx(kl, rel=1e-3)
    assert [tensor["relative_error"] for tensor in result.receipt["tensors"]] != [
        tensor["relative_error"] for tensor in plain["tensors"]
    ]
    assert [block["held_out_error"] for block in result.receipt["blocks"]] != [
        block["held_out_error"] for block in plain["blocks"]
    ]


@pytest.mark.parametrize("settings", [{"train": "scales"}, {"scales": "learned"}], ids=["scales", "every weight"])
def test_training_begins_at_the_very_model_that_was_quantized(tmp_path: Path, settings: dict[str, str]) -> None:
    """Gains that were trained with the scales come along with the codes that they belong to."""
    source, data = tiny_folder(tmp_path, "qwen3"), tiny_chat_file(tmp_path / "rows.jsonl", rows=24)
    start = quantize(source, "int2-g32", output=tmp_path / "start", method="search", data=str(data), scale_steps=10)
    run = short(source, data, tmp_path / "run", method="qat", format="int2-g32", start=str(start.path), max_steps=1,
                learning_rate=1e-12, scale_rate=1e-12, **settings)  # fmt: skip
    begun, original, trained = (
        {name: tensor for name, tensor in tensors(folder).items() if ".layers." in name}
        for folder in (start.path, source, run.last_path)
    )
    assert not same({name: begun[name] for name in begun if name.endswith("norm.weight")},
                    {name: original[name] for name in original if name.endswith("norm.weight")})  # fmt: skip
    assert same(trained, begun)


@pytest.mark.parametrize("killed_after", ["blocks", "training"])
def test_a_killed_run_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: str
) -> None:
    source, data = tiny_folder(tmp_path, "llama"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    options: dict[str, Any] = {"method": "search", "data": data, "scale_steps": 6}
    whole = quantize(source, "int3-g32", output=tmp_path / "whole", **options).path
    trained: list[int] = []

    def training(*arguments: Any, **settings: Any) -> Any:
        trained.append(1)
        if killed_after == "blocks":
            raise KeyboardInterrupt
        return train_scales(*arguments, **settings)

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr("strop.recipes.calibrated.train_scales", training)
        if killed_after == "training":
            patches.setattr("strop.recipes.calibrated._judge", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, "int3-g32", output=tmp_path / "out", **options)
    assert trained == [1]
    assert not (tmp_path / "out").exists()
    if killed_after == "training":  # finished, so not done again
        monkeypatch.setattr("strop.recipes.calibrated.train_scales", killed)
    listener = Listener()
    again = quantize(source, "int3-g32", output=tmp_path / "out", reporter=listener, **options).path
    assert any("2 of 2 blocks were finished before" in note for note in listener.notes)
    assert equal(again, whole)
    assert [path.name for path in tmp_path.iterdir() if "blocks" in path.name] == []


def test_blocks_that_return_tuples_have_their_scales_trained(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "falcon", num_hidden_layers=4)
    data = str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    result = quantize(source, "int3-g32", output=tmp_path / "out", data=data, scale_steps=4)
    assert result.receipt["settings"]["scale_steps"] == 4


def hidden_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".out"))


def test_a_run_without_scale_steps_after_one_past_the_gate_leaves_nothing_behind(tmp_path: Path) -> None:
    source, data = tiny_folder(tmp_path, "llama"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    with pytest.raises(GateError):
        quantize(source, "int2-g32", output=tmp_path / "out", data=data, scale_steps=2, max_kl=1e-9)
    assert hidden_folders(tmp_path) == [".out.blocks", ".out.blocks.scales"]
    quantize(source, "int2-g32", output=tmp_path / "out", data=data)
    assert hidden_folders(tmp_path) == []


def test_training_scales_takes_no_more_disk_for_hidden_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = tiny_folder(tmp_path, "llama"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    used: list[int] = []

    class Watched(Scratch):
        def close(self) -> None:
            used.append(self.used_bytes)
            super().close()

    monkeypatch.setattr("strop.recipes.calibrated.plan_memory", lambda *_, **__: MemoryPlan(4, 0, 0))
    monkeypatch.setattr("strop.recipes.calibrated.Scratch", Watched)
    for steps in (0, 2):
        quantize(source, "int4-g32", output=tmp_path / f"{steps}", data=data, scale_steps=steps)
    assert used[1] == used[0] > 0


def test_what_a_user_should_know_of_the_training_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = tiny_folder(tmp_path, "mixtral"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    monkeypatch.setattr("strop.training.scales.SCALE_RATE", 3.0)  # nothing comes nearer
    monkeypatch.setattr("strop.training.scales.GAIN_RATE", 3.0)
    listener = Listener()
    quantize(source, "int8", output=tmp_path / "out", data=data, scale_steps=2, reporter=listener)
    said = "\n".join(listener.notes)
    assert "3 batches are too few to hold one out; all of them train and measure" in said
    assert "the scales of experts stay" in said
    assert "no step brought the model nearer than it was" in said


def test_a_training_that_fails_leaves_no_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = tiny_folder(tmp_path, "llama"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))

    def failing(*_: Any, **__: Any) -> Any:
        raise TrainingError("scale_steps: the divergence is not finite")

    monkeypatch.setattr("strop.recipes.calibrated.train_scales", failing)
    with pytest.raises(TrainingError):
        quantize(source, "int4-g32", output=tmp_path / "out", data=data, scale_steps=2)
    assert hidden_folders(tmp_path) == [".out.blocks"]


def test_what_has_no_scales_to_train_or_no_rows_is_refused_before_any_work(tmp_path: Path) -> None:
    source, data = tiny_folder(tmp_path, "llama"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    with pytest.raises(UsageError, match=r"scale_steps: scales are trained on rows.*--data"):
        quantize(source, "int4-g32", output=tmp_path / "out", scale_steps=5)
    with pytest.raises(UsageError, match=r"scale_steps: int8-a8.* rounds activations too"):
        quantize(source, "int8-a8", output=tmp_path / "out", data=data, scale_steps=5)
    with pytest.raises(UsageError, match="a number of steps from 0 on is needed, got -1"):
        quantize(source, "int4-g32", output=tmp_path / "out", data=data, scale_steps=-1)
    with pytest.raises(UsageError, match=r"scale_steps: .*nf4-dq.* codes themselves"):
        quantize(source, "nf4-dq", output=tmp_path / "out", data=data, scale_steps=5)
    assert not (tmp_path / "out").exists()


def test_a_budget_under_which_scales_cannot_be_trained_is_refused_with_what_would_do(tmp_path: Path) -> None:
    source, data = tiny_folder(tmp_path, "llama"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    with pytest.raises(UsageError, match=r"\d+ MB are needed for the quantized model, whose scales are trained"):
        quantize(source, "int4-g32", output=tmp_path / "out", data=data, scale_steps=5, max_memory=1_000_000)


def peak_of_training(source: str, data: str, output: str, budget: int) -> int:
    release_unused_memory()
    with PeakMemory() as memory:
        quantize(
            source, "int4-g32", output=output, method="rtn", data=data, max_memory=budget, max_rows=12, scale_steps=1
        )
    return memory.peak_bytes


def test_a_model_larger_than_the_budget_has_its_scales_trained_within_it(tmp_path: Path) -> None:
    budget = 130_000_000
    source = large_folder(tmp_path, more_than=budget)
    data = tiny_chat_file(tmp_path / "rows.jsonl", rows=24)
    peak = in_fresh_process(peak_of_training, str(source), str(data), str(tmp_path / "out"), budget)
    assert peak <= budget, f"{peak / 1e6:.0f} MB of {budget / 1e6:.0f} MB"

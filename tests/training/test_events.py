"""Event files read back by TensorBoard's own reader: the figures of metrics.jsonl, each step once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from strop.errors import MissingInputError
from strop.training.events import FILE, TAGS, EventFile, require_tensorboard
from strop.training.metrics import MetricsFile, read_metrics

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = event_accumulator.EventAccumulator(str(folder))
    reader.Reload()
    tags = reader.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags}


def row(step: int, **more: float) -> dict:
    return {"step": step, "loss": 4.0 / step, "learning_rate": 0.5, "gradient_norm": 1.0, "tokens": 10,
            "tokens_per_second": 100.0, "step_seconds": 0.25, "peak_bytes": 1 << 30, **more}  # fmt: skip


def expected(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    found = {tag: [(r["step"], pytest.approx(r[key])) for r in rows if key in r] for key, tag in TAGS.items()}
    return {tag: values for tag, values in found.items() if values}


def test_event_files_hold_the_figures_of_the_metrics(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", after_step=0, events=tmp_path / "tensorboard")
    metrics.write(row(1))
    metrics.write(row(2, valid_loss=3.5))
    assert scalars(tmp_path / "tensorboard") == expected(read_metrics(tmp_path / "metrics.jsonl"))  # before any close
    metrics.close()
    found = scalars(tmp_path / "tensorboard")
    assert found == expected(read_metrics(tmp_path / "metrics.jsonl"))
    assert set(found) == set(TAGS.values())


def test_a_continued_event_file_holds_each_step_once(tmp_path):
    for after in (0, 2, 1):
        metrics = MetricsFile(tmp_path / "metrics.jsonl", after_step=after, events=tmp_path / "tensorboard")
        for step in range(after + 1, after + 4):
            metrics.write(row(step))
        metrics.close()
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["train/loss"]] == [1, 2, 3, 4]
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == [FILE]


def test_the_clock_counts_training_seconds(tmp_path):
    events = EventFile(tmp_path, [row(1), row(2)])
    events.write(row(3))
    events.close()
    reader = event_accumulator.EventAccumulator(str(tmp_path))
    reader.Reload()
    times = [event.wall_time for event in reader.Scalars("train/loss")]
    assert [round(times[index + 1] - times[index], 3) for index in range(2)] == [0.25, 0.25]


def test_without_the_package_the_extra_is_named(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else real(name, *a))
    with pytest.raises(MissingInputError, match=r"pip install strop\[tensorboard\]"):
        require_tensorboard()

"""Checkpoints: whole, checked, pruned, never a pickle; one process to a run."""

from __future__ import annotations

import json
import multiprocessing
import random
from pathlib import Path

import pytest
import torch

from strop.errors import FileFormatError, StropError, TrainingError, UsageError
from strop.training.checkpoints import (
    Checkpoint,
    RunLock,
    differences,
    generator_states,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    set_generator_states,
)


def checkpoint(step: int = 3) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step,
        {"layer.weight": torch.randn(4, 3, generator=generator), "layer.bias": torch.randn(3, generator=generator)},
        {
            "layer.weight.step": torch.tensor(float(step)),
            "layer.weight.exp_avg": torch.randn(4, 3, generator=generator),
        },
        generator_states(torch.device("cpu")),
        {"progress": {"loss": 0.1 + 0.2}, "stream": {"epoch": 1}},
    )


def test_what_is_read_is_what_was_written(tmp_path):
    written = checkpoint()
    read = load_checkpoint(save_checkpoint(tmp_path, written))
    assert read.step == 3
    for name in ("weights", "optimizer", "random"):
        left, right = getattr(written, name), getattr(read, name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left)
    assert read.state["progress"] == {"loss": 0.1 + 0.2}  # floats survive JSON bit for bit


def test_a_checkpoint_holds_safetensors_and_json_only(tmp_path):
    folder = save_checkpoint(tmp_path, checkpoint())
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "manifest.json",
        "optimizer.safetensors",
        "random.safetensors",
        "state.json",
        "weights.safetensors",
    ]
    for path in folder.iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK"))


def test_any_changed_byte_is_found(tmp_path):
    folder = save_checkpoint(tmp_path, checkpoint())
    draw = random.Random(0)
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for place in draw.sample(range(len(original)), min(12, len(original))):
            changed = bytearray(original)
            changed[place] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
            with pytest.raises(StropError):
                load_checkpoint(folder)
        path.write_bytes(original)
    load_checkpoint(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "manifest.json"])
def test_a_missing_or_cut_file_is_found(tmp_path, name):
    folder = save_checkpoint(tmp_path, checkpoint())
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(StropError):
        load_checkpoint(folder)
    (folder / name).unlink()
    with pytest.raises(StropError):
        load_checkpoint(folder)


def test_an_added_file_is_found(tmp_path):
    folder = save_checkpoint(tmp_path, checkpoint())
    (folder / "optimizer.pt").write_bytes(b"\x80\x04")
    with pytest.raises(FileFormatError, match=r"optimizer\.pt"):
        load_checkpoint(folder)


def test_the_newest_whole_one_is_taken_and_damaged_ones_are_named(tmp_path):
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, checkpoint(step), keep=3)
    (tmp_path / "step-000006" / "state.json").write_text("{}")
    (tmp_path / "step-000004" / "weights.safetensors").unlink()
    found, skipped = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 2
    assert [line.split()[0] for line in skipped] == ["step-000006", "step-000004"]


def test_nothing_there_is_nothing_found(tmp_path):
    assert newest_checkpoint(tmp_path / "none") == (None, [])


def test_half_written_folders_are_not_looked_at(tmp_path):
    (tmp_path / ".step-000009.x.part").mkdir()
    (tmp_path / "step-9").mkdir()
    assert newest_checkpoint(tmp_path) == (None, [])


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, checkpoint(step))
    found, _ = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1_000_000


def test_old_ones_are_removed_only_when_the_new_one_stands(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step))
    from strop.training import checkpoints

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints, "write_manifest", fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path, checkpoint(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    monkeypatch.undo()
    save_checkpoint(tmp_path, checkpoint(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_a_checkpoint_of_another_format_is_refused_by_name(tmp_path):
    from strop.files.folders import write_manifest

    folder = save_checkpoint(tmp_path, checkpoint())
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": 99}))
    write_manifest(folder)
    with pytest.raises(TrainingError, match="format 99, this version reads 1"):
        load_checkpoint(folder)


def test_generators_go_on_where_they_were():
    device = torch.device("cpu")
    before = torch.get_rng_state()
    states = generator_states(device)
    first = torch.rand(5)
    set_generator_states(states, device)
    assert torch.equal(torch.rand(5), first)
    torch.set_rng_state(before)


def test_differences_are_all_listed_and_numbers_compare_by_value():
    lines = differences({"a": 1, "b": 2, "c": None, "d": "x" * 99}, {"a": 1.0, "b": 3, "e": True})
    assert lines[0] == "b was 2 and is 3"
    assert lines[2] == "e was not set and is True"
    assert len(lines) == 3
    assert len(lines[1]) < 100


def _hold(folder: Path, ready: multiprocessing.Event, done: multiprocessing.Event) -> None:
    with RunLock(folder):
        ready.set()
        done.wait(30)


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, done))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(UsageError, match="another process is training"), RunLock(tmp_path):
            pass
    finally:
        other.kill()  # the process's own end, without a goodbye
        other.join()
    with RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass

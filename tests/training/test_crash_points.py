"""After a crash at any call of a save there is the old checkpoint or the new one, whole, and never a mixture."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from strop.files import folders
from strop.files.folders import clear_leftovers
from strop.training.checkpoints import Checkpoint, newest_checkpoint, save_checkpoint
from tests.training.crash_points import Disk, record


def small(step: int, mark: float = 0.0) -> Checkpoint:
    weights = {"w": torch.full((40, 30), step + mark)}
    moments = {"w.step": torch.tensor(float(step)), "w.exp_avg": torch.full((40, 30), -step - mark)}
    return Checkpoint(step, weights, moments, {"cpu": torch.full((64,), step, dtype=torch.uint8)}, {"mark": mark})


def is_whole(found: Checkpoint, wanted: Checkpoint) -> bool:
    if (found.step, found.state["mark"]) != (wanted.step, wanted.state["mark"]):
        return False
    parts = ("weights", "optimizer", "random")
    return all(
        torch.equal(getattr(found, part)[key], value) for part in parts for key, value in getattr(wanted, part).items()
    )


SAVES = {
    "the first": ([], small(1)),
    "the next": ([small(1)], small(2)),
    "a third, the oldest goes": ([small(1), small(2)], small(3)),
    "the same step again": ([small(1), small(2)], small(2, 0.5)),
    "the only one again": ([small(2)], small(2, 0.5)),
}


def crash_everywhere(base: Path, before: list[Checkpoint], new: Checkpoint, *, exchange: bool) -> tuple[int, int]:
    """Save `new` after `before`, crash after every call; returns how many crashes ended in the old and in the new."""
    run = base / "run"
    run.mkdir(parents=True)
    for checkpoint in before:
        save_checkpoint(run / "checkpoints", checkpoint)
    disk = Disk(run)
    with record(run, exchange=exchange) as calls:
        save_checkpoint(run / "checkpoints", new)
    assert {"create", "write", "fsync", "mkdir"} <= {call[0] for call in calls}
    draw, old, fresh = random.Random(0), 0, 0
    for number in range(len(calls) + 1):
        for kept, data in disk.crashes(draw):
            left = base / "left"
            disk.lay_out(left, kept, data)
            clear_leftovers(left / "checkpoints")
            found, _ = newest_checkpoint(left / "checkpoints")
            place = f"after {number} calls, {calls[number - 1][:2] if number else ''}, {data}, {kept}"
            if found is not None and is_whole(found, new):
                fresh += 1
            else:
                assert number < len(calls), f"the save had ended: {place}"
                assert found is None if not before else found is not None and is_whole(found, before[-1]), place
                old += 1
            if (left / "checkpoints").is_dir():
                assert all(path.name.startswith("step-") for path in (left / "checkpoints").iterdir()), place
            shutil.rmtree(left)
        if number < len(calls):
            disk.play(calls[number])
    return old, fresh


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "set aside"])
@pytest.mark.parametrize("save", SAVES)
def test_a_crash_at_any_call_leaves_the_old_or_the_new_checkpoint(tmp_path, save, exchange):
    before, new = SAVES[save]
    old, fresh = crash_everywhere(tmp_path, before, new, exchange=exchange)
    assert old > 50
    assert fresh > 5


def test_the_replay_ends_where_the_real_save_did(tmp_path):
    run = tmp_path / "run"
    save_checkpoint(run / "checkpoints", small(1))
    disk = Disk(run)
    with record(run) as calls:
        save_checkpoint(run / "checkpoints", small(2))
    for call in calls:
        disk.play(call)
    disk.lay_out(tmp_path / "left", [True] * len(disk.pending), "lost")
    listings = [
        {path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
        for root in (run, tmp_path / "left")
    ]
    assert listings[0] == listings[1]


@pytest.mark.parametrize("skipped", ["files", "the parent"])
def test_without_its_flushes_the_save_fails_the_replay(tmp_path, monkeypatch, skipped):
    """The control: the replay finds the errors that it is there to find."""
    if skipped == "files":
        monkeypatch.setattr(folders, "_flush", lambda folder: None)
    else:
        real = folders.sync
        monkeypatch.setattr(folders, "sync", lambda path: None if str(path).endswith("checkpoints") else real(path))
    before, new = SAVES["the only one again"]
    with pytest.raises(AssertionError):
        crash_everywhere(tmp_path, before, new, exchange=True)

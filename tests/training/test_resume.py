"""A run that is stopped, by whatever, goes on bit for bit; what would make it another run is refused."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from strop.config import Steps
from strop.errors import TrainingError
from strop.training.checkpoints import Checkpoint, generator_states, load_checkpoint, newest_checkpoint
from strop.training.metrics import read_metrics
from strop.training.optimizers import OptimizerName
from tests.training.helpers import (
    KINDS,
    Killed,
    Notes,
    assert_equal,
    exported,
    prepared,
    ragged_samples,
    run_loop,
    stream_of,
    trained_tensors,
)

# --- resume -----------------------------------------------------------------------------------------------------------

OPTIMIZERS = get_args(OptimizerName)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_is_bit_for_bit_the_run_in_one_go(tmp_path, kind, optimizer, packing):
    settings = {
        "save_steps": 2, "eval_steps": 2, "warmup_ratio": 0.2, "weight_decay": 0.1, "optimizer": optimizer,
        "packing": packing, "samples": ragged_samples(48 if packing else 12),
    }  # fmt: skip
    assert stream_of(settings["samples"], prepared(kind), packing=packing).steps_per_epoch == 3

    def fresh() -> torch.nn.Module:  # of a rank at which the factors are large enough for moments in 8 bits
        return prepared(kind, dropout=0.1 if "lora" in kind else 0.0, rank=64)

    def kill(step: int) -> None:
        if step == 3:  # one step after the checkpoint, which is lost and done again
            raise Killed

    straight, resumed, notes = fresh(), fresh(), Notes()
    result = run_loop(straight, tmp_path / "straight", **settings)
    with pytest.raises(Killed):
        run_loop(fresh(), tmp_path / "killed", reporter=Notes(kill), **settings)
    saved = load_checkpoint(tmp_path / "killed" / "checkpoints" / "step-000002")
    again = run_loop(resumed, tmp_path / "killed", resume=True, reporter=notes, **settings)

    assert "resumed after step 2 of 6" in notes.notes
    assert [step for step, _ in notes.steps] == [3, 4, 5, 6]
    assert (saved.state["stream"]["epoch"], saved.state["stream"]["step"]) == (0, 2)  # in the middle of the data
    assert_equal(trained_tensors(resumed), trained_tensors(straight))
    for name in ("best", "last"):
        assert_equal(exported(tmp_path / "killed" / name), exported(tmp_path / "straight" / name))
    assert (again.best_step, again.best_valid_loss) == (result.best_step, result.best_valid_loss)
    rows = [untimed(tmp_path / name) for name in ("straight", "killed")]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5, 6]
    kinds = {tensor.dtype for name, tensor in saved.optimizer.items() if name.endswith("exp_avg")}
    assert (torch.uint8 in kinds) == (optimizer == "adamw-8bit")


def untimed(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what a clock or the memory decides."""
    timed = {"step_seconds", "tokens_per_second", "peak_bytes"}
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


PARTS = ("weights", "optimizer", "random", "stream", "step")


@pytest.mark.parametrize("lost", [*PARTS, "all"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_that_goes_on_without_a_part_of_its_state_ends_elsewhere(tmp_path, monkeypatch, optimizer, lost):
    """The control: equal bits above say that every part came back, and that nothing began afresh."""
    settings = {"save_steps": 2, "optimizer": optimizer, "samples": ragged_samples(48), "packing": True, "valid": []}

    def fresh() -> torch.nn.Module:
        return prepared("lora", dropout=0.1, rank=64)

    def kill(step: int) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        run_loop(fresh(), tmp_path / "killed", reporter=Notes(kill), **settings)
    shutil.copytree(tmp_path / "killed", tmp_path / "forgot")
    resumed, forgot = fresh(), fresh()
    run_loop(resumed, tmp_path / "killed", resume=True, **settings)

    start = trained_tensors(forgot)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generators = generator_states(torch.device("cpu"))

    def without(root: Path) -> tuple[Checkpoint, list[str]]:
        saved, skipped = newest_checkpoint(root)
        state = dict(saved.state)
        state["stream"] = state["stream"] | {"epoch": 0, "step": 0}
        first = {"weights": start, "optimizer": {}, "random": generators, "step": 0, "stream": state}
        parts = PARTS if lost == "all" else (lost,)
        changes = {("state" if part == "stream" else part): first[part] for part in parts}
        if lost == "all":
            del changes["step"]  # as many steps as the others have left
        return replace(saved, **changes), skipped

    monkeypatch.setattr("strop.training.states.newest_checkpoint", without)
    run_loop(forgot, tmp_path / "forgot", resume=True, **settings)
    left, right = trained_tensors(forgot), trained_tensors(resumed)
    assert any(not torch.equal(left[name], right[name]) for name in left)


def test_dropout_is_drawn_from_the_seed_and_not_from_the_process(tmp_path):
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))
        model = prepared("lora", dropout=0.5)
        run_loop(model, tmp_path / str(len(results)), seed=seed, valid=[])
        results.append(trained_tensors(model))
    assert_equal(results[0], results[1])
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_the_process_generator_is_left_as_it_was(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run_loop(prepared("lora", dropout=0.5), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"identity": {"learning_rate": 2.0}}, "learning_rate was 1.0 and is 2.0"),
        ({"identity": {}}, "learning_rate was 1.0 and is not set"),
        ({"samples": ragged_samples(seed=4)}, "samples_sha256 was"),
        ({"batch": {"batch_size": 3}}, "batch_size was 2 and is 3"),
    ],
)
def test_resuming_with_what_would_change_the_run_is_refused(tmp_path, change, says):
    settings = {"identity": {"learning_rate": 1.0}, "save_steps": 2, "length": Steps(max_steps=2)}
    run_loop(prepared("lora"), tmp_path, **settings)
    with pytest.raises(TrainingError, match=says):
        run_loop(prepared("lora"), tmp_path, resume=True, **(settings | change))


def test_resuming_other_parameters_is_refused(tmp_path):
    run_loop(prepared("lora"), tmp_path, save_steps=2, length=Steps(max_steps=2))
    with pytest.raises(TrainingError, match=r"lora_A was \[4, 64\] and is not set"):
        run_loop(prepared("full"), tmp_path, resume=True, length=Steps(max_steps=2))


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    notes = Notes()
    assert run_loop(prepared("lora"), tmp_path, resume=True, reporter=notes).steps == 6
    assert any("starts from the beginning" in note for note in notes.notes)


def test_resuming_a_run_that_is_done_changes_nothing(tmp_path):
    model = prepared("lora")
    run_loop(model, tmp_path, save_steps=6)
    again = prepared("lora")
    assert run_loop(again, tmp_path, save_steps=6, resume=True).steps == 6
    assert_equal(trained_tensors(again), trained_tensors(model))


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path):
    run_loop(prepared("lora"), tmp_path, save_steps=2)
    newest = tmp_path / "checkpoints" / "step-000006" / "weights.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    notes = Notes()
    run_loop(prepared("lora"), tmp_path, save_steps=2, resume=True, reporter=notes)
    assert any("step-000006 is damaged and was skipped" in note for note in notes.notes)
    assert "resumed after step 4 of 6" in notes.notes


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["signal", "exception"])
def test_ctrl_c_saves_the_last_step_and_the_resumed_run_is_the_same(tmp_path, way):
    straight = prepared("lora", dropout=0.1)
    run_loop(straight, tmp_path / "straight")

    def press(step: int) -> None:
        if step == 3:
            if way == "exception":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    notes = Notes(press)
    with pytest.raises(KeyboardInterrupt):
        run_loop(prepared("lora", dropout=0.1), tmp_path / "run", reporter=notes)
    assert any("interrupted after step 3" in note for note in notes.notes)
    assert notes.finished == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    resumed = prepared("lora", dropout=0.1)
    run_loop(resumed, tmp_path / "run", resume=True)
    assert_equal(trained_tensors(resumed), trained_tensors(straight))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_between_micro_batches_replays_the_step_from_its_beginning(tmp_path):
    straight = prepared("lora", dropout=0.1)
    run_loop(straight, tmp_path / "straight", valid=[])
    model = prepared("lora", dropout=0.1)
    calls = 0

    def press(*_: object) -> None:
        nonlocal calls
        calls += model.training
        if calls == 6:  # the second micro-batch of the third step
            raise KeyboardInterrupt

    hook = model.get_input_embeddings().register_forward_hook(press)
    with pytest.raises(KeyboardInterrupt):
        run_loop(model, tmp_path / "run", valid=[])
    hook.remove()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    resumed = prepared("lora", dropout=0.1)
    run_loop(resumed, tmp_path / "run", valid=[], resume=True)
    assert_equal(trained_tensors(resumed), trained_tensors(straight))


def test_ctrl_c_during_an_evaluation_leaves_it_to_the_resumed_run(tmp_path):
    run_loop(prepared("lora"), tmp_path / "straight", eval_steps=2)
    model = prepared("lora")

    def press(*_: object) -> None:
        if not model.training and (tmp_path / "run" / "metrics.jsonl").exists():
            raise KeyboardInterrupt

    hook = model.get_input_embeddings().register_forward_hook(press)
    with pytest.raises(KeyboardInterrupt):
        run_loop(model, tmp_path / "run", eval_steps=2)
    hook.remove()
    run_loop(prepared("lora"), tmp_path / "run", eval_steps=2, resume=True)
    losses = [
        [(row["step"], row["loss"], row.get("valid_loss")) for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("straight", "run")
    ]
    assert losses[0] == losses[1]
    assert losses[0][1][2] is not None


def test_any_other_failure_keeps_the_state_too(tmp_path):
    def fail(step: int) -> None:
        if step == 2:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run_loop(prepared("lora"), tmp_path, reporter=Notes(fail))
    assert (tmp_path / "checkpoints" / "step-000002").is_dir()

"""What is no number is skipped, what diverges returns, what lacks memory is cut smaller; nothing else is touched."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

from strop.config import Steps
from strop.errors import TrainingError
from strop.training import watchdog
from strop.training.metrics import read_metrics
from strop.training.settings import Progress
from tests.tiny import tiny_model
from tests.training.helpers import (
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


class Thrown:
    """Wraps the model's last norm: in training, at chosen calls, it multiplies the output or raises."""

    def __init__(self, model: nn.Module, act) -> None:
        self.calls = 0
        self._act = act
        model.model.norm.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        self.calls += 1
        return self._act(self.calls, output)


def said(notes: Notes, text: str) -> bool:
    return any(text in note for note in notes.notes)


# --- what is not a number ---------------------------------------------------------------------------------------------


def test_one_step_without_a_number_is_skipped_and_told(tmp_path):
    model, notes = prepared("full"), Notes()
    Thrown(model, lambda call, output: output * math.nan if call == 6 else output)  # the third step
    result = run_loop(model, tmp_path, valid=[], reporter=notes)
    assert result.steps == 6
    assert [(event["kind"], event["step"]) for event in result.events] == [("skipped", 3)]
    assert said(notes, "step 3: the loss is nan")
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "skipped" in row] == [3]
    assert all(torch.isfinite(value).all() for value in trained_tensors(model).values())


def test_a_skipped_step_leaves_no_trace_but_its_rows_place(tmp_path):
    """The same run over a stream from which the step was taken out ends in the same bits."""
    spoiled = prepared("full")
    Thrown(spoiled, lambda call, output: output * math.nan if call == 1 else output)
    run_loop(spoiled, tmp_path / "spoiled", valid=[])
    plain, stream = prepared("full"), stream_of(ragged_samples())
    stream.next_step()
    run_loop(plain, tmp_path / "plain", valid=[], stream=stream)
    assert_equal(trained_tensors(spoiled), trained_tensors(plain))


# --- divergence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5, "bursts"])
def test_ordinary_losses_raise_no_alarm(noise):
    for seed in range(50):
        draw, progress = random.Random(seed), Progress()
        for step in range(400):
            loss = 0.2 + 4 * math.exp(-step / 60)
            loss *= draw.lognormvariate(0, 0.3 if noise == "bursts" else noise)
            if noise == "bursts" and draw.random() < 0.05:
                loss += draw.expovariate(0.3)  # now and then a hard batch
            assert not watchdog.diverges(progress, loss)


def test_a_loss_that_leaves_and_stays_is_an_alarm_at_the_fifth_step():
    draw, progress = random.Random(0), Progress()
    for _ in range(100):
        assert not watchdog.diverges(progress, draw.gauss(1.0, 0.05))
    assert [watchdog.diverges(progress, 3.0) for _ in range(5)] == [False] * 4 + [True]


def wreck(model: nn.Module, at_step: int) -> Notes:
    """After `at_step`, once, throw the weights far off."""
    done: list[int] = []

    def act(step: int) -> None:
        if step == at_step and not done:
            done.append(step)
            with torch.no_grad():
                model.model.norm.weight.mul_(-20)

    return Notes(act)


LONG = {"length": Steps(max_steps=46), "learning_rate": 1e-3, "valid": [], "save_steps": 34}


def test_a_run_that_diverges_returns_to_its_last_good_state_and_finishes(tmp_path):
    model = prepared("full")
    notes = wreck(model, 38)
    result = run_loop(model, tmp_path, reporter=notes, **LONG)
    assert [(event["kind"], event["step"], event["to"]) for event in result.events] == [("rolled_back_from", 43, 34)]
    assert said(notes, "weights and optimizer are back at step 34")
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 47))
    assert [row["step"] for row in rows if "rolled_back_from" in row] == [35]
    assert rows[-1]["loss"] < 2 * rows[33]["loss"] + 0.5


def test_without_planned_checkpoints_one_is_written_when_the_watch_begins(tmp_path):
    model = prepared("full")
    result = run_loop(model, tmp_path, reporter=wreck(model, 38), **(LONG | {"save_steps": None}))
    assert [event["to"] for event in result.events] == [watchdog.WINDOW]


def test_killed_after_the_return_the_run_goes_on_alike(tmp_path):
    straight = prepared("full")
    run_loop(straight, tmp_path / "straight", reporter=wreck(straight, 38), **LONG)
    model = prepared("full")
    notes = wreck(model, 38)
    harm, seen = notes._at_step, []

    def kill(step: int) -> None:
        harm(step)
        seen.append(step)
        if seen.count(37) == 2:
            raise Killed

    notes._at_step = kill
    with pytest.raises(Killed):
        run_loop(model, tmp_path / "run", reporter=notes, **LONG)
    resumed = prepared("full")
    result = run_loop(resumed, tmp_path / "run", resume=True, **LONG)
    assert [event["kind"] for event in result.events] == ["rolled_back_from"]
    assert_equal(trained_tensors(resumed), trained_tensors(straight))


def test_a_run_that_keeps_diverging_stops_with_its_last_good_state(tmp_path):
    model = prepared("full")

    def harm(step: int) -> None:
        if step == 38:
            with torch.no_grad():
                model.model.norm.weight.mul_(-20)

    with pytest.raises(TrainingError, match=r"far above its recent median(.|\n)*state after step 34 is kept"):
        run_loop(model, tmp_path, reporter=Notes(harm), **LONG)
    assert (tmp_path / "checkpoints" / "step-000034").is_dir()
    assert max(float(value.abs().max()) for value in exported(tmp_path / "last").values()) < 5


def test_an_ordinary_run_has_no_event(tmp_path):
    notes = Notes()
    assert run_loop(prepared("full"), tmp_path, reporter=notes, **LONG).events == []
    assert not any("median" in note or "kept their bits" in note for note in notes.notes)


# --- updates that are lost --------------------------------------------------------------------------------------------


def test_updates_too_small_for_the_weights_are_measured_and_told(tmp_path):
    shares = {}
    for rate in (1e-3, 1e-12):
        notes = Notes()
        run_loop(prepared("full"), tmp_path / str(rate), learning_rate=rate, reporter=notes, valid=[], weight_decay=0.0)
        shares[rate] = read_metrics(tmp_path / str(rate) / "metrics.jsonl")[1]["lost_update_share"]
        assert said(notes, "kept their bits through the update") == (rate == 1e-12)
    assert shares[1e-3] < 0.01
    assert shares[1e-12] > 0.9


def test_in_bf16_the_updates_that_fp32_masters_keep_are_lost():
    """Why masters are fp32: the same step, half of a bf16 ulp at most, moves every fp32 weight and no bf16 one."""
    for dtype, lost in ((torch.float32, 0.0), (torch.bfloat16, 1.0)):
        weight = nn.Parameter(torch.ones(100, dtype=dtype))
        weight.grad = torch.ones_like(weight)
        probe = watchdog.UpdateProbe({"weight": weight})
        with torch.no_grad():
            weight.sub_(1e-3)
        assert probe.lost_share() == lost


def test_a_gradient_of_zero_is_told_once(tmp_path):
    model, notes = prepared("full"), Notes()
    for parameter in model.parameters():
        parameter.register_hook(torch.zeros_like)
    run_loop(model, tmp_path, valid=[], reporter=notes, length=Steps(max_steps=25))
    assert sum("exactly zero" in note for note in notes.notes) == 1


# --- memory -----------------------------------------------------------------------------------------------------------

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    MemoryError("no memory"),
]


def scarce(model: nn.Module, rows: int, error: BaseException = ERRORS[0]) -> None:
    """Let the model fail, after dropout was drawn, with more than so many rows."""

    def act(_call: int, output: torch.Tensor) -> torch.Tensor:
        if output.shape[0] > rows:
            raise error
        return output

    Thrown(model, act)


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_out_of_memory_ends_in_the_bits_of_a_run_with_smaller_micro_batches(tmp_path, error, packing):
    samples = ragged_samples(16)
    model, notes = prepared("lora", dropout=0.1), Notes()
    scarce(model, 2, error)
    common = {"samples": samples, "valid": [], "packing": packing}
    large = {"batch_size": 8, "accumulation": 1, "max_length": 24}
    result = run_loop(model, tmp_path / "a", batch=large, reporter=notes, **common)
    assert [(event["kind"], event["step"], event["value"]) for event in result.events] == [
        ("micro_batch", 1, 4),
        ("micro_batch", 1, 2),
    ]
    assert said(notes, "memory ran out at step 1 with micro-batches of 8 rows")
    small = prepared("lora", dropout=0.1)
    run_loop(small, tmp_path / "b", batch={"batch_size": 2, "accumulation": 4, "max_length": 24}, **common)
    assert_equal(trained_tensors(model), trained_tensors(small))
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab"]
    assert [row["tokens"] for row in rows[0]] == [row["tokens"] for row in rows[1]]
    assert rows[0][0]["micro_batch"] == 2


def test_the_smaller_micro_batch_is_kept_on_resume(tmp_path):
    straight = prepared("lora", dropout=0.1)
    scarce(straight, 1)
    run_loop(straight, tmp_path / "straight", valid=[], save_steps=2)
    model = prepared("lora", dropout=0.1)
    scarce(model, 1)

    def kill(step: int) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        run_loop(model, tmp_path / "run", valid=[], save_steps=2, reporter=Notes(kill))
    resumed, notes = prepared("lora", dropout=0.1), Notes()  # memory is plenty now, the cut stays
    result = run_loop(resumed, tmp_path / "run", valid=[], save_steps=2, resume=True, reporter=notes)
    assert [event["value"] for event in result.events] == [1]
    assert not said(notes, "memory ran out")
    assert_equal(trained_tensors(resumed), trained_tensors(straight))


def test_with_one_row_it_stops_and_says_what_would_help(tmp_path):
    model = prepared("lora")
    scarce(model, 0)
    with pytest.raises(TrainingError, match=r"memory ran out with 1 row of \d+ tokens(.|\n)*max_length") as error:
        run_loop(model, tmp_path, valid=[])
    assert "CUDA out of memory" in str(error.value)


def test_another_runtime_error_is_not_taken_for_memory(tmp_path):
    model = tiny_model("llama").requires_grad_(True)
    Thrown(model, lambda call, output: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_loop(model, tmp_path, valid=[])

"""Memory that runs out where there is no micro-batch to halve: in an evaluation, and in the optimizer's step."""

from __future__ import annotations

import pytest
import torch

from strop.config import Steps
from strop.errors import TrainingError
from strop.training.metrics import read_metrics
from tests.training.helpers import Killed, Notes, assert_equal, prepared, ragged_samples, run_loop, trained_tensors

ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def scarce_in_evaluation(model: torch.nn.Module, rows: int) -> None:
    """Let evaluations fail with more than so many rows at once."""

    began = False  # what looks at the model before the first step is no evaluation

    def act(module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        nonlocal began
        began |= model.training
        if not model.training and began and len(output) > rows:
            raise ERROR

    model.get_input_embeddings().register_forward_hook(act)


def trained(folder, rows: int | None = None, **settings):
    model, notes = prepared("lora", dropout=0.1), settings.pop("reporter", Notes())
    if rows is not None:
        scarce_in_evaluation(model, rows)
    settings = {"valid": ragged_samples(8, seed=9), "eval_steps": 2, "save_steps": 2} | settings
    return model, run_loop(model, folder, reporter=notes, **settings), notes


def test_an_evaluation_without_memory_goes_on_with_half_the_rows_and_says_so(tmp_path):
    plain, expected, _ = trained(tmp_path / "plain", eval_batch_size=2)
    model, result, notes = trained(tmp_path / "scarce", 2, eval_batch_size=8)
    assert [(event["kind"], event["step"], event["value"]) for event in result.events] == [
        ("eval_batch", 2, 4), ("eval_batch", 2, 2),
    ]  # fmt: skip
    assert "out of memory" in result.events[0]["why"]
    assert sum("memory ran out in the evaluation after step 2" in note for note in notes.notes) == 2
    assert result.valid_loss == expected.valid_loss
    assert_equal(trained_tensors(model), trained_tensors(plain))
    assert [row.get("eval_batch") for row in read_metrics(tmp_path / "scarce" / "metrics.jsonl")] == [
        None, 2, None, None, None, None,
    ]  # fmt: skip


def test_the_smaller_evaluation_is_kept_on_resume(tmp_path):
    def kill(step: int) -> None:
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        trained(tmp_path, 4, eval_batch_size=8, reporter=Notes(kill))
    _, result, notes = trained(tmp_path, 4, eval_batch_size=8, resume=True)
    assert [event["value"] for event in result.events] == [4]
    assert not any("memory ran out" in note for note in notes.notes)


def test_an_evaluation_of_one_row_without_memory_stops_the_run_and_keeps_its_state(tmp_path):
    with pytest.raises(TrainingError, match=r"in the evaluation with 1 row at once .*valid_fraction to 0") as error:
        trained(tmp_path, 0)
    assert "The state after step 2 is kept in" in str(error.value)


def test_another_failure_of_an_evaluation_is_not_taken_for_memory(tmp_path):
    model = prepared("lora")

    def fail(module: torch.nn.Module, *_: object) -> None:
        if not model.training and (tmp_path / "metrics.jsonl").exists():
            raise RuntimeError("shapes do not match")

    model.get_input_embeddings().register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_loop(model, tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_an_optimizer_step_without_memory_ends_with_what_to_do_and_keeps_no_half_step(tmp_path, monkeypatch, optimizer):
    from strop.training import optimizers

    cls = torch.optim.AdamW if optimizer == "adamw" else optimizers.AdamW8bit
    step, calls = cls.step, []

    def fail(self, *args, **settings):
        calls.append(1)
        if len(calls) == 4:
            raise ERROR
        return step(self, *args, **settings)

    monkeypatch.setattr(cls, "step", fail)
    with pytest.raises(TrainingError, match=r"step 4: memory ran out in the optimizer's step .*adamw-8bit"):
        run_loop(prepared("full"), tmp_path, optimizer=optimizer, save_steps=2, valid=[], length=Steps(max_steps=6))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]

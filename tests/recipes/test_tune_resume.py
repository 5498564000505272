"""Runs of `tune` that are stopped and go on, and those that must not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from strop.config import load_config
from strop.errors import (
    ConfigError,
    MissingInputError,
    TrainingError,
    UsageError,
)
from strop.files.folders import sha256_file
from strop.recipes.tune import tune, tune_from_config
from strop.training.checkpoints import load_checkpoint
from tests.recipes.helpers import METHODS, Killed, Notes, same, short, tensors
from tests.tiny import tiny_chat_file, tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft

# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_runs_end_in_the_same_files(base, data, tmp_path, method):
    settings = {
        "method": method, "max_steps": 5, "save_steps": 2, "eval_steps": 2, "batch_size": 2, "accumulation": 2,
        "packing": True, "max_length": 96, "dtype": "auto", **METHODS[method],
    }  # fmt: skip
    if method in ("lora", "qlora"):
        settings["dropout"] = 0.2
    straight = short(base, data, tmp_path / "straight", **settings)

    def kill(step: int) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        short(base, data, tmp_path / "killed", reporter=Notes(kill), **settings)
    assert not (tmp_path / "killed" / "last").exists()
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["finished"] is False
    notes = Notes()
    resumed = short(base, data, tmp_path / "killed", resume=True, reporter=notes, **settings)
    assert notes.said("resumed after step 2 of 5")
    for part in ("best", "last"):
        assert same(tensors(resumed.path / part), tensors(straight.path / part))
        name = "model.safetensors" if method in ("full", "qat") else "adapter_model.safetensors"
        assert sha256_file(resumed.path / part / name) == sha256_file(straight.path / part / name)
    assert [row["loss"] for row in resumed.metrics] == [row["loss"] for row in straight.metrics]


def test_ctrl_c_keeps_the_state_and_resume_ends_in_the_same_files(base, data, tmp_path):
    straight = short(base, data, tmp_path / "straight")

    def press(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        short(base, data, tmp_path / "run", reporter=Notes(press))
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000002").step == 2
    with pytest.raises(UsageError, match="already holds best, checkpoints"):
        short(base, data, tmp_path / "run")
    resumed = tune_from_config(load_config(tmp_path / "run" / "config.yaml", {"resume": True}))
    assert same(tensors(resumed.last_path), tensors(straight.last_path))
    assert resumed.config == straight.config.replace(output=str(tmp_path / "run"))


def test_resuming_a_finished_run_gives_that_run(base, data, tmp_path):
    run, notes = short(base, data, tmp_path / "run"), Notes()
    again = short(base, data, tmp_path / "run", resume=True, reporter=notes)
    assert again.to_dict() == run.to_dict()
    assert notes.said("the run is finished")


def test_resuming_with_other_settings_lists_them_all(base, data, tmp_path):
    short(base, data, tmp_path / "run", rank=4)
    with pytest.raises(ConfigError) as error:
        short(base, data, tmp_path / "run", rank=8, seed=3, learning_rate=0.5, resume=True)
    for part in ("rank was 4 and is 8", "seed was 0 and is 3", "learning_rate was 0.0064 and is 0.5", "alpha was 8.0"):
        assert part in str(error.value)


def test_resuming_on_other_rows_or_another_base_is_refused(base, data, tmp_path):
    def kill(step: int) -> None:
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        short(base, data, tmp_path / "run", save_steps=1, reporter=Notes(kill))
    other_rows = tiny_chat_file(tmp_path / "other.jsonl", rows=17)
    with pytest.raises(TrainingError, match="samples"):
        short(base, other_rows, tmp_path / "run", save_steps=1, resume=True)
    other_base = tiny_folder(tmp_path, "llama", seed=1, dtype=torch.bfloat16)
    with pytest.raises(TrainingError, match="base was"):
        short(other_base, data, tmp_path / "run", save_steps=1, resume=True)
    moved = tmp_path / "moved.jsonl"
    shutil.copy(data, moved)
    assert short(base, moved, tmp_path / "run", save_steps=1, resume=True).report["finished"]


def test_resuming_what_is_not_there_is_refused(base, data, tmp_path):
    with pytest.raises(MissingInputError, match="no run to resume"):
        short(base, data, tmp_path / "none", resume=True)
    with pytest.raises(ConfigError, match="output: name the run's folder"):
        tune(base, data, resume=True)

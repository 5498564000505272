"""`rank: auto` in a run in stages: raced when its stage begins, a number from then on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strop.config import TuneConfig
from strop.errors import ConfigError
from strop.files.peft_adapter import read_adapter_config
from strop.recipes.rank import choose_rank
from strop.recipes.stages import tune_stages
from tests.recipes.test_stages import Killed, Notes
from tests.tiny import tiny_chat_file, tiny_folder

COMMON: dict[str, Any] = {"max_steps": 4, "valid_fraction": 0.25, "dtype": "float32", "batch_size": 8, "save_steps": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"), "llama")


def stages(base: Path, data: Path, output: Path) -> dict[str, Any]:
    three = [
        {"name": "domain", "method": "full"},
        {"name": "task", "method": "lora", "rank": "auto"},
        {"name": "more", "method": "lora"},
    ]
    return {"model": str(base), "data": str(data), "output": str(output), **COMMON, "stages": three}


def test_a_stage_races_over_the_last_ones_result_and_later_stages_take_its_number(base, tmp_path):
    data = tiny_chat_file(tmp_path / "chats.jsonl", rows=48)
    given = stages(base, data, tmp_path / "run")
    with pytest.raises(Killed):
        tune_stages(given, reporter=Notes(kill=(2, 3)))
    raced = (tmp_path / "run" / "2-task" / "rank.json").read_bytes()
    notes = Notes()
    run = tune_stages(given, resume=True, reporter=notes)
    assert not any("rank auto" in note for note in notes.notes)  # resumed with what was chosen
    domain, task, more = run.runs
    told = json.loads(raced)
    assert (task.path / "rank.json").read_bytes() == raced
    settings = TuneConfig.from_flat(
        {"model": domain.best_path, "data": data, "method": "lora", "rank": "auto", **COMMON}
    )
    alone = choose_rank(settings)
    assert (told["rank"], told["row_losses"]) == (
        alone.rank,
        {str(rank): sums for rank, sums in alone.row_losses.items()},
    )
    for stage in (task, more):
        assert stage.config.method.rank == told["rank"]
        assert read_adapter_config(stage.best_path).rank == told["rank"]
    assert not (more.path / "rank.json").exists()
    assert run.verify().ok


def test_a_stage_with_too_few_rows_for_its_race_is_refused_before_the_first_one_is_trained(base, tmp_path):
    data = tiny_chat_file(tmp_path / "chats.jsonl", rows=32)
    notes = Notes()
    with pytest.raises(ConfigError, match=r"stage 2 \(task\).*rank auto needs at least 30 training rows.*there are 24"):
        tune_stages(stages(base, data, tmp_path / "run"), reporter=notes)
    assert notes.trainings == 0
    assert not (tmp_path / "run").exists()

"""The race of `rank: auto`: who leaves it, what it is judged by, which task needs which rank, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strop.config import TuneConfig
from strop.errors import ConfigError, TrainingError, UsageError
from strop.evaluation.likelihood import Likelihood
from strop.files.folders import write_json
from strop.layers.surgery import lora_modules
from strop.progress import SILENT
from strop.recipes import rank as rank_recipe
from strop.recipes.doctor import examine
from strop.recipes.rank import choose_rank, documents, hold_out
from strop.recipes.tune import tune
from strop.training.candidates import Candidate
from tests.tiny import tiny_chat_file, tiny_folder
from tests.training.helpers import ragged_samples

SHORT: dict[str, Any] = {"rank": "auto", "max_steps": 24, "batch_size": 4, "dtype": "float32"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_file(tmp_path_factory.mktemp("data") / "chats.jsonl", rows=60)


def config(base: Path, data: Path, **changes: object) -> TuneConfig:
    return TuneConfig.from_flat({"model": base, "data": data} | SHORT | changes)


def planned(losses: dict[int, np.ndarray]) -> Any:
    """A measurement that answers what was planned for the rank that is on the model, in nats per token by row."""

    def measure(model: Any, samples: Any, *, batch_size: int) -> Likelihood:
        rank = next(iter(lora_modules(model).values())).rank
        measured = Likelihood(len(samples))
        measured.tokens += torch.tensor([sample.supervised for sample in samples])
        measured.nll_sums += torch.tensor(losses[rank][: len(samples)]) * measured.tokens
        return measured

    return measure


# --- what it is judged by ---------------------------------------------------------------------------------------------


def test_windows_of_one_text_are_never_on_both_sides():
    samples = [
        type(sample)(sample.input_ids, sample.labels, place // 4) for place, sample in enumerate(ragged_samples(200))
    ]
    assert documents(samples) == [sample.index for sample in samples]
    kept, held = hold_out(samples, wanted=20, seed=0, where="text")
    assert {sample.index for sample in kept}.isdisjoint(sample.index for sample in held)
    assert len(held) == 20
    assert len({sample.index for sample in held}) == 10  # a fifth of the texts, two windows of each


def test_a_single_text_is_counted_by_its_windows():
    samples = [type(sample)(sample.input_ids, sample.labels, 0) for sample in ragged_samples(60)]
    kept, held = hold_out(samples, wanted=10, seed=0, where="text")
    assert len(held) == 10
    assert len(kept) == 50


def test_copies_of_a_held_out_row_are_not_trained_on():
    samples = [
        type(sample)(sample.input_ids, sample.labels, place) for place, sample in enumerate(ragged_samples(20) * 3)
    ]
    kept, held = hold_out(samples, wanted=8, seed=0, where="rows")
    assert {tuple(sample.input_ids) for sample in kept}.isdisjoint(tuple(sample.input_ids) for sample in held)
    with pytest.raises(UsageError, match="only one text in all its rows"):
        hold_out([samples[0]] * 40, wanted=8, seed=0, where="rows")


def test_the_runs_own_validation_rows_have_no_part_in_the_choice(base, tmp_path, monkeypatch):
    tiny_chat_file(tmp_path / "train.jsonl", rows=40)
    (tmp_path / "valid.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "quick"}, {"role": "assistant", "content": "fox"}]}) + "\n"
    )
    seen: list[Any] = []
    real = rank_recipe.hold_out

    def watched(samples: Any, **given: Any) -> Any:
        seen.extend(samples)
        return real(samples, **given)

    monkeypatch.setattr(rank_recipe, "hold_out", watched)
    session = rank_recipe.open_session(config(base, tmp_path, rank=1), reporter=SILENT)
    assert session.valid_set is not None
    choose_rank(config(base, tmp_path))
    assert len(seen) == 40
    assert session.valid_set.samples[0].input_ids not in [sample.input_ids for sample in seen]


# --- who leaves, and when it ends -------------------------------------------------------------------------------------


def test_the_race_ends_when_two_measurements_in_a_row_say_the_same(base, data, monkeypatch):
    rows = np.linspace(1.0, 1.2, 12)
    monkeypatch.setattr(rank_recipe, "likelihood", planned({1: rows + 1, 4: rows + 0.5, 16: rows}))
    choice = choose_rank(config(base, data), candidates=(1, 4, 16))
    assert (choice.rank, choice.verdict) == (16, "decided")
    assert [each.step for each in choice.rounds] == [4, 8]
    assert choice.steps_used == 3 * 8 < 3 * choice.steps


def test_a_rank_that_is_worse_twice_leaves_and_the_others_go_on(base, data, monkeypatch):
    rows, apart = np.linspace(1.0, 1.2, 12), np.tile([-0.2, 0.25], 6)
    monkeypatch.setattr(rank_recipe, "likelihood", planned({1: rows + 1, 4: rows + apart, 16: rows}))
    choice = choose_rank(config(base, data), candidates=(1, 4, 16))
    assert choice.left == {1: "decidedly worse at two measurements, the last at step 8"}
    assert choice.steps_used == 3 * 8 + 2 * 8
    assert (choice.verdict, [each.size for each in choice.rounds[-1].board]) == ("undecided", [4, 16])
    assert any("not decided: rank" in line or "too wide" in line for line in choice.lines())


def test_a_smaller_rank_that_catches_up_keeps_the_race_going(base, data, monkeypatch):
    rows, gaps = np.linspace(1.0, 1.2, 12), iter([1.0, 0.6, 0.3])

    def measure(model: Any, samples: Any, *, batch_size: int) -> Likelihood:
        small = next(iter(lora_modules(model).values())).rank == 4
        return planned({4: rows + (next(gaps) if small else 0), 16: rows})(model, samples, batch_size=batch_size)

    monkeypatch.setattr(rank_recipe, "likelihood", measure)
    choice = choose_rank(config(base, data), candidates=(4, 16))
    assert [each.step for each in choice.rounds] == [4, 8, 16]
    assert choice.rank == 16
    assert any("rank 4 was catching up (+0.6000, then +0.3000)" in line for line in choice.lines())


def test_a_rank_that_breaks_leaves_and_all_of_them_breaking_is_an_error(base, data, monkeypatch):
    broken: set[int] = {16}
    real = Candidate.train

    def train(self: Candidate, until: int, **given: Any) -> None:
        real(self, until, **given)
        if self.rank in broken:
            self.broken = f"step {until}: the loss is nan"

    monkeypatch.setattr(Candidate, "train", train)
    choice = choose_rank(config(base, data), candidates=(4, 16))
    assert choice.rank == 4
    assert "step 4: the loss is nan" in choice.left[16]
    broken.add(4)
    with pytest.raises(TrainingError, match=r"no rank's loss stayed finite .*lower the learning rate"):
        choose_rank(config(base, data), candidates=(4, 16))


# --- which task needs which rank --------------------------------------------------------------------------------------


def test_the_same_stories_in_lower_case_take_a_smaller_rank_than_another_language(material, tmp_path):
    model, chosen = material / "models" / "stories260K", {}
    for name in ("tinystories_4M_lowercase", "tinyshakespeare"):
        text = tmp_path / f"{name}.txt"
        text.write_text((material / "data" / f"{name}.txt").read_text()[:200_000])
        chosen[name] = choose_rank(config(model, text, max_length=64, batch_size=8, max_steps=160))
        assert chosen[name].candidates == (2, 8, 32)
    assert chosen["tinystories_4M_lowercase"].rank < chosen["tinyshakespeare"].rank


# --- settings ---------------------------------------------------------------------------------------------------------


def test_an_alpha_that_was_given_is_kept_and_raced_with(base, data, tmp_path):
    run = tune(base, data, output=tmp_path / "run", **(SHORT | {"max_steps": 8, "alpha": 8.0}))
    assert run.config.method.alpha == 8.0
    plain = choose_rank(config(base, data, max_steps=8))
    told = json.loads((run.path / "rank.json").read_text())
    assert told["alpha"] == 8.0
    assert told["row_losses"] != {str(rank): sums for rank, sums in plain.row_losses.items()}


def test_a_run_in_minutes_gets_a_race_of_counted_steps(base, data):
    choice = choose_rank(config(base, data, max_steps=None, minutes=0.005))
    assert 1 <= choice.steps <= choice.run_steps


def test_an_adapter_is_refused_since_it_has_a_rank(base, data, tmp_path):
    first = tune(base, data, output=tmp_path / "first", rank=2, max_steps=1, batch_size=4, dtype="float32")
    with pytest.raises(UsageError, match="is an adapter of rank 2; leave --rank auto out"):
        choose_rank(config(first.best_path, data))


def test_auto_cannot_resume_a_run_that_was_given_a_number(base, data, tmp_path):
    tune(base, data, output=tmp_path / "run", rank=2, max_steps=1, batch_size=4, dtype="float32")
    with pytest.raises(ConfigError, match="rank was 2 and is 'auto'"):
        tune(base, data, output=tmp_path / "run", resume=True, **(SHORT | {"max_steps": 1}))


def test_the_race_of_a_run_that_never_began_is_not_kept_beside_a_number(base, data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_json(folder / "run.json", {"finished": False})
    for name in (rank_recipe.FILE, rank_recipe.PICTURE):
        (folder / name).write_text("{}")
    tune(base, data, output=folder, rank=2, max_steps=1, batch_size=4, dtype="float32")
    assert not list(folder.glob("rank.*"))


def test_doctor_looks_at_auto_with_the_largest_rank_that_is_raced(base, data):
    found = examine(config(base, data), trial=False)
    assert any(finding.name == "rank" and "looked at with 64" in finding.message for finding in found.findings)

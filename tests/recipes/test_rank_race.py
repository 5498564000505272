"""The race of `rank: auto`: who leaves it, what it is judged by, which task needs which rank, what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strop.config import TuneConfig
from strop.data import records
from strop.data.mixing import open_mixture
from strop.errors import ConfigError, TrainingError, UsageError
from strop.evaluation.likelihood import Likelihood
from strop.files.folders import write_json
from strop.layers.surgery import lora_modules
from strop.progress import SILENT
from strop.recipes import doctor
from strop.recipes import rank as rank_recipe
from strop.recipes.checks.finding import Finding
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
    assert documents(samples).tolist() == [sample.index for sample in samples]
    split = hold_out(samples, wanted=20, seed=0, where="text")
    assert {sample.index for sample in split.kept}.isdisjoint(sample.index for sample in split.held)
    assert split.documents == [sample.index for sample in split.held]
    assert len(split.held) == 20
    assert len(set(split.documents)) == 10  # a fifth of the texts, two windows of each


def test_a_single_text_is_counted_by_its_windows():
    samples = [type(sample)(sample.input_ids, sample.labels, 0) for sample in ragged_samples(60)]
    split = hold_out(samples, wanted=10, seed=0, where="text")
    assert len(split.held) == len(set(split.documents)) == 10
    assert len(split.kept) == 50


def test_copies_of_a_held_out_row_are_not_trained_on():
    samples = [
        type(sample)(sample.input_ids, sample.labels, place) for place, sample in enumerate(ragged_samples(20) * 3)
    ]
    split = hold_out(samples, wanted=8, seed=0, where="rows")
    held = {tuple(sample.input_ids) for sample in split.held}
    assert held.isdisjoint(tuple(sample.input_ids) for sample in split.kept)
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


def test_rows_that_lie_on_the_disk_race_as_those_in_memory_do(base, data, monkeypatch):
    held = choose_rank(config(base, data, max_steps=8))
    monkeypatch.setattr(records, "KEPT_BYTES", 0)
    streamed = choose_rank(config(base, data, max_steps=8))
    assert streamed.row_losses == held.row_losses
    assert streamed.tokens == held.tokens


def test_a_mixture_races_in_its_weights_and_is_judged_by_rows_of_all_its_sets(base, data, tmp_path, monkeypatch):
    more = tiny_chat_file(tmp_path / "more.jsonl", rows=40)
    splits: list[rank_recipe.HeldOut] = []
    real = rank_recipe.hold_out

    def watched(*rows: Any, **given: Any) -> rank_recipe.HeldOut:
        splits.append(real(*rows, **given))
        return splits[0]

    monkeypatch.setattr(rank_recipe, "hold_out", watched)
    settings = config(base, data).replace(data=[{"path": str(data)}, {"path": str(more), "weight": 3}], max_steps=2)
    choose_rank(settings)
    (split,), first = splits, len(open_mixture(settings.data).sets[0].train)
    counts = Counter(sample.index for sample in split.kept)
    assert {times for index, times in counts.items() if index < first} == {1}
    assert {times for index, times in counts.items() if index >= first} == {3}
    assert set(counts).isdisjoint(split.documents)
    assert min(split.documents) < first <= max(split.documents)


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


def test_an_undecided_race_takes_the_smallest_rank_that_is_not_ruled_out(base, data, monkeypatch):
    rows, apart = np.linspace(1.0, 1.2, 12), np.tile([-0.2, 0.35], 6)  # far apart by row, so that chance is large
    monkeypatch.setattr(rank_recipe, "likelihood", planned({1: rows + 1, 4: rows + apart, 16: rows}))
    choice = choose_rank(config(base, data), candidates=(1, 4, 16))
    open_one, best = choice.rounds[-1].board
    assert (choice.verdict, choice.rank, open_one.place) == ("undecided", 4, "open")
    assert open_one.loss > best.loss + best.error  # by the losses alone it would be the largest
    said = "\n".join(choice.lines())
    assert "rank 4: the smallest that is not ruled out; whether it lies within one standard error" in said
    gap = open_one.difference
    assert f"not decided: rank 4 lies {gap.estimate:+.4f} from the best, 95% interval {gap.low:+.4f} to" in said
    assert "the smaller rank has the benefit of the doubt" in said
    assert "by the losses alone it would be rank 16" in said


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


# --- what is refused for any rank is refused before it ----------------------------------------------------------------


def test_a_run_that_would_be_refused_is_refused_before_the_race_and_leaves_nothing(base, data, tmp_path, monkeypatch):
    def race(*args: object) -> None:
        raise AssertionError("raced")

    def full(session: Any, run_dir: Path) -> Finding:
        return Finding("refuse", "disk", "the run writes up to 2 GB; 1 GB are free", "free 1 GB more")

    monkeypatch.setattr(rank_recipe, "_Race", race)
    monkeypatch.setattr(doctor, "check_disk", full)
    with pytest.raises(TrainingError, match=r"the run was not begun:\n  disk: the run writes up to 2 GB"):
        tune(base, data, output=tmp_path / "run", **SHORT)
    assert not (tmp_path / "run").exists()


def test_a_race_that_fails_leaves_nothing_and_the_checks_before_it_change_nothing_of_it(
    base, data, tmp_path, monkeypatch
):
    alone = choose_rank(config(base, data, max_steps=8))
    run = tune(base, data, output=tmp_path / "run", **(SHORT | {"max_steps": 8}))
    told = json.loads((run.path / "rank.json").read_text())
    assert told["row_losses"] == {str(rank): sums for rank, sums in alone.row_losses.items()}
    assert not (run.path / "cache").exists()

    def stop(*args: object, **given: object) -> None:
        assert (tmp_path / "stopped" / "cache").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(Candidate, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        tune(base, data, output=tmp_path / "stopped", **SHORT)
    assert not (tmp_path / "stopped").exists()


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

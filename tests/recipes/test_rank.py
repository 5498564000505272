"""`rank: auto`: the gradient of whole weights, the rule that chooses, the race, and what a run keeps of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.rank_probe import energy_rank, entropy_rank, probe_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from strop.app.cli import app
from strop.config import Lora, TuneConfig
from strop.errors import ConfigError, UsageError
from strop.evaluation.smallest import best_of, decided, smallest_good, smallest_possible, standings
from strop.layers.surgery import linear_modules
from strop.recipes.rank import choose_rank, hold_out, race_ranks, race_steps
from strop.recipes.tune import tune
from strop.training.losses import token_loss_sum
from strop.training.shapes import at_common_width, positions_of
from tests.tiny import tiny_chat_file, tiny_folder, tiny_model
from tests.training.helpers import ragged_samples, stream_of

LOSSES = st.lists(st.floats(0.1, 5.0), min_size=6, max_size=6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_file(tmp_path_factory.mktemp("data") / "chats.jsonl", rows=60)


def config(base: Path, data: Path, **changes: object) -> TuneConfig:
    given = {"model": base, "data": data, "rank": "auto", "max_steps": 24, "batch_size": 4, "dtype": "float32"}
    return TuneConfig.from_flat(given | changes)


# --- the gradient of whole weights ------------------------------------------------------------------------------------


def test_the_hooks_gradient_is_the_one_of_an_unfrozen_weight():
    model = tiny_model("llama").double()
    batches = stream_of(ragged_samples(), model).next_step()
    names = list(linear_modules(model))
    wanted_sum, supervised = 0.0, 0
    for batch in batches:
        loss, count = token_loss_sum(model, at_common_width(batch, limit=positions_of(model)))
        wanted_sum, supervised = wanted_sum + loss, supervised + count
    (wanted_sum / supervised).backward()
    wanted = {name: model.get_submodule(name).weight.grad for name in names}
    model.requires_grad_(requires_grad=False)
    found = probe_gradients(model, names, batches, compute_dtype=torch.float64)
    assert found.keys() == wanted.keys()
    for name in names:
        # The model's norms and softmax compute in fp32 whatever its dtype; the matrices agree as far as that allows.
        assert float((found[name] - wanted[name]).norm() / wanted[name].norm()) < 1e-6


def test_a_matrix_of_two_directions_has_two():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(20, 2, generator=generator))[0], torch.randn(2, 30, generator=generator)
    values = torch.linalg.svdvals(left @ torch.linalg.qr(right.t())[0].t())
    assert energy_rank(values, 0.99) == 2
    assert entropy_rank(values) == pytest.approx(2.0, abs=1e-3)


# --- the rule ---------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from([1, 2, 4, 8, 16]), LOSSES, min_size=1))
@settings(max_examples=60, deadline=None)
def test_the_choice_is_the_smallest_within_one_standard_error_of_the_best(losses):
    board = standings({size: np.array(sums) for size, sums in losses.items()}, np.ones(6), seed=0)
    chosen, best = smallest_good(board), best_of(board)
    assert chosen.loss <= best.loss + best.error
    assert chosen.size <= best.size
    assert all(each.loss > best.loss + best.error for each in board if each.size < chosen.size)
    possible, sure = smallest_possible(board), decided(board)
    assert possible.size <= chosen.size
    assert all(each.place == "out" for each in board if each.size < possible.size)
    assert sure == (None if possible.place == "open" else possible.size)
    if sure is not None:
        assert sure == chosen.size


def test_equal_losses_take_the_smallest_and_clear_ones_the_best():
    same = {size: np.linspace(1, 2, 40) for size in (4, 16, 64)}
    assert smallest_good(standings(same, np.ones(40), seed=0)).size == 4
    apart = {size: np.linspace(1, 1.1, 40) + 1 / size for size in (4, 16, 64)}
    board = standings(apart, np.ones(40), seed=0)
    assert smallest_good(board).size == decided(board) == 64


def test_ranks_and_steps_of_the_race():
    assert race_ranks(64) == (4, 16, 64)
    assert race_ranks(2) == (1, 2)
    assert race_steps(1200, 3, 0.25) == 100
    assert race_steps(4, 3, 0.25) == 4


def test_rows_that_judge_the_race_are_not_trained_on():
    samples = ragged_samples(60)
    first, again, other = (hold_out(samples, wanted=10, seed=seed, where="rows") for seed in (3, 3, 4))
    assert {sample.index for sample in first.kept}.isdisjoint(sample.index for sample in first.held)
    assert len(first.held) == 10
    assert len(first.kept) == 50
    assert (list(first.kept), first.held) == (list(again.kept), again.held)
    assert first.held != other.held


def test_too_few_rows_are_refused():
    with pytest.raises(UsageError, match="at least 30 training rows"):
        hold_out(ragged_samples(20), wanted=4, seed=0, where="rows")


# --- the race ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_chooses_the_same_with_the_same_figures(base, data):
    one, two = (choose_rank(config(base, data)).to_dict() for _ in range(2))
    del one["seconds"], two["seconds"]
    one["why"], two["why"] = one["why"][:-1], two["why"][:-1]  # the last line tells the seconds
    assert one == two
    assert one["rank"] in one["candidates"]
    assert one["steps_used"] <= 3 * one["steps"]


def test_a_run_keeps_what_the_race_saw_and_trains_with_the_number(base, data, tmp_path):
    run = tune(base, data, output=tmp_path / "run", rank="auto", max_steps=10, batch_size=4, dtype="float32")
    told = json.loads((run.path / "rank.json").read_text())
    assert isinstance(run.config.method, Lora)
    assert run.config.method.rank == told["rank"]
    assert run.config.method.alpha == 2 * told["rank"]
    assert (run.path / "rank.png").read_bytes().startswith(b"\x89PNG")
    assert any(f"rank {told['rank']}:" in line for line in told["why"])
    last = told["rounds"][-1]["board"]
    assert {each["size"] for each in last} <= set(told["candidates"])
    for each in last:
        mean = sum(told["row_losses"][str(each["size"])]) / sum(told["tokens"])
        assert each["loss"] == pytest.approx(mean)
    config_file = run.path / "config.yaml"
    assert f"rank: {told['rank']}" in config_file.read_text()
    assert run.verify().lines()


def test_a_run_with_a_number_has_no_race(base, data, tmp_path):
    run = tune(base, data, output=tmp_path / "run", rank=2, max_steps=2, batch_size=4, dtype="float32")
    assert not (run.path / "rank.json").exists()


def test_a_resumed_run_takes_the_rank_that_was_chosen(base, data, tmp_path):
    options = {"output": tmp_path / "run", "rank": "auto", "max_steps": 10, "batch_size": 4, "dtype": "float32"}
    first = tune(base, data, **options)
    before = (first.path / "rank.json").read_bytes()
    assert tune(base, data, resume=True, **options).config == first.config
    assert (first.path / "rank.json").read_bytes() == before


def test_the_race_runs_over_a_quantized_base_too(base, data):
    choice = choose_rank(config(base, data, method="qlora", format="int4-g32"))
    assert choice.rank in choice.candidates


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", ["many", 0, -1, 2.5, True])
def test_a_rank_that_is_none_is_refused_in_one_sentence(base, data, rank):
    with pytest.raises(ConfigError, match="needs a whole number of at least 1, or auto"):
        config(base, data, rank=rank)


@pytest.mark.parametrize(("given_rank", "shown"), [("auto", "rank: auto"), ("8", "rank: 8")])
def test_the_command_line_takes_a_number_or_auto(base, data, given_rank, shown):
    told = CliRunner().invoke(
        app, ["tune", str(base), "--data", str(data), "--rank", given_rank, "--dry-run"], catch_exceptions=False
    )
    assert told.exit_code == 0, told.output
    assert shown in told.stdout

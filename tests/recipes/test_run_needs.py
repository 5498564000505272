"""What a run says beforehand that it needs: memory by the policy that was really chosen, the disk of its cache."""

from __future__ import annotations

from dataclasses import replace

import pytest

from strop.config import TuneConfig
from strop.data.store import store_bytes
from strop.files.folders import read_json
from strop.recipes import tune as tune_recipe
from strop.recipes.checks.disk import cached_bytes
from strop.recipes.manifest import predicted_memory
from strop.recipes.session import open_session
from tests.recipes.helpers import Notes, short

BUDGET = 10**10


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_manifest_predicts_what_the_memory_policy_really_chose(base, data, tmp_path, monkeypatch, blocks):
    monkeypatch.setattr("strop.training.recompute.blocks_for_budget", lambda *args, **settings: blocks)
    notes = Notes()
    run = short(
        base, data, tmp_path / "run", method="full", checkpointing="auto", max_memory=BUDGET, max_steps=1,
        reporter=notes,
    )  # fmt: skip
    told = read_json(run.path / "manifest.json")["memory"]["predicted_bytes"]
    session = open_session(run.config.replace(resume=None))
    [tried] = [check["figures"]["shapes"] for check in run.report["checks"] if check["name"] == "accumulation"]

    def predicted(checkpointing: str | int) -> int:
        settings = replace(session.train_settings(), checkpointing=checkpointing)
        plan = predicted_memory(session, settings, tried=tried)
        assert plan is not None
        return plan.peak_bytes

    none, everything = predicted("none"), predicted("all")
    assert notes.notes.count(f"{blocks} of 2 blocks are recomputed, to stay within max_memory") == 1
    assert everything < none
    assert told == (none, predicted(1), everything)[blocks]


def test_as_many_blocks_are_recomputed_in_the_run_as_were_chosen(base, data, tmp_path, monkeypatch):
    given = []
    train = tune_recipe.train
    monkeypatch.setattr("strop.training.recompute.blocks_for_budget", lambda *args, **settings: 1)
    monkeypatch.setattr(
        tune_recipe, "train", lambda *args, **named: (given.append(args[3].checkpointing), train(*args, **named))[1]
    )
    short(base, data, tmp_path / "run", checkpointing="auto", max_memory=BUDGET, max_steps=1)
    assert given == [1]


def test_the_disk_of_a_run_counts_the_rows_in_its_cache(base, data, tmp_path):
    config = TuneConfig.from_flat({"model": base, "data": data})
    session = open_session(config, cache=tmp_path / "cache")
    written = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.*") if path.stem in ("train", "valid"))
    headers = 2 * 400  # names and shapes of the tables
    assert written - headers <= cached_bytes(session) <= written
    assert store_bytes(list(session.train_set.samples)) == session.train_set.samples.stored_bytes

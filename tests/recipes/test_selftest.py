"""`selftest`: kills really happen, runs end in the same bits, and a run that differs is not called equal."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from strop.app.cli import app
from strop.recipes import selftest as recipe
from strop.recipes.selftest import SelftestResult, selftest


@pytest.mark.slow
def test_killed_runs_are_counted_and_end_in_the_same_bits():
    result = selftest(kills=3)
    assert result.kills == sum(result.kills_by_step.values()) == 3
    assert result.runs >= 1
    assert result.passed


def test_a_run_that_ends_otherwise_fails_the_test(monkeypatch):
    outcomes = iter(range(100))
    monkeypatch.setattr(recipe, "_outcome", lambda _: {"weights": next(outcomes)})
    told = CliRunner().invoke(app, ["selftest", "--kill", "1", "--json"])
    assert told.exit_code == 1
    found = json.loads(told.stdout)
    assert found["passed"] is False
    assert found["identical"] == 0


def test_the_verdict_is_a_sentence():
    good = SelftestResult("lora", 2, {3: 2}, 1, 1, 4.0)
    assert good.lines()[-1] == "bit-equal to the run left alone: yes (1 of 1)"
    assert not SelftestResult("lora", 2, {3: 2}, 2, 1, 4.0).passed

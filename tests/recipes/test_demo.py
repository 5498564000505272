"""The demo, with far less training: every step runs, every figure is there, and nothing of anybody's is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from strop.errors import UsageError
from strop.models import load
from strop.recipes.demo import MAIN_SPLIT, OTHER_SPLITS, Recipe, demo

SHORT = {"max_steps": 2, "batch_size": 4}
RECIPE = Recipe(
    rows=60,
    test_rows=12,
    tuning={"full": SHORT, "lora": SHORT, "qlora": SHORT},
    more=SHORT,
    rounded=("int8",),
    questions=("call anna",),
)


def test_the_whole_way_runs_and_accounts_for_every_figure(tmp_path: Path) -> None:
    result = demo(tmp_path / "demo", recipe=RECIPE)
    figures = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert set(figures["scores"]) == {MAIN_SPLIT, *OTHER_SPLITS}
    for split in figures["scores"].values():
        assert {"base", "full", "lora", "qlora", "int3-tensor qat", "copying the nearest row"} <= set(split)
    assert {"int8", "int3-tensor rounded", "int3-tensor control"} <= set(figures["scores"][MAIN_SPLIT])
    page = result.page.read_text(encoding="utf-8")
    assert "int3-tensor control" in page
    assert "<svg" in page
    assert figures["answers"][0]["question"] == "call anna"
    assert any("minutes" in line for line in result.lines())
    assert load(tmp_path / "demo" / "runs" / "qat").scheme is not None


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="no demo made"):
        demo(tmp_path, recipe=RECIPE)
    assert (tmp_path / "mine.txt").read_text() == "keep"

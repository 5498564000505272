"""What is said of a comparison: verdicts, the headline, the table, and JSON that holds no NaN."""

from __future__ import annotations

import json
import math

import numpy as np

from strop.evaluation.comparison import Comparison, Flips, ModelResult
from strop.evaluation.statistics import Difference, Interval, Verdict, compare_proportions, wilson_interval

MEBIBYTE = 1 << 20


def loss_result(name: str, *, mebibytes: float, verdict: Verdict | None, estimate: float = 0.5) -> ModelResult:
    difference = None
    if verdict is not None:
        low, high = (-0.1, 0.1) if verdict == "undecided" else (0.2, 0.4) if verdict == "worse" else (-0.4, -0.2)
        needed = 840 if verdict == "undecided" else None
        difference = Difference((low + high) / 2 or 0.02, low, high, verdict, needed, 100, 0.95, "bootstrap")
    loss = Interval(estimate, 0.4, 0.6, 100, 0.95, "bootstrap")
    return ModelResult(name, f"/{name}", "int8", int(mebibytes * MEBIBYTE), None, 1, loss, loss_difference=difference)


def task_result(name: str, *, mebibytes: float, right: list[bool], reference: list[bool] | None) -> ModelResult:
    difference = None if reference is None else compare_proportions(reference, right)
    loss = Interval(0.5, 0.4, 0.6, 100, 0.95, "bootstrap")
    return ModelResult(
        name,
        f"/{name}",
        "int8",
        int(mebibytes * MEBIBYTE),
        None,
        1,
        loss,
        score=wilson_interval(sum(right), len(right)),
        loss_difference=reference and Difference(0.3, 0.2, 0.4, "worse", None, len(right), 0.95, "bootstrap"),
        score_difference=difference,
        flips=Flips(0, 0, ()),
    )


def together(*models: ModelResult, task: str | None = None) -> Comparison:
    return Comparison(models, "rows", 100, 1000, "00" * 32, task, 0, 0.95)


def answers(share: float) -> list[bool]:
    return (np.arange(1000) < 1000 * share).tolist()


def test_the_headline_names_the_better_the_smallest_that_keeps_up_and_the_worse():
    comparison = together(
        loss_result("full", mebibytes=8, verdict=None),
        loss_result("tuned", mebibytes=8, verdict="better"),
        loss_result("int8", mebibytes=4, verdict="undecided"),
        loss_result("int4", mebibytes=2, verdict="undecided"),
        loss_result("int2", mebibytes=1, verdict="worse", estimate=0.8),
    )
    assert comparison.headline() == (
        "Better than full: tuned (-0.300 nats). "
        "int4 is the smallest file not shown to be worse than full: 2.00 MiB, 25% of full's, perplexity 1.649 against "
        "1.649 (difference -0.100 to +0.100 nats, undecided). "
        "Worse than full: int2 (+0.300 nats). Undecided: int8 (+0.020 nats) and int4 (+0.020 nats)."
    )


def test_a_smaller_file_that_is_worse_keeps_up_with_nothing():
    comparison = together(
        loss_result("full", mebibytes=8, verdict=None), loss_result("int2", mebibytes=1, verdict="worse")
    )
    assert comparison.headline() == "No smaller file keeps up with full. Worse than full: int2 (+0.300 nats)."
    assert together(loss_result("full", mebibytes=8, verdict=None)).headline().startswith("full stands alone")


def test_many_models_of_one_kind_are_listed_without_figures():
    worse = [loss_result(f"m{index}", mebibytes=9, verdict="worse") for index in range(4)]
    comparison = together(loss_result("full", mebibytes=8, verdict=None), *worse)
    assert comparison.headline() == "Worse than full: m0, m1, m2 and m3."


def test_a_verdict_gives_difference_interval_test_and_the_rows_that_would_decide():
    full = answers(0.98)
    near = [*answers(0.98)[:-4], True, True, False, False]
    comparison = together(
        task_result("full", mebibytes=8, right=full, reference=None),
        task_result("int3", mebibytes=2, right=answers(0.9), reference=full),
        task_result("int8", mebibytes=4, right=near, reference=full),
        task="exact-match",
    )
    worse, undecided = comparison.verdicts()
    assert worse.startswith("int3 against full: worse (exact match -8.0 points, 95% interval -9.8 to -6.4,")
    assert worse.endswith("exact McNemar p < 0.0001).")
    needed = comparison.model("int8").difference.rows_needed
    assert f"exact McNemar p 0.5); about {needed:,} rows would decide a difference of this size." in undecided
    assert "98.2% exact match against 98.0%" in comparison.headline()
    loss = together(
        loss_result("full", mebibytes=8, verdict=None), loss_result("int8", mebibytes=4, verdict="undecided")
    )
    assert loss.verdicts() == [
        "int8 against full: undecided (loss +0.020 nats, 95% interval -0.100 to +0.100); "
        "about 840 rows would decide a difference of this size."
    ]


def test_scores_of_zero_decide_nothing_and_the_loss_does():
    nobody = answers(0.0)
    comparison = together(
        task_result("full", mebibytes=8, right=nobody, reference=None),
        task_result("int8", mebibytes=4, right=nobody, reference=nobody),
        task="exact-match",
    )
    assert comparison.model("int8").judged_by == "loss"
    assert comparison.headline() == "No smaller file keeps up with full. Worse than full: int8 (+0.300 nats)."
    assert comparison.to_dict()["models"][1]["judged_by"] == "loss"


def test_too_few_rows_are_said_to_be_too_few():
    few = Difference(0.1, None, None, "undecided", 50, 3, 0.95, "bootstrap")
    model = ModelResult("b", "/b", "int8", 1, None, 1, Interval(0.5, None, None, 3, 0.95, "x"), loss_difference=few)
    comparison = together(loss_result("a", mebibytes=1, verdict=None), model)
    assert comparison.verdicts() == [
        "b against a: undecided (loss +0.100 nats, 3 rows are too few for an interval); "
        "about 50 rows would decide a difference of this size."
    ]
    assert comparison.rows()[1][-2:] == ["+0.100 nats", "undecided"]


def test_what_json_cannot_hold_is_none():
    huge = ModelResult(
        "b", "/b", "int2", 1, None, 1, Interval(5000.0, 4000.0, math.inf, 9, 0.95, "x"), kl_99th=math.nan
    )
    plain = together(loss_result("a", mebibytes=1, verdict=None), huge).to_dict()
    back = json.loads(json.dumps(plain, allow_nan=False))["models"][1]
    assert back["loss"] == {"estimate": 5000.0, "low": 4000.0, "high": None, "rows": 9, "level": 0.95, "method": "x"}
    assert back["perplexity"] == {"estimate": None, "low": None, "high": None}
    assert back["kl_99th"] is None

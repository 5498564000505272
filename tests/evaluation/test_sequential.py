"""The test that may look after every row: exactly valid, quick where nothing was lost, honest about what it lacks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from strop.evaluation.sequential import (
    ERROR,
    LOG_GOAL,
    DropTest,
    Evidence,
    decide,
    drop_interval,
    rows_to_decide,
)

OUTCOMES = np.array([1.0, 0.0, -1.0])


def trinomial(generator: np.random.Generator, drop: float, differing: float, rows: int) -> np.ndarray:
    """Rows whose answers differ with this chance and are lost this much more often than gained."""
    differing = max(differing, abs(drop))
    chances = [(differing + drop) / 2, 1 - differing, (differing - drop) / 2]
    return generator.choice(OUTCOMES, size=rows, p=np.array(chances) / sum(chances))


def state_after(limit: float, lost: np.ndarray, gained: np.ndarray, rows: int) -> Evidence:
    """The gamblers after these counts; their next stakes depend on nothing else."""
    evidence = Evidence(np.full(len(lost), limit), limit)
    evidence.rows = rows
    evidence._drops, evidence._squares = (lost - gained).astype(float), (lost + gained).astype(float)
    return evidence


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.3, 0.9])
def test_no_bet_is_favourable_under_its_hypothesis_after_any_200_rows(limit: float) -> None:
    """E[factor] <= 1 for every distribution that the hypothesis allows, from every state: a supermartingale.

    The expectation is linear in the outcome's distribution, so the corners of what is allowed are enough.
    """
    corners_of_pass = [(limit, 1 - limit, 0.0), ((1 + limit) / 2, 0.0, (1 - limit) / 2), (1.0, 0.0, 0.0)]
    corners_of_fail = [*corners_of_pass[:2], (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    for rows in [*range(0, 60, 3), 100, 150, 200]:
        lost, gained = (part.ravel() for part in np.indices((rows + 1, rows + 1)))
        inside = lost + gained <= rows
        passing, failing = state_after(limit, lost[inside], gained[inside], rows).stakes()
        assert (passing >= 0).all()
        assert (failing >= 0).all()
        up = 1 + passing[..., None] * (limit - OUTCOMES)
        down = 1 + failing[..., None] * (OUTCOMES - limit)
        assert (up > 0).all()
        assert (down > 0).all()
        assert max((up @ np.array(corner)).max() for corner in corners_of_pass) <= 1 + 1e-12
        assert max((down @ np.array(corner)).max() for corner in corners_of_fail) <= 1 + 1e-12


@pytest.mark.parametrize("gained_share", [0.0, 0.1, 0.3])
def test_whole_tree_of_outcomes_passes_wrongly_at_most_once_in_twenty(gained_share: float) -> None:
    """Every one of 3^11 sequences at the very limit, weighted by its chance."""
    limit, rows = 0.35, 11
    chances = np.array([limit + gained_share, 1 - limit - 2 * gained_share, gained_share])
    sequences = np.array(list(itertools.product(range(3), repeat=rows)), dtype=np.int8)
    evidence = Evidence(np.full(len(sequences), limit), limit)
    passed, failed = np.zeros(len(sequences), dtype=bool), np.zeros(len(sequences), dtype=bool)
    for row in range(rows):
        evidence.add(OUTCOMES[sequences[:, row]])
        passed |= evidence.log_pass >= LOG_GOAL
        failed |= evidence.log_fail >= LOG_GOAL
    weights = chances[sequences].prod(axis=1)
    assert weights.sum() == pytest.approx(1)
    assert passed.any()
    assert failed.any()
    assert weights[passed].sum() <= ERROR
    assert weights[failed].sum() <= ERROR


@settings(max_examples=25, deadline=None)
@given(
    limit=st.sampled_from([0.02, 0.05, 0.2]),
    differing=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**31),
    bounded=st.booleans(),
)
def test_wealth_averages_at_most_one_at_the_limit(limit: float, differing: float, seed: int, *, bounded: bool) -> None:
    """Simulated hypotheses of all spreads, answers and continuous drops alike, at a stopped time."""
    generator = np.random.default_rng(seed)
    replays, rows = 2000, 80
    draws = trinomial(generator, limit, differing, replays * rows).reshape(rows, replays)
    if bounded:  # a drop of the same mean spread over an interval
        draws = np.clip(limit + (1 - limit) * differing * generator.uniform(-1, 1, size=(rows, replays)), -1, 1)
    evidence = Evidence(np.full(replays, limit), limit)
    stopped_pass, stopped_fail = np.zeros(replays), np.zeros(replays)
    for row in draws:
        evidence.add(row)
        stopped_pass = np.where(stopped_pass >= LOG_GOAL, stopped_pass, evidence.log_pass)
        stopped_fail = np.where(stopped_fail >= LOG_GOAL, stopped_fail, evidence.log_fail)
    for logs in (stopped_pass, stopped_fail):
        wealth = np.exp(logs)
        assert wealth.mean() <= 1 + 5 * wealth.std() / math.sqrt(replays) + 1e-9
        assert (logs >= LOG_GOAL).mean() <= ERROR + 5 * math.sqrt(ERROR / replays)


def test_looking_after_every_row_holds_five_percent_where_a_repeated_test_does_not() -> None:
    """Hazard 34: reading a fixed-size interval again and again claims far too often."""
    generator = np.random.default_rng(0)
    limit, replays, rows = 0.05, 1000, 600
    draws = trinomial(generator, limit, 0.1, replays * rows).reshape(rows, replays)
    evidence, passed = Evidence(np.full(replays, limit), limit), np.zeros(replays, dtype=bool)
    for row in draws:
        evidence.add(row)
        passed |= evidence.log_pass >= LOG_GOAL
    count = np.arange(1, rows + 1)[:, None]
    mean = draws.cumsum(axis=0) / count
    error = np.sqrt(np.maximum((draws**2).cumsum(axis=0) / count - mean**2, 1e-12) / count)
    peeked = ((mean + 1.645 * error < limit) & (count >= 50)).any(axis=0)
    assert passed.mean() <= ERROR
    assert peeked.mean() > 3 * ERROR


@pytest.mark.parametrize(("differing", "fixed_size"), [(0.02, 124), (0.05, 211), (0.1, 364)], ids=["2%", "5%", "10%"])
def test_nothing_lost_passes_in_under_three_quarters_of_a_fixed_size_test(differing: float, fixed_size: int) -> None:
    """Rows of the exact fixed-size test with a power of 90% at a margin of 5%: benchmarks/prove_replay.py."""
    generator = np.random.default_rng(1)
    replays, rows = 400, round(1.5 * fixed_size)
    evidence, took = Evidence(np.full(replays, 0.05), 0.05), np.full(replays, np.inf)
    for row in trinomial(generator, 0.0, differing, replays * rows).reshape(rows, replays):
        evidence.add(row)
        took[(evidence.log_pass >= LOG_GOAL) & np.isinf(took)] = evidence.rows
    assert np.median(took) <= 0.75 * fixed_size


def test_planted_drops_fail_and_their_verdict_takes_fewer_rows_the_larger_they_are() -> None:
    generator = np.random.default_rng(2)
    took = []
    for drop in (0.04, 0.1, 0.4):
        verdicts = [decide(trinomial(generator, drop, 0.1, 4000), 0.01) for _ in range(5)]
        assert {verdict.decision for verdict in verdicts} == {"fail"}
        took.append(np.median([verdict.rows for verdict in verdicts]))
    assert took == sorted(took, reverse=True)
    assert took[2] < 40


def test_a_drop_between_nothing_and_the_limit_is_found_in_the_end() -> None:
    generator = np.random.default_rng(3)
    for drop, decision in ((0.02, "pass"), (0.08, "fail")):
        assert decide(trinomial(generator, drop, 0.1, 8000), 0.05).decision == decision


def test_identical_answers_pass_about_as_soon_as_any_test_could() -> None:
    """Without one differing row no valid test passes before log(1/20) / log(1 - limit) rows."""
    for limit in (0.01, 0.02, 0.05):
        least = math.log(ERROR) / math.log1p(-limit)
        rows = decide(np.zeros(1000), limit).rows
        assert least <= rows <= 1.2 * least


def test_the_first_row_that_decides_ends_it_however_rows_are_handed_over() -> None:
    rows = np.concatenate([np.zeros(90), np.ones(50)])
    whole, pieces = decide(rows, 0.05), DropTest(0.05)
    for start in range(0, len(rows), 7):
        pieces.add(rows[start : start + 7])
    assert whole == pieces.verdict
    assert whole.decision == "pass"
    assert whole.rows < 90


@settings(max_examples=30, deadline=None)
@example(limit=0.05, drop=0.0, differing=0.01171875, seed=2599285)
@example(limit=0.1, drop=0.0, differing=0.5, seed=215898)
@given(
    limit=st.sampled_from([0.02, 0.05, 0.1]),
    drop=st.floats(-0.05, 0.3),
    differing=st.floats(0.01, 0.5),
    seed=st.integers(0, 2**31),
)
def test_interval_agrees_with_the_verdict_and_holds_the_mean(
    limit: float, drop: float, differing: float, seed: int
) -> None:
    rows = trinomial(np.random.default_rng(seed), drop, differing, 250)
    verdict = decide(rows, limit)
    seen = rows[: verdict.rows]
    low, high = drop_interval(seen, limit)
    assert -1 <= low <= seen.mean() <= high <= 1
    assert (verdict.decision == "pass") == (high <= limit)
    assert (verdict.decision == "fail") == (low >= limit)


def test_interval_covers_the_true_drop_at_every_look() -> None:
    generator = np.random.default_rng(4)
    missed = 0
    for _ in range(24):
        rows = trinomial(generator, 0.02, 0.2, 240)
        missed += any(
            not low <= 0.02 <= high for low, high in (drop_interval(rows[:look], 0.05) for look in (20, 60, 120, 240))
        )
    assert missed <= 24 * 2 * ERROR + 3


def test_further_rows_are_estimated_near_what_they_turn_out_to_be() -> None:
    generator = np.random.default_rng(5)
    ratios = []
    for _ in range(12):
        rows = trinomial(generator, 0.0, 0.05, 4000)
        took, seen = decide(rows, 0.05).rows, 40
        if took <= seen:
            continue
        estimate = rows_to_decide(rows[:seen], 0.05, seed=0)
        assert estimate is not None
        ratios.append((took - seen) / estimate)
    assert 1 / 3 < np.median(ratios) < 3


def test_no_number_is_named_where_the_drop_is_at_the_limit() -> None:
    lost = np.tile([1.0] * 3 + [0.0] * 96 + [-1.0] * 2, 60)  # 0.99% of 6,060 rows
    assert decide(lost, 0.01).decision == "undecided"
    estimate = rows_to_decide(lost, 0.01, seed=0)
    assert estimate is None or estimate > 10_000


def test_continuous_drops_are_estimated_from_a_few_values() -> None:
    rows = np.random.default_rng(6).normal(0.0, 0.1, 60)
    estimate = rows_to_decide(rows, 0.02, seed=0)
    assert estimate is not None
    assert 20 < estimate < 2000


@pytest.mark.parametrize("drop", [1.1, -1.0001, math.nan, math.inf])
def test_what_is_outside_the_bounds_is_refused(drop: float) -> None:
    with pytest.raises(ValueError, match=r"outside \[-1, 1\]"):
        decide([0.0, drop], 0.01)


@pytest.mark.parametrize(("limit", "scale"), [(1.0, 0.1), (0.1, 0.0), (0.1, 1.0)])
def test_limits_and_scales_out_of_range_are_refused(limit: float, scale: float) -> None:
    with pytest.raises(ValueError, match="needed limits"):
        Evidence(limit, scale)

"""Intervals and tests: against published values, a slow oracle, enumeration, and replays with known truth."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.evaluation.statistics import (
    bootstrap_mean,
    compare_proportions,
    mcnemar_exact,
    paired_bootstrap,
    wilson_interval,
)


def answers(*, both: int, only_model: int, only_reference: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Reference's and model's answers with the given counts."""
    reference = [True] * both + [False] * only_model + [True] * only_reference + [False] * neither
    model = [True] * both + [True] * only_model + [False] * only_reference + [False] * neither
    return np.array(reference, dtype=bool), np.array(model, dtype=bool)


def test_wilson_gives_the_interval_of_newcombes_table():
    # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3
    for successes, rows, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        interval = wilson_interval(successes, rows)
        assert (interval.low, interval.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert wilson_interval(1, 29).high == pytest.approx(0.1718, abs=5e-5)


@given(rows=st.integers(1, 400), data=st.data())
@settings(deadline=None, max_examples=50)
def test_wilson_is_inside_zero_and_one_holds_the_share_and_mirrors(rows: int, data: st.DataObject):
    successes = data.draw(st.integers(0, rows))
    interval, mirrored = wilson_interval(successes, rows), wilson_interval(rows - successes, rows)
    assert interval.low is not None
    assert interval.high is not None
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert mirrored.low == pytest.approx(1 - interval.high, abs=1e-12)


@pytest.mark.parametrize(("successes", "rows"), [(1, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_counts_that_contradict_each_other(successes: int, rows: int):
    with pytest.raises(ValueError, match="successes among"):
        wilson_interval(successes, rows)


def test_mcnemar_equals_the_enumeration_of_every_outcome():
    for rows in range(11):
        outcomes = [sum(flips) for flips in product((0, 1), repeat=rows)]
        for only_model in range(rows + 1):
            extreme = abs(only_model - rows / 2)
            share = sum(abs(heads - rows / 2) >= extreme for heads in outcomes) / len(outcomes)
            assert mcnemar_exact(only_model, rows - only_model) == pytest.approx(share, abs=1e-15)


def test_mcnemar_stays_exact_for_thousands_of_rows():
    assert mcnemar_exact(5000, 5000) == 1.0
    assert mcnemar_exact(5100, 4900) == pytest.approx(math.erfc(199 / math.sqrt(2 * 10000)), rel=1e-3)
    assert 0 < mcnemar_exact(0, 1000) == 2 / 2**1000


def test_newcombes_interval_is_the_published_one():
    # Newcombe 1998, Statistics in Medicine 17, 2635-2650: 36, 12, 2, 0 of 50, method 10: 0.0569 to 0.3404
    difference = compare_proportions(*answers(both=36, only_model=12, only_reference=2, neither=0))
    assert difference.estimate == pytest.approx(0.2)
    assert difference.low == pytest.approx(0.0569, abs=5e-5)
    assert difference.high == pytest.approx(0.3404, abs=5e-5)
    assert difference.verdict == "better"
    assert difference.rows_needed is None
    assert difference.p_value == pytest.approx(2 * (1 + 14 + 91) / 2**14)


@given(*[st.integers(0, 60) for _ in range(4)])
@settings(deadline=None, max_examples=200)
def test_the_verdict_on_answers_is_undecided_exactly_where_the_interval_holds_zero(
    both: int, only_model: int, only_reference: int, neither: int
):
    if both + only_model + only_reference + neither == 0:
        return
    difference = compare_proportions(
        *answers(both=both, only_model=only_model, only_reference=only_reference, neither=neither)
    )
    assert difference.low is not None
    assert difference.high is not None
    assert difference.p_value is not None
    assert -1 <= difference.low <= difference.estimate <= difference.high <= 1
    assert (difference.verdict == "undecided") == (difference.low <= 0 <= difference.high)
    if difference.verdict != "undecided":
        assert difference.p_value <= 0.05
        assert difference.verdict == ("better" if difference.estimate > 0 else "worse")
        assert difference.rows_needed is None
    else:
        assert (difference.rows_needed is None) == (only_model == only_reference)
        assert difference.rows_needed is None or difference.rows_needed > difference.rows
    swapped = compare_proportions(
        *answers(both=both, only_model=only_reference, only_reference=only_model, neither=neither)
    )
    assert swapped.estimate == -difference.estimate
    assert swapped.low == pytest.approx(-difference.high, abs=1e-12)


def slow_symmetric_bootstrap_t(values, tokens, *, seed: int, resamples: int) -> tuple[float, float, float]:
    """The docstring's formulas, one document and one sample at a time."""

    def ratio_and_error(d: list[float], w: list[float]) -> tuple[float, float]:
        count, ratio = len(d), sum(d) / sum(w)
        squares = sum((a - ratio * b) ** 2 for a, b in zip(d, w, strict=True))
        return ratio, math.sqrt(count / (count - 1) * squares) / sum(w)

    estimate, error = ratio_and_error(list(values), list(tokens))
    generator = np.random.default_rng(seed)
    distances = []
    for drawn in generator.integers(len(values), size=(resamples, len(values))):
        ratio, spread = ratio_and_error([values[i] for i in drawn], [tokens[i] for i in drawn])
        distances.append(abs(ratio - estimate) / spread)
    distances.sort()
    reach = distances[math.ceil(0.95 * (resamples - 1))] * error
    return estimate, estimate - reach, estimate + reach


def test_the_paired_bootstrap_equals_its_formulas_worked_one_sample_at_a_time():
    generator = np.random.default_rng(7)
    tokens = generator.integers(3, 40, 12)
    reference = generator.normal(2, 1, 12) * tokens
    model = reference + generator.normal(0.1, 0.2, 12) * tokens
    difference = paired_bootstrap(reference, model, tokens, seed=3, resamples=300)
    slow = slow_symmetric_bootstrap_t(model - reference, tokens, seed=3, resamples=300)
    assert (difference.estimate, difference.low, difference.high) == pytest.approx(slow, rel=1e-9)
    alone = bootstrap_mean(model - reference, tokens, seed=3, resamples=300)
    assert (alone.estimate, alone.low, alone.high) == pytest.approx(slow, rel=1e-9)


def test_many_documents_are_resampled_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch):
    generator = np.random.default_rng(1)
    tokens, model = generator.integers(1, 9, 40), generator.normal(size=40)
    whole = paired_bootstrap(np.zeros(40), model, tokens, seed=5, resamples=100)
    monkeypatch.setattr("strop.evaluation.statistics._CHUNK_NUMBERS", 40 * 7)
    assert paired_bootstrap(np.zeros(40), model, tokens, seed=5, resamples=100) == whole


def replay(generator: np.random.Generator, *, documents: int, effect: float) -> tuple[np.ndarray, ...]:
    """Sums of two models whose documents differ by heavy-tailed noise about `effect` per token."""
    tokens = generator.integers(4, 80, documents)
    reference = generator.gamma(4, 0.5, documents) * tokens
    return reference, reference + (effect + 0.1 * generator.standard_t(4, documents)) * tokens, tokens


@pytest.mark.parametrize("documents", [8, 25, 120])
def test_replays_with_no_true_difference_in_loss_claim_at_most_five_percent(documents: int):
    generator = np.random.default_rng(documents)
    replays = 400
    claims = sum(
        paired_bootstrap(*replay(generator, documents=documents, effect=0.0), seed=index, resamples=400).verdict
        != "undecided"
        for index in range(replays)
    )
    assert claims / replays <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / replays)


def test_replays_with_no_true_difference_in_answers_claim_at_most_five_percent():
    generator = np.random.default_rng(11)
    replays, claims = 1000, 0
    for _ in range(replays):
        level = generator.uniform(0.2, 0.99, 150)  # rows differ in difficulty, the models do not
        claims += (
            compare_proportions(generator.random(150) < level, generator.random(150) < level).verdict != "undecided"
        )
    assert claims / replays <= 0.05


def test_a_planted_difference_is_found_and_has_the_right_sign():
    generator = np.random.default_rng(5)
    found = [paired_bootstrap(*replay(generator, documents=80, effect=0.1), seed=i, resamples=400) for i in range(50)]
    verdicts = [difference.verdict for difference in found]
    assert verdicts.count("worse") >= 48
    assert "better" not in verdicts
    gains = [paired_bootstrap(*replay(generator, documents=80, effect=-0.1), seed=i, resamples=400) for i in range(50)]
    assert [difference.verdict for difference in gains].count("better") >= 48
    scores = paired_bootstrap(*replay(generator, documents=80, effect=0.1), seed=0, lower_is_better=False)
    assert scores.verdict == "better"
    assert compare_proportions(*answers(both=880, only_model=5, only_reference=60, neither=55)).verdict == "worse"


def test_the_intervals_hold_the_true_difference_about_as_often_as_they_say():
    generator = np.random.default_rng(2)
    held = held_answers = 0
    for index in range(300):
        interval = paired_bootstrap(*replay(generator, documents=30, effect=0.05), seed=index, resamples=400)
        held += interval.low <= 0.05 <= interval.high
        model = generator.random(200) < 0.9
        reference = np.where(generator.random(200) < 0.2, generator.random(200) < 0.5, model)
        truth = 0.9 - (0.8 * 0.9 + 0.2 * 0.5)
        difference = compare_proportions(reference, model)
        held_answers += difference.low <= truth <= difference.high
    assert 0.91 <= held / 300 <= 0.995
    assert 0.91 <= held_answers / 300 <= 0.995


def test_the_rows_said_to_decide_do_decide_most_of_the_time():
    generator = np.random.default_rng(3)
    undecided = paired_bootstrap(*replay(generator, documents=20, effect=0.03), seed=0)
    assert undecided.verdict == "undecided"
    assert undecided.rows_needed is not None
    rows, effect = undecided.rows_needed, undecided.estimate
    assert rows > 20
    spread = [replay(generator, documents=rows, effect=effect) for _ in range(40)]
    decided = sum(paired_bootstrap(*one, seed=0, resamples=200).verdict != "undecided" for one in spread)
    assert decided >= 20  # planned for 80%; the spread itself was estimated on 20 documents

    answered = compare_proportions(*answers(both=80, only_model=4, only_reference=10, neither=6))
    assert answered.verdict == "undecided"
    rows = answered.rows_needed
    assert rows is not None
    decided = 0
    for _ in range(100):
        kinds = generator.choice(4, size=rows, p=[0.8, 0.04, 0.1, 0.06])
        decided += compare_proportions((kinds == 0) | (kinds == 2), (kinds == 0) | (kinds == 1)).verdict == "worse"
    assert 65 <= decided <= 95


def test_equal_models_are_undecided_and_no_number_of_rows_would_decide():
    tokens = np.arange(1, 11)
    same = paired_bootstrap(tokens * 2.0, tokens * 2.0, tokens, seed=0)
    assert (same.estimate, same.low, same.high, same.verdict, same.rows_needed) == (0, 0, 0, "undecided", None)
    right, _ = answers(both=7, only_model=0, only_reference=0, neither=3)
    same = compare_proportions(right, right)
    assert (same.estimate, same.verdict, same.rows_needed, same.p_value) == (0, "undecided", None, 1.0)


@pytest.mark.parametrize("documents", [1, 2, 5])
def test_too_few_documents_decide_nothing_and_stay_valid_json(documents: int):
    tokens = np.full(documents, 10)
    difference = paired_bootstrap(tokens * 1.0, tokens * np.linspace(5, 6, documents), tokens, seed=0)
    assert difference.verdict == "undecided"
    assert difference.low is None
    assert difference.high is None
    json.dumps(difference.to_dict(), allow_nan=False)


def test_one_document_that_differs_among_many_equal_ones_decides_nothing():
    sums = np.zeros(40)
    sums[3] = 8.0
    difference = paired_bootstrap(np.zeros(40), sums, np.ones(40), seed=0)
    assert difference.verdict == "undecided"
    json.dumps(difference.to_dict(), allow_nan=False)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    generator = np.random.default_rng(0)
    sums = replay(generator, documents=20, effect=0.0)
    assert paired_bootstrap(*sums, seed=1) == paired_bootstrap(*sums, seed=1)
    assert paired_bootstrap(*sums, seed=1).low != paired_bootstrap(*sums, seed=2).low


def test_numbers_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="per document"):
        bootstrap_mean([1.0, 2.0], [1.0], seed=0)
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean([1.0, math.nan], [1, 1], seed=0)
    with pytest.raises(ValueError, match="at least one token"):
        bootstrap_mean([1.0, 2.0], [1, 0], seed=0)
    with pytest.raises(ValueError, match="per row"):
        compare_proportions([True], [True, False])
    with pytest.raises(ValueError, match="per row"):
        compare_proportions([], [])

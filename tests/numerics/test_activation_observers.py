"""Observers of activations against slow oracles that see everything at once, and on planted outliers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from strop.errors import DataError, FormatError
from strop.numerics.activation_observers import (
    ACTIVATION_OBSERVERS,
    BINS,
    FIRST_CLIP,
    Entropy,
    Histogram,
    MinMax,
    MovingAverage,
    Percentile,
    activation_observer,
    best_clip,
)


def batches(count: int = 5, size: int = 4000) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size // 40, 40, generator=generator) * (1 + 0.3 * index) for index in range(count)]


def planted(*, outlier: float = 60.0) -> Tensor:
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(1))
    x[:3] = outlier
    return x


@pytest.mark.parametrize("name", ACTIVATION_OBSERVERS)
def test_an_observer_that_saw_nothing_or_zeros_covers_zero(name: str) -> None:
    seen = activation_observer(name)()
    assert seen.range() == (0.0, 0.0)
    seen.observe(torch.zeros(7))
    seen.observe(torch.zeros(0))
    assert seen.range() == (0.0, 0.0)
    seen.observe(torch.full((5,), 3.0))
    low, high = seen.range()
    assert low == 0.0
    assert high == pytest.approx(3.0 if name != "average" else 0.03)


@pytest.mark.parametrize("name", ACTIVATION_OBSERVERS)
def test_values_that_are_not_finite_are_refused(name: str) -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(DataError, match="NaN or infinite"):
            activation_observer(name)().observe(torch.tensor([1.0, value]))


def test_minmax_equals_the_ends_of_everything() -> None:
    seen = MinMax()
    for batch in batches():
        seen.observe(batch)
    together = torch.cat(batches())
    assert seen.range() == (together.min().item(), together.max().item())


def test_the_moving_average_equals_its_recurrence() -> None:
    seen = MovingAverage()
    low, high = batches()[0].min().item(), batches()[0].max().item()
    for index, batch in enumerate(batches()):
        seen.observe(batch)
        if index:
            low = 0.99 * low + 0.01 * batch.min().item()
            high = 0.99 * high + 0.01 * batch.max().item()
    assert seen.range() == pytest.approx((low, high))


def test_batches_count_as_everything_at_once_would() -> None:
    seen = Histogram()
    for batch in batches():
        seen.observe(batch)
    magnitudes = torch.cat(batches()).double().abs().flatten()
    assert seen.limit > 2 * batches()[0].abs().max().item()  # the later ones are wider
    counts = torch.zeros(BINS, dtype=torch.int64)
    for magnitude in magnitudes.tolist():
        counts[min(int(magnitude * (BINS / seen.limit)), BINS - 1)] += 1
    assert seen.counts.equal(counts)


def test_the_percentile_is_within_a_bin_of_the_exact_one() -> None:
    seen = Percentile()
    for batch in batches():
        seen.observe(batch)
    exact = torch.cat(batches()).abs().flatten().double().quantile(0.9999).item()
    low, _ = seen.range()  # the side with the larger magnitudes
    assert abs(-low - exact) < 2 * seen.seen.limit / BINS


def slow_best_clip(counts: list[int]) -> int:
    """The search of the paper, bin by bin."""
    used = max(index + 1 for index, count in enumerate(counts) if count)
    losses = {}
    for clip in range(FIRST_CLIP, used + 1):
        p = [float(count) for count in counts[:clip]]
        p[-1] += sum(counts[clip:])
        q = [0.0] * clip
        for level in range(FIRST_CLIP):
            members = [index for index in range(clip) if index * FIRST_CLIP // clip == level]
            filled = [index for index in members if counts[index]]
            for index in filled:
                q[index] = sum(counts[member] for member in members) / len(filled)
        loss = 0.0
        for one, other in zip(p, q, strict=True):
            if one:
                loss += one / sum(p) * math.log(one / sum(p) / (other / sum(q))) if other else math.inf
        losses[clip] = loss
    least = min(losses.values())
    return max(clip for clip, loss in losses.items() if loss <= least + 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_entropy_search_equals_the_slow_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = (torch.randn(4000, generator=generator).abs() * 60).long().clamp(max=199)
    histogram = torch.bincount(counts, minlength=200)
    histogram[190 + seed] += 3
    assert best_clip(histogram) == slow_best_clip(histogram.tolist())


def test_entropy_clips_a_planted_outlier_and_minmax_does_not() -> None:
    x = planted()
    ranges = {}
    for name in ACTIVATION_OBSERVERS:
        seen = activation_observer(name)()
        seen.observe(x)
        ranges[name] = seen.range()[1]
    assert ranges["minmax"] == ranges["average"] == 60.0
    assert ranges["entropy"] < 10.0
    assert ranges["percentile"] < 10.0


def test_entropy_keeps_what_has_no_outlier() -> None:
    x = torch.rand(50_000, generator=torch.Generator().manual_seed(2)) * 2 - 1
    seen = Entropy()
    seen.observe(x)
    low, high = seen.range()
    assert high > 0.95
    assert low < -0.95


def test_an_unknown_observer_is_refused_with_the_nearest() -> None:
    with pytest.raises(FormatError, match=r"entropi.*entropy"):
        activation_observer("entropi")

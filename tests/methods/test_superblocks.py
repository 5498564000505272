"""The search for Q4_K and MXFP4 scales: never worse than the plain grid, against slow oracles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strop.errors import FormatError
from strop.methods import Statistics, rtn, search, weighted_error
from strop.methods.superblocks import search_super_scale
from strop.numerics import IntFormat, parse_format, parse_scheme, quantize_tensor
from strop.numerics.groups import split
from tests.numerics.schemes import hard_weights

Q4_K = parse_format("gguf:q4_k").scheme


def layer(rows: int = 24, columns: int = 512) -> tuple[Tensor, Statistics]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, Statistics(torch.rand(columns, generator=generator) ** 4, rows=100)


@given(hard_weights(512), st.sampled_from(["q4_k", "mxfp4"]), st.booleans(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_search_is_never_worse_than_the_plain_grid(weight: Tensor, text: str, weighted: bool, seed: int) -> None:
    scheme = parse_scheme(text)
    mean_square = torch.rand(512, generator=torch.Generator().manual_seed(seed)) ** 8
    statistics = Statistics(mean_square.mul(2).floor() + mean_square, rows=10) if weighted else None
    try:
        plain = rtn(weight, scheme)
    except FormatError:
        with pytest.raises(FormatError, match="overflow float16"):
            search(weight, scheme, statistics)
        return
    searched = search(weight, scheme, statistics)
    assert weighted_error(weight, searched, statistics) <= weighted_error(weight, plain, statistics)
    assert searched.scheme == scheme
    assert torch.isfinite(searched.dequantize()).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_no_superblock_is_worse_than_plain(weighted: bool) -> None:
    """Not just the tensor as a whole."""
    weight, statistics = layer()
    importance = statistics.mean_square if weighted else torch.ones(512)
    assert isinstance(Q4_K.format, IntFormat)
    found = search_super_scale(split(weight, Q4_K), Q4_K.format, importance.view(1, -1, 32))
    errors = [
        ((one.dequantize() - weight).square() * importance).view(24, -1, 256).double().sum(-1)
        for one in (quantize_tensor(weight, Q4_K, super_scale=found), rtn(weight, Q4_K))
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()


@pytest.mark.parametrize(("text", "share", "weighted_share"), [("q4_k", 0.82, 0.65), ("mxfp4", 0.97, 0.95)])
def test_search_errs_clearly_less(text: str, share: float, weighted_share: float) -> None:
    weight, statistics = layer()
    scheme = parse_scheme(text)
    for seen, most in ((None, share), (statistics, weighted_share)):
        plain = weighted_error(weight, rtn(weight, scheme), seen)
        assert weighted_error(weight, search(weight, scheme, seen), seen) < most * plain


def test_searched_q4_k_comes_near_the_best_scale_and_minimum_of_every_group() -> None:
    """The oracle tries 101 x 101 scales and minimums for each group, in float64, and rounds neither to 6 bits."""
    weight, _ = layer(rows=2, columns=256)
    found = search(weight, Q4_K)
    groups = weight.double().view(-1, 32)
    best = torch.full((groups.shape[0],), torch.inf, dtype=torch.float64)
    low, high = groups.amin(-1), groups.amax(-1)
    for wide in torch.linspace(0.7, 1.1, 101).tolist():
        step = ((high - low) * wide / 15).unsqueeze(-1)
        for shift in torch.linspace(-0.25, 0.25, 101).tolist():
            minimum = (-low * (1 + shift)).unsqueeze(-1)
            codes = ((groups + minimum) / step).round().clamp(0, 15)
            best = torch.minimum(best, (codes * step - minimum - groups).square().sum(-1))
    error = (found.dequantize().double() - weight.double()).square().sum()
    plain = (rtn(weight, Q4_K).dequantize().double() - weight.double()).square().sum()
    assert best.sum() < error * 1.02  # the oracle is one
    assert error < 1.06 * best.sum()
    assert plain > 1.25 * best.sum()


def test_every_scale_of_mxfp4_is_the_best_of_its_neighbours_by_powers_of_two() -> None:
    weight, statistics = layer()
    scheme = parse_scheme("mxfp4")
    plain, found = rtn(weight, scheme).scales(), search(weight, scheme, statistics)
    errors = []
    for power in (0.25, 0.5, 1.0, 2.0):
        restored = quantize_tensor(weight, scheme, scale=plain * power).dequantize()
        errors.append(((restored - weight).square() * statistics.mean_square).view(24, -1, 32).sum(-1))
    least = torch.stack(errors).amin(0)
    mine = ((found.dequantize() - weight).square() * statistics.mean_square).view(24, -1, 32).sum(-1)
    assert (mine <= least * (1 + 2e-5)).all()
    assert (found.scales() != plain).float().mean() > 0.05


def test_columns_that_are_never_used_do_not_count() -> None:
    """Outliers in dead columns: the searched grid is laid for the others."""
    weight, _ = layer()
    weight[:, ::32] *= 50
    mean_square = torch.ones(512)
    mean_square[::32] = 0.0
    statistics = Statistics(mean_square, rows=1)
    aware = search(weight, Q4_K, statistics)
    assert weighted_error(weight, aware, statistics) < 0.05 * weighted_error(weight, rtn(weight, Q4_K), statistics)


def test_statistics_of_nothing_at_all_change_nothing() -> None:
    weight, _ = layer()
    dead = Statistics(torch.zeros(512), rows=1)
    assert search(weight, Q4_K, dead).dequantize().equal(rtn(weight, Q4_K).dequantize())


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_ranges_of_observers_are_taken_too(observer: str) -> None:
    weight, _ = layer()
    observed = rtn(weight, Q4_K, observer=observer)
    assert observed.scheme == Q4_K
    assert weighted_error(weight, observed) < 1.3 * weighted_error(weight, rtn(weight, Q4_K))

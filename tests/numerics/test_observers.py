"""Observers: the range each chooses, against numpy and exhaustive search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strop.errors import FormatError
from strop.numerics import FORMATS, OBSERVERS, Format, Mode, choose_scale, dequantize, quantize
from strop.numerics.formats import IntFormat
from strop.numerics.observers import observer, search_range

from .schemes import hard_weights

INT4 = FORMATS["int4"]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", list(OBSERVERS))
@pytest.mark.parametrize("shape", [(3, 2, 16), (4, 64), (1, 1, 10_000), (32,)])
def test_observers_give_a_range_for_each_group(name: str, shape: tuple[int, ...]) -> None:
    low, high = OBSERVERS[name](normal(*shape), INT4, Mode.SYMMETRIC)
    assert low.shape == high.shape == shape[:-1]
    assert low.dtype == high.dtype == torch.float32
    assert (low <= high).all()


def test_minmax_covers_every_value() -> None:
    groups = normal(5, 3, 16)
    low, high = OBSERVERS["minmax"](groups, INT4, Mode.SYMMETRIC)
    assert torch.equal(low, groups.amin(-1))
    assert torch.equal(high, groups.amax(-1))


@pytest.mark.parametrize("size", [2, 33, 20_000])
def test_percentiles_are_those_of_numpy(size: int) -> None:
    groups = normal(2, size)
    low, high = OBSERVERS["percentile"](groups, INT4, Mode.ASYMMETRIC)
    np.testing.assert_allclose(low, np.percentile(groups.numpy(), 0.01, axis=1), rtol=1e-5)
    np.testing.assert_allclose(high, np.percentile(groups.numpy(), 99.99, axis=1), rtol=1e-5)
    low, high = OBSERVERS["percentile"](groups, INT4, Mode.SYMMETRIC)
    magnitude = np.percentile(groups.abs().numpy(), 99.99, axis=1)
    np.testing.assert_allclose(torch.maximum(-low, high), magnitude, rtol=1e-5)


def test_a_percentile_leaves_one_outlier_in_ten_thousand_out() -> None:
    groups = normal(1, 50_000)
    groups[0, 17] = 1000.0
    assert OBSERVERS["minmax"](groups, INT4, Mode.SYMMETRIC)[1].item() == 1000.0
    assert OBSERVERS["percentile"](groups, INT4, Mode.SYMMETRIC)[1].item() < 6.0


def squared_error(group: Tensor, low: Tensor, high: Tensor, form: Format, mode: Mode) -> float:
    assert isinstance(form, IntFormat)
    scale, zero_point = choose_scale(low, high, form, mode)
    restored = dequantize(quantize(group, scale, zero_point, form), scale, zero_point)
    return (restored.double() - group.double()).square().sum().item()


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_finds_the_best_clip_of_its_grid(bits: int, mode: Mode) -> None:
    form = FORMATS[f"int{bits}"]
    groups = normal(4, 200)
    groups[1, 0] = 30.0
    low, high = OBSERVERS["mse"](groups, form, mode)
    for row, group in enumerate(groups):
        got = squared_error(group, low[row], high[row], form, mode)
        tried = [
            squared_error(group, group.min() * percent / 100, group.max() * percent / 100, form, mode)
            for percent in range(100, 28, -2)
        ]
        assert got <= min(tried) * 1.0001
        assert got <= tried[0]


def test_mse_of_a_whole_tensor_is_that_of_one_long_group() -> None:
    """A whole weight is searched in rows that share the range; the zeros that fill the last row change nothing."""
    groups = normal(1, 1, 10_001)
    low, high = OBSERVERS["mse"](groups, INT4, Mode.SYMMETRIC)
    pair = groups.expand(2, 1, -1)  # two groups, each searched in one piece
    twice_low, twice_high = OBSERVERS["mse"](pair, INT4, Mode.SYMMETRIC)
    assert low.view(-1).tolist() == [twice_low[0].item()]
    assert high.view(-1).tolist() == [twice_high[0].item()]


@given(hard_weights(), st.sampled_from(list(Mode)), st.sampled_from(["int2", "int4", "int8"]))
@settings(deadline=None, max_examples=100)
def test_mse_is_never_worse_than_minmax(weight: Tensor, mode: Mode, name: str) -> None:
    form = FORMATS[name]
    low, high = OBSERVERS["mse"](weight, form, mode)
    for row, group in enumerate(weight.float()):
        plain = squared_error(group, group.min(), group.max(), form, mode)
        assert squared_error(group, low[row], high[row], form, mode) <= plain * 1.0001


def test_the_search_weighs_what_matters() -> None:
    """Two values between which the scale must choose: the one of importance is met."""
    group = torch.tensor([[[7.5, 1.0, 1.0, 1.0]]])
    importance = torch.tensor([[[0.0, 1.0, 1.0, 1.0]]])
    factors = [percent / 100 for percent in range(10, 100)]
    _, plain = search_range(group, INT4, Mode.SYMMETRIC, factors=factors)
    _, weighed = search_range(
        torch.tensor([[[7.5, 1.3, 1.3, 1.3]]]), INT4, Mode.SYMMETRIC, factors=factors, importance=importance
    )
    assert plain.item() == 7.5
    scale = weighed / 7.5
    assert abs((1.3 / scale).round() * scale - 1.3) < 0.01


def test_a_search_skips_scales_that_overflow() -> None:
    group = torch.full((1, 1, 8), 480_000.0)
    low, high = search_range(group, INT4, Mode.SYMMETRIC, factors=[1.1], scale_dtype=torch.float16)
    assert (low.item(), high.item()) == (0.0, 480_000.0)


def test_an_unknown_observer_is_refused_with_the_nearest() -> None:
    with pytest.raises(FormatError, match=r"unknown observer 'min-max' \(did you mean 'minmax'\?\)"):
        observer("min-max")

"""Searched rounding: never worse than plain rounding by the error it minimises, and better where it should be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strop.errors import DataError, FormatError
from strop.methods import METHODS, Statistics, rtn, search, weighted_error
from strop.numerics import choose_scale, parse_scheme, quantize_tensor
from tests.numerics.schemes import ALL_TEXTS, COLUMNS, hard_weights, overflows


def layer(rows: int = 24, columns: int = 128) -> tuple[Tensor, Statistics]:
    """A weight and the mean squares of inputs of which a few are large, as in real models."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, Statistics(torch.rand(columns, generator=generator) ** 4, rows=100)


@given(hard_weights(), st.sampled_from(ALL_TEXTS), st.booleans(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=120)
def test_search_is_never_worse_than_rounding(weight: Tensor, text: str, weighted: bool, seed: int) -> None:
    scheme = parse_scheme(text)
    statistics = None
    if weighted:
        mean_square = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(seed)) ** 8
        statistics = Statistics(mean_square.mul(2).floor() + mean_square, rows=10)
    if overflows(weight, scheme):
        with pytest.raises(FormatError, match="overflows"):
            search(weight, scheme, statistics)
        return
    plain = rtn(weight, scheme)
    searched = search(weight, scheme, statistics)
    assert weighted_error(weight, searched, statistics) <= weighted_error(weight, plain, statistics)
    assert searched.scheme == scheme


def test_scales_that_double_quantization_would_spoil_are_not_taken() -> None:
    """Three blocks that plain scales meet exactly, since all four are 1, and a fourth that hardly matters.

    A better scale for the fourth makes the four differ, and the 8-bit scales of the three inexact.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(0, 2, (1, 256), generator=generator) * 2.0 - 1.0
    weight[0, 192:] = torch.randn(64, generator=generator).clamp(-0.9, 0.9)
    weight[0, 192] = 1.0
    mean_square = torch.ones(256)
    mean_square[192:] = 1e-12
    statistics = Statistics(mean_square, rows=1)
    errors = [
        weighted_error(weight, METHODS["search"](weight, parse_scheme(text), statistics), statistics)
        / weighted_error(weight, rtn(weight, parse_scheme(text)), statistics)
        for text in ("nf4", "nf4-dq")
    ]
    assert errors[0] < 0.99
    assert errors[1] == 1.0


@pytest.mark.parametrize(
    ("text", "share"),
    [("int2-g32", 0.7), ("int3-g32", 0.85), ("int4-g32", 0.9), ("int4", 0.9), ("int4-g32-full", 0.95), ("nf4", 0.95)],
)
def test_search_errs_clearly_less_at_few_bits(text: str, share: float) -> None:
    weight, statistics = layer()
    scheme = parse_scheme(text)
    for seen in (None, statistics):
        plain = weighted_error(weight, rtn(weight, scheme), seen)
        assert weighted_error(weight, search(weight, scheme, seen), seen) < share * plain


def test_statistics_move_the_scales_to_the_inputs_that_matter() -> None:
    weight, statistics = layer()
    scheme = parse_scheme("int3-g32")
    aware, unaware = search(weight, scheme, statistics), search(weight, scheme)
    assert weighted_error(weight, aware, statistics) < 0.95 * weighted_error(weight, unaware, statistics)
    assert weighted_error(weight, aware) > weighted_error(weight, unaware)


def test_equal_statistics_are_the_same_as_none() -> None:
    weight, _ = layer()
    scheme = parse_scheme("int3-g32")
    flat = Statistics(torch.ones(128), rows=1)
    assert torch.equal(search(weight, scheme, flat).dequantize(), search(weight, scheme).dequantize())


@pytest.mark.parametrize("text", ["int3-g32", "int2-g32-asym", "int4-g32-full"])
def test_each_group_has_the_best_of_the_scales_tried(text: str) -> None:
    """A slow search, one group at a time in float64, finds nothing better among the same multiples of the range."""
    scheme = parse_scheme(text)
    weight, statistics = layer(rows=3)
    found = search(weight, scheme, statistics).dequantize().double()
    for row in range(3):
        for start in range(0, 128, 32):
            group = weight[row : row + 1, start : start + 32]
            importance = statistics.mean_square[start : start + 32].double()
            errors = []
            factors = [percent / 100 for percent in range(30, 113, 2)]
            for factor in factors + ([-factor for factor in factors] if "full" in text else []):
                low, high = sorted((group.min() * factor, group.max() * factor))
                scale, zero_point = choose_scale(low, high, scheme.format, scheme.mode, scale_dtype=torch.float16)
                zero = None if zero_point is None else zero_point.view(1, 1)
                restored = quantize_tensor(group, scheme, scale=scale.view(1, 1), zero_point=zero).dequantize()
                errors.append(((restored - group).double().square() @ importance).item())
            error = ((found[row, start : start + 32] - group[0]).square() @ importance).item()
            assert error <= min(errors) * 1.001


def test_columns_that_are_never_used_do_not_count() -> None:
    weight, _ = layer(rows=4)
    weight[:, 7] = 50.0  # an outlier of every row, on an input that is always zero
    mean_square = torch.ones(128)
    mean_square[7] = 0.0
    statistics = Statistics(mean_square, rows=1)
    scheme = parse_scheme("int4")
    plain = weighted_error(weight, rtn(weight, scheme), statistics)
    assert weighted_error(weight, search(weight, scheme, statistics), statistics) < plain


def test_the_table_holds_search() -> None:
    weight, statistics = layer()
    scheme = parse_scheme("int4-g32")
    by_name = METHODS["search"](weight, scheme, statistics)
    assert torch.equal(by_name.dequantize(), search(weight, scheme, statistics).dequantize())


@pytest.mark.parametrize(
    ("mean_square", "said"),
    [
        (torch.ones(64), r"statistics of \[64\] inputs for a weight with 128"),
        (-torch.ones(128), "finite and not negative"),
        (torch.full((128,), float("nan")), "finite and not negative"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(mean_square: Tensor, said: str) -> None:
    weight, _ = layer()
    with pytest.raises(DataError, match=f"q_proj: .*{said}"):
        search(weight, parse_scheme("int4"), Statistics(mean_square, rows=1), where="q_proj")


def test_the_weighted_error_is_the_expected_output_error() -> None:
    """Inputs with independent features: the mean squared output error, divided by the number of inputs, per output."""
    weight, statistics = layer(rows=8)
    quantized = rtn(weight, parse_scheme("int3-g32"))
    inputs = torch.randn(200_000, 128, generator=torch.Generator().manual_seed(1)) * statistics.mean_square.sqrt()
    outputs = inputs @ (quantized.dequantize() - weight).t()
    expected = weighted_error(weight, quantized, statistics)
    assert outputs.square().mean().item() / 128 == pytest.approx(expected, rel=0.02)

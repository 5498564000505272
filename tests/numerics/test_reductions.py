"""Sums of a fixed order, and whether values are finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strop.numerics.reductions import all_finite, halved_sum


@given(st.integers(0, 8), st.integers(0, 1000))
def test_halves_are_added_until_one_is_left(power: int, seed: int) -> None:
    values = torch.randn(3, 1 << power, generator=torch.Generator().manual_seed(seed))

    def by_hand(numbers: list[torch.Tensor]) -> torch.Tensor:
        half = len(numbers) // 2
        return by_hand([a + b for a, b in zip(numbers[:half], numbers[half:], strict=True)]) if half else numbers[0]

    expected = torch.stack([by_hand(list(row.unbind())) for row in values])
    assert torch.equal(halved_sum(values), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, bad: float) -> None:
    values = torch.randn(7, 33).to(dtype)
    assert all_finite(values)
    assert all_finite(values[:0])
    for place in (0, 100, 230):
        spoiled = values.clone()
        spoiled.view(-1)[place] = bad
        assert not all_finite(spoiled)

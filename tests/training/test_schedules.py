"""The learning rate over a run: where it rises, where it falls, and that it is never zero."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.training.schedules import rate_share

SCHEDULES = ["linear", "cosine", "constant"]


@given(st.sampled_from(SCHEDULES), st.integers(1, 300), st.floats(0, 0.99))
def test_it_rises_to_its_peak_and_never_rises_again(schedule, total, warmup):
    shares = [rate_share(schedule, step, total, warmup_ratio=warmup) for step in range(total)]
    assert all(0 < share <= 1 for share in shares)
    assert max(shares) == 1
    warm = math.ceil(warmup * total)
    assert shares[:warm] == [(step + 1) / warm for step in range(warm)]
    assert all(left >= right for left, right in zip(shares[warm:], shares[warm + 1 :], strict=False))


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_half_way(schedule, middle):
    assert rate_share(schedule, 50, 100, warmup_ratio=0) == pytest.approx(middle)


def test_cosine_lies_above_linear_before_the_middle_and_below_after():
    for step in range(1, 99):
        difference = rate_share("cosine", step, 100, warmup_ratio=0) - rate_share("linear", step, 100, warmup_ratio=0)
        assert (difference > 0) == (step < 50) or step == 50


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_an_error(step):
    with pytest.raises(ValueError, match="not in 0 to 9"):
        rate_share("linear", step, 10, warmup_ratio=0)

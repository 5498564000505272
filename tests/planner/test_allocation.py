"""Bits under a budget: against every choice tried, and by the properties that any budget must keep."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.errors import UsageError
from strop.planner import allocation
from strop.planner.allocation import allocate

OPTIONS = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 60)), min_size=1, max_size=4)


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(1, 250))
def test_no_choice_that_fits_costs_less(tensors: list[list[tuple[int, int]]], budget: int) -> None:
    costs = [[float(cost) for cost, _ in options] for options in tensors]
    sizes = [[size for _, size in options] for options in tensors]
    choices = [
        choice
        for choice in itertools.product(*(range(len(options)) for options in tensors))
        if sum(sizes[t][o] for t, o in enumerate(choice)) <= budget
    ]
    if not choices:
        with pytest.raises(UsageError, match=r"smallest choice of formats needs \d+"):
            allocate(costs, sizes, budget)
        return
    found = allocate(costs, sizes, budget)
    assert sum(sizes[t][o] for t, o in enumerate(found)) <= budget
    least = min(sum(costs[t][o] for t, o in enumerate(choice)) for choice in choices)
    assert sum(costs[t][o] for t, o in enumerate(found)) == least


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(1, 250))
def test_in_coarse_units_it_fits_and_is_no_worse_than_the_budget_less_a_unit_each(
    tensors: list[list[tuple[int, int]]], budget: int
) -> None:
    costs = [[float(cost) for cost, _ in options] for options in tensors]
    sizes = [[size for _, size in options] for options in tensors]
    if sum(min(options) for options in sizes) > budget:
        return
    saved, allocation.UNITS = allocation.UNITS, 10  # type: ignore[misc]
    try:
        found = allocate(costs, sizes, budget)
        spare = min(budget, sum(map(max, sizes))) - sum(map(min, sizes))
        unit = max(1, -(-spare // 10))
    finally:
        allocation.UNITS = saved  # type: ignore[misc]
    assert sum(sizes[t][o] for t, o in enumerate(found)) <= budget
    smaller = budget - unit * len(tensors)
    if smaller >= sum(min(options) for options in sizes):
        exact = allocate(costs, sizes, smaller)
        assert sum(costs[t][o] for t, o in enumerate(found)) <= sum(costs[t][o] for t, o in enumerate(exact))

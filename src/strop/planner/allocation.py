"""Bits under a budget: for every tensor one of several formats, the sum of costs least, the sum of bytes within it.

    minimise  sum_t cost[t][choice_t]     subject to  sum_t bytes[t][choice_t] <= budget

the multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11). Solved by
dynamic programming over bytes in units; sizes are rounded up to units, so that what is found always fits. With a unit
of one byte the answer is exact; otherwise no choice that fits into `budget - tensors * unit` bytes is better. What
rounding left over is then spent where it lowers the costs most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from strop.errors import UsageError

UNITS: Final = 100_000
"""Units in which the part of the budget that can be chosen is counted."""


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Choose one option for each tensor.

    Args:
        costs: Cost of each tensor's options, not negative; [tensors][options], each tensor with its own options.
        sizes: Bytes of each, in the same order.
        budget: Bytes for all tensors together.

    Returns:
        The option of each tensor.

    Raises:
        UsageError: even the smallest options exceed the budget; the message says how many bytes would do.

    >>> allocate([[4.0, 1.0], [9.0, 0.0]], [[10, 20], [10, 20]], 30)
    [0, 1]
    """
    least = [min(options) for options in sizes]
    spare = budget - sum(least)
    if spare < 0:
        raise UsageError(f"budget: {budget:,} bytes, and the smallest choice of formats needs {sum(least):,}")
    most = sum(max(options) for options in sizes) - sum(least)
    unit = max(1, -(-min(spare, most) // UNITS))
    room = min(spare, most) // unit
    best = np.zeros(room + 1)
    taken: list[np.ndarray] = []
    for cost, size, smallest in zip(costs, sizes, least, strict=True):
        extra = [-(-(each - smallest) // unit) for each in size]
        found = np.full((len(cost), room + 1), np.inf)
        for option, units in enumerate(extra):
            if units <= room:
                found[option, units:] = best[: room + 1 - units] + cost[option]
        chosen = found.argmin(axis=0)
        taken.append(chosen.astype(np.uint8))
        best = found[chosen, np.arange(room + 1)]
    choice: list[int] = []
    left = int(best.argmin())
    for options, size, smallest in zip(reversed(taken), reversed(sizes), reversed(least), strict=True):
        option = int(options[left])
        left -= -(-(size[option] - smallest) // unit)
        choice.append(option)
    return _spend(choice[::-1], costs, sizes, budget)


def _spend(
    choice: list[int], costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """Use what is left of the budget, the largest gain first."""
    left = budget - sum(size[option] for size, option in zip(sizes, choice, strict=True))
    while True:
        gains = [
            (costs[tensor][option] - cost, tensor, other)
            for tensor, option in enumerate(choice)
            for other, cost in enumerate(costs[tensor])
            if sizes[tensor][other] - sizes[tensor][option] <= left
        ]
        gain, tensor, other = max(gains)
        if gain <= 0:
            return choice
        left -= sizes[tensor][other] - sizes[tensor][choice[tensor]]
        choice[tensor] = other

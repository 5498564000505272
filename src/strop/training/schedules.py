"""The learning rate of each step as a share of its peak: a linear warm-up, then linear, cosine or constant.

Steps are counted from 0 to total - 1 and each has one rate. Warm-up takes w = ceil(warmup_ratio * total) steps and
rises as (step + 1) / w; after it, with p = (step - w) / (total - w) in [0, 1):

    linear 1 - p        cosine (1 + cos(pi p)) / 2        constant 1

so that no step has rate zero. Cosine: Loshchilov and Hutter, "SGDR" (2017), without restarts and with minimum 0.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

Schedule: TypeAlias = Literal["linear", "cosine", "constant"]


def rate_share(schedule: Schedule, step: int, total: int, *, warmup_ratio: float) -> float:
    """The share of the peak learning rate that step `step` of `total` takes, in (0, 1].

    >>> [round(rate_share("linear", step, 10, warmup_ratio=0.2), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]

    Raises:
        ValueError: the step is not below the total.
    """
    if not 0 <= step < total:
        raise ValueError(f"step {step} is not in 0 to {total - 1}")
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (total - warmup)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0

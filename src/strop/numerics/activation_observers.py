"""Observers of activations: the range that one static scale should cover, from batches that pass once.

An observer holds a few numbers of what it saw; `observe` adds a batch [any shape], `range` gives (low, high) to cover:

    minmax      everything seen
    average     each batch's smallest and largest value, in a moving average: new = old + 0.01 (batch - old)
    percentile  all but 0.01% of the magnitudes, on both sides
    entropy     magnitudes up to the clip whose 128 levels tell least apart from what was seen (least KL divergence)

The last two count magnitudes in 2048 bins of equal width. A magnitude beyond the last bin doubles the width until it
fits, neighbours being added together; what is counted does not depend on how values were split into batches, but for
the width, which the first batch's largest value begins.

Sources: entropy is Migacz, "8-bit Inference with TensorRT" (2017), with its 2048 bins and 128 levels; the moving
average is Jacob and others, "Quantization and Training of Neural Networks" (2018), section 3.1, with the constant 0.01
of torch's MovingAverageMinMaxObserver.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from strop.errors import DataError, FormatError, nearest
from strop.numerics.observers import PERCENTILE

BINS = 2048
FIRST_CLIP = 128
"""Bins that the narrowest clip of the entropy search covers; also the levels of one side of int8."""

AVERAGING = 0.01

_PIECE = 1 << 18
"""Values counted at a time: places take 16 bytes for each."""


class ActivationObserver(Protocol):
    """What sees batches and gives a range."""

    def observe(self, x: Tensor) -> None:
        """Take a batch of finite values, any float dtype and shape; an empty one changes nothing."""
        ...

    def range(self) -> tuple[float, float]:
        """(low, high), low <= 0 <= high; (0, 0) where nothing was seen."""
        ...


@dataclass
class MinMax:
    """The smallest and the largest value of all, zero included."""

    low: float = 0.0
    high: float = 0.0

    def observe(self, x: Tensor) -> None:
        """Widen the range by a batch."""
        if x.numel():
            low, high = _ends(x)
            self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self) -> tuple[float, float]:
        """What was seen."""
        return self.low, self.high


@dataclass
class MovingAverage:
    """The batches' ends, averaged with weight `AVERAGING` for the newest; the first batch counts whole."""

    low: float = 0.0
    high: float = 0.0
    batches: int = 0

    def observe(self, x: Tensor) -> None:
        """Move the ends towards a batch's."""
        if not x.numel():
            return
        low, high = _ends(x)
        share = AVERAGING if self.batches else 1.0
        self.low += share * (low - self.low)
        self.high += share * (high - self.high)
        self.batches += 1

    def range(self) -> tuple[float, float]:
        """The averages, zero included."""
        return min(self.low, 0.0), max(self.high, 0.0)


@dataclass
class Histogram:
    """Magnitudes counted in `BINS` bins.

    Attributes:
        counts: int64 [BINS]; bin k holds magnitudes from k to less than k + 1 widths.
        limit: Upper end of the last bin; 0 before anything but zeros was seen.
        zeros: Values seen while there was no limit, all of them 0.
        low: The smallest value seen, at most 0.
        high: The largest value seen, at least 0.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    limit: float = 0.0
    zeros: int = 0
    low: float = 0.0
    high: float = 0.0

    def observe(self, x: Tensor) -> None:
        """Count a batch."""
        if not x.numel():
            return
        low, high = _ends(x)
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high)
        if not self.limit:
            if not largest:
                self.zeros += x.numel()
                return
            self.limit = largest * (1 + 2.0**-40)  # the largest value lies in the last bin, not at its end
            self.counts[0] += self.zeros
        while largest >= self.limit:
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), torch.zeros(BINS // 2, dtype=torch.int64)])
            self.limit *= 2
        values = x.detach().flatten()
        for start in range(0, values.numel(), _PIECE):
            places = (values[start : start + _PIECE].double().abs_() * (BINS / self.limit)).long().clamp_(max=BINS - 1)
            self.counts += torch.bincount(places, minlength=BINS).cpu()

    def clipped(self, magnitude: float) -> tuple[float, float]:
        """The range seen, no wider than `magnitude` on either side."""
        return max(self.low, -magnitude), min(self.high, magnitude)


@dataclass
class Percentile:
    """The bin's end below which `PERCENTILE` percent of the magnitudes lie."""

    seen: Histogram = field(default_factory=Histogram)

    def observe(self, x: Tensor) -> None:
        """Count a batch."""
        self.seen.observe(x)

    def range(self) -> tuple[float, float]:
        """At most one bin's width wider than the exact percentile."""
        total = int(self.seen.counts.sum())
        needed = math.ceil(total * PERCENTILE / 100)
        bins = int((self.seen.counts.cumsum(0) < needed).sum()) + 1 if total else 0
        return self.seen.clipped(bins * self.seen.limit / BINS)


@dataclass
class Entropy:
    """The clip of least KL divergence."""

    seen: Histogram = field(default_factory=Histogram)

    def observe(self, x: Tensor) -> None:
        """Count a batch."""
        self.seen.observe(x)

    def range(self) -> tuple[float, float]:
        """The range up to the best clip; all of it where there is little to choose from."""
        return self.seen.clipped(best_clip(self.seen.counts) * self.seen.limit / BINS)


def best_clip(counts: Tensor) -> int:
    """Bins to keep, from `FIRST_CLIP` to all, so that rounding to 128 levels loses least.

    For a clip of n bins, P is the first n bins with everything beyond added to the last of them, and Q the same bins
    without that, cut into 128 levels, each level's sum spread evenly over those of its bins that are not empty. Both
    are normalised; the clip with the least sum of P log(P / Q) wins, the widest among equals. Where P has values and
    Q has none (the last bin was empty before the outliers fell into it) the divergence is infinite.

    Args:
        counts: [bins], not negative.
    """
    values = counts.double()
    used = int((values > 0).nonzero().max()) + 1 if bool((values > 0).any()) else 0
    if used <= FIRST_CLIP:
        return used
    total, best, best_loss = values.sum(), used, math.inf
    for clip in range(used, FIRST_CLIP - 1, -1):
        kept = values[:clip]
        level = torch.arange(clip) * FIRST_CLIP // clip  # [clip], each bin's level
        sums = torch.zeros(FIRST_CLIP, dtype=torch.float64).index_add_(0, level, kept)
        filled = kept > 0
        members = torch.zeros(FIRST_CLIP, dtype=torch.float64).index_add_(0, level, filled.double())
        expanded = torch.where(filled, (sums / members.clamp(min=1))[level], 0.0)
        p = kept.clone()
        p[-1] += total - kept.sum()
        q = expanded / expanded.sum() if expanded.sum() > 0 else expanded
        p /= total
        here = p > 0
        loss = float((p[here] * (p[here] / q[here]).log()).sum())  # infinite where q is 0
        if loss < best_loss - 1e-12:
            best, best_loss = clip, loss
    return best


ACTIVATION_OBSERVERS: Mapping[str, Callable[[], ActivationObserver]] = MappingProxyType(
    {"minmax": MinMax, "average": MovingAverage, "percentile": Percentile, "entropy": Entropy}
)
"""Makers of observers by name."""


def activation_observer(name: str) -> Callable[[], ActivationObserver]:
    """What makes observers of a name.

    Raises:
        FormatError: There is none of that name.
    """
    if name not in ACTIVATION_OBSERVERS:
        known = ", ".join(ACTIVATION_OBSERVERS)
        raise FormatError(
            f"unknown observer of activations {name!r}{nearest(name, ACTIVATION_OBSERVERS)}; there are {known}"
        )
    return ACTIVATION_OBSERVERS[name]


def _ends(x: Tensor) -> tuple[float, float]:
    low, high = (float(end) for end in torch.aminmax(x.detach().float()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError("activations hold NaN or infinite values, which no range can cover")
    return low, high

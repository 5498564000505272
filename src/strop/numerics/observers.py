"""Observers: the range that a grid should cover, from the values themselves.

An observer takes groups [..., size] and returns (xmin, xmax) [...], float32. Covering everything (`minmax`) never clips;
leaving out the outermost values (`percentile`) or searching the clip (`mse`) gives the many a finer step at the price of
the few.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from strop.numerics.formats import Format
from strop.numerics.groups import group_range
from strop.numerics.scheme import Mode


class Observer(Protocol):
    """Groups [..., size], the format and mode that will hold them, to the range (xmin, xmax) [...] to cover."""

    def __call__(self, groups: Tensor, form: Format, mode: Mode, /) -> tuple[Tensor, Tensor]:
        """Observe the range."""
        ...


def minmax(groups: Tensor, form: Format, mode: Mode) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value."""
    low, high = group_range(groups)
    return low.float(), high.float()


OBSERVERS: Mapping[str, Observer] = MappingProxyType({"minmax": minmax})

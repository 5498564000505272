"""Rounding to nearest: each value goes to the nearest point of a grid laid over the range that an observer chooses."""

from __future__ import annotations

from torch import Tensor

from strop.methods.base import Statistics
from strop.numerics.groups import plan_shape, split
from strop.numerics.observers import observer as observer_of
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scales import scale_of_range
from strop.numerics.scheme import Granularity, Scheme


def rtn(
    weight: Tensor,
    scheme: Scheme,
    statistics: Statistics | None = None,
    *,
    observer: str = "minmax",
    where: str = "weight",
) -> QuantizedTensor:
    """Round a weight [out, in] to the nearest values of a scheme's grid.

    Args:
        weight: Any float dtype.
        scheme: The grid.
        statistics: Not used: rounding to nearest looks at the weight alone.
        observer: Which range each group's grid covers, a name in `OBSERVERS`: "minmax" clips nothing.
        where: The weight's name, for messages.

    Raises:
        FormatError: As `quantize_tensor`, or an unknown observer.
    """
    observe = observer_of(observer)
    if observer == "minmax":
        return quantize_tensor(weight, scheme, where=where)
    plan_shape(tuple(weight.shape), scheme, where=where)
    groups = split(weight.detach(), scheme)
    seen = groups.reshape(1, 1, -1) if scheme.granularity is Granularity.TENSOR else groups
    low, high = observe(seen, scheme.format, scheme.mode)
    scale, zero_point = scale_of_range(low, high, scheme, where=where)
    return quantize_tensor(weight, scheme, scale=scale, zero_point=zero_point, where=where)

"""What becomes of all values of a tensor: a sum whose order is fixed, and whether they are finite."""

from __future__ import annotations

import torch
from torch import Tensor


def halved_sum(values: Tensor) -> Tensor:
    """The sum along the last dimension, a power of two long: its halves are added, then those of what that gives.

    torch's own sum adds in an order that depends on the processor; a kernel that adds in this one has the same bits.
    """
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values.squeeze(-1)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: by the range, which NaN spoils, in one pass and without a mask."""
    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))

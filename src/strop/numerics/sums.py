"""A sum whose order is fixed, so that a kernel can add in the same one and arrive at the same bits."""

from __future__ import annotations

from torch import Tensor


def halved_sum(values: Tensor) -> Tensor:
    """The sum along the last dimension, a power of two long: its halves are added, then those of what that gives.

    torch's own sum adds in an order that depends on the processor.
    """
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values.squeeze(-1)

"""Stochastic rounding: each value goes to one of its two neighbours on the grid, the nearer the likelier.

    P(upper) = (x - lower) / (upper - lower), so that the expected value is x

(Gupta and others, "Deep Learning with Limited Numerical Precision", 2015, section 3.1). Its squared error is twice that
of rounding to nearest on average: what it buys is that errors do not add up in a sum over many values.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from strop.methods.base import Statistics
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scheme import Scheme


def stochastic(
    weight: Tensor, scheme: Scheme, statistics: Statistics | None = None, *, seed: int = 0, where: str = "weight"
) -> QuantizedTensor:
    """Round a weight [out, in] to a scheme's plain grid by chance, without bias wherever the grid reaches.

    Args:
        weight: Any float dtype.
        scheme: The grid.
        statistics: Not used: the weight alone decides.
        seed: Decides every draw, together with `where`; the same two give the same bits.
        where: The weight's name, for messages, and so that weights of one model have draws of their own.

    Raises:
        FormatError: As `quantize_tensor`.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{where}".encode()))
    return quantize_tensor(weight, scheme, generator=generator, where=where)

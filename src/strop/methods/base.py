"""What a quantization method is given and returns, and the error by which methods are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from strop.errors import DataError
from strop.numerics.groups import row_chunks
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme


@dataclass(frozen=True, eq=False)
class Statistics:
    """What calibration saw of a linear layer's inputs.

    Attributes:
        mean_square: Mean of each input feature's square, float32 [in].
        rows: Number of input rows (tokens) behind the mean.
    """

    mean_square: Tensor
    rows: int


class Method(Protocol):
    """Round a weight [out, in] to a scheme's grid, with statistics of the layer's inputs or without."""

    def __call__(
        self, weight: Tensor, scheme: Scheme, statistics: Statistics | None = None, /, *, where: str = "weight"
    ) -> QuantizedTensor:
        """Quantize; `where` is the weight's name, for messages."""
        ...


def weighted_error(weight: Tensor, quantized: QuantizedTensor, statistics: Statistics | None = None) -> float:
    """Mean over the weight [out, in] of mean_square[in] * (weight - quantized)^2, in float64.

    Without statistics every mean square is 1. With them this is, up to the number of inputs, the expected squared error
    of an output whose inputs are uncorrelated.
    """
    rows, columns = weight.shape
    importance = None if statistics is None else check_statistics(statistics, weight).double()
    restored = quantized.dequantize()
    total = 0.0
    for part in row_chunks(rows, columns):
        square = (weight[part].double() - restored[part].double()).square_()
        total += (square.sum() if importance is None else (square @ importance).sum()).item()
    return total / (rows * columns)


def check_statistics(statistics: Statistics, weight: Tensor, *, where: str = "weight") -> Tensor:
    """The mean squares, float32 [in], on the device of the weight [out, in] that they belong to.

    Raises:
        DataError: They are of another layer's width, not finite, or negative.
    """
    mean_square, columns = statistics.mean_square, weight.shape[1]
    if tuple(mean_square.shape) != (columns,):
        raise DataError(f"{where}: statistics of {list(mean_square.shape)} inputs for a weight with {columns}")
    if not torch.isfinite(mean_square).all() or (mean_square < 0).any():
        raise DataError(
            f"{where}: mean squares of the inputs must be finite and not negative; calibrate on finite activations"
        )
    return mean_square.to(device=weight.device, dtype=torch.float32)

"""The frozen weight of a product in int8: an approximation that training may compute with, forward and backward.

    y  = c_n * s_t * (round(x_t / s_t) @ C^T)              W[n, :] ~ c_n * C[n, :],  C int8
    dx = s'_t * (round(dy_t * c / s'_t) @ C)               the output's scale is folded into dy before it is rounded

C and c are rounded from the weight as the products would see it (dense, or dequantized), a scale an output channel; x
and dy c are rounded with a scale a token (`kernels.int8`). C takes a byte a weight beside the weight itself, which
stays: it is what is evaluated and saved.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from strop.kernels import int8


class Int8Weight:
    """The weights of a product, [sum of out, in], in int8.

    Args:
        shape: (sum of out, in).
        tiles: Stretches of rows: the first one's place, and the values.
    """

    def __init__(self, shape: tuple[int, int], tiles: Iterable[tuple[int, Tensor]]) -> None:
        self.scales = torch.empty(shape[0], dtype=torch.float32)
        self.codes = torch.empty(0, dtype=torch.int8)
        for start, weight in tiles:
            rows = int8.round_rows(weight.detach())
            if start == 0:
                self.codes = torch.empty(shape[0], rows.codes.shape[1], dtype=torch.int8)
            self.codes[start : start + len(weight)] = rows.codes[: len(weight)]
            self.scales[start : start + len(weight)] = rows.scales
        self.columns = shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scales.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """X [tokens, in] -> y [tokens, sum of out], in the dtype of x."""
        y = x.new_empty(x.shape[0], len(self.scales))
        int8.product(int8.round_rows(x), self.codes, y, channel=self.scales)
        return y

    def backward(self, grad: Tensor) -> Tensor:
        """The gradient of y -> that of x."""
        back = grad.new_empty(grad.shape[0], self.columns)
        int8.product(int8.round_rows(grad, self.scales), self.codes, back, back=True)
        return back


class MeasuredInt8:
    """An int8 weight on trial: its results are compared with the product's own, which are what is used.

    Attributes:
        weight: The weight.
        cosine: The least cosine seen between both, of a y or of a gradient of x; NaN where one was not finite.
    """

    def __init__(self, weight: Int8Weight) -> None:
        self.weight = weight
        self.cosine = 1.0

    def compare(self, own: Tensor, other: Tensor) -> None:
        """Note a result and its approximation."""
        found = cosine(own, other)
        self.cosine = found if not found >= self.cosine else self.cosine


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two tensors, in float64; 1 where both are zero."""
    a, b = a.detach().flatten().double(), b.detach().flatten().double()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size != 0.0 else float(torch.equal(a, b))

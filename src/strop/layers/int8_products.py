"""A product's frozen weights in int8, for both ways of a training step.

    forward    y = (round(x / a) . Q^T) * a * s      a: one a token, max |x| / 127;  s: one an output, max |W| / 127
    backward   dx = (round(dy * s / b) . Q) * b      b: one a token, max |dy * s| / 127

Q = round(W / s) is held once, one byte a weight: the outputs' scales go into the incoming gradient before that is
rounded, and so the same codes serve both. Sums are int32 and exact. What is rounded is the base's share of the product
alone; adapters, norms and attention stay as they are. Source: Dettmers and others, "LLM.int8()" (2022), for the
rounding by rows and columns; the folding of scales into the gradient follows from the chain rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.kernels import block as kernels
from strop.layers.block_products import Operands, weight_tiles
from strop.numerics.int8_matmul import MOST_INPUTS, native_is_exact

_SUMS_AT_ONCE = 1 << 20
"""Sums of a forward product that are there at once: 4 MiB, so that they are scaled while a cache holds them."""


def int8_is_exact() -> bool:
    """Whether this processor multiplies int8 into int32 without saturating, and there are kernels for the rest."""
    return kernels.available() and native_is_exact("cpu")


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """The weights of layers that read one input.

    Attributes:
        codes: int8 [sum of out, in].
        scale: float32 [sum of out].
    """

    codes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, parts: Sequence[Operands]) -> Int8Weight | None:
        """Of frozen layers; None where one is trained, or its sums could leave 32 bits."""
        columns = parts[0].shape[1]
        trained = any(part.weight is not None and part.weight.requires_grad for part in parts)
        if trained or columns > MOST_INPUTS:
            return None
        outputs = sum(part.shape[0] for part in parts)
        codes, scale = torch.empty((outputs, columns), dtype=torch.int8), torch.empty(outputs)
        for start, tile in weight_tiles(parts, torch.float32):
            rows = slice(start, start + len(tile))
            codes[rows], scale[rows] = kernels.round_rows(tile.contiguous(), None)
        return cls(codes, scale)

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def forward(self, x: Tensor, out: Tensor) -> None:
        """X [tokens, in] -> out [tokens, sum of out]."""
        codes, scale = kernels.round_rows(x, None)
        step = max(64, _SUMS_AT_ONCE // max(1, len(x)))
        for start in range(0, len(self.codes), step):
            rows = slice(start, start + step)
            sums = _product(codes, self.codes[rows].t())
            kernels.scale_sums(sums, scale, self.scale[rows], out[:, rows])

    def backward(self, grad: Tensor) -> Tensor:
        """The gradient of the output [tokens, sum of out] -> that of x [tokens, in]."""
        codes, scale = kernels.round_rows(grad, self.scale)
        back = grad.new_empty(len(grad), self.codes.shape[1])
        kernels.scale_sums(_product(codes, self.codes), scale, None, back)
        return back


def _product(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch._int_mm(a, b)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]  # no public name
    return product

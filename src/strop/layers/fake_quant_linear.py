"""`FakeQuantLinear`: a linear layer that trains through the rounding it will be stored with.

    y = round_inputs(x) @ grid.rounded(W)^T + bias

`W` is a trainable [out, in] in fp32 or bf16. The forward pass sees exactly the values that the stored codes stand for,
scales rounded to the dtype of the file; the backward pass is straight-through (`grids.py` says where scales come from).
`to_quant_linear()` stores what was trained: its dequantized weight equals the fake one bit for bit. With `rounds` off
the layer computes with the weight itself: the first steps of a delayed start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from strop.errors import FormatError
from strop.layers.base import compute_dtype, extra_repr
from strop.layers.grids import Grid, RangeGrid
from strop.layers.input_rounding import InputRounding
from strop.layers.quant_linear import QuantLinear
from strop.numerics.scheme import Scheme


class FakeQuantLinear(nn.Module):
    """A linear layer with a trainable weight that is rounded on every call.

    Args:
        weight: [out, in], fp32 or bf16; becomes the trainable parameter (its memory is shared).
        bias: [out] or None; trainable too.
        grid: what the weight is rounded to; a scheme stands for its `RangeGrid`.
        inputs: how the inputs are rounded in training; None leaves them.

    Attributes:
        rounds: whether weight and inputs are rounded in the forward pass.

    Raises:
        FormatError: the shape does not fit the scheme (a group size that does not divide `in`), or the scheme rounds
            activations.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, grid: Grid | Scheme, *, inputs: InputRounding | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.grid: Grid = RangeGrid(grid, (self.out_features, self.in_features)) if isinstance(grid, Scheme) else grid
        if self.scheme.activations is not None:
            raise FormatError(
                f"{self.scheme}: training stores no rounding of activations; train through the weights' own format "
                "(activations: int8 rounds the inputs in training), then quantize"
            )
        self.inputs, self.rounds = inputs, True
        self.weight = nn.Parameter(weight.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    @property
    def scheme(self) -> Scheme:
        """The grid's scheme."""
        return self.grid.scheme

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in] -> [..., out] in the dtype of `x`, or autocast's."""
        dtype = compute_dtype(x)
        x = x.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if not self.rounds:
            return functional.linear(x, self.weight.to(dtype), bias)
        with torch.autocast(x.device.type, enabled=False):  # the rounding is exact, and has no lower precision
            weight = self.grid.rounded(self.weight)
            if self.inputs is not None:
                x = self.inputs(x)
        return functional.linear(x, weight.to(dtype), bias)

    def hold(self) -> None:
        """Let the scales stay as they are from now on."""
        self.grid.hold(self.weight)

    def dense_weight(self) -> Tensor:
        """The rounded weight [out, in], in the dtype of the trainable one."""
        with torch.no_grad():
            return self.grid.rounded(self.weight)

    def to_quant_linear(self) -> QuantLinear:
        """The stored form: codes and scales whose dequantized values are those that training saw, bit for bit."""
        return QuantLinear(self.grid.settled(self.weight.detach()), self.bias)

    def extra_repr(self) -> str:
        """Shape, scheme and bias, for printing."""
        return extra_repr(self, scheme=self.scheme.name, bias=self.bias is not None)

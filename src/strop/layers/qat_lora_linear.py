"""`QatLoraLinear`: an adapter whose sum with its base goes through the quantizer of the file, so that merging is exact.

    y = round_inputs(x) @ grid.rounded(W0 + scaling * B @ A)^T + bias

W0 is frozen and may be held in 16 bits, in 8, or as the destination's own codes; A [r, in] and B [out, r] are trained,
fp32. What the forward pass multiplies with is what the merged file's codes stand for, bit for bit.

The backward pass takes the rounding for the identity, everywhere (straight-through; nothing is cut where the grid
clips), so that the adapter's gradients are LoRA's own, of low rank, and no gradient of the whole weight is formed:

    dL/dx = dL/dy @ W^,   dL/dB = scaling * dL/dy^T @ (x @ A^T),   dL/dA = scaling * (dL/dy @ B)^T @ x

W^ is made again in the backward pass: memory holds the base, the adapter and one dense layer, never a rounded model.

The sum moves a code once it is more than half a step away: with W0 in 16 or 8 bits most weights lie somewhere between
two codes, and a small sum moves those near a threshold. With W0 held as codes every weight lies on its code, and a
small sum would move nothing; there `CodeMoves` is the grid, which gives every weight a place of its own between two
thresholds (or `ZeroMoves`, where the gradient is formed with the mean input of each group).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from strop.errors import FormatError
from strop.layers.base import compute_dtype, dense_weight, extra_repr
from strop.layers.grids import Grid, ZeroMoves
from strop.layers.input_rounding import InputRounding
from strop.layers.lora_linear import LoraLinear
from strop.layers.quant_linear import QuantLinear
from strop.numerics.scheme import Scheme


class QatLoraLinear(nn.Module):
    """A linear layer with an adapter that is added before the rounding.

    Args:
        adapter: the frozen base with its adapter, as `LoraLinear`; without dropout, which a sum of weights cannot have.
        grid: what the sum is rounded to.
        inputs: how the inputs are rounded in training; None leaves them.

    Attributes:
        rounds: whether weight and inputs are rounded in the forward pass.

    Raises:
        FormatError: the adapter has dropout.
    """

    def __init__(self, adapter: LoraLinear, grid: Grid, *, inputs: InputRounding | None = None) -> None:
        super().__init__()
        if adapter.dropout:
            raise FormatError(
                f"dropout is {adapter.dropout:g}; an adapter that is rounded with its base has none: set 0"
            )
        self.in_features, self.out_features = adapter.in_features, adapter.out_features
        self.adapter, self.grid, self.inputs, self.rounds = adapter, grid, inputs, True

    @property
    def scheme(self) -> Scheme:
        """The grid's scheme."""
        return self.grid.scheme

    @property
    def bias(self) -> Tensor | None:
        """The base's bias [out]."""
        return cast("Tensor | None", self.adapter.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in] -> [..., out] in the dtype of `x`, or autocast's."""
        dtype = compute_dtype(x)
        x = x.to(dtype)
        if not self.rounds:
            return self.adapter(x)
        if self.inputs is not None:
            with torch.autocast(x.device.type, enabled=False):
                x = self.inputs(x)
        apply = cast(Callable[..., Tensor], _Summed.apply)  # pyright: ignore[reportUnknownMemberType]
        return apply(x, self.adapter.lora_A, self.adapter.lora_B, self)

    @torch.no_grad()
    def summed(self) -> Tensor:
        """W0 + scaling * B @ A, [out, in], fp32: what is rounded."""
        return dense_weight(self.adapter.base).float() + self.adapter.change()

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The rounded sum [out, in], fp32."""
        return self.grid.rounded(self.summed())

    def hold(self) -> None:
        """Let the scales stay as they are from now on."""
        self.grid.hold(self.summed())

    def to_quant_linear(self) -> QuantLinear:
        """The merged layer: codes and scales whose dequantized values are those that training saw, bit for bit."""
        return QuantLinear(self.grid.settled(self.summed()), self.bias)

    def extra_repr(self) -> str:
        """Shape, scheme and bias, for printing."""
        return extra_repr(self, scheme=self.scheme.name, bias=self.bias is not None)


class _Summed(torch.autograd.Function):
    """x, A, B, layer -> x @ rounded(W0 + scaling * B @ A)^T; nothing dense is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: QatLoraLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, a, b)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            return functional.linear(x, layer.dense_weight().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        layer: QatLoraLinear = ctx.layer
        grad, scaling = grads[0].reshape(-1, grads[0].shape[-1]), layer.adapter.scaling
        tokens = x.reshape(-1, x.shape[-1])
        if isinstance(layer.grid, ZeroMoves):
            tokens = layer.grid.pooled(tokens)
        for_x = for_a = for_b = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                for_x = (grad @ layer.dense_weight().to(grad.dtype)).view(x.shape)
            if ctx.needs_input_grad[1]:
                through = grad @ b.to(grad.dtype)  # [tokens, r]
                for_a = (through.t() @ tokens).to(a.dtype) * scaling
            if ctx.needs_input_grad[2]:
                down = tokens @ a.to(tokens.dtype).t()  # [tokens, r]
                for_b = (grad.t() @ down).to(b.dtype) * scaling
        return for_x, for_a, for_b, None

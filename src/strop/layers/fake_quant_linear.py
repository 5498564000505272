"""`FakeQuantLinear`: a linear layer that trains through the rounding it will be stored with.

    y = x @ fake_quantize(W, scheme)^T + bias

`W` is a trainable [out, in] in fp32 or bf16. The forward pass sees exactly the values that `quantize` followed by
`dequantize` gives, scales rounded to the dtype of the file; the backward pass is straight-through, zero where a value
was clipped. `to_quant_linear()` stores what was trained: its dequantized weight equals the fake one bit for bit.
Activations are not quantized here, and schemes that do (`int8-a8`) are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from strop.errors import FormatError
from strop.layers.base import compute_dtype, extra_repr
from strop.layers.quant_linear import QuantLinear
from strop.numerics.affine import fake_quantize
from strop.numerics.groups import plan_shape
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import Scheme


class FakeQuantLinear(nn.Module):
    """A linear layer with a trainable weight that is rounded to `scheme` on every call.

    Args:
        weight: [out, in], fp32 or bf16; becomes the trainable parameter (its memory is shared).
        bias: [out] or None; trainable too.
        scheme: the grid that the weight is rounded to.

    Raises:
        FormatError: the shape does not fit the scheme (a group size that does not divide `in`), or the scheme rounds
            activations.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scheme: Scheme) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        plan_shape((out_features, in_features), scheme)
        if scheme.activations is not None:
            raise FormatError(f"{scheme}: training does not round activations; train through int8, then quantize")
        self.out_features, self.in_features = out_features, in_features
        self.scheme = scheme
        self.weight = nn.Parameter(weight.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in] -> [..., out] in the dtype of `x`, or autocast's."""
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):  # the rounding is exact, and has no lower precision
            weight = fake_quantize(self.weight, self.scheme)
        weight = weight.to(dtype)
        return functional.linear(x.to(dtype), weight, None if self.bias is None else self.bias.to(dtype))

    def dense_weight(self) -> Tensor:
        """The rounded weight [out, in], in the dtype of the trainable one."""
        with torch.no_grad():
            return fake_quantize(self.weight, self.scheme)

    def to_quant_linear(self) -> QuantLinear:
        """The stored form: codes and scales whose dequantized values are those that training saw, bit for bit."""
        with torch.no_grad():
            return QuantLinear(quantize_tensor(self.weight.detach(), self.scheme), self.bias)

    def extra_repr(self) -> str:
        """Shape, scheme and bias, for printing."""
        return extra_repr(self, scheme=self.scheme.name, bias=self.bias is not None)

"""`ScaleLinear`: a quantized linear layer whose codes stay and whose scales learn.

    y = x @ (s * (q - z))^T + bias,        s = start * factor, rounded to the dtype of the file

The factor [as the scales] is trained, fp32, and starts at 1; codes and zero points are kept packed and the dense weight
exists during one call. The second phase of "EfficientQAT: Efficient Quantization-Aware Training for Large Language
Models", Chen and others, 2024 (arXiv 2407.11062).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from strop.errors import FormatError
from strop.layers.base import compute_dtype, extra_repr
from strop.layers.grids import bound_factors
from strop.layers.input_rounding import InputRounding
from strop.layers.quant_linear import QuantLinear
from strop.methods.rounding import stored_scale
from strop.numerics.groups import restore, split, spread
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme


class ScaleLinear(nn.Module):
    """A quantized layer whose scales are trained.

    Args:
        layer: the quantized layer; its codes are shared, its bias is not trained here.
        inputs: how the inputs are rounded in training; None leaves them.

    Raises:
        FormatError: the scales are codes themselves, or inputs are grouped in GPTQ's activation order.
    """

    def __init__(self, layer: QuantLinear, *, inputs: InputRounding | None = None) -> None:
        super().__init__()
        quantized = layer.qtensor
        if quantized.scale is None or not quantized.scheme.has_real_scales:
            raise FormatError(f"{quantized.scheme}: its scales are codes themselves and cannot be trained")
        if quantized.group_index is not None:
            raise FormatError(
                f"{quantized.scheme}: its inputs are grouped in activation order, whose scales are not trained"
            )
        self.out_features, self.in_features = quantized.shape
        self.quantized, self.inputs = quantized, inputs
        self._unit = dataclasses.replace(quantized, scale=torch.ones_like(quantized.scale))
        self.factor = nn.Parameter(torch.ones(quantized.scale.shape, device=quantized.scale.device))
        self.bias = layer.bias

    @property
    def scheme(self) -> Scheme:
        """The weight's scheme."""
        return self.quantized.scheme

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in] -> [..., out] in the dtype of `x`, or autocast's."""
        dtype = compute_dtype(x)
        x = x.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            weight = self._weight().to(dtype)
            if self.inputs is not None:
                x = self.inputs(x)
        return functional.linear(x, weight, None if self.bias is None else self.bias.to(dtype))

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weight [out, in], fp32."""
        return self._weight()

    @torch.no_grad()
    def stored(self) -> QuantizedTensor:
        """The weight with the scales as the file holds them."""
        assert self.quantized.scale is not None
        return dataclasses.replace(self.quantized, scale=self._scale().to(self.quantized.scale.dtype))

    def to_quant_linear(self) -> QuantLinear:
        """The stored form."""
        return QuantLinear(self.stored(), self.bias)

    def hold(self) -> None:
        """Let the scales stay as they are from now on."""
        self.factor.requires_grad = False

    def keep_in_bounds(self) -> int:
        """After an optimizer's step: no scale vanishes or turns; how many had to be stopped."""
        return bound_factors(self.factor)

    def extra_repr(self) -> str:
        """Shape, scheme and bias, for printing."""
        return extra_repr(self, scheme=self.scheme.name, bias=self.bias is not None)

    def _weight(self) -> Tensor:
        units = split(self._unit.dequantize(), self.scheme)  # codes less zero points
        return restore(units * spread(self._scale()), self.quantized.shape)

    def _scale(self) -> Tensor:
        assert self.quantized.scale is not None
        return stored_scale(self.quantized.scale.float() * self.factor, self.scheme)

"""`QuantLinear`: a linear layer over a frozen `QuantizedTensor`.

    y = x @ dequantize(codes, scale, zero)^T + bias

`x` is [..., in], `y` is [..., out], both in the activation's dtype (or autocast's); the codes are packed uint8, scales
and zeros keep the dtype that the file holds, whatever the model is cast to. Only the codes are kept: the dense weight
exists during one call, and is made again in the backward pass for the gradient of the input,

    dL/dx = dL/dy @ dequantize(codes, scale, zero).

While gradients are off, a few rows of `x` (a token that is being generated) are multiplied by the native kernels where
there are any: with the codes as they lie, their values unrounded and summed in float32; nothing dense is made at all.

Under torch.compile a layer is one operator (`operators`), with the same numbers.

There is no gradient for codes, scales and zeros: what trains on top is an adapter (`LoraLinear`), and training through
the rounding itself is `FakeQuantLinear`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from strop.layers.base import compute_dtype, extra_repr, held_back
from strop.layers.operators import quant_linear
from strop.numerics import accelerated
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme


class _QuantizedMatmul(torch.autograd.Function):
    """x, bias, (codes, scale, ...) -> x @ W^T + bias, keeping nothing dense for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        scheme: Scheme,
        shape: tuple[int, int],
        names: tuple[str, ...],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.scheme, ctx.shape, ctx.names = scheme, shape, names
        ctx.save_for_backward(*tensors)
        weight = QuantizedTensor.from_tensors(dict(zip(names, tensors, strict=True)), scheme, shape).dequantize(x.dtype)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
            weight = QuantizedTensor.from_tensors(tensors, ctx.scheme, ctx.shape).dequantize(grad.dtype)
            grad_x = grad @ weight  # [..., out] @ [out, in] -> [..., in]
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return (grad_x, grad_bias, None, None, None, *(None for _ in ctx.names))


class QuantLinear(nn.Module):
    """A linear layer whose weight is a `QuantizedTensor`.

    Args:
        qtensor: the quantized weight of logical shape (out, in). Its tensors become frozen parameters under their own
            names (`codes`, `scale`, ...), so that a state dict and a sharded model hold exactly them; a single number
            (`nested_offset`) becomes a buffer, since it cannot be sharded.
        bias: [out] or None; kept as a frozen parameter, and cast with the model, as any bias is.
    """

    def __init__(self, qtensor: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = qtensor.shape
        self.scheme = qtensor.scheme
        tensors = qtensor.tensors()
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            if tensor.dim() == 0:
                self.register_buffer(name, tensor.detach())
            else:
                self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def qtensor(self) -> QuantizedTensor:
        """The weight as it is stored; shares memory with the layer."""
        tensors = {name: self._kept(name).detach() for name in self._names}
        return QuantizedTensor.from_tensors(tensors, self.scheme, (self.out_features, self.in_features))

    def dense_weight(self) -> Tensor:
        """The dequantized weight [out, in], fp32."""
        return self.qtensor.dequantize(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in] -> [..., out] in the dtype of `x`, or autocast's."""
        dtype = compute_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        tensors = [self._kept(name) for name in self._names]
        shape = (self.out_features, self.in_features)
        if torch.compiler.is_compiling():
            names = ",".join(self._names)
            by_kernels = not torch.is_grad_enabled()
            return quant_linear(x.to(dtype), bias, tensors, names, self.scheme.name, *shape, by_kernels)
        if not torch.is_grad_enabled():
            parts = dict(zip(self._names, tensors, strict=True))
            if (y := accelerated.product(x.to(dtype), self.scheme, shape, parts, bias)) is not None:
                return y
        return _QuantizedMatmul.apply(x.to(dtype), bias, self.scheme, shape, self._names, *tensors)

    def extra_repr(self) -> str:
        """Shape, scheme and bias, for printing."""
        return extra_repr(self, scheme=self.scheme.name, bias=self.bias is not None)

    def _kept(self, name: str) -> Tensor:
        tensor = self._parameters.get(name, self._buffers.get(name))
        assert tensor is not None
        return tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:  # noqa: FBT001, FBT002
        # nn.Module casts every floating-point tensor in `.to(dtype)` and `.half()`: a scale would lose bits that the
        # file holds. So the weight's tensors are taken out of its sight and only moved.
        with held_back(self, self._names, fn):
            super()._apply(fn, recurse)
        return self

"""`Int8Linear` and `OutlierInt8Linear`: int8 weights times int8 activations, summed as integers.

    Int8Linear          y[t, o] = a[t] * w[o] * sum over i of (X[t, i] - z[t]) * C[o, i]  + bias[o]
    OutlierInt8Linear   the same over the columns i without outliers, plus x[t, i] * w[o] * C[o, i] over the others

C are the weight's codes and w its scales, one per output (or one in all); X, a and z the codes, scale and zero point of
the activations, found per token while the model runs, or one scale fixed by calibration (`numerics.activations`).
Products are summed in int32 and are exact on every machine (`numerics.int8_matmul`); the sum is then multiplied by a,
by w, and the bias added, in float32, and rounded once to the activation's dtype (or autocast's).

The gradient of the input passes straight through the rounding: dL/dx = dL/dy @ dequantize(C, w). The weight has none.

LLM.int8's outliers are columns, chosen over all tokens of a call: what a token becomes can depend on the others that
are computed with it (as in bitsandbytes). `Int8Linear` treats every token on its own.

Source: Dettmers and others, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale" (2022), section 3. The
outlier columns are multiplied with the dequantized weight, since the 16-bit one is not kept (as bitsandbytes does).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from strop.errors import FormatError
from strop.layers.base import compute_dtype, extra_repr, held_back
from strop.numerics.activations import (
    ActivationRange,
    tensor_codes,
    token_codes,
    token_codes_asymmetric,
    vector_codes,
)
from strop.numerics.int8_matmul import MOST_INPUTS, int8_matmul
from strop.numerics.qtensor import QuantizedTensor

_HELD = ("codes", "scale", "activation_scale")


class _StraightThrough(torch.autograd.Function):
    """x -> layer.product(x); backward as if nothing had been rounded but the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Int8Layer) -> Tensor:
        ctx.layer = layer
        with torch.autocast(x.device.type, enabled=False):
            return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.layer.dense_weight().to(grad.dtype), None


class _Int8Layer(nn.Module):
    """What both layers share: the weight's codes and scales, how they are kept and printed, and the gradient.

    Subclasses multiply: `_multiplied`, tokens [tokens, in] -> [tokens, out], float32, without the bias.

    Args:
        qtensor: the weight, of a scheme with 8-bit activations.
        bias: [out] or None; a frozen parameter, cast with the model.

    Raises:
        FormatError: the scheme is another, or the layer has too many inputs.
    """

    def __init__(self, qtensor: QuantizedTensor, bias: Tensor | None) -> None:
        super().__init__()
        scheme = qtensor.scheme
        if scheme.activations is None:
            raise FormatError(f"{scheme}: leaves activations as they are; int8-a8 rounds them to int8")
        if qtensor.shape[1] > MOST_INPUTS:
            raise FormatError(
                f"{scheme}: the layer has {qtensor.shape[1]} inputs, and sums of int8 products fit 32 bits up to "
                f"{MOST_INPUTS}; use int8, which leaves the activations as they are"
            )
        self.scheme, self.activations = scheme, scheme.activations
        self.out_features, self.in_features = qtensor.shape
        assert qtensor.scale is not None  # schemes with 8-bit activations nest no scales
        self.codes = _frozen((qtensor.codes ^ 0x80).view(torch.int8))  # int8 [out, in]
        self.scale = _frozen(qtensor.scale)
        self.activation_scale = None if qtensor.activation_scale is None else _frozen(qtensor.activation_scale)
        self.bias = None if bias is None else _frozen(bias)

    @property
    def qtensor(self) -> QuantizedTensor:
        """The weight as it is stored; its codes are a copy."""
        codes = self.codes.detach().view(torch.uint8) ^ 0x80  # q as its bits to q + 128
        shape = (self.out_features, self.in_features)
        fixed = None if self.activation_scale is None else self.activation_scale.detach()
        return QuantizedTensor(codes, self.scale.detach(), None, self.scheme, shape, activation_scale=fixed)

    def product(self, x: Tensor) -> Tensor:
        """The formula at the head of the module, [..., in] -> [..., out], in the dtype of `x`."""
        y = self._multiplied(x.reshape(-1, self.in_features))
        if self.bias is not None:
            y += self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    @abstractmethod
    def _multiplied(self, tokens: Tensor) -> Tensor: ...

    def dense_weight(self) -> Tensor:
        """The dequantized weight [out, in], fp32."""
        return self.codes.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in] -> [..., out] in the dtype of `x`, or autocast's."""
        return _StraightThrough.apply(x, self).to(compute_dtype(x))

    def extra_repr(self) -> str:
        """Shape, scheme and bias, for printing."""
        return extra_repr(self, scheme=self.scheme.name, bias=self.bias is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Int8Layer:  # noqa: FBT001, FBT002
        # Scales keep the bits that the file holds, whatever the model is cast to (as in QuantLinear).
        with held_back(self, _HELD, fn):
            super()._apply(fn, recurse)
        return self


class Int8Linear(_Int8Layer):
    """A linear layer that multiplies int8 activations by int8 weights.

    Args:
        qtensor: the weight, of a scheme with 8-bit activations and no outlier threshold; with `-a8-static` it carries
            the activations' scale.
        bias: [out] or None; a frozen parameter, cast with the model.

    Raises:
        FormatError: the scheme is another, the static scale is missing, or the layer has too many inputs.
    """

    def __init__(self, qtensor: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__(qtensor, bias)
        if self.activations.threshold is not None:
            raise FormatError(f"{qtensor.scheme}: an OutlierInt8Linear splits outliers off, an Int8Linear does not")
        if self.activations.is_static and qtensor.activation_scale is None:
            raise FormatError(
                f"{qtensor.scheme}: the scale of the activations is fixed by calibration, and there is none; "
                "quantize with data (strop quantize --data), or use int8-a8, which finds it while it runs"
            )

    def _multiplied(self, tokens: Tensor) -> Tensor:
        if self.activations.range is ActivationRange.TOKEN_ASYMMETRIC:
            codes, scale, zero_point = token_codes_asymmetric(tokens)
            sums = int8_matmul(codes, self.codes) - zero_point * self.codes.sum(dim=1, dtype=torch.int32)
        else:
            codes, scale = (
                token_codes(tokens) if self.activation_scale is None else tensor_codes(tokens, self.activation_scale)
            )
            sums = int8_matmul(codes, self.codes)
        return sums.float().mul_(scale).mul_(self.scale.view(1, -1))


class OutlierInt8Linear(_Int8Layer):
    """An `Int8Linear` that computes columns with outliers in floating point (LLM.int8).

    Args:
        qtensor: the weight, of a scheme with an outlier threshold (`int8-a8-over6`).
        bias: [out] or None; a frozen parameter, cast with the model.

    Raises:
        FormatError: the scheme is another, or the layer has too many inputs.
    """

    def __init__(self, qtensor: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__(qtensor, bias)
        if self.activations.threshold is None:
            raise FormatError(f"{qtensor.scheme}: names no outlier threshold; int8-a8-over6 does")
        self.threshold = self.activations.threshold

    def _multiplied(self, tokens: Tensor) -> Tensor:
        codes, scale, outliers = vector_codes(tokens, self.threshold)
        y = int8_matmul(codes, self.codes).float().mul_(scale).mul_(self.scale.view(1, -1))
        if outliers.numel():
            weight = self.codes[:, outliers].float() * self.scale  # [out, outliers]
            y += tokens[:, outliers].float() @ weight.T
        return y


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)

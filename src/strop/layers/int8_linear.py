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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from strop.errors import FormatError
from strop.layers.base import compute_dtype, extra_repr, held_back
from strop.numerics.activations import (
    ActivationRange,
    Activations,
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
    def forward(ctx: Any, x: Tensor, layer: Int8Linear | OutlierInt8Linear) -> Tensor:
        ctx.layer = layer
        with torch.autocast(x.device.type, enabled=False):
            return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.layer.dense_weight().to(grad.dtype), None


class Int8Linear(nn.Module):
    """A linear layer that multiplies int8 activations by int8 weights.

    Args:
        qtensor: the weight, of a scheme with 8-bit activations and no outlier threshold; with `-a8-static` it carries
            the activations' scale.
        bias: [out] or None; a frozen parameter, cast with the model.

    Raises:
        FormatError: the scheme is another, the static scale is missing, or the layer has too many inputs.
    """

    def __init__(self, qtensor: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        activations = _checked(qtensor)
        if activations.threshold is not None:
            raise FormatError(f"{qtensor.scheme}: an OutlierInt8Linear splits outliers off, an Int8Linear does not")
        self.out_features, self.in_features = qtensor.shape
        self.scheme, self.activations = qtensor.scheme, activations
        self.codes, self.scale = _parameters(qtensor)
        self.activation_scale = None
        if activations.is_static:
            if qtensor.activation_scale is None:
                raise FormatError(
                    f"{qtensor.scheme}: the scale of the activations is fixed by calibration, and there is none; "
                    "quantize with data (strop quantize --data), or use int8-a8, which finds it while it runs"
                )
            self.activation_scale = _frozen(qtensor.activation_scale)
        self.bias = None if bias is None else _frozen(bias)

    @property
    def qtensor(self) -> QuantizedTensor:
        """The weight as it is stored; its codes are a copy."""
        scale = None if self.activation_scale is None else self.activation_scale.detach()
        return _qtensor(self, scale)

    def dense_weight(self) -> Tensor:
        """The dequantized weight [out, in], fp32."""
        return self.codes.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in] -> [..., out] in the dtype of `x`, or autocast's."""
        return _StraightThrough.apply(x, self).to(compute_dtype(x))

    def product(self, x: Tensor) -> Tensor:
        """The formula at the head of the module, [..., in] -> [..., out], in the dtype of `x`."""
        tokens = x.reshape(-1, self.in_features)  # [..., in] -> [tokens, in]
        if self.activations.range is ActivationRange.TOKEN_ASYMMETRIC:
            codes, scale, zero_point = token_codes_asymmetric(tokens)
            sums = int8_matmul(codes, self.codes) - zero_point * self.codes.sum(dim=1, dtype=torch.int32)
        else:
            codes, scale = (
                token_codes(tokens) if self.activation_scale is None else tensor_codes(tokens, self.activation_scale)
            )
            sums = int8_matmul(codes, self.codes)
        y = sums.float().mul_(scale).mul_(self.scale.view(1, -1))  # [tokens, out]
        if self.bias is not None:
            y += self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape, scheme and bias, for printing."""
        return extra_repr(self, scheme=self.scheme.name, bias=self.bias is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:  # noqa: FBT001, FBT002
        # Scales keep the bits that the file holds, whatever the model is cast to (as in QuantLinear).
        with held_back(self, _HELD, fn):
            super()._apply(fn, recurse)
        return self


class OutlierInt8Linear(nn.Module):
    """An `Int8Linear` that computes columns with outliers in floating point (LLM.int8).

    Args:
        qtensor: the weight, of a scheme with an outlier threshold (`int8-a8-over6`).
        bias: [out] or None; a frozen parameter, cast with the model.

    Raises:
        FormatError: the scheme is another, or the layer has too many inputs.
    """

    def __init__(self, qtensor: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        activations = _checked(qtensor)
        if activations.threshold is None:
            raise FormatError(f"{qtensor.scheme}: names no outlier threshold; int8-a8-over6 does")
        self.out_features, self.in_features = qtensor.shape
        self.scheme, self.threshold = qtensor.scheme, activations.threshold
        self.codes, self.scale = _parameters(qtensor)
        self.bias = None if bias is None else _frozen(bias)

    @property
    def qtensor(self) -> QuantizedTensor:
        """The weight as it is stored; its codes are a copy."""
        return _qtensor(self, None)

    def dense_weight(self) -> Tensor:
        """The dequantized weight [out, in], fp32."""
        return self.codes.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in] -> [..., out] in the dtype of `x`, or autocast's."""
        return _StraightThrough.apply(x, self).to(compute_dtype(x))

    def product(self, x: Tensor) -> Tensor:
        """The formula at the head of the module, [..., in] -> [..., out], in the dtype of `x`."""
        tokens = x.reshape(-1, self.in_features)  # [..., in] -> [tokens, in]
        codes, scale, outliers = vector_codes(tokens, self.threshold)
        y = int8_matmul(codes, self.codes).float().mul_(scale).mul_(self.scale.view(1, -1))  # [tokens, out]
        if outliers.numel():
            weight = self.codes[:, outliers].float() * self.scale  # [out, outliers]
            y += tokens[:, outliers].float() @ weight.T
        if self.bias is not None:
            y += self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape, scheme and bias, for printing."""
        return extra_repr(self, scheme=self.scheme.name, bias=self.bias is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OutlierInt8Linear:  # noqa: FBT001, FBT002
        with held_back(self, _HELD, fn):
            super()._apply(fn, recurse)
        return self


def _checked(qtensor: QuantizedTensor) -> Activations:
    scheme = qtensor.scheme
    if scheme.activations is None:
        raise FormatError(f"{scheme}: leaves activations as they are; int8-a8 rounds them to int8")
    if qtensor.shape[1] > MOST_INPUTS:
        raise FormatError(
            f"{scheme}: the layer has {qtensor.shape[1]} inputs, and sums of int8 products fit 32 bits up to "
            f"{MOST_INPUTS}; use int8, which leaves the activations as they are"
        )
    return scheme.activations


def _parameters(qtensor: QuantizedTensor) -> tuple[nn.Parameter, nn.Parameter]:
    """Codes as int8 [out, in], scales as they are stored."""
    assert qtensor.scale is not None  # schemes with 8-bit activations nest no scales
    return _frozen((qtensor.codes ^ 0x80).view(torch.int8)), _frozen(qtensor.scale)


def _qtensor(layer: Int8Linear | OutlierInt8Linear, activation_scale: Tensor | None) -> QuantizedTensor:
    codes = layer.codes.detach().view(torch.uint8) ^ 0x80  # q as its bits to q + 128
    shape = (layer.out_features, layer.in_features)
    return QuantizedTensor(codes, layer.scale.detach(), None, layer.scheme, shape, activation_scale=activation_scale)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)

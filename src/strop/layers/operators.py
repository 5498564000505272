"""What `QuantLinear` computes as operators of `torch.library`, so that torch.compile sees two ordinary ones.

    strop::quant_linear   x, bias, (codes, scale, ...) -> x @ W^T + bias, with a gradient for x and bias
    strop::dequantize     (codes, scale, ...) -> W [out, in], which the gradient of x is made with

A graph that calls them keeps the codes, and makes a dense weight where an eager layer does: during the product, and
once more in its backward pass, with the same numbers. Eager layers do without them, for an operator's dispatch takes
longer than the rest of a token's call.

An operator takes tensors and plain values, so that a scheme travels by name and the parts of a weight as a list with
their names, joined by commas.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from strop.numerics import accelerated
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import parse_scheme

_scheme = functools.lru_cache(maxsize=256)(parse_scheme)


@torch.library.custom_op(
    "strop::dequantize",
    mutates_args=(),
    schema="(Tensor[] parts, str names, str scheme, int rows, int columns, ScalarType dtype) -> Tensor",
)
def dequantize(parts: list[Tensor], names: str, scheme: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The values of a quantized weight, [rows, columns], in `dtype`."""
    named = dict(zip(names.split(","), parts, strict=True))
    return QuantizedTensor.from_tensors(named, _scheme(scheme), (rows, columns)).dequantize(dtype)


@dequantize.register_fake
def _(parts: list[Tensor], names: str, scheme: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty((rows, columns), dtype=dtype)


@torch.library.custom_op(
    "strop::quant_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor? bias, Tensor[] parts, str names, str scheme, int rows, int columns, bool by_kernels)"
    " -> Tensor",
)
def quant_linear(
    x: Tensor,
    bias: Tensor | None,
    parts: list[Tensor],
    names: str,
    scheme: str,
    rows: int,
    columns: int,
    by_kernels: bool,  # noqa: FBT001
) -> Tensor:
    """X [..., columns] times a quantized weight transposed, plus a bias: [..., rows] in the dtype of x.

    Args:
        x: The activations.
        bias: [rows] in the dtype of x, or None.
        parts: The weight's tensors, as `QuantizedTensor.tensors` gives them.
        names: Their names, joined by commas.
        scheme: The scheme's name.
        rows: Outputs.
        columns: Inputs.
        by_kernels: Whether a few rows of x are multiplied with the codes as they lie, in float32, where there are
            native kernels, as `QuantLinear` does while gradients are off.
    """
    named, shape = dict(zip(names.split(","), parts, strict=True)), (rows, columns)
    if by_kernels and (y := accelerated.product(x, _scheme(scheme), shape, named, bias)) is not None:
        return y
    weight = QuantizedTensor.from_tensors(named, _scheme(scheme), shape).dequantize(x.dtype)
    return functional.linear(x, weight, bias)


@quant_linear.register_fake
def _(x: Tensor, bias: Tensor | None, parts: list[Tensor], names: str, scheme: str, rows: int, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, parts, *ctx.weight, _ = inputs
    ctx.save_for_backward(*parts)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = dequantize(list(ctx.saved_tensors), *ctx.weight, grad.dtype)
        grad_x = grad @ weight  # [..., out] @ [out, in] -> [..., in]
    if ctx.needs_input_grad[1]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return (grad_x, grad_bias, [None] * len(ctx.saved_tensors), None, None, None, None, None)


quant_linear.register_autograd(_gradients, setup_context=_keep)

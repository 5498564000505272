"""What a quantization method is given and returns, and the error by which methods are compared.

    Method       one weight:   (weight, scheme, statistics of its inputs) -> QuantizedTensor
    BlockMethod  one block:    (block over its calibration inputs, a scheme for each weight) -> BlockResult

A method of the second kind looks at a whole block of the model (attention and feed-forward together): it may run it
with other weights in place of its own, compare the output with what the block gave in full precision, and change
parameters beside the weights (a norm whose gain takes up a scale). Neither kind knows modules or models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from strop.errors import DataError
from strop.numerics.groups import row_chunks
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme


@dataclass(frozen=True, eq=False)
class Statistics:
    """What calibration saw of a linear layer's inputs x [tokens, in].

    Attributes:
        mean_square: Mean of each input feature's square, float32 [in].
        rows: Number of input rows (tokens) behind the means.
        mean_abs: Mean of each feature's magnitude, float32 [in]; None where it was not gathered.
        largest: Largest magnitude of each feature, float32 [in]; None where it was not gathered.
        hessian: Mean of x^T x, float32 [in, in], the second moments that GPTQ needs (its factor 2 left out, which
            changes no result); None where it was not gathered.
        drift: Mean of (x' - x)^T x, float32 [in, in], x' what the same tokens are in the full-precision model: how far
            the quantization of what comes before has moved the inputs; None where it was not gathered.
    """

    mean_square: Tensor
    rows: int
    mean_abs: Tensor | None = None
    largest: Tensor | None = None
    hessian: Tensor | None = None
    drift: Tensor | None = None


class Method(Protocol):
    """Round a weight [out, in] to a scheme's grid, with statistics of the layer's inputs or without."""

    def __call__(
        self, weight: Tensor, scheme: Scheme, statistics: Statistics | None = None, /, *, where: str = "weight"
    ) -> QuantizedTensor:
        """Quantize; `where` is the weight's name, for messages."""
        ...


class Block(Protocol):
    """One repeated block of a model over its calibration inputs, batch by batch.

    Batches are numbered from 0. Every output is that of the real tokens alone, [tokens, hidden] float32: padding is
    left out. Names are the full names of layers (`model.layers.0.mlp.up_proj`) and of other parameters
    (`model.layers.0.input_layernorm.weight`).

    Attributes:
        name: The block's own full name, `model.layers.0`.
        weights: The dense weights to quantize by layer, float32 [out, in], in the order in which the block uses them.
        shared: Layers that receive the very same input tensor (q, k and v), as tuples in the order of use; every layer
            stands in exactly one.
        others: Every other floating-point parameter of the block (norm gains, biases) by its full name.
        batches: Number of batches.
    """

    name: str
    weights: Mapping[str, Tensor]
    shared: Sequence[tuple[str, ...]]
    others: Mapping[str, Tensor]
    batches: int

    def target(self, batch: int) -> Tensor:
        """What the block gave in full precision for the inputs of the full-precision model."""
        ...

    def run(self, batch: int, changed: Mapping[str, Tensor]) -> Tensor:
        """The block's output for this batch, with `changed` in place of its own; gradients reach `changed`.

        Args:
            batch: Its number; the inputs are those that the quantized blocks before this one give.
            changed: Weights [out, in] by layer and other parameters by name; what is not named stays as it is.
        """
        ...

    def statistics(
        self, layers: Sequence[str], changed: Mapping[str, Tensor], *, hessian: bool = False, drift: bool = False
    ) -> dict[str, Statistics]:
        """Statistics of the inputs of `layers` over all batches, with `changed` in place; unreached layers are out.

        Second moments (`hessian`) and the drift are gathered where they are asked for; the latter not of experts, whose
        tokens the router may choose differently in full precision, nor where its inputs were not kept; once a layer:
        they are let go on the way.

        Layers of one tuple of `shared` get the same object. The block is not run past the last of `layers`.
        """
        ...

    def stages(self, *, hessian: bool) -> Sequence[tuple[str, ...]]:
        """Layers that are measured in one pass, in the order of use: one tuple of `shared`, or experts of a parameter.

        Args:
            hessian: Whether second moments are gathered, of which memory bounds how many there are at a time.
        """
        ...

    def is_expert(self, layer: str) -> bool:
        """Whether a layer is an expert of a mixture, that sees only the tokens which the router gives it."""
        ...

    def let_go(self) -> None:
        """Free what was kept of earlier passes: later ones run the whole block, to the same bits, and have no drift."""
        ...

    def inputs(self, layer: str, changed: Mapping[str, Tensor], *, most: int) -> Tensor:
        """At most `most` rows of a layer's inputs, float32 [rows, in], spread evenly over all batches."""
        ...


@dataclass(frozen=True, eq=False)
class BlockResult:
    """What a method made of a block.

    Attributes:
        weights: The quantized weight of every layer that it was given a scheme for.
        others: Parameters beside the weights that changed, by full name.
        notes: What a user should know, a sentence each.
        tokens: Of the experts of a mixture: how many calibration tokens the router gave each. Methods leave it empty.
    """

    weights: Mapping[str, QuantizedTensor]
    others: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    notes: Sequence[str] = ()
    tokens: Mapping[str, int] = field(default_factory=dict[str, int])


class BlockMethod(Protocol):
    """Quantize the weights of a block together."""

    def __call__(
        self,
        block: Block,
        schemes: Mapping[str, Scheme],
        /,
        *,
        seed: int = 0,
        step: Callable[[str], None] = lambda _: None,
    ) -> BlockResult:
        """Quantize every weight that `schemes` names; `seed` decides every draw, `step` is told what is being done."""
        ...


def weighted_error(weight: Tensor, quantized: QuantizedTensor, statistics: Statistics | None = None) -> float:
    """Mean over the weight [out, in] of mean_square[in] * (weight - quantized)^2, in float64.

    Without statistics every mean square is 1. With them this is, up to the number of inputs, the expected squared error
    of an output whose inputs are uncorrelated.
    """
    rows, columns = weight.shape
    importance = None if statistics is None else check_statistics(statistics, weight).double()
    restored = quantized.dequantize()
    total = 0.0
    for part in row_chunks(rows, columns):
        square = (weight[part].double() - restored[part].double()).square_()
        total += (square.sum() if importance is None else (square @ importance).sum()).item()
    return total / (rows * columns)


def output_error(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> float:
    """Mean over the outputs of the squared error that rounding leaves: trace(D H D^T) / out, D = weight - quantized.

    Args:
        weight: [out, in].
        quantized: What it was rounded to.
        hessian: Mean of x^T x over the inputs, [in, in].

    Returns:
        Computed in float64, a bounded piece of rows at a time.
    """
    rows, columns = weight.shape
    restored, moments = quantized.dequantize(), hessian.double()
    total = 0.0
    for part in row_chunks(rows, columns):
        error = weight[part].double() - restored[part].double()
        total += ((error @ moments) * error).sum().item()
    return total / rows


def check_statistics(statistics: Statistics, weight: Tensor, *, where: str = "weight") -> Tensor:
    """The mean squares, float32 [in], on the device of the weight [out, in] that they belong to.

    Raises:
        DataError: They are of another layer's width, not finite, or negative.
    """
    mean_square, columns = statistics.mean_square, weight.shape[1]
    if tuple(mean_square.shape) != (columns,):
        raise DataError(f"{where}: statistics of {list(mean_square.shape)} inputs for a weight with {columns}")
    if not torch.isfinite(mean_square).all() or (mean_square < 0).any():
        raise DataError(
            f"{where}: mean squares of the inputs must be finite and not negative; calibrate on finite activations"
        )
    return mean_square.to(device=weight.device, dtype=torch.float32)

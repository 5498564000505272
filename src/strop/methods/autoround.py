"""AutoRound: each weight's rounding and each group's clipping, by signed gradient descent on a block's output.

"Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", Cheng and others, 2023 (arXiv
2309.05516):

    W~ = s * clip(round(W / s + V), n, m)        V in [-0.5, 0.5] for each weight
    s = (max(W) * beta - min(W) * alpha) / (2^b - 1)        alpha, beta for each group
    V, alpha, beta  <-  their value - rate * sign(gradient of the block's mean squared output error)

with a rate that falls linearly from 1 / iterations to 0: no offset can travel further than about 0.5. Deviations:

- min(W) and max(W) are those of searched rounding's range, which may be wider or narrower than the group's own, so the
  factors may pass 1 (0.5 to 1.5). Grids without a zero point have one range and one factor.
- The best is that of ten measurements on a fixed selection of batches, not of the noisy errors of single batches.
- In formats other than integers, V is in units of the distance between the two values around each weight.

A step looks at one of the block's batches: the caller decides how many rows that is (the paper: 8 rows of 2048 tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from strop.methods.base import Block, BlockResult
from strop.methods.reconstruction import evenly, searched_start, train
from strop.methods.rounding import round_through, settled, steps_between, stored_scale, whole
from strop.numerics.formats import IntFormat
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme

ITERATIONS = 200
LONG = 1000
"""Iterations from which the rate doubles for formats of at most 3 bits."""

_FACTORS = (0.5, 1.5)
_MEASURED = 8  # batches


def autoround(
    block: Block,
    schemes: Mapping[str, Scheme],
    /,
    *,
    iterations: int = ITERATIONS,
    rate: float | None = None,
    seed: int = 0,
    step: Callable[[str], None] = lambda _: None,
) -> BlockResult:
    """Quantize a block's weights with trained rounding.

    Args:
        block: The block over its calibration inputs.
        schemes: A scheme for each layer to quantize.
        iterations: Steps of training, a batch each; 0 gives searched rounding.
        rate: How far a step moves V and the clipping factors at first, None for 1 / iterations (2 / iterations for
            layers of at most 3 bits from 1,000 iterations on).
        seed: Decides the order of the batches.
        step: Told what is being done.

    Returns:
        Never worse than searched rounding by the block's error on the batches that measure (at most 8, evenly spread).
        Layers that no token reached are searched without data, and a note says so.

    Raises:
        DataError: The calibration inputs or the block's output are not finite.
        FormatError: A weight does not fit its scheme, or is not finite.
    """
    start = searched_start(block, schemes)
    layers = {
        layer: _Rounding(layer, block.weights[layer], schemes[layer], start.weights[layer]) for layer in start.reached
    }
    if not layers or not iterations:
        return BlockResult(start.weights, notes=start.notes)
    rates = {layer: rate if rate is not None else _rate(schemes[layer], iterations) for layer in layers}

    def update(iteration: int) -> None:
        for layer, part in layers.items():
            part.descend(rates[layer] * (1 - iteration / iterations))

    everything = range(block.batches)
    weights = train(
        block,
        layers,
        start,
        batches=everything,
        measured=evenly(everything, _MEASURED),
        iterations=iterations,
        update=update,
        seed=seed,
        say=lambda text: step(f"{block.name}: AutoRound {text}"),
    )
    return BlockResult(weights, notes=start.notes)


def _rate(scheme: Scheme, iterations: int) -> float:
    return (2.0 if scheme.bits <= 3 and iterations >= LONG else 1.0) / iterations


class _Rounding:
    """A weight's offsets V and its groups' clipping factors, from 0 and 1, where they give searched rounding."""

    def __init__(self, name: str, weight: Tensor, scheme: Scheme, start: QuantizedTensor) -> None:
        self.name, self.weight, self.scheme = name, weight, scheme
        self.scale = start.scales() if start.scale is None else start.scale.float()
        self.offset = torch.zeros_like(weight).requires_grad_()
        self.unit = steps_between(weight, scheme, self.scale)
        self.low: Tensor | None = None
        if start.zero_point is not None:
            self.low = start.zero_point.float() * self.scale  # below zero, as a positive number
        sides = 1 if self.low is None else 2
        self.factors = [torch.ones_like(self.scale).requires_grad_() for _ in range(sides)]

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point for the factors as they are."""
        if self.low is None:
            return stored_scale(self.scale * self.factors[0], self.scheme), None
        assert isinstance(self.scheme.format, IntFormat)
        steps = self.scheme.format.steps
        low = self.low * self.factors[0]
        high = (steps * self.scale - self.low) * self.factors[1]
        scale = stored_scale((low + high) / steps, self.scheme)
        return scale, whole(low / scale, 0, steps)

    def rounded(self) -> Tensor:
        scale, zero_point = self.grid()
        return round_through(self.weight, self.scheme, scale, zero_point, self._offset())

    @torch.no_grad()
    def settled(self) -> QuantizedTensor:
        scale, zero_point = self.grid()
        return settled(self.weight, self.scheme, scale, zero_point, self._offset(), where=self.name)

    @torch.no_grad()
    def descend(self, rate: float) -> None:
        """One step against the sign of the gradients, which are cleared."""
        for tensor, (lowest, highest) in [(self.offset, (-0.5, 0.5)), *((factor, _FACTORS) for factor in self.factors)]:
            if tensor.grad is not None:
                tensor.add_(tensor.grad.sign_(), alpha=-rate).clamp_(lowest, highest)
                tensor.grad = None

    def _offset(self) -> Tensor:
        return self.offset if self.unit is None else self.offset * self.unit

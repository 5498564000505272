"""AutoRound: each weight's rounding and each group's clipping, by signed gradient descent on a block's output.

"Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", Cheng and others, 2023 (arXiv
2309.05516):

    W~ = s * clip(round(W / s + V), n, m)        V for each weight
    s = (max(W) * beta - min(W) * alpha) / (2^b - 1)        alpha, beta for each group
    V, alpha, beta  <-  their value - rate * sign(gradient of the block's mean squared output error)

with a rate that falls linearly from 1 / iterations to 0: no offset can travel further than about 0.5. Deviations:

- It starts from what GPTQ makes of the block, layer after layer, not from rounding to nearest: V is 0 where GPTQ takes
  the nearest value, and elsewhere such that W / s + V lies beyond the threshold as far as W / s lies before it. (The
  paper keeps V within 0.5 of zero; here nothing but the rate bounds it.)
- min(W) and max(W) are those of the range that GPTQ's scale has, which may be wider or narrower than the group's own,
  so the factors may pass 1 (0.5 to 1.5). Grids without a zero point have one range and one factor.
- The best is that of ten measurements on batches that train nothing (one in eight; with fewer than four batches, all
  train and all measure), not of the noisy errors of single batches.
- In formats other than integers, V is in units of the distance between the two values around each weight.

A step looks at one of the block's batches: the caller decides how many rows that is (the paper: 8 rows of 2048 tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from strop.methods.base import Block, BlockResult
from strop.methods.reconstruction import gptq_start, held_out, train
from strop.methods.rounding import round_through, settled, steps_between, stored_scale, whole
from strop.numerics.formats import IntFormat
from strop.numerics.groups import restore, split, spread
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme

ITERATIONS = 200
LONG = 1000
"""Iterations from which the rate doubles for formats of at most 3 bits."""

_FACTORS = (0.5, 1.5)


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
        iterations: Steps of training, a batch each; 0 gives GPTQ.
        rate: How far a step moves V and the clipping factors at first, None for 1 / iterations (2 / iterations for
            layers of at most 3 bits from 1,000 iterations on).
        seed: Decides the order of the batches.
        step: Told what is being done.

    Returns:
        Never worse than GPTQ or searched rounding by the block's error on the batches that measure.
        Layers that no token reached are searched without data, and a note says so.

    Raises:
        DataError: The calibration inputs or the block's output are not finite.
        FormatError: A weight does not fit its scheme, or is not finite.
    """
    notes: list[str] = []
    batches, measured = held_out(block, notes)
    start = gptq_start(block, schemes, measured)
    notes += start.notes
    layers = {
        layer: Rounding(layer, block.weights[layer], schemes[layer], start.weights[layer]) for layer in start.reached
    }
    if not layers or not iterations:
        return BlockResult(start.weights, notes=notes)
    rates = {layer: rate if rate is not None else _rate(schemes[layer], iterations) for layer in layers}

    def update(iteration: int) -> None:
        for layer, part in layers.items():
            part.descend(rates[layer] * (1 - iteration / iterations))

    weights = train(
        block,
        layers,
        start,
        batches=batches,
        measured=measured,
        iterations=iterations,
        update=update,
        seed=seed,
        say=lambda text: step(f"{block.name}: AutoRound {text}"),
    )
    return BlockResult(weights, notes=notes)


def _rate(scheme: Scheme, iterations: int) -> float:
    return (2.0 if scheme.bits <= 3 and iterations >= LONG else 1.0) / iterations


class Rounding:
    """A weight's offsets V and its groups' clipping factors, from 0 and 1, where they give searched rounding."""

    def __init__(self, name: str, weight: Tensor, scheme: Scheme, start: QuantizedTensor) -> None:
        self.name, self.weight, self.scheme = name, weight, scheme
        self.scale = start.scales() if start.scale is None else start.scale.float()
        self.unit = steps_between(weight, scheme, self.scale)
        self.low: Tensor | None = None
        if start.zero_point is not None:
            self.low = start.zero_point.float() * self.scale  # below zero, as a positive number
        sides = 1 if self.low is None else 2
        self.factors = [torch.ones_like(self.scale).requires_grad_() for _ in range(sides)]
        self.offset = self._offset_of(start).requires_grad_()

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
        """The weight as the grid has it, with gradients to the offsets and the factors."""
        scale, zero_point = self.grid()
        return round_through(self.weight, self.scheme, scale, zero_point, self._offset())

    @torch.no_grad()
    def settled(self) -> QuantizedTensor:
        """What is stored for it."""
        scale, zero_point = self.grid()
        return settled(self.weight, self.scheme, scale, zero_point, self._offset(), where=self.name)

    @torch.no_grad()
    def descend(self, rate: float) -> None:
        """One step against the sign of the gradients, which are cleared."""
        for tensor in (self.offset, *self.factors):
            if tensor.grad is not None:
                tensor.add_(tensor.grad.sign_(), alpha=-rate)
                tensor.grad = None
        for factor in self.factors:
            factor.clamp_(*_FACTORS)

    @torch.no_grad()
    def _offset_of(self, start: QuantizedTensor) -> Tensor:
        """Offsets under which the weight rounds to what it starts from: 0 where that is the nearest value anyway.

        Elsewhere the place of the weight is mirrored in the threshold between the two values, or, from further away,
        the value itself.
        """
        scale, zero_point = self.grid()
        nearest = settled(self.weight, self.scheme, scale, zero_point, where=self.name).dequantize()
        chosen = start.dequantize()
        size = spread(self.scale)
        distance = split(chosen - self.weight, self.scheme) / torch.where(size == 0, 1.0, size)
        distance = restore(distance, (self.weight.shape[0], self.weight.shape[1]))
        if self.unit is not None:
            distance /= self.unit
        beyond = distance.abs()
        offset = torch.minimum((2 * (beyond - 0.5)).clamp_(min=beyond - 0.49), beyond).copysign(distance)
        return torch.where(nearest == chosen, 0.0, offset)

    def _offset(self) -> Tensor:
        return self.offset if self.unit is None else self.offset * self.unit

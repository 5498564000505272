"""AutoRound: each weight's rounding and each group's clipping, by gradient descent on a block's output.

"Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", Cheng and others, 2023 (arXiv
2309.05516):

    W~ = s * clip(round(W / s + V), n, m)        V for each weight
    s = (max(W) * beta - min(W) * alpha) / (2^b - 1)        alpha, beta for each group
    V, alpha, beta  <-  descend the block's squared output error, at a rate that falls linearly to 0

Deviations, each with its gain in `benchmarks/LOG.md` (2026-11-25 and 2026-12-01):

- It starts from what GPTQ makes of the block, layer after layer, with what drift did to the inputs made up for, not
  from rounding to nearest: V is 0 where GPTQ takes the nearest value, and elsewhere such that W / s + V lies beyond the
  threshold as far as W / s lies before it. From there less of the paper's way is left to go: the rate is 0.001 (0.002
  at 3 bits and fewer), not 1 / iterations, and half of the paper's 200 steps do.
- The error of a token is taken relative to its length (`reconstruction.relative_errors`), not as it is.
- The paper steps by the sign of the gradient; here Adam steps by its running mean over its running magnitude, at most
  about the rate too. The sign moves weights that the error hardly depends on as far as any, and leaves GPTQ's optimum
  before it finds a better one. The clipping factors move at a tenth of the rate, and weights are not bound to the
  two values around them but by how far the rate can take them.
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
from strop.methods.reconstruction import gptq_start, held_out, relative_errors, train
from strop.methods.rounding import beside, round_through, settled, steps_between, stored_scale, whole
from strop.numerics.formats import IntFormat
from strop.numerics.groups import restore, split, spread
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme

ITERATIONS = 100
_RATE, _COARSE_RATE = 1e-3, 2e-3  # steps of the grid: above 3 bits, and at 3 bits and fewer
_FACTOR_SHARE = 0.1
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
        iterations: Steps of training, a batch each; 0 gives GPTQ, drift made up for.
        rate: How far the first step moves V at the most, in steps of the grid; None for 0.002 at 3 bits
            and fewer, else 0.001.
        seed: Decides the order of the batches.
        step: Told what is being done.

    Returns:
        Never worse than GPTQ or searched rounding by the block's relative error on the batches that measure.
        Layers that no token reached are searched without data, and a note says so.

    Raises:
        DataError: The calibration inputs or the block's output are not finite.
        FormatError: A weight does not fit its scheme, or is not finite.
    """
    notes: list[str] = []
    batches, measured = held_out(block, notes)
    start = gptq_start(block, schemes, measured, drift=True, errors=relative_errors)
    notes += start.notes
    layers = {
        layer: Rounding(layer, block.weights[layer], schemes[layer], start.weights[layer]) for layer in start.reached
    }
    if not layers or not iterations:
        return BlockResult(start.weights, notes=notes)
    groups = [group for part in layers.values() for group in part.groups(rate)]
    weights, _ = train(
        block,
        layers,
        start,
        groups,
        batches=batches,
        measured=measured,
        iterations=iterations,
        seed=seed,
        say=lambda text: step(f"{block.name}: AutoRound {text}"),
        errors=relative_errors,
    )
    return BlockResult(weights, notes=notes)


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
        moved = beside(weight, start, *self.grid(), where=name) - weight
        size = spread(self.scale)
        offset = restore(split(moved, scheme) / torch.where(size == 0, 1.0, size), (weight.shape[0], weight.shape[1]))
        self.offset = (offset if self.unit is None else offset / self.unit).detach().requires_grad_()

    def groups(self, rate: float | None) -> list[dict[str, object]]:
        """What the optimizer trains, each kind at its rate."""
        own = rate or (_COARSE_RATE if self.scheme.bits <= 3 else _RATE)
        return [{"params": [self.offset], "lr": own}, {"params": self.factors, "lr": own * _FACTOR_SHARE}]

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
    def keep_in_bounds(self) -> None:
        """No factor leaves its range."""
        for factor in self.factors:
            factor.clamp_(*_FACTORS)

    def _offset(self) -> Tensor:
        return self.offset if self.unit is None else self.offset * self.unit

"""Block-wise training: scales, zero points and the weights themselves, on a block's output, for 2 and 3 bits.

"EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", Chen and others, 2024 (arXiv
2407.11062), its block-wise training of all parameters: in

    w^ = s * (clamp(round(w / s) + round(z), 0, 2^b - 1) - round(z))

s, z, w and the gains of the block's norms learn together, from the first step, from the block's mean squared output
error, by Adam, the gradients passing straight through the rounding. (Scales and zero points first and weights later
left a third more error.) The paper's second phase, scales alone end to end, is a training of the whole model and not
part of this method. Deviations:

- It starts from what GPTQ makes of the block, not from the range of each group; a weight begins where it rounds to what
  GPTQ chose (`rounding.beside`).
- A scale learns as a multiple of its start, and a weight's learning rate is a share of the mean distance between values
  of its layer's grid, so that a step means as much in a small model as in a large one, and at 2 bits as at 3.
- The best of ten measurements on batches that train nothing is kept (one in eight; with fewer than four batches, all
  train and all measure), so that few calibration rows are not simply learnt by heart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from strop.methods.base import Block, BlockResult
from strop.methods.reconstruction import gptq_start, held_out, train
from strop.methods.rounding import beside, round_through, settled, steps_between, stored_scale, whole
from strop.numerics.formats import IntFormat
from strop.numerics.groups import split, spread
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme

ITERATIONS = 400
_SCALE_RATE = 1e-3  # of the start's scale
_WEIGHT_RATE = 3e-3  # of the mean distance between two values of the layer's grid
_ZERO_RATE = 1e-2  # steps of the grid
_GAIN_RATE = 1e-3  # of a norm's mean gain
_FACTORS = (0.05, 20.0)


def blockwise(
    block: Block,
    schemes: Mapping[str, Scheme],
    /,
    *,
    iterations: int = ITERATIONS,
    seed: int = 0,
    step: Callable[[str], None] = lambda _: None,
) -> BlockResult:
    """Quantize a block's weights by training scales, zero points and weights.

    Args:
        block: The block over its calibration inputs.
        schemes: A scheme for each layer to quantize.
        iterations: Steps of training, a batch each; 0 gives GPTQ.
        seed: Decides the order of the batches.
        step: Told what is being done.

    Returns:
        Never worse than GPTQ or searched rounding by the block's error on the batches that measure. Layers that no
        token reached are searched without data, and a note says so.

    Raises:
        DataError: The calibration inputs or the block's output are not finite.
        FormatError: A weight does not fit its scheme, or is not finite.
    """
    notes: list[str] = []
    batches, measured = held_out(block, notes)
    start = gptq_start(block, schemes, measured)
    notes += start.notes
    layers = {
        layer: _Weight(layer, block.weights[layer], schemes[layer], start.weights[layer]) for layer in start.reached
    }
    if not layers or not iterations:
        return BlockResult(start.weights, notes=notes)
    groups = [group for part in layers.values() for group in part.groups()]
    gains = {
        name: tensor.detach().float().clone().requires_grad_()
        for name, tensor in block.others.items()
        if tensor.ndim == 1 and tensor.any()
    }
    for gain in gains.values():
        groups.append({"params": [gain], "lr": _GAIN_RATE * float(gain.detach().abs().mean())})
    weights, changed = train(
        block,
        layers,
        start,
        groups,
        others=gains,
        batches=batches,
        measured=measured,
        iterations=iterations,
        seed=seed,
        say=lambda text: step(f"{block.name}: block-wise training {text}"),
    )
    return BlockResult(weights, changed, notes)


class _Weight:
    """A weight, its scales as multiples of the start's, and its zero points as real numbers."""

    def __init__(self, name: str, weight: Tensor, scheme: Scheme, start: QuantizedTensor) -> None:
        self.name, self.scheme = name, scheme
        self.scale = start.scales() if start.scale is None else start.scale.float()
        self.factor = torch.ones_like(self.scale).requires_grad_()
        self.zero_point: Tensor | None = None
        if start.zero_point is not None:
            self.zero_point = start.zero_point.float().requires_grad_()
        self.weight = beside(weight.detach(), start, *self.grid(), where=name).detach().requires_grad_()

    def groups(self) -> list[dict[str, object]]:
        """What the optimizer trains, each kind at its rate."""
        unit = steps_between(self.weight.detach(), self.scheme, self.scale)
        distance = self.scale.abs().mean() if unit is None else (split(unit, self.scheme) * spread(self.scale)).mean()
        found: list[dict[str, object]] = [
            {"params": [self.weight], "lr": _WEIGHT_RATE * float(distance)},
            {"params": [self.factor], "lr": _SCALE_RATE},
        ]
        if self.zero_point is not None:
            found.append({"params": [self.zero_point], "lr": _ZERO_RATE})
        return found

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point as they are stored."""
        scale = stored_scale(self.scale * self.factor, self.scheme)
        if self.zero_point is None:
            return scale, None
        return scale, whole(self.zero_point, 0, self._steps())

    def rounded(self) -> Tensor:
        return round_through(self.weight, self.scheme, *self.grid())

    @torch.no_grad()
    def settled(self) -> QuantizedTensor:
        return settled(self.weight, self.scheme, *self.grid(), where=self.name)

    @torch.no_grad()
    def keep_in_bounds(self) -> None:
        """No scale changes sign or vanishes, no zero point leaves the codes."""
        self.factor.clamp_(*_FACTORS)
        if self.zero_point is not None:
            self.zero_point.clamp_(0, self._steps())

    def _steps(self) -> int:
        assert isinstance(self.scheme.format, IntFormat)
        return self.scheme.format.steps

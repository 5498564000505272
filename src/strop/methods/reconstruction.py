"""What methods that train a block against its full-precision output share: where they start, and what they measure.

The error is that of the block's whole output: mean over batches' tokens and features of (quantized - full precision)^2,
the quantized block being fed what the quantized blocks before it give. A method keeps the best of what it measured, the
start among it, so that on the batches that measure it is never worse than searched rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from strop.errors import DataError
from strop.methods.base import Block
from strop.methods.search import search
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme

MEASUREMENTS = 10
"""How often a training looks at its error, the start left out."""


class Trainable(Protocol):
    """A layer's weight on a grid that is being trained."""

    def rounded(self) -> Tensor:
        """The weight [out, in] as the grid has it, with gradients to what is trained."""
        ...

    def settled(self) -> QuantizedTensor:
        """The quantized tensor that dequantizes to `rounded`, bit for bit."""
        ...


@dataclass(frozen=True, eq=False)
class Start:
    """Where training starts from.

    Attributes:
        weights: Searched rounding of every layer.
        reached: The layers that calibration reached, in the block's order: those that can be trained.
        notes: What a user should know.
    """

    weights: dict[str, QuantizedTensor]
    reached: tuple[str, ...]
    notes: list[str]


def searched_start(block: Block, schemes: Mapping[str, Scheme]) -> Start:
    """Round every weight with a searched scale, weighted by the inputs that the full-precision block meets.

    Raises:
        DataError: Inputs of a layer are not finite.
        FormatError: A weight does not fit its scheme, or is not finite.
    """
    layers = [layer for layer in block.weights if layer in schemes]
    statistics = block.statistics(layers, {})
    weights: dict[str, QuantizedTensor] = {}
    notes: list[str] = []
    for layer in layers:
        weights[layer] = search(block.weights[layer], schemes[layer], statistics.get(layer), where=layer)
        if layer not in statistics:
            notes.append(f"{layer}: no calibration token reached it; its scales were searched without data")
    return Start(weights, tuple(layer for layer in layers if layer in statistics), notes)


@torch.no_grad()
def block_error(block: Block, batches: Sequence[int], weights: Mapping[str, QuantizedTensor]) -> float:
    """Mean squared error of the block's output over `batches`, with quantized weights in place."""
    changed = {layer: quantized.dequantize() for layer, quantized in weights.items()}
    total, values = 0.0, 0
    for batch in batches:
        difference = block.run(batch, changed) - block.target(batch)
        total += float(difference.square_().sum(dtype=torch.float64))
        values += difference.numel()
    return total / max(1, values)


def train(
    block: Block,
    layers: Mapping[str, Trainable],
    start: Start,
    *,
    batches: Sequence[int],
    measured: Sequence[int],
    iterations: int,
    update: Callable[[int], None],
    seed: int,
    say: Callable[[str], None],
) -> dict[str, QuantizedTensor]:
    """Train layers on the block's output, a batch at a time, and keep the best that was measured.

    Args:
        block: The block.
        layers: What is trained.
        start: Where it starts; its weights stand where nothing is trained.
        batches: Batches to train on, each once in a random order, then again.
        measured: Batches whose error decides.
        iterations: Batches to train on in all.
        update: Told the iteration (from 0) once gradients are there; moves what is trained and clears the gradients.
        seed: Decides the order.
        say: Told how far it is.

    Returns:
        The quantized weights with the least error, those that were not trained included.

    Raises:
        DataError: The start's error is not finite.
    """
    best, kept = block_error(block, measured, start.weights), start.weights
    if not math.isfinite(best):
        raise DataError(
            f"{block.name}: its output is not finite on the calibration rows, in full precision or quantized; check "
            "the model's weights"
        )
    fixed = {layer: weight.dequantize() for layer, weight in start.weights.items() if layer not in layers}
    order = _order(batches, torch.Generator().manual_seed(seed))
    first = best
    for iteration in range(iterations):
        batch = next(order)
        changed = fixed | {layer: part.rounded() for layer, part in layers.items()}
        loss = (block.run(batch, changed) - block.target(batch)).square().mean()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        update(iteration)
        done = iteration + 1
        if done * MEASUREMENTS // iterations > iteration * MEASUREMENTS // iterations:
            found = start.weights | {layer: part.settled() for layer, part in layers.items()}
            error = block_error(block, measured, found)
            if error < best:
                best, kept = error, found
            say(f"{done} of {iterations}, error {best / first if first else 1:.3f} of searched rounding's")
    return kept


def _order(batches: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    """Every batch once in a random order, then again in another, without end."""
    while True:
        for place in torch.randperm(len(batches), generator=generator):
            yield batches[int(place)]


def evenly(batches: Sequence[int], most: int) -> list[int]:
    """At most `most` of the batches, evenly spread."""
    count = min(most, len(batches))
    return [batches[place * len(batches) // count] for place in range(count)]

"""What methods that train a block against its full-precision output share: where they start, and what they measure.

The error is that of the block's whole output, the quantized block being fed what the quantized blocks before it give:

    squared_errors     mean over tokens and features of (quantized - full precision)^2
    relative_errors    mean over tokens of |quantized - full precision|^2 / |full precision|^2

By the second a token counts by how far it is moved, not by how long it is: the norms that read hidden states divide by
their length, and the few tokens that are ten times as long as the others are not fitted before them. A method keeps the
best of what it measured, the start among it, so that on the batches that measure it is never worse than searched
rounding. What trains runs in bf16 where the processor multiplies it faster, what is measured in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from strop.errors import DataError
from strop.methods.base import Block, Statistics
from strop.methods.gptq import gptq
from strop.methods.search import search
from strop.methods.sequential import layer_by_layer
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme
from strop.precision import autocast, compute_dtype

MEASUREMENTS = 10
"""How often a training looks at its error, the start left out."""

BETAS = (0.9, 0.99)
EPS = 1e-30  # gradients of a mean over a block's outputs may be as small as they like
LEAST_BATCHES = 4
"""From here on one in eight is held out."""


class Trainable(Protocol):
    """A layer's weight on a grid that is being trained."""

    def rounded(self) -> Tensor:
        """The weight [out, in] as the grid has it, with gradients to what is trained."""
        ...

    def settled(self) -> QuantizedTensor:
        """The quantized tensor that dequantizes to `rounded`, bit for bit."""
        ...

    def keep_in_bounds(self) -> None:
        """Bring back what a step took out of its range."""
        ...


Errors = Callable[[Tensor, Tensor], Tensor]
"""(output, target), [tokens, hidden], to the error of each token, float32 [tokens]."""


def squared_errors(output: Tensor, target: Tensor) -> Tensor:
    """Mean over features of (output - target)^2."""
    return (output.float() - target).square().mean(dim=-1)


def relative_errors(output: Tensor, target: Tensor) -> Tensor:
    """|output - target|^2 / |target|^2; a token of zeros counts 0."""
    length = target.square().sum(dim=-1)
    errors = (output.float() - target).square().sum(dim=-1)
    return errors * torch.where(length > 0, 1 / length, 0.0)


@dataclass(frozen=True, eq=False)
class Start:
    """Where training starts from.

    Attributes:
        weights: Every layer, rounded.
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


def gptq_start(
    block: Block,
    schemes: Mapping[str, Scheme],
    measured: Sequence[int],
    *,
    drift: bool = False,
    errors: Errors = squared_errors,
) -> Start:
    """Round every weight by GPTQ, or with searched scales where that errs less in the block's output over `measured`.

    Both over the same statistics, gathered layer after layer; what has none (see `layer_by_layer`) is not trained. With
    `drift` GPTQ makes up for how far quantization has moved its inputs.

    Raises:
        DataError: Inputs of a layer, or the block's output, are not finite.
        FormatError: A weight does not fit its scheme, or is not finite.
    """
    notes: list[str] = []
    searched: dict[str, QuantizedTensor] = {}

    def both(
        weight: Tensor, scheme: Scheme, seen: Statistics | None = None, /, *, where: str = "weight"
    ) -> QuantizedTensor:
        searched[where] = search(weight, scheme, seen, where=where)
        return gptq(weight, scheme, seen, where=where, note=notes.append)

    result = layer_by_layer(block, schemes, both, hessian=True, drift=drift)
    notes += result.notes
    weights, reached = dict(result.weights), tuple(layer for layer in block.weights if layer in searched)
    compensated, plain = (block_error(block, measured, found, errors=errors) for found in (weights, weights | searched))
    if plain < compensated:
        notes.append(f"{block.name}: started from searched scales, which err less than GPTQ")
        return Start(weights | searched, reached, notes)
    return Start(weights, reached, notes)


@torch.no_grad()
def block_error(
    block: Block,
    batches: Sequence[int],
    weights: Mapping[str, QuantizedTensor],
    others: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    errors: Errors = squared_errors,
) -> float:
    """The mean error of the block's output over `batches`, with quantized weights and other parameters in place."""
    changed = {layer: quantized.dequantize() for layer, quantized in weights.items()} | dict(others)
    total, tokens = 0.0, 0
    for batch in batches:
        found = errors(block.run(batch, changed), block.target(batch))
        total += float(found.sum(dtype=torch.float64))
        tokens += found.numel()
    return total / max(1, tokens)


def train(
    block: Block,
    layers: Mapping[str, Trainable],
    start: Start,
    groups: Sequence[dict[str, object]],
    *,
    others: Mapping[str, Tensor] = MappingProxyType({}),
    batches: Sequence[int],
    measured: Sequence[int],
    iterations: int,
    seed: int,
    say: Callable[[str], None],
    errors: Errors = squared_errors,
) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """Train layers on the block's output by Adam, a batch at a time, and keep the best that was measured.

    Args:
        block: The block.
        layers: What is trained.
        start: Where it starts; its weights stand where nothing is trained.
        groups: The parameters, each group with the rate at which it begins (`lr`); rates fall linearly to 0.
        others: Parameters beside the weights that are trained too, by name.
        batches: Batches to train on, each once in a random order, then again.
        measured: Batches whose error decides.
        iterations: Batches to train on in all.
        seed: Decides the order.
        say: Told how far it is.
        errors: What is descended, and what decides.

    Returns:
        The quantized weights with the least error, those that were not trained included, and the other parameters that
        go with them; none where the start was best.

    Raises:
        DataError: The start's error is not finite.
    """
    best, kept = block_error(block, measured, start.weights, errors=errors), (start.weights, dict[str, Tensor]())
    if not math.isfinite(best):
        raise DataError(
            f"{block.name}: its output is not finite on the calibration rows, in full precision or quantized; check "
            "the model's weights"
        )
    block.let_go()  # every step changes what comes first in the block
    fixed = {layer: weight.dequantize() for layer, weight in start.weights.items() if layer not in layers}
    first = best
    device = block.target(batches[0]).device
    one_pass = device.type in ("cpu", "cuda")  # the others have no such kernel
    optimizer = torch.optim.Adam(groups, betas=BETAS, eps=EPS, fused=one_pass)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    order = in_random_order(batches, torch.Generator().manual_seed(seed))
    dtype = compute_dtype("auto", device)
    for iteration in range(iterations):
        batch = next(order)
        changed = fixed | {layer: part.rounded() for layer, part in layers.items()} | dict(others)
        with autocast(device, dtype):
            output = block.run(batch, changed)
        loss = errors(output, block.target(batch)).mean()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - iteration / iterations)
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        optimizer.zero_grad()
        for part in layers.values():
            part.keep_in_bounds()
        done = iteration + 1
        if done * MEASUREMENTS // iterations > iteration * MEASUREMENTS // iterations:
            found = start.weights | {layer: part.settled() for layer, part in layers.items()}
            beside = {name: tensor.detach().clone() for name, tensor in others.items()}
            error = block_error(block, measured, found, beside, errors=errors)
            if error < best:
                best, kept = error, (found, beside)
            say(f"{done} of {iterations}, error {best / first if first else 1:.3f} of the start's")
    return kept


def in_random_order(batches: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    """Every batch once in a random order, then again in another, without end."""
    while True:
        for place in torch.randperm(len(batches), generator=generator):
            yield batches[int(place)]


def held_out(block: Block, notes: list[str]) -> tuple[list[int], list[int]]:
    """`to_train_and_measure` of a block's batches, with a note where there are too few."""
    if block.batches < LEAST_BATCHES:
        notes.append(f"{block.name}: {block.batches} batches are too few to hold one out; all of them measure")
    return to_train_and_measure(block.batches)


def to_train_and_measure(batches: int) -> tuple[list[int], list[int]]:
    """Batches to train on, and one in eight, evenly spread, that measure; where there are too few, all do both."""
    everything = list(range(batches))
    if batches < LEAST_BATCHES:
        return everything, everything
    count = max(1, batches // 8)
    measured = [place * batches // count for place in range(count)]
    return [batch for batch in everything if batch not in measured], measured

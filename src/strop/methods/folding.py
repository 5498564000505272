"""Folding: scaling the input channels of a group of layers without changing what the block computes.

    W diag(s) (x / s) = W x,       x / s made by dividing, once and for all, what produces x

Where x is produced is found by trying, not by names: every parameter of fitting width is divided by a random s, the
group's columns are multiplied by it, and the fold is taken only where the block's output stays what it was. Tried are

    a norm        its gain, and its bias with it; also gains that are stored less one, (1 + w) / s - 1
    a layer       whose output rows reach the group channel by channel: up_proj through a product, v_proj through
                  attention, a third of a fused c_attn; its bias with it
    heads         of which several share one head of v_proj: the scales are equal over those that share

A norm that feeds anything beside the group (a router, another layer) fails the trial, and so does a layer followed by a
function that does not pass scales on (GELU). Gains are rounded to bfloat16 and the weights take up the difference, so
that a fold is as exact in a file of 16 bits as in memory.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.methods.base import Block

PROVEN = 1e-4
"""The relative change of the block's output, feature by feature, up to which it is the same: float32 and no more."""

PROVEN_SHARE = 1e-3
"""The same in relation to what scaling the group changes when nothing is divided for it."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Where the reciprocal of a group's scales goes.

    Attributes:
        layers: The group: layers that receive the same input [.., in].
        source: The layer, or the norm, whose output is divided; for messages.
        parts: What is divided along its first dimension, by its name in `Block`.
        rows: Which of those rows, as many as there are `channels`.
        channel: The source's channel behind each input, int64 [in].
        gain: The part that is a norm's gain, None if the source is a layer.
        plus_one: The gain that multiplies is 1 + the part.
    """

    layers: tuple[str, ...]
    source: str
    parts: tuple[str, ...]
    rows: slice
    channel: Tensor
    gain: str | None = None
    plus_one: bool = False

    @property
    def channels(self) -> int:
        """How many scales there are."""
        return self.rows.stop - self.rows.start

    def per_channel(self, x: Tensor) -> Tensor:
        """Mean of x [in] over the inputs that come from the same channel: [channels]."""
        total = torch.zeros(self.channels, dtype=x.dtype).index_add_(0, self.channel, x)
        return total / torch.bincount(self.channel, minlength=self.channels)

    def largest(self, x: Tensor) -> Tensor:
        """Maximum of x [in] over the inputs that come from the same channel: [channels]."""
        start = torch.full((self.channels,), -math.inf, dtype=x.dtype)
        return start.scatter_reduce_(0, self.channel, x, "amax")

    def settle(self, scale: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The scales nearest to these that leave a gain exact in bfloat16; as they are where there is no gain.

        A gain of zero, or one of which bfloat16 keeps too little beside its offset, settles nothing.
        """
        if self.gain is None:
            return scale
        gain = tensors[self.gain] + float(self.plus_one)
        exact = gain / ((gain / scale - float(self.plus_one)).bfloat16().float() + float(self.plus_one))
        return torch.where((exact / scale - 1).abs() < 0.01, exact, scale)  # false of NaN

    def apply(self, scale: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What takes the place of the group's weights and of the source's parts.

        Args:
            scale: float32 [channels], positive; it is settled first.
            tensors: The weights and other parameters of the block as they are now.
        """
        scale = self.settle(scale, tensors)
        changed: dict[str, Tensor] = {}
        for name in self.parts:
            whole = tensors[name].clone()
            offset = float(self.plus_one and name == self.gain)
            whole[self.rows] = (whole[self.rows] + offset) / scale.view(-1, *[1] * (whole.dim() - 1)) - offset
            if name == self.gain:
                near = whole.bfloat16().float()
                whole = torch.where((near - whole).abs() <= 1e-6 * (whole.abs() + offset), near, whole)
            changed[name] = whole
        for layer in self.layers:
            changed[layer] = tensors[layer] * scale[self.channel]
        return changed


def find_fold(
    block: Block, layers: tuple[str, ...], *, movable: Container[str], generator: torch.Generator
) -> Fold | None:
    """Where the scales of a group's inputs can be folded, proven on the block's first batch; None where nowhere.

    Args:
        block: The block.
        layers: One of `block.shared`.
        movable: The layers whose weights may be changed.
        generator: Of the scales that are tried.
    """
    if not all(layer in movable for layer in layers):
        return None
    tensors = {**block.others, **block.weights}
    with torch.no_grad():
        output = block.run(0, {})
        width = block.weights[layers[0]].shape[1]
        scale = _random_scale(width, generator)
        effect = _distance(block.run(0, {layer: block.weights[layer] * scale for layer in layers}), output)
        if not math.isfinite(effect) or effect == 0:
            return None  # the output does not depend on the group: nothing could be proven
        for fold in _candidates(block, layers, movable):
            changed = fold.apply(_random_scale(fold.channels, generator), tensors)
            lost = _distance(block.run(0, changed), output)
            if lost <= min(PROVEN, PROVEN_SHARE * effect):
                return fold
    return None


def _candidates(block: Block, layers: tuple[str, ...], movable: Container[str]) -> Iterator[Fold]:
    """Every fold that the shapes allow: norms first, then the layers that are used before the group."""
    width = block.weights[layers[0]].shape[1]
    straight = torch.arange(width)
    owners: dict[str, list[str]] = {}
    for name in block.others:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    fitting = {
        owner: tuple(names)
        for owner, names in owners.items()
        if owner not in block.weights and all(block.others[name].shape[:1] == (width,) for name in names)
    }
    norms = {owner: names for owner, names in fitting.items() if all(block.others[name].dim() == 1 for name in names)}
    for plus_one in (False, True):
        for owner, names in norms.items():
            yield Fold(layers, owner, names, slice(0, width), straight, names[0], plus_one)
    for owner, names in fitting.items():
        if owner not in norms:
            yield Fold(layers, owner, names, slice(0, width), straight)
    before = list(block.weights)[: list(block.weights).index(layers[0])]  # what comes later cannot produce the input
    shared: list[Fold] = []
    for layer in (layer for layer in before if layer in movable):
        rows = block.weights[layer].shape[0]
        parts = (layer, *(name for name in owners.get(layer, ()) if block.others[name].shape == (rows,)))
        if rows % width == 0:
            for start in range(0, rows, width):
                yield Fold(layers, layer, parts, slice(start, start + width), straight)
        values = rows if rows < width else (rows - width) // 2  # alone, or after queries and keys in one weight
        if values and width % values == 0 and values < width:
            for head in _divisors(values):
                channel = _shared_heads(width, values, head)
                shared.append(Fold(layers, layer, parts, slice(rows - values, rows), channel))
    yield from shared


def _shared_heads(width: int, rows: int, head: int) -> Tensor:
    """The row behind each of `width` inputs where width / rows heads of size `head` in turn repeat one of the rows'."""
    place = torch.arange(width)
    return place // (width // rows * head) * head + place % head


def _divisors(number: int) -> list[int]:
    """Divisors, the usual sizes of a head first."""
    found = [size for size in range(1, number + 1) if number % size == 0]
    return sorted(found, key=lambda size: (abs(math.log2(size / 64)), size))


def _random_scale(width: int, generator: torch.Generator) -> Tensor:
    """Scales between 1/2 and 2."""
    return torch.exp2(2 * torch.rand(width, generator=generator) - 1)


def _distance(output: Tensor, reference: Tensor) -> float:
    """Root mean square over the features of |output - reference| / |reference|, each over all tokens."""
    lost = (output - reference).double().square().sum(dim=0)
    whole = reference.double().square().sum(dim=0)
    share = torch.where(lost > 0, lost / whole, torch.zeros_like(lost))
    return math.sqrt(share.mean().item())

"""AWQ: input channels that matter are scaled up before rounding, and the scales folded into what produces the input.

    minimise over r    sum over the group's layers of |Q(W diag(s)) diag(s)^-1 x - W x|^2,
    s = mean|x|^r / (w^(1 - r) + 1e-4),    w: mean over the rows of |W|, each group of them divided by its largest

Lin and others, AWQ (arXiv 2306.00978), where s is mean|x|^r alone; w, 20 values of r and the norming of s by the root
of its largest times its smallest are those of its implementations. Then the range of every group is clipped
(`clipping`). Scales are kept only where, clipped, they leave less error than clipping alone.

Different from the paper: errors are computed from the second moments of all the inputs, trace(D H D^T), not from a
sample of tokens; layers are rounded one group after the other, each on the inputs that the rounded ones before it give;
queries and keys are clipped like others, since the error says what that costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from strop.methods.base import Block, BlockResult, Method, Statistics
from strop.methods.clipping import clip
from strop.methods.folding import Fold, find_fold
from strop.methods.rtn import rtn
from strop.numerics.groups import restore, split
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme

RATIOS = 20
"""Values of r that are tried: 0, 1 / RATIOS and so on, below 1."""

_SMALLEST = 1e-4
"""Added to the weights' part of a scale, and the least that a scale or an input's share of the largest counts as."""


def awq(
    block: Block,
    schemes: Mapping[str, Scheme],
    /,
    *,
    seed: int = 0,
    step: Callable[[str], None] = lambda _: None,
) -> BlockResult:
    """Quantize the weights of a block with their inputs scaled and their ranges clipped.

    Args:
        block: The block.
        schemes: Scheme of each layer.
        seed: Of the scales by which folds are proven.
        step: Told what is being done.

    Raises:
        FormatError: A scheme does not fit its weight.
        DataError: Inputs are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {**block.others, **block.weights}
    changed: dict[str, Tensor] = {}
    notes: list[str] = []
    for layers in block.shared:
        if not any(layer in schemes for layer in layers):
            continue
        step(f"scaling the inputs of {', '.join(layers)}")
        statistics = block.statistics(layers, changed, hessian=True).get(layers[0])
        if statistics is None:
            notes.append(f"{', '.join(layers)}: no calibration token got there; rounded by the weights alone")
            continue
        fold = find_fold(block, layers, movable=schemes, generator=generator)
        if fold is None:
            notes.append(f"{', '.join(layers)}: nothing before takes up scales of the inputs; clipped, not scaled")
            continue
        scaled = _scaled(fold, tensors, schemes, statistics)
        tensors |= scaled
        changed |= scaled
    weights: dict[str, QuantizedTensor] = {}
    rounded: dict[str, Tensor] = {}
    for layers in block.shared:
        wanted = [layer for layer in layers if layer in schemes]
        if wanted:
            step(f"rounding {', '.join(wanted)}")
            found = block.statistics(wanted, changed | rounded, hessian=True)
            for layer in wanted:
                weights[layer] = clip(tensors[layer], schemes[layer], found.get(layer), where=layer)
                rounded[layer] = weights[layer].dequantize()
    return BlockResult(weights, {name: tensor for name, tensor in changed.items() if name not in weights}, notes)


def _scaled(
    fold: Fold, tensors: Mapping[str, Tensor], schemes: Mapping[str, Scheme], statistics: Statistics
) -> dict[str, Tensor]:
    """What the fold changes under the best scales; nothing where none is better than no scales."""
    group = {layer: tensors[layer] for layer in fold.layers}
    unscaled = torch.ones_like(statistics.mean_square)

    def lost(rounding: Method, scale: Tensor) -> float:
        return sum(_lost(rounding, weight, schemes[layer], scale, statistics) for layer, weight in group.items())

    least, best = lost(rtn, unscaled), None
    for scale in _scales(fold, group, schemes, statistics):
        settled = fold.settle(scale, tensors)
        error = lost(rtn, settled[fold.channel])
        if error < least:
            least, best = error, settled
    if best is None or lost(clip, best[fold.channel]) >= lost(clip, unscaled):
        return {}
    return fold.apply(best, tensors)


def _lost(rounding: Method, weight: Tensor, scheme: Scheme, scale: Tensor, statistics: Statistics) -> float:
    """trace(D H D^T) of D = Q(W diag(s)) diag(s)^-1 - W for the scales s [in] of a layer's inputs."""
    assert statistics.hessian is not None
    seen = Statistics(
        statistics.mean_square / scale.square(),
        statistics.rows,
        hessian=statistics.hessian / (scale * scale.unsqueeze(1)),
    )
    error = rounding(weight * scale, scheme, seen).dequantize().div_(scale).sub_(weight)
    return ((error @ statistics.hessian) * error).sum(dtype=torch.float64).item()


def _scales(
    fold: Fold, group: Mapping[str, Tensor], schemes: Mapping[str, Scheme], statistics: Statistics
) -> Iterator[Tensor]:
    """The scales [channels] for each r."""
    assert statistics.mean_abs is not None
    inputs = fold.per_channel(statistics.mean_abs)
    inputs = inputs.clamp(min=max(inputs.max().item(), 1e-30) * _SMALLEST)
    shares: list[Tensor] = []
    for layer, weight in group.items():
        magnitude = split(weight, schemes[layer]).abs()
        share = magnitude / magnitude.amax(dim=-1, keepdim=True).clamp(min=1e-30)
        shares.append(restore(share, (weight.shape[0], weight.shape[1])))
    columns = fold.per_channel(torch.cat(shares).mean(dim=0))
    for step in range(RATIOS):
        ratio = step / RATIOS
        scale = inputs**ratio / (columns ** (1 - ratio) + _SMALLEST)
        scale = (scale / scale.max()).clamp(min=_SMALLEST)
        yield scale / scale.min().sqrt()

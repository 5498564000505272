"""SmoothQuant: input channels that stand out are scaled down, and the weights up, so that both round well to 8 bits.

    Y = (X diag(s)^-1) (diag(s) W^T),       s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

Xiao and others, SmoothQuant (arXiv 2211.10438); max|W_j| is over all layers of the group that receives X. The scales
are folded into what produces X, where the block's output proves that (`folding`); elsewhere inputs stay as they are. A
group is smoothed only where that leaves less error of the rounded product, on a sample of its inputs.

The weights are rounded to nearest. Activations are rounded at run time, as the scheme says (`int8-a8`: by token,
`int8-a8-static`: by one scale for all, fixed by calibration afterwards); schemes of weights alone are smoothed as if by
token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from strop.errors import ConfigError
from strop.methods.base import Block, BlockResult
from strop.methods.folding import Fold, find_fold
from strop.numerics.activations import Activations, rounded
from strop.numerics.affine import fake_quantize
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import Scheme

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""What is tried where alpha is to be found."""

STANDS_OUT = 10.0
"""Channels whose largest input is this many times the median channel's are named in the notes."""

SAMPLE = 512
"""Inputs by which smoothing is judged."""

_SMALLEST_SHARE = 1e-4
"""A channel counts as at least this share of the largest: scales of channels that never fire stay within bounds."""


def smoothquant(
    block: Block,
    schemes: Mapping[str, Scheme],
    /,
    *,
    seed: int = 0,
    step: Callable[[str], None] = lambda _: None,
    alpha: float | None = 0.5,
) -> BlockResult:
    """Quantize the weights of a block whose inputs will be rounded to 8 bits.

    Args:
        block: The block.
        schemes: Scheme of each layer.
        seed: Of the scales by which folds are proven.
        step: Told what is being done.
        alpha: How much of the difficulty moves from inputs to weights, from 0 to 1; None for that of `ALPHAS` which
            leaves each group the least error.

    Raises:
        ConfigError: alpha is outside 0 to 1.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ConfigError(
            f"alpha is {alpha:g}; give 0 (the weights become even) to 1 (the inputs become even), usually 0.5"
        )
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {**block.others, **block.weights}
    changed: dict[str, Tensor] = {}
    notes: list[str] = []
    for layers in block.shared:
        if not any(layer in schemes for layer in layers):
            continue
        group = ", ".join(layers)
        step(f"smoothing the inputs of {group}")
        seen = block.statistics(layers, changed).get(layers[0])
        if seen is None or seen.largest is None:
            notes.append(f"{group}: no calibration token reached it; its inputs are not smoothed")
            continue
        fold = find_fold(block, layers, movable=schemes, generator=generator)
        done = "nothing before takes up the scales: left as they are"
        if fold is not None:
            x = block.inputs(layers[0], changed, most=SAMPLE)
            group_weights = [tensors[layer] for layer in layers]
            forms = [schemes[layer] for layer in layers]
            least, best = _lost(x, torch.ones(x.shape[1]), group_weights, forms), None
            for power in ALPHAS if alpha is None else (alpha,):
                scale = fold.settle(_scales(fold, seen.largest, group_weights, power), tensors)
                lost = _lost(x, scale[fold.channel], group_weights, forms)
                if lost < least:
                    least, best = lost, scale
            done = "smoothing would lose more than it gains: left as they are"
            if best is not None:
                trial = fold.apply(best, tensors)
                tensors |= trial
                changed |= trial
                done = f"smoothed into {fold.source}"
        if outliers := _outliers(seen.largest):
            notes.append(f"{group}: {outliers}; {done}")
        elif fold is None:
            notes.append(f"{group}: {done}")
    weights = {layer: quantize_tensor(tensors[layer], scheme, where=layer) for layer, scheme in schemes.items()}
    others = {name: tensor for name, tensor in changed.items() if name not in weights}
    return BlockResult(weights, others, notes)


def _scales(fold: Fold, largest: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """S of each channel of the source, from the largest inputs [in] and the group's weights."""
    inputs = fold.largest(largest)
    columns = fold.largest(torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0))
    inputs = inputs.clamp(min=(inputs.max() * _SMALLEST_SHARE).item())
    columns = columns.clamp(min=(columns.max() * _SMALLEST_SHARE).item())
    scale = inputs**alpha / columns ** (1 - alpha)
    return scale if bool((scale > 0).all() and torch.isfinite(scale).all()) else torch.ones_like(scale)


def _lost(x: Tensor, divisor: Tensor, weights: Sequence[Tensor], schemes: Sequence[Scheme]) -> float:
    """Squared error of the products of rounded inputs x / divisor and rounded weights * divisor, x [rows, in]."""
    total = 0.0
    for weight, scheme in zip(weights, schemes, strict=True):
        inputs = rounded(x / divisor, scheme.activations or Activations())
        product = inputs @ fake_quantize(weight * divisor, scheme).t()
        total += (product - x @ weight.t()).double().square().sum().item()
    return total


def _outliers(largest: Tensor) -> str:
    """Which input channels stand out, empty if none does."""
    usual = largest.median().item()
    found = [channel for channel, value in enumerate(largest) if value.item() > STANDS_OUT * usual > 0]
    if not found:
        return ""
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    listed = ", ".join(str(channel) for channel in found[:8]) + more
    return f"input channels {listed} reach up to {largest.max().item() / usual:.0f} times the median channel's largest"

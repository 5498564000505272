"""One scale for all inputs of a layer (`int8-a8-static`), from what its block meets once it is quantized.

Each layer's inputs are observed with the block's new weights and parameters in place (SmoothQuant moves the range), on
every batch that calibrates; the hidden states that reach the block went through quantized blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from strop.calibrate.block import CalibrationBlock
from strop.errors import DataError, FormatError
from strop.methods import BlockResult
from strop.numerics.activation_observers import ActivationObserver
from strop.numerics.activations import rounded, tensor_scale


def fix_input_scales(
    block: CalibrationBlock, result: BlockResult, observer: Callable[[], ActivationObserver]
) -> BlockResult:
    """The same result with a scale of its inputs for every layer whose scheme has a static one.

    Args:
        block: The block.
        result: What it becomes.
        observer: Makes what observes one layer.

    Raises:
        DataError: inputs are not finite.
        FormatError: no token reaches a layer.
    """
    layers = [layer for layer, weight in result.weights.items() if _is_static(result, layer)]
    if not layers:
        return result
    changed = {layer: weight.dequantize() for layer, weight in result.weights.items()} | dict(result.others)
    ranges = observe_inputs(block, layers, changed, observer)
    weights = dict(result.weights)
    for layer in layers:
        scale = tensor_scale(*ranges[layer]) if layer in ranges else None
        try:
            weights[layer] = weights[layer].with_activation_scale(scale)
        except FormatError as error:
            raise FormatError(f"{layer}: {error}") from None
    return replace(result, weights=weights)


def observe_inputs(
    block: CalibrationBlock,
    layers: Sequence[str],
    changed: Mapping[str, Tensor],
    observer: Callable[[], ActivationObserver],
) -> dict[str, tuple[float, float]]:
    """The range (low, high) of the inputs of `layers` over all batches, `changed` in place; unreached ones are out.

    Raises:
        DataError: inputs are not finite.
    """
    leaders = {group[0]: group for group in block.shared if any(layer in layers for layer in group)}
    seen: dict[str, ActivationObserver] = {}

    def see(layer: str, x: Tensor) -> None:
        if not x.numel():
            return
        try:
            seen.setdefault(layer, observer()).observe(x)
        except DataError as error:
            raise DataError(f"calibration: {layer}: {error}; check the model's weights") from None

    for batch in range(block.batches):
        block.observe(batch, leaders, changed, see)
    ranges = {leader: one.range() for leader, one in seen.items()}
    return {layer: ranges[leader] for leader in ranges for layer in leaders[leader] if layer in layers}


def input_rounding(result: BlockResult) -> dict[str, Callable[[Tensor], Tensor]]:
    """How each layer of a block rounds its inputs while it runs; those that take them as they come are out."""
    return {
        layer: partial(rounded, activations=weight.scheme.activations, scale=weight.activation_scale)
        for layer, weight in result.weights.items()
        if weight.scheme.activations is not None
    }


def _is_static(result: BlockResult, layer: str) -> bool:
    activations = result.weights[layer].scheme.activations
    return activations is not None and activations.is_static

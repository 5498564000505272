"""How much a block's output suffers when one of its layers is rounded to a format, the others left as they are.

    error[layer][scheme] = sum |block(x; layer rounded) - block(x)|^2 / sum |block(x)|^2

over the calibration rows, x the hidden states of the full-precision model. Layers are compared by what they do to the
output, whatever they are called. Rounded by searched scales, whose order of formats is that of the finer methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from strop.calibrate.block import CalibrationBlock
from strop.calibrate.stream import BlockStream
from strop.methods import search
from strop.numerics.scheme import Scheme
from strop.progress import SILENT, Reporter

BATCHES = 4
"""Calibration batches, at most, that a layer's error is measured on."""


def measure_sensitivity(
    stream: BlockStream, candidates: Mapping[str, Sequence[Scheme]], *, reporter: Reporter = SILENT
) -> dict[str, list[float]]:
    """Measure every layer with each of its candidate schemes.

    Args:
        stream: Batches at the first block; afterwards they have gone through all of them in full precision.
        candidates: Layer to the schemes that it may have.
        reporter: Told the blocks done.

    Returns:
        Layer to the error under each of its schemes, in their order.
    """
    errors: dict[str, list[float]] = {}
    reporter.start("measure sensitivity", len(stream.model.blocks), "blocks")
    try:
        for done, name in enumerate(stream.model.blocks, start=1):
            layers = [layer for layer in candidates if layer.startswith(f"{name}.")]

            def work(block: CalibrationBlock, layers: Sequence[str] = layers) -> Mapping[str, Tensor]:
                for layer in layers:
                    errors[layer] = _errors(block, layer, candidates[layer])
                return {}

            stream.through(name, layers, work)
            reporter.advance(done, block=name)
    finally:
        reporter.finish()
    return errors


@torch.no_grad()
def _errors(block: CalibrationBlock, layer: str, schemes: Sequence[Scheme]) -> list[float]:
    seen = block.statistics([layer], {}).get(layer)
    numbers = range(0, block.batches, max(1, block.batches // BATCHES))
    found: list[float] = []
    for scheme in schemes:
        rounded = search(block.weights[layer], scheme, seen, where=layer).dequantize()
        lost = whole = 0.0
        for number in numbers:
            wanted = block.target(number).double()
            lost += float((block.run(number, {layer: rounded}).double() - wanted).square_().sum())
            whole += float(wanted.square().sum())
        found.append(lost / whole if whole else 0.0)
    return found

"""A method of single weights over a block, one layer after the other.

Each layer's statistics are gathered with everything before it already quantized, within the block too: layers that
receive the same tensor are measured together, in the order of use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from strop.methods.base import Block, BlockResult, Method
from strop.methods.search import search
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme

STARVED: Final = 32
"""An expert of a mixture that is given fewer calibration tokens has its scales searched without their statistics."""


def layer_by_layer(
    block: Block, schemes: Mapping[str, Scheme], method: Method, *, hessian: bool = False, drift: bool = False
) -> BlockResult:
    """Quantize a block's weights one after the other.

    A layer that no row reached has no statistics: it is rounded by searched scales without them, and named. So is an
    expert of a mixture that is given fewer than `STARVED` tokens, whose statistics would be those of chance.

    Args:
        block: The block.
        schemes: Layer to its scheme.
        method: Rounds one weight.
        hessian: Whether it needs the second moments of the inputs.
        drift: Whether it uses how far they are from full precision.
    """
    made: dict[str, QuantizedTensor] = {}
    changed: dict[str, Tensor] = {}
    notes: list[str] = []
    for group in block.stages(hessian=hessian):
        layers = [layer for layer in group if layer in schemes]
        starved: dict[str, int] = {}
        statistics = block.statistics(layers, changed, hessian=hessian, drift=drift) if layers else {}
        for layer in layers:
            seen = statistics.get(layer)
            if block.is_expert(layer):
                rows = 0 if seen is None else seen.rows
                if rows < STARVED:
                    starved[layer], seen = rows, None
            elif seen is None:
                notes.append(f"{layer}: no calibration token reached it; its scales were searched without data")
            if seen is None:
                made[layer] = search(block.weights[layer], schemes[layer], where=layer)
            else:
                made[layer] = method(block.weights[layer], schemes[layer], seen, where=layer)
            changed[layer] = made[layer].dequantize()
        if starved:
            named = ", ".join(f"{layer} ({rows:,})" for layer, rows in starved.items())
            notes.append(
                f"starved, fewer than {STARVED} calibration tokens (how many in brackets), scales searched without "
                f"data: {named}"
            )
    return BlockResult({layer: made[layer] for layer in schemes}, {}, notes)

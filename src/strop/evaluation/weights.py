"""How far a model's linear layers are from a reference's, layer by layer.

error = sum((W - W0)²) / sum(W0²), over the weights [out, in] that the layers really multiply with: dequantized, and
with an adapter's B·A merged in. It counts every change: what training moved as well as what rounding lost.
"""

from __future__ import annotations

from torch import float64
from transformers import PreTrainedModel

from strop.layers.base import dense_weight
from strop.layers.surgery import linear_modules
from strop.scratch import Scratch, Stored


def keep_weights(model: PreTrainedModel, scratch: Scratch) -> dict[str, Stored] | None:
    """Set the dense weight of every linear layer aside, one at a time, in its own dtype.

    Returns:
        Layer name to where its weight lies; None where the scratch file cannot hold them all.
    """
    kept: dict[str, Stored] = {}
    for name, module in linear_modules(model).items():
        stored = scratch.put(dense_weight(module))
        if stored is None:
            return None
        kept[name] = stored
    return kept


def weight_errors(model: PreTrainedModel, reference: dict[str, Stored], scratch: Scratch) -> dict[str, float]:
    """Relative squared weight error of each linear layer that the reference has too, with the same shape.

    Returns:
        Layer name to error, in the model's order. A layer whose reference is all zero is left out.
    """
    errors: dict[str, float] = {}
    for name, module in linear_modules(model).items():
        stored = reference.get(name)
        if stored is None:
            continue
        weight = dense_weight(module)
        if tuple(weight.shape) != stored.shape:
            continue
        expected = scratch.get(stored).float()
        size = float(expected.square().sum(dtype=float64))
        if size:
            errors[name] = float((weight.detach().cpu().float() - expected).square().sum(dtype=float64)) / size
    return errors

"""What stands outside a model's blocks, rounded and measured: the embedding, and the head.

    embedding   error = sum |rows' - rows|^2 / sum |rows|^2           rows: what the first block is given
    head        error = sum |z' - z|^2 / sum |z|^2                    z: logits less their mean, which softmax ignores
    tied        the sum of both

over the calibration rows, in full precision otherwise: relative errors of hidden states and of what is made of them,
as `sensitivity` has them of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from strop.calibrate.block import InputSums, listening
from strop.calibrate.sensitivity import BATCHES
from strop.calibrate.stream import BlockStream
from strop.errors import ModelError
from strop.layers.quant_embedding import Ends, find_ends
from strop.methods import Method, Statistics, search
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme


def end_weight(model: torch.nn.Module, name: str) -> Tensor:
    """The dense weight [rows, width] of an embedding or head."""
    return model.get_submodule(name).get_parameter("weight").detach()


def stand_ins(ends: Ends, name: str, weight: Tensor) -> dict[str, Tensor]:
    """The weights that stand in for the dense ones where `name` has `weight`: both, where embedding and head are tied.

    >>> stand_ins(Ends("embed", "head", tied=True), "embed", torch.ones(2, 2)).keys()
    dict_keys(['embed', 'head'])
    """
    return {name: weight, **({ends.head: weight} if ends.tied and ends.head is not None else {})}


@torch.no_grad()
def round_head(stream: BlockStream, head: str, scheme: Scheme, method: Method, *, hessian: bool) -> QuantizedTensor:
    """Round a head that is not tied, over what it is given behind the quantized blocks.

    Args:
        stream: Every batch has gone through all blocks.
        head: The head's full name.
        scheme: The grid.
        method: Rounds one weight.
        hessian: Whether it needs second moments.
    """
    weight = end_weight(stream.model.model, head)
    return method(weight, scheme, _head_statistics(stream, head, hessian=hessian), where=head)


@torch.no_grad()
def measure_ends(stream: BlockStream, candidates: Mapping[str, Sequence[Scheme]]) -> dict[str, list[float]]:
    """Measure the embedding and the head with each of their candidate schemes; scales are searched.

    Args:
        stream: Every batch has gone through all blocks, in full precision.
        candidates: Embedding or head, by full name, to the schemes that it may have.

    Returns:
        Each name to the error under each of its schemes, in their order.
    """
    model, ends = stream.model.model, find_ends(stream.model.model)
    found: dict[str, list[float]] = {}
    for name, schemes in candidates.items():
        is_head = name == ends.head
        seen = _head_statistics(stream, name, hessian=False) if is_head and schemes else None
        found[name] = []
        for scheme in schemes:
            rounded = search(end_weight(model, name), scheme, seen, where=name).dequantize()
            weights = stand_ins(ends, name, rounded)
            error = 0.0 if is_head else _error(stream, weights, logits=False)
            found[name].append(error + (_error(stream, weights, logits=True) if is_head or ends.tied else 0.0))
    return found


def _head_statistics(stream: BlockStream, head: str, *, hessian: bool) -> Statistics:
    module = stream.model.model.get_submodule(head)
    sums = InputSums(end_weight(stream.model.model, head).shape[1], hessian=hessian)
    for number in range(stream.calibrating):
        mask = stream.tokens(number)
        with listening({head: module}, lambda _, x, mask=mask: sums.add(x[mask].float())):
            stream.after(number, quantized=True)(**stream.batches[number].inputs())
    if not sums.rows:
        raise ModelError(f"{head}: no calibration row reaches it")
    return sums.statistics(head)


def _error(stream: BlockStream, weights: Mapping[str, Tensor], *, logits: bool) -> float:
    """Relative squared error with these weights in place, of logits or of what the first block is given."""
    lost = whole = 0.0
    for number in range(0, stream.calibrating, max(1, stream.calibrating // BATCHES)):
        inputs, mask = stream.batches[number].inputs(), stream.tokens(number)

        def given(inputs: dict[str, Tensor] = inputs, mask: Tensor = mask, number: int = number) -> Tensor:
            if not logits:
                return stream.model.embedded(inputs)[mask]
            made = stream.model.after_blocks(inputs, stream.given(number, quantized=False)).logits[mask]
            return made - made.mean(dim=-1, keepdim=True)

        wanted = given()
        with stream.model.holding(weights):
            lost += float((given() - wanted).square_().sum(dtype=torch.float64))
        whole += float(wanted.square_().sum(dtype=torch.float64))
    return lost / whole if whole else 0.0

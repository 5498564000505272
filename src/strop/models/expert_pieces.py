"""The layers of a quantized checkpoint that hold experts, and the experts put together from them.

A checkpoint holds `experts.3.gate_proj.weight_packed` and the like for each expert, the model one parameter for all.
transformers collects what matches a pattern in the order of the names, so that the numbers are left open in patterns
and known here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightRenaming, apply_renamings

from strop.errors import FormatError, ModelError
from strop.files.expert_tensors import Place, join, places
from strop.layers.quant_experts import ExpertWeights, check_experts, expert_weights
from strop.models.containers import Container
from strop.models.gguf_base import GgufBase
from strop.numerics.qtensor import QuantizedTensor


@dataclass(frozen=True)
class ExpertPiece:
    """A layer of the checkpoint that holds rows of an expert.

    Attributes:
        weights: the parameter that it belongs to.
        place: which rows of which expert.
        pattern: its name from its module's on, the expert's number open.
        parts: endings of its tensors.
    """

    weights: ExpertWeights
    place: Place
    pattern: str
    parts: tuple[str, ...] = ()

    def pattern_of(self, part: str) -> str:
        """What matches one of its tensors, and that of every other expert."""
        return rf"(?<!\w){self.pattern}\.{re.escape(part)}$"


def expert_pieces(model: nn.Module, renamings: list[WeightRenaming]) -> dict[str, ExpertPiece]:
    """The layers of a checkpoint of this model that would hold experts, by their names after its renamings."""
    found: dict[str, ExpertPiece] = {}
    for weights in expert_weights(model).values():
        for layer, place in places(model, weights).items():
            name = apply_renamings(f"{layer}.weight", renamings).removesuffix(".weight")
            inside = name.removeprefix(f"{weights.owner}.").split(".")
            number = str(place.expert)
            if not name.startswith(f"{weights.owner}.") or number not in inside:
                break  # not told apart by a number within the module: such a file's layers are strangers
            at = inside.index(number)
            inside = [r"\d+" if index == at else re.escape(part) for index, part in enumerate(inside)]
            pattern = r"\.".join([re.escape(weights.owner.rpartition(".")[2]), *inside])
            found[name] = ExpertPiece(weights, place, pattern)
    return found


def decode_experts(
    weights: ExpertWeights,
    pieces: Mapping[str, ExpertPiece],
    arrived: Mapping[str, list[Tensor]],
    container: Container | GgufBase,
    device: torch.device,
) -> list[QuantizedTensor]:
    """The experts of a parameter.

    Args:
        weights: the parameter.
        pieces: the layers that hold them, by name.
        arrived: pattern of a tensor to those of all experts, in the order of their names.
        container: reads a layer's tensors.
        device: where the experts are put.

    Raises:
        ModelError: rows of an expert are not there.
        FormatError: as `check_experts`, or an expert in activation order.
        FileFormatError: as the container, and `join`.
    """
    left = {pattern: list(tensors) for pattern, tensors in arrived.items()}
    found: list[dict[Place, QuantizedTensor]] = [{} for _ in range(weights.count)]
    for layer, piece in sorted(pieces.items(), key=lambda item: item[1].place.expert):
        tensors = {part: left[piece.pattern_of(part)].pop(0).to(device) for part in piece.parts}
        held = container.decode(layer, tensors, widened=True)
        check_experts(held.scheme, where=layer)
        if held.group_index is not None:
            raise FormatError(
                f"{layer}: its groups are in activation order (desc_act), which experts are not held in; use a model "
                "quantized without it"
            )
        found[piece.place.expert][piece.place] = held
    made: list[QuantizedTensor] = []
    for name, parts in zip(weights.names, found, strict=True):
        if sum(place.stop - place.start for place in parts) != weights.shape[0]:
            raise ModelError(f"{name}: the files do not hold all of its rows; every expert must be there, whole")
        made.append(join(parts, weights.shape, where=name))
    return made

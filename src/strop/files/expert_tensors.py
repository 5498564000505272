"""Where a checkpoint keeps the experts of a mixture: which of its layers holds which rows of which expert.

transformers stacks `experts.3.gate_proj.weight` and `experts.3.up_proj.weight` of every expert into one parameter. Its
own conversion, undone on a parameter whose values say where they stand, shows the places; no architecture's names are
known here. compressed-tensors' files hold each of those layers packed (`experts.3.gate_proj.weight_packed`, ...), as
llm-compressor writes and vLLM reads them.

What transformers 5.23 does with such a folder (found by experiment, tests/files/test_expert_tensors.py): it dequantizes
the experts while loading, in the scales' dtype, which is therefore float32 in the file, and all by one scheme.
Asymmetric grids fail there, for their zero points are not read, and so do 8-bit floats in groups: both are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from strop.errors import FileFormatError
from strop.layers.quant_experts import ExpertWeights
from strop.numerics.formats import CodebookFormat, FloatFormat
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Granularity, Mode, Scheme


@dataclass(frozen=True)
class Place:
    """Rows of one expert.

    Attributes:
        expert: Its number.
        start: First row.
        stop: Row after the last.
    """

    expert: int
    start: int
    stop: int


def places(model: nn.Module, weights: ExpertWeights) -> dict[str, Place]:
    """The checkpoint's layers that make up a parameter of experts; empty where it keeps them otherwise.

    Args:
        model: The architecture, with weights or without, not opened from codes.
        weights: The parameter.
    """
    rows = weights.shape[0]
    if weights.transposed:
        return {}
    probe = torch.arange(weights.count * rows * 2, device="cpu").view(weights.count, rows, 2)
    found: dict[str, Place] = {}
    for name, part in revert_weight_conversion(model, {weights.name: probe}).items():  # type: ignore[arg-type]
        if part.dim() != 2 or part.shape[1] != 2 or not name.endswith(".weight"):
            return {}
        first = int(part[0, 0])
        whole = torch.arange(first, first + part.numel(), device="cpu").view_as(part)
        expert, start = first // 2 // rows, first // 2 % rows
        if not part.equal(whole) or start + len(part) > rows:
            return {}
        found[name.removesuffix(".weight")] = Place(expert, start, start + len(part))
    return found


def inexpressible(scheme: Scheme, weights: ExpertWeights, plain: nn.Module) -> str | None:
    """Why no file can hold a parameter of experts in a scheme, so that all its readers open it rightly; None: one can.

    Args:
        scheme: The scheme.
        weights: The parameter.
        plain: The architecture with its own layers, on the meta device or with weights.
    """
    if scheme.activations is not None:
        return "experts, which are computed with the activations that come; the nearest format is int8"
    if isinstance(scheme.format, CodebookFormat):
        return "experts in one tensor, which bitsandbytes' files cannot hold; the nearest format that can is int4-g32"
    if not places(plain, weights):
        return "experts that the model's own files keep in one tensor, for which compressed-tensors has no place"
    if scheme.mode is Mode.ASYMMETRIC:
        nearest = scheme.name.replace("-asym", "")
        return f"experts, whose zero points transformers does not read; the nearest format that it opens is {nearest}"
    if isinstance(scheme.format, FloatFormat) and scheme.granularity is Granularity.GROUP:
        return "experts, whose 8-bit floats transformers opens without groups only; the nearest format is fp8"
    return None


def cut(qtensor: QuantizedTensor, place: Place) -> QuantizedTensor:
    """The rows of an expert's weight that one of the checkpoint's layers holds."""
    rows = slice(place.start, place.stop)
    parts = {
        name: part if name != "codes" and qtensor.scheme.granularity is Granularity.TENSOR else part[rows].contiguous()
        for name, part in qtensor.tensors().items()
    }
    return QuantizedTensor.from_tensors(parts, qtensor.scheme, (place.stop - place.start, qtensor.shape[1]))


def join(pieces: Mapping[Place, QuantizedTensor], shape: tuple[int, int], *, where: str) -> QuantizedTensor:
    """An expert's weight [out, in] from the layers of the checkpoint that hold its rows.

    Raises:
        FileFormatError: the pieces have several formats, or a scale each where the weight has one.
    """
    ordered = [pieces[place] for place in sorted(pieces, key=lambda place: place.start)]
    first = ordered[0]
    kinds = sorted({piece.scheme.name for piece in ordered})
    if len(kinds) > 1:
        raise FileFormatError(f"{where}: its parts are {' and '.join(kinds)}; one format is needed")
    parts: dict[str, Tensor] = {}
    for name, part in first.tensors().items():
        others = [piece.tensors()[name] for piece in ordered]
        if name == "codes" or first.scheme.granularity is not Granularity.TENSOR:
            parts[name] = torch.cat(others)
        elif all(other.equal(part) for other in others):
            parts[name] = part
        else:
            raise FileFormatError(f"{where}: its parts have a {name.replace('_', ' ')} each; one for both is needed")
    return QuantizedTensor.from_tensors(parts, first.scheme, shape)

"""Whether an adapter lies over the base that it was trained on, in the precision of its training; and how far off.

An adapter learns what its own base lacks, rounding errors included: over the same model in another precision it
answers otherwise than it did in training, in silence. `strop_base.json` says which precision that was; PEFT's own
folders do not say it. The shift is measured on the weights that the adapter adapts, in a bounded number of layers:

    shift = ||W trained over - W opened over|| / ||W opened over||     and the same beside ||scaling * B @ A||

"Full precision" stands for 16 and 32 bits alike, whose difference is far below what an adapter changes. A trained
precision that is not there any more is made again by rounding to nearest, as training over a format does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from strop.errors import FormatError, StropError
from strop.files.peft_adapter import AdapterConfig
from strop.files.saving import skeleton
from strop.files.shards import read_tensor, tensor_files
from strop.layers.base import dense_weight, linear_shape
from strop.layers.quant_experts import QuantExperts
from strop.layers.quantized import QUANTIZED
from strop.layers.surgery import lora_modules
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import Scheme, parse_scheme

FULL: Final = "full precision"
"""The precision of a model none of whose layers is quantized."""

MOST_LAYERS: Final = 8
"""Layers that are looked at, spread over the model."""


def base_precision(model: nn.Module) -> str:
    """What the layers of a model are held in: a scheme, several ("int4-g32, int8"), or full precision."""
    names = {module.scheme.name for module in model.modules() if isinstance(module, (*QUANTIZED, QuantExperts))}
    return ", ".join(sorted(names)) or FULL


def precision_notes(model: nn.Module, adapter: AdapterConfig, folder: Path, base: Path) -> Iterator[str]:
    """What is to be said where an adapter does not lie over the precision that it was trained on, or may not.

    Args:
        model: the base with the adapter on it.
        adapter: its configuration.
        folder: its folder, for messages.
        base: the folder or file of its base.
    """
    opened = base_precision(model)
    trained = None if adapter.record is None else adapter.record.precision or adapter.record.format
    if trained is None and opened == FULL:
        return
    if trained is None:
        shift = _shift(model, FULL, opened, base)
        measured = f"; were it full precision, {shift}" if shift else ""
        yield (
            f"{folder}: nothing records the precision of the base that this adapter was trained on, and it is opened "
            f"over {opened}{measured}. If it was trained over another, it answers otherwise than it did in training"
        )
    elif trained != opened:
        shift = _shift(model, trained, opened, base)
        measured = shift or "how far they differ could not be measured, as the dense weights are not there"
        yield (
            f"{folder}: this adapter was trained over its base in {trained}, and is opened over it in {opened}: "
            f"{measured}. It answers otherwise than it did in training; open it over {trained}, or train it further "
            "over what it is to lie on"
        )


def _shift(model: nn.Module, trained: str, opened: str, base: Path) -> str | None:
    """The shift in words; None where either weight cannot be had."""
    adapted = lora_modules(model)
    names = list(adapted)[:: max(1, -(-len(adapted) // MOST_LAYERS))]
    differences, sizes, changes = [], [], []
    try:
        schemes = [None if name == FULL else parse_scheme(name) for name in (trained, opened)]
    except FormatError:
        return None  # several formats
    on_disk = None if schemes[1] is None else _reader(model, base)
    for name in names:
        module = adapted[name]
        here = dense_weight(module.base).float().cpu()
        there = _trained_over(schemes[0], name, here, on_disk)
        if there is None:
            return None
        differences.append((there - here).square().sum())
        sizes.append(here.square().sum())
        changes.append((dense_weight(module).float().cpu() - here).square().sum())
    if not names:
        return None
    difference, size, change = (torch.stack(values).sum().sqrt().item() for values in (differences, sizes, changes))
    times = f", {difference / change:.2g} times what the adapter changes" if change else ""
    looked = f"{len(names)} of {len(adapted)} adapted layers" if len(names) < len(adapted) else "the adapted layers"
    return f"the weights of {looked} differ by {difference / size if size else 0.0:.2%} (relative){times}"


def _trained_over(
    scheme: Scheme | None, name: str, here: Tensor, on_disk: Callable[[str], Tensor | None] | None
) -> Tensor | None:
    """The weight [out, in] that the adapter was trained over, float32; None where it cannot be had."""
    weight = here if on_disk is None else on_disk(name)
    if weight is None or scheme is None:
        return weight
    try:
        return quantize_tensor(weight, scheme, where=name).dequantize()
    except FormatError:
        return None


def _reader(model: nn.Module, base: Path) -> Callable[[str], Tensor | None]:
    """Reads the dense weight [out, in] of a layer, by its name in the model, from a base's folder."""
    try:
        files = tensor_files(base)
    except StropError:
        files = dict[str, Path]()  # a GGUF file, or a folder that is gone by now
    plain = skeleton(model) if isinstance(model, PreTrainedModel) and files else None

    def read(name: str) -> Tensor | None:
        for known in (f"{name}.weight", f"{name.partition('.')[2]}.weight"):
            if known in files and plain is not None:
                weight, layer = read_tensor(files[known], known), plain.get_submodule(name)
                weight = weight.t() if isinstance(layer, Conv1D) and weight.ndim == 2 else weight
                fits = weight.is_floating_point() and tuple(weight.shape) == linear_shape(layer)
                return weight.float().contiguous() if fits else None
        return None

    return read

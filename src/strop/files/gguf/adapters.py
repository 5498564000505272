"""LoRA adapters as GGUF adapters, which llama.cpp puts over a base when it opens it.

    general.type "adapter", adapter.type "lora", adapter.lora.alpha
    blk.3.attn_q.weight.lora_a   [r, in]        blk.3.attn_q.weight.lora_b   [out, r]     f32

llama.cpp computes W + alpha / r * B @ A with one alpha for all layers and the r of each, so that what differs from it
(rank-stabilised scaling, an alpha of its own for a layer) goes into B. Rows of B are laid out as those of W are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from torch import Tensor

from strop.errors import FormatError, ModelError
from strop.files.gguf.architecture_table import Layout
from strop.files.gguf.architectures import Architecture
from strop.files.gguf.blocks import Bytes, encode
from strop.files.gguf.rope import Value
from strop.files.gguf.writer import TensorToWrite
from strop.files.peft_adapter import WEIGHTS, AdapterConfig
from strop.files.shards import Header, read_header, read_tensor

_KEY: Final = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<half>[AB])\.weight")


def adapter_metadata(architecture: Architecture, config: AdapterConfig) -> dict[str, Value]:
    """The keys of an adapter's file."""
    return {
        "general.architecture": architecture.name,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(config.alpha),
    }


def adapter_tensors(folder: Path, architecture: Architecture, config: AdapterConfig) -> list[TensorToWrite]:
    """The tensors of an adapter's file, both halves of each layer.

    Args:
        folder: the adapter, in PEFT's layout.
        architecture: of its base.
        config: as `read_adapter_config` gives it.

    Raises:
        FormatError: layers that llama.cpp puts no adapter over (experts stacked in one tensor); all are named.
        ModelError: a key that is not half of an adapter, or a layer of which one half is missing.
    """
    path = folder / WEIGHTS
    header = read_header(path)
    ranks: dict[str, int] = {}
    halves: dict[str, set[str]] = {}
    for key, entry in header.entries.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ModelError(f"{path}: {key} is no half of a LoRA adapter; GGUF adapters hold nothing else")
        halves.setdefault(match["layer"], set()).add(match["half"])
        if match["half"] == "A":
            ranks[match["layer"]] = entry.shape[0]
    odd = [layer for layer, both in halves.items() if both != {"A", "B"}]
    if odd:
        raise ModelError(f"{path}: one half is missing of {', '.join(sorted(odd)[:5])}")
    experts = [layer for layer in halves if ".experts" in layer]
    if experts:
        raise FormatError(
            f"{path}: adapts experts ({experts[0]}, {len(experts)} in all), over whose stacked weights no GGUF adapter "
            "is written; export merged, without --adapter-only"
        )
    made = []
    for layer in halves:
        name = architecture.tensor_name(f"{layer}.weight")
        layout = architecture.layout_of(f"{layer}.weight")
        factor = _scaling(config, layer, ranks[layer])
        for half, suffix in (("A", "lora_a"), ("B", "lora_b")):
            key = f"base_model.model.{layer}.lora_{half}.weight"
            shape = header.entries[key].shape

            laid = partial(_laid_out, half=half, layout=layout, factor=factor, architecture=architecture)
            make = partial(_half, path, header, key, laid)
            made.append(TensorToWrite(f"{name}.{suffix}", "f32", shape, make))
    return made


def _half(path: Path, header: Header, key: str, laid: Callable[[Tensor], Tensor]) -> Iterator[Bytes]:
    yield encode(laid(read_tensor(path, key, header=header).float()), "f32", where=key)


def _scaling(config: AdapterConfig, layer: str, rank: int) -> float:
    """What B is multiplied by: the layer's scaling over llama.cpp's alpha / r."""
    scaling = config.alpha_of(layer) / (math.sqrt(rank) if config.rank_stabilised else rank)
    return scaling * rank / config.alpha


def _laid_out(tensor: Tensor, *, half: str, layout: Layout, factor: float, architecture: Architecture) -> Tensor:
    if half == "A":
        return tensor
    order = architecture.row_order(layout, tensor.shape[0])
    tensor = tensor if order is None else tensor[order]
    return tensor if factor == 1.0 else tensor * factor

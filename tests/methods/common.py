"""Blocks of real modules over a few rows, as a block method is given them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from strop.calibrate.block import CalibrationBlock
from strop.calibrate.stream import BlockError, BlockStream
from strop.data.batches import Batch, padded_batch
from strop.data.templates import Sample
from strop.layers.surgery import linear_modules
from strop.methods.base import BlockResult
from strop.models.blocks import BlockwiseModel
from strop.numerics import Scheme, parse_scheme
from tests.tiny import tiny_folder

PLANTED = (5, 40)
"""Channels of the inputs that `planted` makes large."""

Work = Callable[[CalibrationBlock], Mapping[str, Tensor]]


def through_blocks(folder: Path, work: Work, *, rows: int = 4, length: int = 24, first: int = 2) -> list[BlockError]:
    """Take random rows of unequal length through a model's first blocks; a second batch of them is held out."""
    model = BlockwiseModel(folder)
    generator = torch.Generator().manual_seed(0)
    most = min(model.model.config.get_text_config().vocab_size, 300)

    def batch() -> Batch:
        lengths = [length - 3 * (row % 3) for row in range(rows)]
        samples = [Sample(torch.randint(5, most, (n,), generator=generator).tolist(), [1] * n) for n in lengths]
        return padded_batch(samples, list(range(rows)), pad_id=0)

    stream = BlockStream(model, [batch(), batch()], 1)
    names = list(linear_modules(model.model))
    return [
        stream.through(block, [name for name in names if name.startswith(f"{block}.")], work)
        for block in list(model.blocks)[:first]
    ]


def changed_by(result: BlockResult) -> dict[str, Tensor]:
    """What takes the place of the block's weights and other parameters."""
    return {**result.others, **{layer: weight.dequantize() for layer, weight in result.weights.items()}}


def fitting(block: CalibrationBlock, text: str) -> dict[str, Scheme]:
    """A scheme for each layer: the one asked for, or the same bits per channel where its groups do not fit."""
    scheme = parse_scheme(text)
    return {
        layer: parse_scheme(f"int{scheme.bits}") if weight.shape[1] % (scheme.group_size or 1) else scheme
        for layer, weight in block.weights.items()
    }


def alter(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Change tensors of a saved model in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def planted(folder: Path) -> Path:
    """A tiny Llama that computes what it did, two channels of its attention's inputs 60 times as large."""

    def change(tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            tensors[f"model.layers.{layer}.input_layernorm.weight"][list(PLANTED)] *= 60
            for name in ("q_proj", "k_proj", "v_proj"):
                tensors[f"model.layers.{layer}.self_attn.{name}.weight"][:, list(PLANTED)] /= 60

    return alter(tiny_folder(folder, "llama"), change)

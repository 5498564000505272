"""The model of a run as people use it: RUN/best and RUN/last, written while training goes on.

Adapters are written as PEFT adapters. A model whose weights are trained keeps fp32 masters in memory and is written in
the dtype that its base had on disk; layers that train through their rounding are written as the quantized ones that
they stand for, an adapter among them merged, and beside the model alone with a mark that it serves only merged. All are
put back as they were afterwards, so that training continues from the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strop.errors import ModelError
from strop.files.folders import atomic_folder
from strop.files.peft_adapter import BaseRecord, save_adapter, write_adapter
from strop.files.saving import save_model, write_model
from strop.layers.quantized import QUANTIZED, THROUGH_ROUNDING
from strop.layers.surgery import adapters_alone, replace
from strop.numerics.reductions import all_finite

ADAPTER = "adapter"
"""The folder in a merged model's that holds the adapter alone."""


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, *, dtype: torch.dtype
) -> None:
    """Write a whole model to `folder`, replacing what is there; `model` is left as it was.

    Args:
        model: dense, or with layers that train through their rounding.
        tokenizer: saved beside it.
        folder: where to.
        dtype: of everything that is not quantized.

    Raises:
        ModelError: a weight is NaN or infinite, or becomes so in `dtype`.
    """
    with as_stored(model, dtype=dtype):
        save_model(model, tokenizer, folder, overwrite=True)


def export_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, *, base: BaseRecord
) -> None:
    """Write the model's adapters to `folder`, replacing what is there."""
    save_adapter(model, folder, base=base, tokenizer=tokenizer, overwrite=True)


def export_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    dtype: torch.dtype,
    base: BaseRecord,
) -> None:
    """Write a model whose adapters train through the rounding: merged, and the adapters in its folder `adapter`.

    Args:
        model: with `QatLoraLinear` layers.
        tokenizer: saved beside it.
        folder: where to, replacing what is there.
        dtype: of everything that is not quantized.
        base: what the adapters were trained on.

    Raises:
        ModelError: a weight or an adapter is NaN or infinite.
    """
    with atomic_folder(folder, overwrite=True) as temporary:
        with as_stored(model, dtype=dtype):
            write_model(model, tokenizer, temporary)
        (temporary / ADAPTER).mkdir()
        with adapters_alone(model):
            write_adapter(model, temporary / ADAPTER, base=base, merge_only=True)


@contextlib.contextmanager
def as_stored(model: nn.Module, *, dtype: torch.dtype) -> Iterator[None]:
    """Show `model` for a while as it will be stored: `QuantLinear` for what trains through its rounding, the rest in
    `dtype`.

    Raises:
        ModelError: a weight is NaN or infinite, or becomes so in `dtype`.
    """
    fakes = {name: module for name, module in model.named_modules() if isinstance(module, THROUGH_ROUNDING)}
    kept: dict[str, torch.Tensor] = {}
    parameters: dict[str, nn.Parameter] = {}
    try:
        for name, fake in fakes.items():
            replace(model, name, fake.to_quant_linear())
        packed = {
            id(value) for module in model.modules() if isinstance(module, QUANTIZED) for value in module.parameters()
        }
        packed -= {id(module.bias) for module in model.modules() if isinstance(module, QUANTIZED)}
        parameters = {
            name: value
            for name, value in model.named_parameters()
            if id(value) not in packed and value.is_floating_point()
        }
        broken = []
        for name, parameter in parameters.items():
            kept[name] = parameter.data
            parameter.data = parameter.data.to(dtype)
            if not all_finite(parameter.data):
                broken.append(name)
        if broken:
            raise ModelError(
                f"{len(broken)} tensors hold NaN or infinite values in {dtype}: {', '.join(broken[:5])}; nothing was "
                "saved. Go back to an earlier checkpoint, and lower learning_rate"
            )
        yield
    finally:
        for name, data in kept.items():
            parameters[name].data = data
        for name, fake in fakes.items():
            replace(model, name, fake)

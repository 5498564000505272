"""The model of a run as people use it: RUN/best and RUN/last, written while training goes on.

Adapters are written as PEFT adapters. A model whose weights are trained keeps fp32 masters in memory and is written in
the dtype that its base had on disk; QAT's layers are written as the quantized ones that they stand for. Both are put
back as they were afterwards, so that training continues from the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strop.errors import ModelError
from strop.files.peft_adapter import BaseRecord, save_adapter
from strop.files.saving import save_model
from strop.layers.fake_quant_linear import FakeQuantLinear
from strop.layers.quantized import QUANTIZED
from strop.layers.surgery import replace


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, *, dtype: torch.dtype
) -> None:
    """Write a whole model to `folder`, replacing what is there; `model` is left as it was.

    Args:
        model: dense, or with `FakeQuantLinear` layers.
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


@contextlib.contextmanager
def as_stored(model: nn.Module, *, dtype: torch.dtype) -> Iterator[None]:
    """Show `model` for a while as it will be stored: `QuantLinear` for `FakeQuantLinear`, the rest in `dtype`.

    Raises:
        ModelError: a weight is NaN or infinite, or becomes so in `dtype`.
    """
    fakes = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)}
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
            if not torch.isfinite(parameter.data).all():
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

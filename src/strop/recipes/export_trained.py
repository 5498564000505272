"""The model of a run that trains on a grid which only a GGUF file holds (Q4_K): RUN/best/model.gguf and RUN/last.

The file is written from the model in memory, its codes as training saw them; embedding and head are 16-bit floats, the
tokenizer lies in it. An adapter that was rounded with its base lies beside it, marked to be merged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from strop.config import QatLora, Rounded
from strop.files.folders import atomic_folder
from strop.files.gguf.architectures import architecture_of
from strop.files.gguf.writer import write_gguf
from strop.files.peft_adapter import BaseRecord, write_adapter
from strop.files.saving import checkpoint_tensors
from strop.layers.surgery import adapters_alone
from strop.models.sources import TRAINED_FILE, find_folder
from strop.numerics.scheme import parse_format
from strop.recipes.export_plan import plan_file, vocabulary_of
from strop.recipes.export_source import ModelWeights
from strop.training.exporting import ADAPTER, as_stored


def only_gguf_holds(method: object) -> bool:
    """Whether a method trains on a grid that no folder holds."""
    return isinstance(method, Rounded) and parse_format(method.format).scheme.super_size is not None


def gguf_exporter(
    model: PreTrainedModel,
    method: Rounded,
    *,
    source: str,
    chat_template: str | None,
    base: BaseRecord,
    dtype: torch.dtype,
) -> Callable[[Path], None]:
    """Writes the model as it stands to a folder, as a GGUF file.

    Args:
        model: with layers that train through the rounding.
        method: how it trains; its format is one of GGUF's.
        source: the model that it was, whose tokenizer goes into the file.
        chat_template: the one that was trained through, for models that have none.
        base: what adapters were trained on.
        dtype: of everything that is not quantized.

    Raises:
        FormatError: llama.cpp has no such architecture or tokenizer; before anything is trained.
    """
    name = parse_format(method.format).container_type
    assert name is not None
    folder = find_folder(source)
    architecture = architecture_of(model.config)
    metadata = architecture.metadata(model.config)
    rows = cast("Tensor", model.get_input_embeddings().weight).shape[0]
    words, _ = vocabulary_of(folder, rows, chat_template)

    def export(target: Path) -> None:
        with atomic_folder(target, overwrite=True) as temporary:
            with as_stored(model, dtype=dtype):
                made_of = {"model": source, "base_sha256": base.digest}
                weights = ModelWeights(folder, model.config, *checkpoint_tensors(model))
                plan = plan_file(weights, architecture, metadata, words, name, made_of, None, "f16")
                with (temporary / TRAINED_FILE).open("wb") as file:
                    write_gguf(file, plan.metadata, plan.to_write)
            if isinstance(method, QatLora):
                (temporary / ADAPTER).mkdir()
                with adapters_alone(model):
                    write_adapter(model, temporary / ADAPTER, base=base, merge_only=True)

    return export

"""What will be in a GGUF file: its keys, its vocabulary and its tensors, planned before a byte is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from strop import __version__
from strop.data.templates import set_chat_template, stop_ids
from strop.errors import ModelError
from strop.files.folders import read_json
from strop.files.gguf.architectures import Architecture
from strop.files.gguf.mixtures import FILE_TYPES, RUNTIME_TYPES, Mixture
from strop.files.gguf.rope import Value
from strop.files.gguf.sentencepiece import read_sentencepiece
from strop.files.gguf.vocabulary import Vocabulary, vocabulary, vocabulary_of_pieces
from strop.files.gguf.writer import TensorToWrite
from strop.models.opening import open_tokenizer
from strop.recipes.export_importance import Importance
from strop.recipes.export_source import Weights
from strop.recipes.export_tensors import TensorRecord, gguf_tensors

_QUANTIZATION_VERSION: Final = 2


@dataclass(frozen=True)
class FilePlan:
    """Everything that will be in the file.

    Attributes:
        metadata: its keys.
        to_write: its tensors.
        records: what will have become of each.
        notes: what is to be said.
        importance: mean squared inputs of columns, by layer.
    """

    metadata: dict[str, Value]
    to_write: list[TensorToWrite]
    records: dict[str, TensorRecord]
    notes: list[str]
    importance: Mapping[str, Tensor]


def vocabulary_of(folder: Path, rows: int, chat_template: str | os.PathLike[str] | None) -> tuple[Vocabulary, Any]:
    """The vocabulary for an embedding of so many rows, and the tokenizer of a folder where transformers opens it; a
    SentencePiece file alone does as well.
    """
    file = folder / "tokenizer.model"
    pieces = read_sentencepiece(file) if file.is_file() else None
    try:
        tokenizer = open_tokenizer(folder)
    except ModelError:
        if pieces is None:
            raise
        words = vocabulary_of_pieces(pieces, rows=rows, stops=_stops(folder, None))
        words.notes.append(
            "the tokenizer was read from tokenizer.model, as transformers opens none here; there is no chat template"
        )
        return words, None
    if chat_template is not None:
        set_chat_template(tokenizer, os.fspath(chat_template))
    return vocabulary(tokenizer, rows=rows, stops=_stops(folder, tokenizer), pieces=pieces), tokenizer


def plan_file(
    source: Weights,
    architecture: Architecture,
    metadata: dict[str, Value],
    words: Vocabulary,
    name: str,
    made_of: Mapping[str, Any],
    weighed: Importance | None,
    ends: str | None,
) -> FilePlan:
    """Plan a file.

    Args:
        source: the weights.
        architecture: of the model.
        metadata: the architecture's keys.
        words: the vocabulary.
        name: the format, without `gguf:`.
        made_of: where it came from, for `strop.provenance`.
        weighed: how much each column is used, or None.
        ends: the type of embedding and head; None where the format chooses.
    """
    config = source.config
    tied = bool(getattr(config, "tie_word_embeddings", False))
    kind = _full_type(source) if name in RUNTIME_TYPES else name
    tied_there = tied and not architecture.table.untied_only
    mixture = Mixture(kind, architecture.blocks, architecture.experts, tied_there, ends)
    importance = {} if weighed is None else weighed.columns
    tensors = gguf_tensors(source, architecture, mixture, tied=tied, importance=importance)
    general = general_keys(str(made_of["model"]), words.tokens) | {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.file_type": {**FILE_TYPES, **RUNTIME_TYPES}[name],
        "general.quantization_version": _QUANTIZATION_VERSION,
        "strop.provenance": json.dumps(made_of),
    }
    notes = [*architecture.notes(config), *words.notes]
    return FilePlan(general | metadata | words.metadata(), tensors.to_write, tensors.records, notes, importance)


def _full_type(source: Weights) -> str:
    """The type that holds every weight of a folder exactly."""
    if source.container is None:
        kinds = {source.dtype(name) for name in source.names}
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
            if kinds == {dtype}:
                return name
    return "f32"


def _stops(folder: Path, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's end, those of generation_config.json, those of the chat template."""
    stops = [tokenizer.eos_token_id] if tokenizer is not None and tokenizer.eos_token_id is not None else []
    if (folder / "generation_config.json").is_file():
        given = read_json(folder / "generation_config.json").get("eos_token_id")
        stops += [number for number in (given if isinstance(given, list) else [given]) if isinstance(number, int)]
    if tokenizer is not None and tokenizer.chat_template:
        stops += stop_ids(tokenizer)
    return list(dict.fromkeys(stops))


def general_keys(model: str, tokens: list[str]) -> dict[str, Value]:
    """The file's own keys. llama.cpp treats models by some names as if they had certain tokens: those are avoided."""
    title = Path(model).resolve().name or model
    needed = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
    for part in ("phi-3", "phi3", "modern-bert"):
        if part in title.lower() and not needed <= set(tokens):
            title = title.lower().replace(part, part[:3] + "_" + part[3:].lstrip("-"))
    return {"general.name": title, "general.quantized_by": f"strop {__version__}"}

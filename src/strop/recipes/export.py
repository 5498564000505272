"""`export`: a model as one GGUF file, proved before it has its name.

    folder or run                 weights in their own dtype, encoded tensor by tensor
    quantized folder              codes moved where GGUF has the grid, else decoded and encoded: a second rounding
    adapter                       merged into its base first (`merge`); or alone, as a GGUF adapter (`adapter_only`)

Memory holds a piece of a tensor, the disk is asked for the whole file first, and the file stands under a temporary name
until it is proved: in llama.cpp against the model it was made from (`export_proof`), or, where llama.cpp is not
installed, read back by the `gguf` package and by strop's own reader, tensor by tensor; which of the two is said and
recorded. Beside it stand a card (what it is, what was lost, how to run it) and, asked for, an Ollama Modelfile.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from strop import __version__
from strop.data.templates import stop_ids
from strop.errors import FormatError, UsageError
from strop.files.folders import read_json, sha256_file
from strop.files.gguf.architectures import architecture_of
from strop.files.gguf.mixtures import FILE_TYPES, Mixture, parse_export_format
from strop.files.gguf.rope import Value
from strop.files.gguf.vocabulary import vocabulary
from strop.files.gguf.writer import TensorToWrite, atomic_file, check_disk, check_file_target, file_bytes, write_gguf
from strop.files.peft_adapter import base_digest
from strop.models.opening import open_tokenizer
from strop.models.sources import find_folder, is_adapter
from strop.progress import SILENT, Reporter
from strop.recipes.export_check import read_back
from strop.recipes.export_source import Source, open_source
from strop.recipes.export_tensors import TensorRecord, gguf_tensors
from strop.recipes.merge import merge
from strop.recipes.recording import record, recorded

_QUANTIZATION_VERSION: Final = 2


@dataclass(frozen=True)
class ExportResult:
    """An exported file and what is known of it.

    Attributes:
        path: the file.
        format: what was asked for, `gguf:...`.
        nbytes: its size.
        sha256: of its bytes.
        tensors: what became of each tensor.
        notes: what a user should know of it.
        proof: how it was proved, in sentences; the first says whether.
        beside: files written beside it.
        receipt: all of it as plain values.
    """

    path: Path
    format: str
    nbytes: int
    sha256: str
    tensors: list[TensorRecord]
    notes: list[str]
    proof: list[str]
    beside: list[Path] = field(default_factory=list)
    receipt: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The result in sentences."""
        return [
            *summary(self.tensors),
            *(f"note: {note}" for note in self.notes),
            *self.proof,
            f"{self.path}: {self.format}, {self.nbytes:,} bytes, SHA-256 {self.sha256[:16]}",
            *(f"beside it: {path}" for path in self.beside),
        ]


@recorded
def export(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str,
    verify: bool = True,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> ExportResult:
    """Write a model as a GGUF file.

    Args:
        model: a folder, a run, an adapter, a hub id, or "demo".
        output: the file.
        format: `gguf:` and a type or mixture.
        verify: prove the file before it gets its name.
        overwrite: replace what stands at `output`.
        reporter: told what happens.

    Raises:
        UsageError: something stands at `output`, or cannot be written there.
        FormatError: an unknown format, or an architecture or a tokenizer that llama.cpp does not have.
        DiskFullError: the disk has no room for the file.
        GateError: the proof failed; nothing was kept.
        ModelError, FileFormatError, MissingInputError: as the model's opening raises them.
    """
    name = parse_export_format(format)
    target = check_file_target(output, overwrite=overwrite)
    with _whole(find_folder(model), target, reporter) as folder:
        source = open_source(folder)
        plan = _plan(source, name, str(model), {})
        check_disk(target.parent, file_bytes(plan.metadata, plan.to_write))
        for note in plan.notes:
            reporter.note(f"note: {note}")
        with atomic_file(target, overwrite=overwrite) as temporary:
            _write(temporary, plan, reporter)
            proof = _prove(temporary, plan, verify=verify, reporter=reporter)
            nbytes, sha256 = temporary.stat().st_size, sha256_file(temporary)
        receipt = {
            "model": str(model),
            "base_sha256": base_digest(folder),
            "format": f"gguf:{name}",
            "bytes": nbytes,
            "sha256": sha256,
            "notes": plan.notes,
            "proof": proof,
            "made_by": record(),
            "tensors": [tensor.to_dict() for tensor in plan.records.values()],
        }
    return ExportResult(
        target, f"gguf:{name}", nbytes, sha256, list(plan.records.values()), plan.notes, proof, [], receipt
    )


@dataclass(frozen=True)
class _Plan:
    """Everything that will be in the file."""

    source: Source
    metadata: dict[str, Value]
    to_write: list[TensorToWrite]
    records: dict[str, TensorRecord]
    notes: list[str]


def _plan(source: Source, name: str, model: str, importance: Mapping[str, Tensor]) -> _Plan:
    config = source.config
    architecture = architecture_of(config)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    mixture = Mixture(name, architecture.blocks, architecture.experts, tied and not architecture.table.untied_only)
    metadata = architecture.metadata(config)
    tensors = gguf_tensors(source, architecture, mixture, tied=tied, importance=importance)
    tokenizer = open_tokenizer(source.folder)
    embedding = tensors.records["token_embd.weight"].shape[0]
    words = vocabulary(tokenizer, rows=embedding, stops=_stops(source.folder, tokenizer))
    general: dict[str, Value] = {
        "general.architecture": metadata.pop("general.architecture"),
        "general.type": "model",
        "general.name": _title(model, words.tokens),
        "general.quantized_by": f"strop {__version__}",
        "general.file_type": FILE_TYPES[name],
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    notes = [*architecture.notes(config), *words.notes]
    return _Plan(source, general | metadata | words.metadata(), tensors.to_write, tensors.records, notes)


def _write(path: Path, plan: _Plan, reporter: Reporter) -> None:
    reporter.start("write the file", len(plan.to_write), "tensors")
    try:
        with path.open("wb") as file:
            write_gguf(
                file, plan.metadata, plan.to_write, told=lambda done, tensor: reporter.advance(done, tensor=tensor)
            )
    finally:
        reporter.finish()


def _prove(path: Path, plan: _Plan, *, verify: bool, reporter: Reporter) -> list[str]:
    if not verify:
        return ["not proved: --no-verify"]
    reporter.start("read the file back", len(plan.records), "tensors")
    try:
        read_back(path, plan.metadata, plan.records, told=lambda done: reporter.advance(done))
    finally:
        reporter.finish()
    return [
        "read back by the gguf package and by strop's reader: every key and every tensor as they were written; "
        "the proof in llama.cpp itself was not made: it needs `pip install 'strop[gguf]'`"
    ]


@contextlib.contextmanager
def _whole(folder: Path, target: Path, reporter: Reporter) -> Iterator[Path]:
    """A folder that holds a whole model: an adapter is merged into its base for as long as the export takes."""
    if not is_adapter(folder):
        yield folder
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".merged", dir=target.parent) as scratch:
        result = merge(folder, Path(scratch) / "model", reporter=reporter)
        for line in result.lines()[:-1]:
            reporter.note(line)
        yield result.path


def _stops(folder: Path, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's end, those of generation_config.json, those of the chat template."""
    stops = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if (folder / "generation_config.json").is_file():
        given = read_json(folder / "generation_config.json").get("eos_token_id")
        stops += [number for number in (given if isinstance(given, list) else [given]) if isinstance(number, int)]
    if tokenizer.chat_template:
        stops += stop_ids(tokenizer)
    return list(dict.fromkeys(stops))


def _title(model: str, tokens: list[str]) -> str:
    """A name for the file; llama.cpp treats models by some names as if they had certain tokens."""
    title = Path(model).name or model
    needed = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
    if any(part in title.lower() for part in ("phi-3", "phi3")) and not needed <= set(tokens):
        title = title.lower().replace("phi-3", "phi_3").replace("phi3", "phi_3")
    return title.lower().replace("modern-bert", "modern_bert") if "modern-bert" in title.lower() else title


def summary(records: list[TensorRecord]) -> list[str]:
    """How many tensors took which type, what that lost, and which took another than was asked for."""
    kinds: dict[str, list[TensorRecord]] = {}
    for one in records:
        kinds.setdefault(one.type, []).append(one)
    lines = []
    for kind, ones in sorted(kinds.items(), key=lambda item: -sum(one.nbytes for one in item[1])):
        weights = sum(math.prod(one.shape) for one in ones)
        error, power = sum(one.error for one in ones), sum(one.power for one in ones)
        moved = sum(one.how == "moved" for one in ones)
        said = f"{len(ones)} tensors ({weights:,} weights) as {kind}"
        if moved:
            said += f", the codes of {moved} taken over bit for bit"
        if error:
            said += f", relative error {math.sqrt(error / power):.2e}"
        lines.append(said)
    again = [one for one in records if one.how == "rounded again"]
    if again:
        lines.append(
            f"WARNING: {len(again)} tensors were quantized before on another grid and have been rounded a second time "
            f"({again[0].name}, ...); export the full-precision model instead, or choose the type of their grid"
        )
    lines += [f"{one.name}: {one.type}, as {one.reason}" for one in records if one.reason]
    return lines


__all__ = ["ExportResult", "FormatError", "UsageError", "export"]

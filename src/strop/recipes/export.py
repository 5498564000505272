"""`export`: a model as one GGUF file, proved before it has its name.

    folder or run                 weights in their own dtype, encoded tensor by tensor
    quantized folder              codes moved where GGUF has the grid, else decoded and encoded: a second rounding
    adapter                       merged into its base first (`merge`); or alone, as a GGUF adapter (`adapter_only`)

Memory holds a piece of a tensor, the disk is asked for the whole file first, and the file stands under a temporary name
until it is proved: read back by the `gguf` package and by strop's own reader, tensor by tensor, and, where llama.cpp is
installed, run there beside the model that it was made from (`export_proof`). What was proved is said and recorded.
Beside the file stand a card, a receipt and, asked for, an Ollama Modelfile (`export_beside`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from strop.errors import FormatError, GateError, MissingInputError, UsageError, nearest
from strop.files.folders import sha256_file
from strop.files.gguf.adapters import adapter_metadata, adapter_tensors
from strop.files.gguf.architectures import architecture_of
from strop.files.gguf.blocks import Bytes
from strop.files.gguf.mixtures import FILE_TYPES, RUNTIME_TYPES, parse_export_format
from strop.files.gguf.reader import GgufFile
from strop.files.gguf.rope import Value
from strop.files.gguf.vocabulary import Vocabulary
from strop.files.gguf.writer import TensorToWrite, atomic_file, check_disk, check_file_target, file_bytes, write_gguf
from strop.files.peft_adapter import base_digest, read_adapter_config
from strop.models.sources import TRAINED_FILE, find_folder, is_adapter, read_config
from strop.pages.atomic import write_whole
from strop.progress import SILENT, Reporter
from strop.recipes.export_beside import CARD, MODELFILE, RECEIPT, card, modelfile, origin
from strop.recipes.export_check import read_back
from strop.recipes.export_importance import measure_importance
from strop.recipes.export_plan import FilePlan, general_keys, plan_file, vocabulary_of
from strop.recipes.export_proof import prove_export
from strop.recipes.export_runtime import quantize_in_runtime
from strop.recipes.export_source import open_source
from strop.recipes.export_summary import summary
from strop.recipes.export_tensors import HOW, Made, TensorRecord
from strop.recipes.manifest import adapter_digest
from strop.recipes.merge import merge
from strop.recipes.probing import rounded_method
from strop.recipes.recording import record, recorded
from strop.recipes.rows import Rows
from strop.runtime.library import library

_STOP_KEYS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")
_ROUNDING: Final = frozenset({*FILE_TYPES, *RUNTIME_TYPES} - {"f32", "f16", "bf16", "q8_0"})
"""Formats whose encoding an importance of the columns changes."""


@dataclass(frozen=True)
class ExportResult:
    """An exported file and what is known of it.

    Attributes:
        path: the file.
        tensors: what became of each tensor.
        proof: how it was proved, in sentences.
        beside: files written beside it.
        receipt: all of it as plain values.
    """

    path: Path
    tensors: list[TensorRecord]
    proof: list[str]
    beside: list[Path] = field(default_factory=list)
    receipt: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The result in sentences."""
        return [
            *summary(self.tensors),
            *(f"note: {note}" for note in self.receipt["notes"]),
            *self.proof,
            f"{self.path}: {self.receipt['format']}, {self.receipt['bytes']:,} bytes, "
            f"SHA-256 {self.receipt['sha256'][:16]}...; beside it: {', '.join(path.name for path in self.beside)}",
        ]


@recorded
def export(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str,
    data: Rows | None = None,
    max_rows: int = 128,
    max_length: int | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    adapter_only: bool = False,
    embeddings: str | None = None,
    modelfile: bool = False,
    verify: bool = True,
    max_kl: float | None = None,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> ExportResult:
    """Write a model as a GGUF file.

    Args:
        model: a folder, a run, an adapter, a hub id, or "demo".
        output: the file.
        format: `gguf:` and a type or mixture.
        data: rows over which the use of each column is measured, so that rounding spares what is used most.
        max_rows: rows of `data` that are used; a quarter of them is left out, as `quantize` does.
        max_length: most tokens of a row.
        chat_template: for models that have none, as `tune` takes it; it is embedded, and rows are written by it.
        adapter_only: the adapter alone, as a GGUF adapter.
        embeddings: the type of embedding and head (f16, q8_0, q6_k ...), in the place of what the format chooses; a
            model that was trained through this very format keeps them as training saw them, in 16 bits, by default.
        modelfile: write an Ollama Modelfile too.
        verify: prove the file before it gets its name.
        max_kl: most nats per token between the file in llama.cpp and the model; the type's own gate by default.
        overwrite: replace what stands at `output` and beside it.
        reporter: told what happens.

    Raises:
        UsageError: something stands at `output` or beside it, or options that contradict each other.
        FormatError: an unknown format, or an architecture or a tokenizer that llama.cpp does not have.
        DiskFullError: the disk has no room for the file.
        GateError: the proof failed; nothing was kept.
        ModelError, FileFormatError, MissingInputError: as the model's opening raises them.
    """
    name = parse_export_format(format)
    target = check_file_target(output, overwrite=overwrite)
    endings = [CARD, RECEIPT, *([MODELFILE] if modelfile else [])]
    beside = [check_file_target(target.with_name(target.name + ending), overwrite=overwrite) for ending in endings]
    folder = find_folder(model)
    if max_kl is not None and not verify:
        raise UsageError("--max-kl is judged by the proof; leave --no-verify out")
    if folder.name == TRAINED_FILE and folder.is_file():
        ignored = {"--data": data, "--chat-template": chat_template, "--embeddings": embeddings}
        given = [name for name, value in ignored.items() if value is not None]
        given += ["--adapter-only"] if adapter_only else []
        given += ["--modelfile"] if modelfile else []
        if given:
            raise UsageError(
                f"{folder}: is the very file that was trained, and is exported as it is; leave out {', '.join(given)}"
            )
        return _export_trained(
            folder, Path(output), beside, str(model), name, verify=verify, max_kl=max_kl, overwrite=overwrite,
            reporter=reporter,
        )  # fmt: skip
    _check_options(folder, name, data=data, adapter_only=adapter_only, modelfile=modelfile)
    if adapter_only:
        return _export_adapter(folder, Path(output), beside, str(model), verify=verify, overwrite=overwrite)
    ends = _ends(folder, name, embeddings)
    with _whole(folder, target, reporter) as whole:
        source = open_source(whole)
        architecture = architecture_of(source.config)
        metadata = architecture.metadata(source.config)  # refuses what llama.cpp computes otherwise, before any work
        rows = source.shape(architecture.embedding_name(source.names))[0]
        words, tokenizer = vocabulary_of(whole, rows, chat_template)
        weighed = None
        if data is not None:
            weighed = measure_importance(
                source,
                architecture,
                data,
                max_rows=max_rows,
                max_length=max_length,
                chat_template=chat_template,
                reporter=reporter,
            )
        made_of = {"model": str(model), "base_sha256": base_digest(whole), "origin": origin(folder)}
        made_of["importance"] = None if weighed is None else dict(weighed.rows)
        plan = plan_file(source, architecture, metadata, words, name, made_of, weighed, ends)
        for note in plan.notes:
            reporter.note(f"note: {note}")
        with atomic_file(target, overwrite=overwrite) as temporary:
            read = _make(temporary, plan, name, verify=verify, reporter=reporter)
            run = _run(temporary, target.name, model, verify=verify, max_kl=max_kl, reporter=reporter)
            proof = _Proof([*read, *run.lines], run.run)
            made_of["model_path"] = os.path.abspath(folder)  # in no file that is sent to others
            receipt = _receipt(temporary, f"gguf:{name}", made_of, plan.notes, proof, plan.records)
        result = ExportResult(Path(output), list(plan.records.values()), proof.lines, beside, receipt)
        _write_beside(result, words, tokenizer, source.config)
    return result


def _ends(folder: Path, name: str, embeddings: str | None) -> str | None:
    """The type of embedding and head; None where the format chooses.

    Raises:
        FormatError: there is no such type.
        UsageError: the format is written by llama.cpp's quantizer, which chooses itself.
    """
    if embeddings is not None:
        wanted = embeddings.lower().removeprefix("gguf:")
        if wanted not in FILE_TYPES or wanted == "q4_k_m":
            raise FormatError(
                f"--embeddings {embeddings}: unknown{nearest(wanted, FILE_TYPES)}; there are {', '.join(FILE_TYPES)}"
            )
        if name in RUNTIME_TYPES:
            raise UsageError(f"--embeddings: gguf:{name} is written by llama.cpp's own quantizer, which chooses them")
        return wanted
    method = rounded_method(folder)
    return "f16" if method is not None and method.format == f"gguf:{name}" else None


def _check_options(folder: Path, name: str, *, data: Rows | None, adapter_only: bool, modelfile: bool) -> None:
    if adapter_only:
        if not is_adapter(folder):
            raise UsageError(f"{folder}: --adapter-only takes an adapter, and this is a whole model; leave it out")
        if name != "f32":
            raise UsageError(f"--format gguf:{name}: an adapter alone is kept in full precision; use gguf:f32")
        if data is not None or modelfile:
            raise UsageError("--adapter-only goes without --data and --modelfile: nothing is rounded, no model is made")
    if not folder.is_dir():
        raise UsageError(f"{folder}: is a file already; export the model that it was made from")
    if data is not None and name not in _ROUNDING:
        raise UsageError(
            f"--data weighs the columns of what is rounded in a search, and gguf:{name} has none; leave it out, or use "
            "gguf:q4_k_m, gguf:q4_0 ..."
        )
    if name in RUNTIME_TYPES:
        try:
            library()
        except MissingInputError as error:
            raise UsageError(
                f"--format gguf:{name}: is written by llama.cpp's own quantizer. {error} Without it there are "
                f"gguf:{', gguf:'.join(FILE_TYPES)}"
            ) from error


def _make(path: Path, plan: FilePlan, name: str, *, verify: bool, reporter: Reporter) -> list[str]:
    """Write a file and prove it; returns what was proved."""
    if name in RUNTIME_TYPES:
        quantize_in_runtime(path, plan.metadata, plan.to_write, plan.records, name, plan.importance, reporter=reporter)
    else:
        check_disk(path.parent, file_bytes(plan.metadata, plan.to_write))
        _write(path, plan.metadata, plan.to_write, reporter)
    return _prove(path, plan.metadata, plan.records, verify=verify, reporter=reporter)


def _write(path: Path, metadata: Mapping[str, Value], tensors: list[TensorToWrite], reporter: Reporter) -> None:
    reporter.start("write the file", len(tensors), "tensors")
    try:
        with path.open("wb") as file:
            write_gguf(file, metadata, tensors, told=lambda done, tensor: reporter.advance(done, tensor=tensor))
    finally:
        reporter.finish()


def _export_trained(
    file: Path,
    output: Path,
    beside: list[Path],
    model: str,
    name: str,
    *,
    verify: bool,
    max_kl: float | None,
    overwrite: bool,
    reporter: Reporter,
) -> ExportResult:
    """The very file that a run trained, under its new name once it is proved.

    Raises:
        UsageError: another format is asked for, or options that only another writing could meet.
        GateError: the proof failed.
    """
    method = rounded_method(file)
    if method is None or method.format != f"gguf:{name}":
        trained = "no format that is recorded" if method is None else method.format
        raise UsageError(f"{file}: is a file already, trained as {trained}; it is exported in that format, as it is")
    read = GgufFile.open(file)
    records = [
        TensorRecord(
            tensor.name, tensor.type, tensor.shape, (), how=HOW[1] if tensor.type == name else HOW[0],
            nbytes=tensor.nbytes,
        )
        for tensor in read.tensors.values()
    ]  # fmt: skip
    with atomic_file(output, overwrite=overwrite) as temporary:
        shutil.copyfile(file, temporary)
        run = _run(temporary, output.name, model, verify=verify, max_kl=max_kl, reporter=reporter)
        made_of = {"model": model, "base_sha256": base_digest(file), "origin": origin(file.parent), "importance": None}
        made_of["model_path"] = os.path.abspath(file.parent)
        proof = _Proof(["the file that was trained, byte for byte", *run.lines], run.run)
        receipt = _receipt(temporary, f"gguf:{name}", made_of, [], proof, {one.name: one for one in records})
    result = ExportResult(output, records, proof.lines, beside, receipt)
    for path in beside:
        if path.name.endswith(RECEIPT):
            _write_receipt(path, result)
        else:
            _write_card(path, result, prompt="tokenizer.chat_template" in read.metadata)
    return result


@dataclass(frozen=True)
class _Proof:
    """How a file was proved, in sentences, and the figures of its run; None where it was not run."""

    lines: list[str]
    run: dict[str, Any] | None = None


def _prove(
    path: Path, metadata: Mapping[str, Value], records: Mapping[str, TensorRecord], *, verify: bool, reporter: Reporter
) -> list[str]:
    """Read a file back; returns what that proves, or that it was left out."""
    if not verify:
        return ["NOT PROVED: --no-verify was given; nothing was read back and nothing was run"]
    reporter.start("read the file back", len(records), "tensors")
    try:
        read_back(path, metadata, records, told=lambda done: reporter.advance(done))
    finally:
        reporter.finish()
    return ["read back by the gguf package and by strop's reader: every key and every tensor as they were written"]


def _run(
    path: Path, name: str, model: str | os.PathLike[str], *, verify: bool, max_kl: float | None, reporter: Reporter
) -> _Proof:
    """Run a file in llama.cpp beside the model that it was made from.

    Raises:
        GateError: it is not that model.
    """
    if not verify:
        return _Proof([])
    try:
        library()
    except MissingInputError as error:
        return _Proof([f"NOT RUN in llama.cpp, where it is to serve: {error}"])
    try:
        proof = prove_export(path, model, name=name, max_kl=max_kl, reporter=reporter)
    except GateError as error:
        raise GateError(f"{error}\nNothing was kept; choose a format of more bits, or a larger --max-kl") from None
    return _Proof(proof.lines(), proof.to_dict())


def _export_adapter(
    folder: Path, target: Path, beside: list[Path], model: str, *, verify: bool, overwrite: bool
) -> ExportResult:
    """An adapter alone; its base is needed for its shape only."""
    config = read_adapter_config(folder)
    if config.merge_only:
        raise UsageError(
            f"{folder}: was trained to be merged into its base and is worse than the base beside it; leave "
            "--adapter-only out"
        )
    base = find_folder(config.base)
    architecture = architecture_of(read_config(base)[0])
    made_of = {"model": model, "base_sha256": adapter_digest(folder), "origin": origin(folder), "importance": None}
    metadata = (
        general_keys(model, []) | adapter_metadata(architecture, config) | {"strop.provenance": json.dumps(made_of)}
    )
    tensors = adapter_tensors(folder, architecture, config)
    records = {one.name: TensorRecord(one.name, one.type, one.shape, ()) for one in tensors}
    watched = [
        TensorToWrite(one.name, one.type, one.shape, partial(_watched, one, records[one.name])) for one in tensors
    ]
    with atomic_file(target, overwrite=overwrite) as temporary:
        check_disk(temporary.parent, file_bytes(metadata, watched))
        _write(temporary, metadata, watched, SILENT)
        read = _prove(temporary, metadata, records, verify=verify, reporter=SILENT)
        proof = _Proof(
            [*read, *(["NOT RUN in llama.cpp: an adapter runs over its base's file alone"] if verify else [])]
        )
        notes = [f"an adapter over {config.base}: llama.cpp opens it with --lora beside a GGUF file of that base"]
        made_of["model_path"] = os.path.abspath(folder)
        receipt = _receipt(temporary, "gguf:f32 adapter", made_of, notes, proof, records)
    result = ExportResult(target, list(records.values()), proof.lines, beside, receipt)
    _write_beside(result, None, None, None)
    return result


def _watched(tensor: TensorToWrite, record: TensorRecord) -> Iterator[Bytes]:
    nothing = torch.empty(0)  # f32 loses nothing, so nothing is compared
    yield from record.watching(Made(raw, nothing) for raw in tensor.make())


def _receipt(
    path: Path,
    format: str,
    made_of: Mapping[str, Any],
    notes: list[str],
    proof: _Proof,
    records: Mapping[str, TensorRecord],
) -> dict[str, Any]:
    return {
        **made_of,
        "format": format,
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "notes": notes,
        "summary": summary(list(records.values())),
        "proof": proof.lines,
        "run": proof.run,
        "made_by": record(),
        "tensors": [tensor.to_dict() for tensor in records.values()],
    }


def _write_beside(result: ExportResult, words: Vocabulary | None, tokenizer: Any, config: Any) -> None:
    name = result.path.name
    for path in result.beside:
        if path.name.endswith(RECEIPT):
            _write_receipt(path, result)
        elif path.name.endswith(MODELFILE):
            assert words is not None
            ends = [words.keys[key] for key in _STOP_KEYS if key in words.keys]
            stops = [words.tokens[number] for number in ends if isinstance(number, int)]
            context = int(getattr(config, "max_position_embeddings", None) or config.n_positions)
            adds = bool(words.keys["add_bos_token"])
            write_whole(path, [modelfile(name, tokenizer, stops, adds_bos=adds, context=context)])
        else:
            template = words is not None and "tokenizer.chat_template" in words.keys
            _write_card(path, result, prompt=template, adapter=words is None)


def _write_receipt(path: Path, result: ExportResult) -> None:
    write_whole(path, [json.dumps(result.receipt, indent=2, allow_nan=False), "\n"])


def _write_card(path: Path, result: ExportResult, *, prompt: bool, adapter: bool = False) -> None:
    text = card(result.path.name, result.receipt, summary(result.tensors), prompt=prompt, adapter=adapter)
    write_whole(path, [text])


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

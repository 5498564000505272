"""`manifest.json` of a run: what it was made of and what it wrote, by hash, so that `verify` can check both again.

Written twice: before the first step, with the inputs and no files yet, so that a killed run says what it was made of
too; and at the end, with every file below the run's folder (checkpoints included; not the lock). Inputs are the data
(a file's or folder's bytes; the rows of a hub id), the rendered rows, the base's weights, the adapter that was trained
further, the chat template with its special tokens, and the configuration.

The manifest vouches for itself: it holds the SHA-256 of its own content and is written in one way only, so that a
changed byte in it is found like one anywhere else. That is a guard against accidents, not against somebody who forges.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Final

from strop.config import DataPart, QatLora, TuneConfig, data_name
from strop.data.readers import EXTENSIONS, extension_of
from strop.data.records import Record
from strop.data.store import sample_lengths
from strop.data.templates import template_hash
from strop.errors import FileFormatError, StropError
from strop.files.folders import MANIFEST, read_json, sha256_file
from strop.files.peft_adapter import base_digest
from strop.models.sources import find_folder, is_adapter
from strop.planner.hardware import this_machine
from strop.planner.memory import MemoryPlan, Step, plan_memory
from strop.planner.parameters import LinearShape, open_shape
from strop.recipes.session import Session
from strop.recipes.teacher import BASE, TeacherSource
from strop.training.settings import TrainSettings, count_steps
from strop.training.shapes import common_width, positions_of
from strop.training.teachers import ModelTeacher

FORMAT: Final = 1
SELF: Final = "manifest_sha256"
NOT_LISTED: Final = (MANIFEST, ".lock")
"""Files at the top of a run's folder that its manifest does not list: itself, and the lock of whoever trains."""


# --- the file itself --------------------------------------------------------------------------------------------------


def save_manifest(run_dir: Path, content: Mapping[str, Any]) -> None:
    """Write RUN/manifest.json whole or not at all, with the hash of its own content."""
    part = run_dir / f".{MANIFEST}.part"
    part.write_text(_text({**content, SELF: _own_hash(content)}), encoding="utf-8")
    os.replace(part, run_dir / MANIFEST)


def load_manifest(run_dir: Path) -> dict[str, Any]:
    """Read RUN/manifest.json.

    Raises:
        MissingInputError: there is none.
        FileFormatError: it is not what was written.
    """
    path = run_dir / MANIFEST
    content = read_json(path)
    if path.read_bytes() != _text(content).encode() or content.pop(SELF, None) != _own_hash(content):
        raise FileFormatError(f"{path}: its bytes changed since they were written, so nothing in it can be relied on")
    if content.get("format") != FORMAT:
        raise FileFormatError(
            f"{path}: format {content.get('format')!r}, this version reads {FORMAT}; verify with the version of strop "
            "that wrote it"
        )
    return content


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _own_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()


def files_below(folder: Path, *, leave_out: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file below a folder, by its path in it; `leave_out` names top folders to pass over."""
    return {
        name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for name, path in paths_below(folder, leave_out=leave_out).items()
    }


def paths_below(folder: Path, *, leave_out: Iterable[str] = ()) -> dict[str, Path]:
    """Every file below a run's folder that its manifest lists, by its path in it."""
    passed = {*NOT_LISTED, *leave_out}
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path
        for name, path in sorted(found.items())
        if name.split("/", 1)[0] not in passed and not (path.name == ".lock" and path.stat().st_size == 0)
    }


# --- what a run was made of -------------------------------------------------------------------------------------------


def run_manifest(session: Session, run_dir: Path, settings: TrainSettings, *, tried: int = 0) -> dict[str, Any]:
    """The manifest of a run that is about to begin with these settings; `finish_manifest` completes it.

    Args:
        session: the run.
        run_dir: its folder.
        settings: the loop's, with what was chosen.
        tried: how many shapes of batches the first checks took, before steps that were undone.
    """
    config, report = session.config, session.report()
    predicted = predicted_memory(session, settings, tried=tried)
    teacher = _teacher_record(session.teacher, run_dir)
    return {
        "format": FORMAT,
        "kind": "run",
        "finished": False,
        "inputs": {
            "data": data_record(config.data, chain(session.splits.train, session.splits.valid), run_dir),
            "rows": {"samples": session.train_set.report.samples, "sha256": session.rows_digest()},
            "base": base_record(session.base.record.base, run_dir),
            "adapter": None if session.base.adapter is None else _adapter_record(config, run_dir),
            **({} if teacher is None else {"teacher": teacher}),
            "template": {"sha256": template_hash(session.tokenizer)},
            "configuration": {"sha256": configuration_digest(config)},
        },
        "seed": config.seed,
        "threads": report["threads"],
        "device": report["device"],
        "versions": report["versions"],
        "machine": {"system": platform.platform(), "processor": platform.machine(), **this_machine().to_dict()},
        "memory": {
            "predicted_bytes": None if predicted is None else predicted.peak_bytes,
            "measured_bytes": None,
        },
        "files": {},
    }


def finish_manifest(run_dir: Path, *, measured_bytes: int) -> None:
    """Complete the manifest of a run that has ended: every file that it wrote, and the memory that it took.

    Nothing happens where it is complete. A manifest from before the first step has to be there.
    """
    content = load_manifest(run_dir)
    if content["finished"]:
        return
    memory = content["memory"] | {"measured_bytes": measured_bytes}
    save_manifest(run_dir, content | {"finished": True, "memory": memory, "files": files_below(run_dir)})


def configuration_digest(config: TuneConfig) -> str:
    """SHA-256 over the resolved settings."""
    settings = {key: value for key, value in config.flat().items() if key != "resume"}
    return hashlib.sha256(_text(settings).encode()).hexdigest()


def predicted_memory(session: Session, settings: TrainSettings, *, tried: int = 0) -> MemoryPlan | None:
    """The planner's figure for this method, batch, length and policy; None where it knows no shape of such a model."""
    config, method = session.config, session.config.method
    try:
        shape, _ = open_shape(session.model.config)
    except StropError:
        return None
    rows = session.train_set.samples
    longest = config.samples.max_length if config.samples.packing else max(sample_lengths(rows))
    adapter = session.base.adapter
    names = set(session.trained.layers)
    adapted: list[LinearShape] = [linear for linear in shape.linears if linear.name in names]
    step = Step(
        rows=config.optimization.batch_size,
        length=longest or 1,
        checkpointing=settings.checkpointing != "none",
        recomputed=settings.checkpointing if isinstance(settings.checkpointing, int) else None,
        rank=adapter.rank if adapter is not None else int(getattr(method, "rank", 16)),
        format=session.trained.scheme.name if session.trained.scheme is not None else "nf4-dq",
        held=session.base.scheme.name if isinstance(method, QatLora) and session.base.scheme is not None else "",
        dtype="bfloat16" if str(session.dtype) == "torch.bfloat16" else "float32",
        attention="block" if session.one_piece else "plain" if session.attention == "eager" else "fused",
        optimizer=config.optimization.optimizer,
        device="cpu" if session.device.type == "cpu" else "accelerator",
        shapes=_trained_shapes(session) + tried,
        tried=tried > 0,
        eval_shapes=_evaluated_shapes(session, settings.eval_batch_size),
        steady=settings.max_memory is not None,
    )
    plan = plan_memory(shape, method.name, step, adapted=adapted or None)
    teacher, beside = session.objective.teacher, shape.linear_weights if settings.int8 else 0  # codes of a byte each
    if isinstance(teacher, ModelTeacher):
        beside += sum(parameter.nbytes for parameter in teacher.model.parameters())
    return replace(plan, weights_bytes=plan.weights_bytes + beside)


def _trained_shapes(session: Session) -> int:
    """How many shapes of micro-batches an epoch has, or the run, if that is shorter."""
    stream, limit = session.stream, positions_of(session.model)
    steps = count_steps(session.config.length, stream.steps_per_epoch)
    return len({(rows, common_width(width, limit=limit)) for rows, width in stream.shapes(steps)})


def _evaluated_shapes(session: Session, batch_size: int) -> int:
    """How many shapes of batches an evaluation has."""
    if session.valid_set is None:
        return 0
    lengths = sorted(sample_lengths(session.valid_set.samples), reverse=True)
    limit = positions_of(session.model)
    batches = [lengths[begin : begin + batch_size] for begin in range(0, len(lengths), batch_size)]
    return len({(len(batch), common_width(batch[0], limit=limit)) for batch in batches})


def data_record(data: str | Sequence[DataPart], records: Iterable[Record], run_dir: Path) -> dict[str, Any]:
    """What the data were: the files that were read, by hash; for a hub id, or several sets, the rows."""
    if not isinstance(data, str):
        sets = [part.model_dump() for part in data]
        return {"name": data_name(data), "sets": sets, "records_sha256": records_digest(records)}
    files = data_files(Path(data))
    if not files:
        return {"name": data, "records_sha256": records_digest(records)}
    return {"name": data, **place_record(Path(data), run_dir), "files": _hashes(files)}


def data_files(path: Path) -> dict[str, Path]:
    """The files that a local data set is read from, by their names."""
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        return {}
    return {
        file.relative_to(path).as_posix(): file
        for file in sorted(path.rglob("*"))
        if file.is_file() and extension_of(file) in (*EXTENSIONS, ".arrow")
    }


def base_record(base: str, run_dir: Path) -> dict[str, Any]:
    """What the base was: its name, where it was found, the digest of its weights and configuration."""
    folder = find_folder(base)
    return {"name": base, **place_record(folder, run_dir), "sha256": base_digest(folder)}


def _adapter_record(config: TuneConfig, run_dir: Path) -> dict[str, Any]:
    place = getattr(config.method, "adapter", None) or config.model
    folder = find_folder(place)
    assert is_adapter(folder)
    return {"name": str(place), **place_record(folder, run_dir), "sha256": adapter_digest(folder)}


def _teacher_record(teacher: TeacherSource | None, run_dir: Path) -> dict[str, Any] | None:
    """What taught; `base` is recorded as the base already."""
    if teacher is None or teacher.name == BASE:
        return None
    return {"name": teacher.name, **place_record(teacher.folder, run_dir), "sha256": teacher.digest}


def adapter_digest(folder: Path) -> str:
    """SHA-256 that stands for an adapter's weights and configuration."""
    files = [folder / "adapter_config.json", *sorted(folder.glob("adapter_model*.safetensors"))]
    return hashlib.sha256("".join(f"{path.name} {sha256_file(path)}\n" for path in files).encode()).hexdigest()


def place_record(path: Path, run_dir: Path) -> dict[str, str]:
    """Where an input lies; beside the run also from there, so that both can be moved together."""
    absolute, home = Path(os.path.abspath(path)), Path(os.path.abspath(run_dir)).parent
    record = {"path": str(absolute)}
    if absolute.is_relative_to(home):
        record["from_run"] = Path(os.path.relpath(absolute, home / run_dir.name)).as_posix()
    return record


def records_digest(records: Iterable[Record]) -> str:
    """SHA-256 over what records say, in whatever order and wherever they came from."""
    rows = []
    for record in records:
        turns = [[turn.role, turn.content, turn.supervise] for turn in record.messages or ()]
        rows.append(hashlib.sha256(json.dumps([turns, record.text]).encode()).digest())
    return hashlib.sha256(b"".join(sorted(rows))).hexdigest()


def _hashes(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    return {name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in files.items()}

"""`strop compare`: models side by side on the same rows, with what may be claimed of the differences.

GGUF files run in llama.cpp, all else in transformers. One model is in memory at a time. The first is the reference: its
logits, and its weights for the error by layer, are set aside in a bounded temporary file, and each other model is
measured against them. Per model: bytes on disk, peak memory of opening and scoring, tokens per second, perplexity, KL
divergence and top-1 agreement with the reference, and with a task the share of rows answered exactly. Every difference
is paired by row.

Rows are scored with the first model's tokenizer and chat template; all must share its vocabulary.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from strop.data.records import Record
from strop.errors import DataError, UsageError, nearest
from strop.evaluation.comparison import Comparison
from strop.evaluation.kv_cache import KVFormat
from strop.evaluation.side_by_side import Place, Settings, SideBySide
from strop.files.gguf import is_gguf
from strop.files.gguf.reader import GgufFile
from strop.files.peft_adapter import read_adapter_config
from strop.files.shards import weight_bytes
from strop.models.sources import find_folder, is_adapter
from strop.pages.page import write_page
from strop.progress import SILENT, Reporter
from strop.recipes.model_receipts import with_receipts
from strop.recipes.rows import Rows, held_out_records, rows_name
from strop.runtime.llama_cpp import require_runtime
from strop.scratch import DEFAULT_LIMIT_BYTES, Scratch

TASKS: Final = ("exact-match",)
WARM_UP_BYTES: Final = 256 << 20
"""Below it the first opening's one-time costs would show; the reference is then opened once before it is measured."""


def compare(
    models: Sequence[str | os.PathLike[str]],
    data: Rows,
    *,
    names: Sequence[str] | None = None,
    task: str | None = None,
    page: str | os.PathLike[str] | None = None,
    max_rows: int = 300,
    max_length: int | None = None,
    chat_template: str | Path | None = None,
    batch_size: int = 8,
    speed: bool = True,
    kv_cache: str | None = None,
    examples: int = 6,
    scratch_bytes: int = DEFAULT_LIMIT_BYTES,
    device: str = "cpu",
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> Comparison:
    """Measure models on the same rows and compare each with the first.

    Args:
        models: Folders, run folders, adapters, hub ids, "demo", or GGUF files; the first is the reference.
        data: A file or list of rows (all are used), or a folder or hub id with a test split. Rows that neither
        trained nor
            calibrated nor chose any of the models.
        names: What to call the models; by default their folders' names, told apart where they are the same.
        task: "exact-match" judges whole answers of conversations; None compares by loss.
        page: Where to write a page to look at (.html).
        max_rows: Above it, so many rows are drawn by `seed`.
        max_length: Tokens of a row that are scored; by default the first model's context, 4096 at the most. With a
        task,
            rows that do not fit are left out whole.
        chat_template: For models that have none, as `strop tune` takes it.
        batch_size: Rows per forward pass.
        speed: Whether to time reading and writing.
        kv_cache: "int8" or "int4" rounds the cache of keys and values of every model but the first; a single model is
            compared with itself.
        examples: Rows shown of each kind of flip and model; only conversations with one answer can be shown.
        scratch_bytes: The most that is set aside on the disk. What does not fit narrows the divergence to fewer rows
        and
            drops the error by layer, with a note.
        device: Where the models run.
        seed: Of the draw of rows and of the bootstrap.
        reporter: Told what happens.

    Returns:
        The comparison; `to_dict()` is JSON-ready.

    Raises:
        UsageError: No model, names that do not fit, an unknown task.
        MissingInputError: A model or the data are not there.
        DataError: No row can be scored, or with a task a row is not a conversation.
        ModelError: A model's vocabulary differs from the first's, or its context is too short for a row.
    """
    if task is not None and task not in TASKS:
        raise UsageError(f"unknown task {task!r}{nearest(task, TASKS)}; there is: {', '.join(TASKS)}")
    if max_rows < 1 or batch_size < 1:
        raise UsageError(f"max_rows {max_rows}, batch_size {batch_size}: needed at least 1 of each")
    rounded = None if kv_cache is None else KVFormat(kv_cache)
    paths = [str(model) for model in models]
    if rounded is not None and (files := [path for path in paths[1:] or paths if is_gguf(path)]):
        raise UsageError(f"{files[0]}: --kv-cache {rounded.name} rounds the cache of models that transformers runs")
    if rounded is not None and len(paths) == 1:
        paths *= 2
    places = [
        Place(name, path, *_weight_bytes(path), kv_cache=rounded if index else None)
        for index, (name, path) in enumerate(zip(model_names(paths, names), paths, strict=True))
    ]
    records = _drawn(held_out_records(data), max_rows, seed)
    if task is not None:
        _require_conversations(records)
    settings = Settings(
        task=task,
        max_length=max_length,
        chat_template=chat_template,
        batch_size=batch_size,
        speed=speed,
        kv_bytes=rounded is not None,
        examples=examples,
        device=device,
        seed=seed,
    )
    reporter.start("compare", len(places), "models")
    try:
        with Scratch(scratch_bytes) as scratch:
            run = SideBySide(records, settings, scratch)
            if places[0].weights_bytes < WARM_UP_BYTES:
                run.warm_up(places[0])
            for index, place in enumerate(places):
                run.measure(place)
                reporter.advance(index + 1, model=place.name)
    finally:
        reporter.finish()
    comparison = with_receipts(run.comparison(rows_name(data)), [place.path for place in places], data)
    for note in comparison.notes:
        reporter.note(note)
    if page is not None:
        write_page(comparison.to_dict(), page, title=f"{len(places)} models on {Path(comparison.data).name}")
    return comparison


def _drawn(records: list[Record], max_rows: int, seed: int) -> list[Record]:
    if len(records) <= max_rows:
        return records
    return [records[index] for index in sorted(random.Random(seed).sample(range(len(records)), max_rows))]


def _require_conversations(records: Sequence[Record]) -> None:
    texts = [record for record in records if record.messages is None]
    if texts:
        raise DataError(
            f"{texts[0].source}, row {texts[0].row} (and {len(texts) - 1} more): a plain text has no answer to match; "
            "exact-match needs conversations. Leave the task out to compare by loss"
        )


def _weight_bytes(path: str) -> tuple[int, int | None]:
    """Bytes of the weight files that a model needs on disk, and of those that are an adapter (None without one)."""
    if is_gguf(path):
        require_runtime()
        return GgufFile.open(path).path.stat().st_size, None
    folder = find_folder(path)
    if not is_adapter(folder):
        return weight_bytes(folder), None
    adapter = sum(file.stat().st_size for file in folder.glob("adapter_model*.safetensors"))
    return weight_bytes(find_folder(read_adapter_config(folder).base)) + adapter, adapter


def model_names(places: Sequence[str], given: Sequence[str] | None = None) -> list[str]:
    """A short name for each model, all different.

    Raises:
        UsageError: No model, or names that are too few, too many or twice the same.
    """
    if not places:
        raise UsageError("compare needs at least one model; name two or more to see a difference")
    if given is not None:
        if len(given) != len(places) or len(set(given)) != len(given):
            raise UsageError(
                f"{len(places)} models and the names {', '.join(given)}: needed one for each, all different"
            )
        return list(given)
    parts = [_telling_parts(place) for place in places]
    names = [_shortest_ending(part, [other for other in parts if other != part]) for part in parts]
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def _shortest_ending(parts: list[str], others: Sequence[list[str]]) -> str:
    """As many of the last parts as none of the others shares."""
    depth = 1
    while depth < len(parts) and any(other[-depth:] == parts[-depth:] for other in others):
        depth += 1
    return "/".join(parts[-depth:])


def _telling_parts(place: str) -> list[str]:
    """The parts of a path that tell a model from others: `runs/full/best` is called `full`."""
    path = Path(place)
    if path.exists():
        path = path.resolve()
    parts = [part for part in path.parts if part != path.anchor]
    while len(parts) > 1 and parts[-1] in ("best", "last", "model"):
        parts.pop()
    return parts or [place]

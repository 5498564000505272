"""`prove`: does this very file keep your task, within the drop that you allow?

Model and reference answer the same rows, each in its own runtime (GGUF files in llama.cpp, all else in transformers),
with its own tokenizer and template. After each batch the sequential test looks (`strop.evaluation.sequential`) and
stops as soon as it knows: Pass, Fail, or, where the rows end before, Undecided with the further rows that would
probably decide. Rows are taken in an order that is drawn, so that a sorted file does not decide by its beginning.

    exact-match, choice   the drop is in the share of right answers: 0.01 is one in a hundred
    perplexity            the drop is the rise in nats per supervised token, the mean over rows of each row's own; a
                          row counts up to 1 nat either way, since no test can bound what is unbounded

Refused: rows that trained, calibrated or chose either model, as far as what lies beside the models tells
(`provenance`). Both models are in memory at once.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final, cast

import torch
import transformers

from strop import __version__
from strop.errors import DataError, StropError, UsageError, nearest
from strop.evaluation.sequential import ERROR, Decision
from strop.files.folders import sha256_file
from strop.files.gguf import is_gguf
from strop.progress import SILENT, Reporter
from strop.recipes.certificate import (
    ASSUMPTIONS,
    CLIPPED,
    ENDING,
    METHOD,
    Certificate,
    DataRecord,
    encoded,
    model_record,
)
from strop.recipes.prove_result import Fail, Pass, Undecided
from strop.recipes.prove_rows import TASKS, ProofRow, Task, clusters_in_order, proof_rows
from strop.recipes.prove_run import BothOpen, Proving
from strop.recipes.provenance import Provenance, provenance
from strop.recipes.rows import Rows, row_digest, rows_name

UNITS: Final[dict[Task, str]] = {
    "exact-match": "share of rows",
    "choice": "share of rows",
    "perplexity": "nats per token",
}
_SHOWN: Final = 10  # rows that an error names


def prove(
    model: str | os.PathLike[str],
    data: Rows,
    *,
    max_drop: float = 0.01,
    against: str | os.PathLike[str] | None = None,
    task: str = "exact-match",
    certificate: str | os.PathLike[str] | None = None,
    max_rows: int | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
    chat_template: str | Path | None = None,
    leave_out_seen: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> Pass | Fail | Undecided:
    """Compare a model with its reference until the verdict is sure.

    Args:
        model: What is shipped: a GGUF file, a folder, a run, an adapter, a hub id.
        data: A file or list of rows, or a folder or hub id with a test split; rows that chose nothing.
        max_drop: The largest drop that is allowed, between 0 and 1: in the share of right answers, or in nats.
        against: The reference; by default the model that this one was made of, where that is recorded.
        task: "exact-match", "perplexity" or "choice".
        certificate: Where the certificate is written; by default beside the model, as MODEL.proof.json.
        max_rows: Look at so many rows at the most.
        max_length: Most tokens of a row; by default what both contexts hold, 4,096 at the most.
        batch_size: Records per forward pass.
        chat_template: For models that have none.
        leave_out_seen: Leave rows out that trained, calibrated or chose, where there are some, instead of refusing.
        overwrite: Replace the certificate that stands there.
        device: Where folders run.
        seed: Of the rows' order.
        reporter: Told what happens.

    Returns:
        The proof; its certificate is written, whatever it says.

    Raises:
        UsageError: An option makes no sense, no reference is known, model and reference are the same.
        MissingInputError, ModelError, FileFormatError: A model or the data are not there or broken.
        DataError: Rows trained, calibrated or chose one of the models, or do not fit the task.
    """
    chosen = _checked(task, max_drop, batch_size, max_rows)
    place = str(model)
    origin = provenance(place)
    reference = _reference(place, against, origin)
    target = _target(place, certificate, overwrite=overwrite)
    rows = proof_rows(data, chosen)
    origins = [origin] if reference in origin.sources else [origin, provenance(reference)]
    kept, notes = _unseen(rows, data, origins, leave_out=leave_out_seen)
    clusters = clusters_in_order(kept, seed=seed)
    sides = [model_record(name, "") for name in (place, reference)]
    if sides[0].files == sides[1].files:
        raise UsageError(f"{place} and {reference} are the same, byte for byte; name another reference with --against")
    with_both = BothOpen(place, reference, device)
    try:
        proof = Proving(
            with_both,
            clusters,
            chosen,
            max_drop,
            max_length=max_length,
            max_rows=max_rows,
            batch_size=batch_size,
            chat_template=chat_template,
        )
        reporter.start(f"prove {Path(place).name}", len(kept) if max_rows is None else min(max_rows, len(kept)), "rows")
        try:
            proof.run(reporter)
        finally:
            reporter.finish()
        result = proof.result(seed=seed, seen_before=len(rows) - len(kept))
        made = Certificate(
            format=1,
            kind="proof",
            model=sides[0].model_copy(update={"format": with_both.model.format}),
            reference=sides[1].model_copy(update={"format": with_both.reference.format}),
            data=_data_record(data, rows, len({row.cluster for row in rows})),
            task=chosen,
            max_drop=max_drop,
            unit=UNITS[chosen],
            seed=seed,
            error=ERROR,
            method=METHOD,
            assumptions=[*ASSUMPTIONS, *([CLIPPED] if chosen == "perplexity" else [])],
            notes=[*notes, *proof.notes],
            result=result,
            **encoded(proof.drops),
            rows_digest=proof.digest(),
            flipped=proof.flipped(),
            versions=_versions(place, reference),
        )
    finally:
        with_both.close()
    path = made.write(target)
    kinds: dict[Decision, type[Pass | Fail | Undecided]] = {"pass": Pass, "fail": Fail, "undecided": Undecided}
    return kinds[result.decision](made, path)


# --- before anything is opened ----------------------------------------------------------------------------------------


def _checked(task: str, max_drop: float, batch_size: int, max_rows: int | None) -> Task:
    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}{nearest(task, TASKS)}; there are: {', '.join(TASKS)}")
    if not 0 < max_drop < 1:
        raise UsageError(
            f"max_drop is {max_drop:g}; needed a number between 0 and 1: 0.01 allows one right answer in a hundred to "
            "be lost (perplexity: 0.01 nats per token). That nothing at all is lost, no number of rows can prove"
        )
    if batch_size < 1 or (max_rows is not None and max_rows < 1):
        raise UsageError(f"batch_size {batch_size}, max_rows {max_rows}: needed at least 1 of each")
    return cast(Task, task)


def _reference(place: str, against: str | os.PathLike[str] | None, origin: Provenance) -> str:
    if against is not None:
        return str(against)
    if not origin.sources:
        why = "; ".join(origin.notes[:-1])  # the last one says that nothing is known, as does this
        raise UsageError(
            f"{place}: what it was made of is not recorded beside it{f' ({why})' if why else ''}; name the reference "
            "with --against"
        )
    return origin.sources[0]


def _target(place: str, certificate: str | os.PathLike[str] | None, *, overwrite: bool) -> Path:
    """Where the certificate goes: beside the model; for one that is found by name, into the working folder."""
    if certificate is not None:
        target = Path(certificate)
    elif Path(place).exists():
        path = Path(os.path.abspath(place))
        target = path.with_name(path.name + ENDING)
    else:
        target = Path(place.replace("/", "--") + ENDING)
    if target.is_dir():
        raise UsageError(f"{target}: is a folder; name a file for the certificate")
    if target.exists() and not overwrite:
        raise UsageError(
            f"{target}: a certificate stands there; name another with --certificate, or replace it with --overwrite. "
            "To prove again and again until it passes proves nothing: each proof errs in up to 5% of cases"
        )
    return target


def _unseen(
    rows: Sequence[ProofRow], data: Rows, origins: Sequence[Provenance], *, leave_out: bool
) -> tuple[list[ProofRow], list[str]]:
    """The rows that neither trained nor calibrated nor chose anything, and what could not be looked at.

    Raises:
        DataError: Some did, and they are not to be left out; or none is left.
    """
    digests: dict[str, list[ProofRow]] = {}
    for row in rows:
        for record in row.records if row.right is None else [row.records[row.right]]:
            digests.setdefault(row_digest(record), []).append(row)
    is_file = isinstance(data, str | os.PathLike) and Path(data).is_file()
    own = sha256_file(cast(str, data)) if is_file else None
    notes = [note for origin in origins for note in origin.notes]
    seen: dict[int, str] = {}
    for one in {(c.model, c.how, c.name): c for origin in origins for c in origin.choosers}.values():
        words = f"{one.how} {one.model} ({one.name})"
        try:
            shared = one.shared(digests)
        except StropError:
            if own is not None and one.holds_file(own):
                shared = set(digests)
            else:
                notes.append(f"the rows that {words} are no longer there; only the hash of the whole file was compared")
                continue
        for digest in shared:
            seen |= {id(row): words for row in digests[digest]}
    if not seen:
        return list(rows), notes
    found = [row for row in rows if id(row) in seen]
    shown = ", ".join(str(row.row) for row in found[:_SHOWN]) + (" ..." if len(found) > _SHOWN else "")
    if not leave_out:
        others = ", or leave these out with --leave-out-seen" if len(found) < len(rows) else ""
        raise DataError(
            f"{rows_name(data)}: {len(found):,} of {len(rows):,} rows {seen[id(found[0])]}: rows {shown}; "
            f"what chose cannot judge. Name rows that chose nothing{others}"
        )
    if len(found) == len(rows):
        raise DataError(f"{rows_name(data)}: all {len(rows):,} rows {seen[id(found[0])]}; no row is left to judge by")
    notes.append(f"{len(found):,} of {len(rows):,} rows {seen[id(found[0])]} and were left out (rows {shown})")
    return [row for row in rows if id(row) not in seen], notes


def _data_record(data: Rows, rows: Sequence[ProofRow], clusters: int) -> DataRecord:
    path = Path(os.path.abspath(cast(str, data))) if isinstance(data, str | os.PathLike) else None
    digests = sorted(row_digest(record) for row in rows for record in row.records)
    return DataRecord(
        name=rows_name(data),
        path=str(path) if path is not None and path.exists() else None,
        sha256=sha256_file(path) if path is not None and path.is_file() else None,
        rows_sha256=hashlib.sha256("".join(digests).encode()).hexdigest(),
        rows=len(rows),
        clusters=clusters,
    )


def _versions(*places: str) -> dict[str, str]:
    found = {
        "strop": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
    return found | ({"llama-cpp-python": version("llama-cpp-python")} if any(map(is_gguf, places)) else {})

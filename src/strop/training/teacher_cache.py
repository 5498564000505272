"""What a teacher said, kept on the disk: its likeliest tokens for every supervised token of the rows.

    FOLDER/parts.json           what it was made of, and every part with its bytes' SHA-256
    FOLDER/part-00000.safetensors, ...
        rows      uint8    [rows, 32]     SHA-256 of each row's ids and mask: what it is found by
        ends      int64    [rows]         where a row's tokens end
        ids       int32    [tokens, k]    the k likeliest tokens, the likeliest first
        logs      float16  [tokens, k]    their log-probabilities
        rest      float32  [tokens]       log of the probability that all others have together

Of a token, k + 1 outcomes are kept: the k likeliest, and "any other". What is read is brought to a sum of one again (in
fp16 it is off by about 1e-3), and the divergence is that of those outcomes:

    KL = sum_k p_k (log p_k - log q_k) + p_rest (log p_rest - log q_rest),    q_rest = sum of q over all other tokens

which is at most the divergence of the whole distributions (the data processing inequality), and is it, up to the
rounding of fp16, where k is the vocabulary. k is 64: 388 bytes a supervised token.

Rows are found by what they are, not by where they stand, so that packing, order, accumulation, smaller micro-batches
and resuming all find theirs. A part appears whole or not at all; a pass that was killed goes on behind the last one.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from strop.data.batches import Batch, eval_batches
from strop.data.templates import IGNORED, Sample
from strop.errors import FileFormatError, TrainingError
from strop.files.folders import inside, read_json, sha256_file, sync, write_json
from strop.files.shards import Header, Part, read_header, read_rows, read_tensor, write_file
from strop.precision import autocast
from strop.progress import SILENT, Reporter
from strop.training.losses import wide
from strop.training.shapes import at_common_width
from strop.training.teachers import HiddenWanted

FORMAT: Final = 1
INDEX: Final = "parts.json"
TOP: Final = 64
"""The most tokens that are kept of a distribution."""
PART_TOKENS: Final = 2**17
"""Supervised tokens of a part, about: 51 MB."""
_NOTHING: Final = -1e4  # a log-probability that is zero and still finite
READ_TOKENS: Final = 1024
"""Supervised tokens whose logits are there at once while the cache is written."""


def kept_tokens(vocabulary: int) -> int:
    """How many tokens of a distribution are kept: k."""
    return min(TOP, vocabulary)


def cache_bytes(tokens: int, vocabulary: int) -> int:
    """Bytes that the cache takes for so many supervised tokens, without its headers and rows' digests.

    >>> cache_bytes(1000, 32000), cache_bytes(1000, 10)
    (388000, 64000)
    """
    return tokens * (6 * kept_tokens(vocabulary) + 4)


@dataclass(frozen=True)
class TopWanted:
    """The k likeliest tokens of a teacher, and the rest as one outcome.

    Attributes:
        ids: [tokens, k] int64.
        logs: log-probabilities [tokens, k]; with `rest` their exponentials sum to one.
        rest: log-probability of all other tokens together [tokens].
    """

    ids: Tensor
    logs: Tensor
    rest: Tensor

    @classmethod
    def stored(cls, ids: Tensor, logs: Tensor, rest: Tensor) -> TopWanted:
        """From what the files hold, brought to a sum of one in fp64."""
        outcomes = torch.cat([logs.double(), rest.double()[:, None]], dim=1)  # [tokens, k + 1]
        outcomes = (outcomes - outcomes.logsumexp(dim=1, keepdim=True)).clamp(min=_NOTHING)
        return cls(ids.long(), outcomes[:, :-1], outcomes[:, -1])

    def __getitem__(self, part: slice) -> TopWanted:
        """Of some of the tokens; behind the last there is nothing."""
        return TopWanted(self.ids[part], self.logs[part], self.rest[part])

    def divergence_sum(self, logits: Tensor) -> Tensor:
        """KL(teacher || student) over k + 1 outcomes, summed over the tokens that are held."""
        logits, ids = logits[: len(self.ids)], self.ids.to(logits.device)
        logs, rest = self.logs.to(logits), self.rest.to(logits)  # device and dtype
        whole = logits.logsumexp(dim=1)
        found = logits.gather(1, ids) - whole[:, None]
        total = (logs.exp() * (logs - found)).sum()
        if logits.shape[1] == ids.shape[1]:
            return total
        others = logits.scatter(1, ids, -torch.inf).logsumexp(dim=1) - whole
        return total + (rest.exp() * (rest - others)).sum()


# --- rows -------------------------------------------------------------------------------------------------------------


def row_key(ids: Tensor, labels: Tensor) -> bytes:
    """SHA-256 of a row's tokens and of which of them are supervised; both [tokens], labels not shifted."""
    counted = labels != IGNORED
    counted[:1] = False
    return hashlib.sha256(
        ids.to(torch.int64).numpy().tobytes() + counted.numpy().tobytes()  # ids take 8 bytes each, marks 1
    ).digest()


def document_keys(batch: Batch) -> list[bytes]:
    """The key of every document of a batch, in the order in which `Kept` has their tokens."""
    keys = []
    for row in range(len(batch.input_ids)):
        ids, labels = batch.input_ids[row].cpu(), batch.labels[row].cpu()
        if batch.documents is None:
            spans = [(0, int(batch.lengths[row]))]
        else:
            places = batch.documents[row].cpu()
            sizes = torch.bincount(places[places >= 0]).tolist()
            ends = np.cumsum(sizes).tolist()
            spans = list(zip([0, *ends[:-1]], ends, strict=True))
        keys += [row_key(ids[begin:end], labels[begin:end]) for begin, end in spans]
    return keys


def _key(sample: Sample) -> bytes:
    return row_key(torch.tensor(sample.input_ids), torch.tensor(sample.labels))


class _Distinct(Sequence[Sample]):
    """Every row of several sets once, the longest first, those without a supervised token left out."""

    def __init__(self, sets: Sequence[Sequence[Sample]]) -> None:
        self._sets = sets
        found: dict[bytes, tuple[int, int, int]] = {}  # a row's length and place; the rows themselves stay on the disk
        for number, samples in enumerate(sets):
            for place, sample in enumerate(samples):
                if sample.supervised:
                    found.setdefault(_key(sample), (len(sample), number, place))
        self._places = sorted(found.values(), key=lambda row: -row[0])

    def behind(self, done: int) -> _Distinct:
        """Without the first `done`."""
        rest = copy.copy(self)
        rest._places = self._places[done:]
        return rest

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        _, number, place = self._places[index]
        return self._sets[number][place]


# --- writing ----------------------------------------------------------------------------------------------------------


def write_cache(
    folder: Path,
    made_of: dict[str, Any],
    sets: Sequence[Sequence[Sample]],
    teacher: Callable[[], tuple[Any, Callable[[Batch], HiddenWanted]]],
    *,
    batch_size: int,
    pad_id: int,
    compute_dtype: torch.dtype,
    limit: int | None = None,
    replace: bool = False,
    reporter: Reporter = SILENT,
) -> float:
    """Write what a teacher says of every supervised token; nothing is done where it stands whole already.

    Args:
        folder: where to.
        made_of: JSON values that decide what is said: the teacher's digest, the tokenizer's, the rows'.
        sets: the rows.
        teacher: opens it: its device, and what it says of a batch. Not called where the cache is whole.
        batch_size: rows that it reads at once.
        pad_id: any valid token id.
        compute_dtype: of its products.
        limit: its positions; None where there is no limit.
        replace: begin anew where the folder holds something else, or something damaged, in place of refusing it.
        reporter: told of progress.

    Returns:
        The share of the teacher's probability that the tokens kept do not have.

    Raises:
        TrainingError: the folder holds what another teacher said, or of other rows.
        FileFormatError: a part is not what was written.
    """
    index = _index(folder, made_of, replace=replace, reporter=reporter)
    if index["finished"]:
        return _left_out(index)
    _clear_strange(folder, index)
    rows = _Distinct(sets)
    done = sum(part["rows"] for part in index["parts"])
    if done:
        reporter.note(f"{folder}: {done:,} of {len(rows):,} rows were read with the teacher before")
    device, wanted_of = teacher()
    reporter.start("reading the rows with the teacher", len(rows), "rows")
    pending = _Pending()
    try:
        seen = done
        for batch in eval_batches(rows.behind(done), batch_size, pad_id=pad_id):
            seen += len(batch.rows)
            with torch.no_grad(), autocast(device, compute_dtype):
                said = wanted_of(at_common_width(batch, limit=limit))
            pending.add(batch, said)
            if pending.tokens >= PART_TOKENS:
                _write_part(folder, index, pending)
                pending = _Pending()
            reporter.advance(seen)
        if pending.tokens:
            _write_part(folder, index, pending)
    finally:
        reporter.finish()
    index["finished"] = True
    _write_index(folder, index)
    return _left_out(index)


def _left_out(index: dict[str, Any]) -> float:
    tokens = sum(part["tokens"] for part in index["parts"])
    return sum(part["left_out"] for part in index["parts"]) / tokens if tokens else 0.0


class _Pending:
    """Rows that the teacher has read and no part holds yet."""

    def __init__(self) -> None:
        self.tokens = 0
        self.keys: list[bytes] = []
        self.ends: list[int] = []
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, batch: Batch, said: HiddenWanted) -> None:
        """Take in what was said of a batch of one row each."""
        for begin in range(0, said.supervised, READ_TOKENS):
            some = said[begin : begin + READ_TOKENS]
            logs = torch.log_softmax(wide(some.logits_of(some.hidden))[: some.supervised], dim=-1)
            self.parts.append(_coarsened(logs))
        counts = (batch.labels[:, 1:] != IGNORED).sum(dim=1).tolist()
        for count, key in zip(counts, document_keys(batch), strict=True):
            self.tokens += count
            self.keys.append(key)
            self.ends.append(self.tokens)


def _coarsened(logs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [tokens, vocabulary] to ids [tokens, k] int32, logs float16 and the rest's log float32."""
    top = logs.topk(kept_tokens(logs.shape[1]), dim=1)
    rest = logs.scatter(1, top.indices, -torch.inf).logsumexp(dim=1)
    return top.indices.int().cpu(), top.values.half().cpu(), rest.float().cpu()


def _write_part(folder: Path, index: dict[str, Any], pending: _Pending) -> None:
    name = f"part-{len(index['parts']):05d}.safetensors"
    ids, logs, rest = (torch.cat(column) for column in zip(*pending.parts, strict=True))
    keys = torch.from_numpy(np.frombuffer(b"".join(pending.keys), dtype=np.uint8).reshape(-1, 32).copy())
    tensors = {"rows": keys, "ends": torch.tensor(pending.ends), "ids": ids, "logs": logs, "rest": rest}
    unfinished = folder / f".{name}.part"
    write_file(unfinished, [Part.of(tensors)])
    sync(unfinished)
    os.replace(unfinished, folder / name)
    digest = sha256_file(folder / name)
    left_out = float(rest.double().exp().sum())
    index["parts"].append({"name": name, "rows": len(keys), "tokens": len(ids), "left_out": left_out, "sha256": digest})
    _write_index(folder, index)


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    unfinished = folder / f".{INDEX}.part"
    write_json(unfinished, index)
    sync(unfinished)
    os.replace(unfinished, folder / INDEX)
    sync(folder)


def _index(folder: Path, made_of: dict[str, Any], *, replace: bool, reporter: Reporter) -> dict[str, Any]:
    """What the folder holds of this cache, every part checked; an empty one is begun."""
    try:
        return _checked_index(folder, made_of)
    except (TrainingError, FileFormatError) as error:
        if not replace:
            raise
        reporter.note(f"what an earlier try left is removed: {str(error).partition(';')[0]}")
    shutil.rmtree(folder)
    return _checked_index(folder, made_of)


def _checked_index(folder: Path, made_of: dict[str, Any]) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        index: dict[str, Any] = {"format": FORMAT, "made_of": made_of, "finished": False, "parts": []}
        _write_index(folder, index)
        return index
    index = read_json(folder / INDEX)
    before = index.get("made_of") if index.get("format") == FORMAT else None
    if before != made_of:
        known = before if isinstance(before, dict) else {}
        changed = sorted(key for key in {*known, *made_of} if known.get(key) != made_of.get(key))
        raise TrainingError(
            f"{folder}: holds what a teacher said before {' and '.join(changed) or 'the format'} changed, and is not "
            "used; put back what it was made of, or remove that folder, and the rows are read with the teacher again"
        )
    for part in index["parts"]:
        path = inside(folder, part["name"])
        if not path.is_file() or sha256_file(path) != part["sha256"]:
            raise FileFormatError(
                f"{path}: is not what was written there; remove {folder}, and the rows are read with the teacher again"
            )
    return index


def _clear_strange(folder: Path, index: dict[str, Any]) -> None:
    """Remove what a killed pass left: unfinished files, and a part that no index names."""
    names = {INDEX, *(part["name"] for part in index["parts"])}
    for path in folder.iterdir():
        if path.is_file() and path.name not in names:
            path.unlink()


# --- reading ----------------------------------------------------------------------------------------------------------


class CachedTeacher:
    """A teacher that has said everything already.

    Args:
        folder: of a finished cache.

    Attributes:
        bytes: that it takes.

    Raises:
        TrainingError: it is not finished.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read_json(folder / INDEX)
        if not index.get("finished"):
            raise TrainingError(f"{folder}: the pass that writes it was not finished")
        self.bytes = sum(path.stat().st_size for path in folder.iterdir())
        self._places: dict[bytes, tuple[int, int, int]] = {}
        self._files: list[tuple[Path, Header]] = []
        for number, part in enumerate(index["parts"]):
            path = inside(folder, part["name"])
            self._files.append((path, read_header(path)))
            ends = read_tensor(path, "ends").tolist()
            keys = read_tensor(path, "rows").numpy()
            for begin, end, key in zip([0, *ends[:-1]], ends, keys, strict=True):
                self._places[key.tobytes()] = (number, begin, end)

    def check(self, batch: Batch) -> None:
        """See that rows like these were read.

        Raises:
            TrainingError: one was not.
        """
        self.wanted(batch)

    def wanted(self, batch: Batch) -> TopWanted:
        """What was said at the batch's supervised tokens.

        Raises:
            TrainingError: a row was not read.
        """
        columns = list(zip(*self._spans(batch), strict=True))
        if not columns:
            return TopWanted(torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1), torch.empty(0))
        with torch.autocast("cpu", enabled=False):  # it would join neither fp16 nor fp64
            return TopWanted.stored(*(torch.cat(column) for column in columns))

    def _spans(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        counted = 0
        for key in document_keys(batch):
            place = self._places.get(key)
            if place is None:
                continue
            number, begin, end = place
            path, header = self._files[number]
            counted += end - begin
            ids, logs, rest = (read_rows(path, name, begin, end, header=header) for name in ("ids", "logs", "rest"))
            yield ids, logs, rest
        if counted != batch.supervised_tokens:
            raise TrainingError(
                f"{self.folder}: {batch.supervised_tokens - counted:,} supervised tokens of a batch were never read by "
                "the teacher; remove that folder, and the rows are read again"
            )

"""Data sets into records: a file, a folder of splits, a hub id, rows in memory, each split found or held out.

`read_data` gives lists. `open_data` gives the same records as sequences that read a large source again each time
instead of holding it: every row is checked once (file, row and field of all that is wrong are told together), then the
source is read anew by whoever needs its rows. What a row means is the part of `conversations.py`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, overload

import torch

from strop.data.conversations import KNOWN_FIELDS, ROLES, Message, Record, Role, RowError, to_records
from strop.data.hub import checked_file, dataset_sources, is_hub_id
from strop.data.readers import EXTENSIONS, Problems, RawRow, Source, extension_of, file_source, kind_of
from strop.errors import DataError, MissingInputError, nearest

__all__ = [
    "ROLES",
    "Message",
    "OpenedData",
    "Record",
    "Records",
    "Role",
    "Splits",
    "open_data",
    "read_data",
    "read_records",
]

SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("valid", "validation", "dev"),
    "test": ("test",),
}

KEPT_BYTES: Final = 16 << 20
"""Sources up to this size are read once and their records kept."""

_SHARD = re.compile(r"([a-z]+)-(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class Splits:
    """Records to train on, to choose by, and to judge by; `test` is empty unless the data have such a split."""

    train: list[Record]
    valid: list[Record]
    test: list[Record]


class Records(Sequence[Record]):
    """The records of sources one after another, or some of them by position.

    Every row has been checked. Those of small sources are kept; large ones are read again for every pass, and for
    every single record that is asked for.

    Args:
        sources: Files or datasets, read one after another.

    Raises:
        DataError: If any row is broken, or a source has none.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.held = sum(source.size_bytes for source in sources) <= KEPT_BYTES
        self._chosen: list[int] | None = None
        self._kept: list[Record] = []
        self._count = 0
        for source in sources:
            for record in _read(source):
                self._count += 1
                if self.held:
                    self._kept.append(record)

    def choose(self, positions: Sequence[int]) -> Records:
        """The records at these positions, in ascending order."""
        part = Records.__new__(Records)
        part.sources, part.held, part._chosen = self.sources, self.held, None
        part._count = len(positions)
        part._kept = [self._kept[position] for position in positions] if self.held else []
        if not self.held:
            part._chosen = [position if self._chosen is None else self._chosen[position] for position in positions]
        return part

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Record]:
        if self.held:
            return iter(self._kept)
        whole = (record for source in self.sources for record in _read(source))
        return whole if self._chosen is None else _at(whole, self._chosen)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if self.held:
            return self._kept[index]
        if isinstance(index, slice):
            begin, end, step = index.indices(self._count)
            wanted = range(begin, end, step)
            found = list(_at(iter(self), sorted(wanted)))
            return found if step > 0 else found[::-1]
        position = range(self._count)[index]
        return next(islice(iter(self), position, None))


def _at(records: Iterator[Record], positions: Sequence[int]) -> Iterator[Record]:
    """The records at ascending positions."""
    waiting = iter(positions)
    wanted = next(waiting, None)
    for position, record in enumerate(records):
        if wanted is None:
            return
        if position == wanted:
            yield record
            wanted = next(waiting, None)


def _read(source: Source) -> Iterator[Record]:
    """The records of a source; once it is read, everything that is wrong with it is raised at once."""
    problems = Problems(source.name, source.unit)
    yield from _records(source.rows(problems), problems)


def _records(rows: Iterable[RawRow], problems: Problems) -> Iterator[Record]:
    count = 0
    for row in rows:
        count += 1
        try:
            yield from to_records(row, problems.source)
        except RowError as error:
            problems.add(row.number, str(error))
    problems.raise_any(count)
    if not count:
        raise DataError(f"{problems.source}: there is no row in it; it needs at least one")


def read_records(path: str | os.PathLike[str] | Sequence[Mapping[str, Any]]) -> list[Record]:
    """Read one file, or rows that are already in memory, into records.

    Args:
        path: A file (.jsonl, .json, .csv, .tsv, .txt, each also .gz; .parquet), or a list of mappings.

    Raises:
        MissingInputError: If the file is not there or of no known extension.
        DataError: If any row is broken; the message gives file, row and field of up to ten and the number of the
        others.
    """
    if isinstance(path, str | os.PathLike):
        return list(_read(file_source(_path(path), KNOWN_FIELDS)))
    problems = Problems("rows", unit="record")
    rows = []
    for number, fields in enumerate(path, start=1):
        if isinstance(fields, Mapping):
            rows.append(RawRow(number, fields))
        else:
            problems.add(number, f"got {kind_of(fields)}; each row must be a mapping")
    if not rows and not problems.count:
        raise DataError("rows: the list is empty; it needs at least one row")
    return list(_records(rows, problems))


def _path(name: str | os.PathLike[str]) -> Path:
    text = os.fspath(name)
    if "\0" in text:
        raise MissingInputError(f"{text!r}: a path cannot hold a NUL; check the name")
    return Path(text)


# --- splits -----------------------------------------------------------------------------------------------------------


def held_out(count: int, *, seed: int, valid_fraction: float) -> tuple[list[int], list[int]]:
    """Positions of `count` rows to train on and to hold out: a fraction, at least one where there are two rows."""
    if valid_fraction <= 0 or count < 2:
        return list(range(count)), []
    many = min(count - 1, max(1, round(count * valid_fraction)))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[:many])
    return [row for row in range(count) if row not in held], sorted(held)


def _split_named(name: str) -> str | None:
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def _files_of_folder(folder: Path) -> dict[str, list[Path]]:
    """The split files of a folder: split -> one file, or all its shards (`train-00000-of-00002.parquet`) in order.

    Shards may also stand in its folder `data`, as on the hub.
    """
    single: dict[str, list[Path]] = {}
    shards: dict[tuple[str, str], dict[int, Path]] = {}
    for where in (folder, folder / "data"):
        for path in sorted(where.iterdir()) if where.is_dir() else []:
            extension = extension_of(path)
            if path.is_dir() or extension not in EXTENSIONS:
                continue
            stem = path.name[: -len(extension)]
            shard = _SHARD.fullmatch(stem.lower())
            split = _split_named(shard[1] if shard else stem)
            if split is None:
                continue
            checked_file(folder, path.relative_to(folder).as_posix())
            if shard:
                shards.setdefault((split, f"{shard[1]} {shard[3]}"), {})[int(shard[2])] = path
            elif where == folder:
                single.setdefault(split, []).append(path)
    found: dict[str, list[list[Path]]] = {split: [[path] for path in paths] for split, paths in single.items()}
    for (split, kind), parts in shards.items():
        total = int(kind.split()[1])
        missing = [number for number in range(total) if number not in parts]
        if missing:
            listed = ", ".join(f"{number:05d}" for number in missing[:10])
            raise DataError(
                f"{folder}: the {split} split has {len(parts)} of its {total} shards; "
                f"{listed} {'is' if len(missing) == 1 else 'are'} missing; fetch the rest"
            )
        found.setdefault(split, []).append([parts[number] for number in sorted(parts)])
    for split, sets in found.items():
        if len(sets) > 1:
            names = ", ".join(paths[0].name for paths in sets)
            raise DataError(f"{folder}: {names} all claim to be the {split} split; keep one")
    return {split: sets[0] for split, sets in found.items()}


def _sources_of(data: str | os.PathLike[str], *, need_train: bool) -> dict[str, list[Source]]:
    """Where a data set's splits stand: split -> its sources."""
    path = _path(data)
    if path.is_dir():
        files = _files_of_folder(path)
        if not files:
            return _dataset_splits(str(path), need_train=need_train)
        if need_train and "train" not in files:
            first = next(iter(files.values()))[0]
            raise DataError(
                f"{path}: there is no train file beside {', '.join(f.name for part in files.values() for f in part)}; "
                f"name it train{extension_of(first)}"
            )
        return {split: [file_source(file, KNOWN_FIELDS) for file in part] for split, part in files.items()}
    if path.exists() or extension_of(path) in EXTENSIONS or not is_hub_id(str(data)):
        if not path.exists():
            siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            raise MissingInputError(f"{path}: no such file or folder{nearest(path.name, siblings)}; check the path")
        return {"train": [file_source(path, KNOWN_FIELDS)]}
    name, _, configuration = str(data).partition(":")
    return _dataset_splits(name, configuration or None, need_train=need_train)


def _dataset_splits(name: str, configuration: str | None = None, *, need_train: bool) -> dict[str, list[Source]]:
    found = dataset_sources(name, configuration)
    parts: dict[str, list[Source]] = {}
    for split_name, source in found.items():
        split = _split_named(split_name)
        if split is not None:
            parts[split] = [source]
    if need_train and "train" not in parts:
        raise DataError(f"{name}: there is no train split (splits: {', '.join(found) or 'none'})")
    return parts


@dataclass(frozen=True)
class OpenedData:
    """A data set whose rows were all checked.

    Attributes:
        name: What it was asked for as.
        train: Records to train on.
        valid: Records to choose by.
        test: Records to judge by; empty unless the data have such a split.
        drawn: Whether `valid` was held out of the training rows, since the data name no such split.
        sha256: Of the bytes that were read, with how the validation rows were drawn.
    """

    name: str
    train: Sequence[Record]
    valid: Sequence[Record]
    test: Sequence[Record]
    drawn: bool
    sha256: str


def open_data(
    data: str | os.PathLike[str], *, seed: int = 0, valid_fraction: float = 0.05, need_train: bool = True
) -> OpenedData:
    """Open and check a data set: a file, a folder with train, valid and test files, a dataset folder, or a hub id.

    Where the data have no validation split, `valid_fraction` of the training rows is held out, drawn by `seed` (at
    least one row where there are two). `validation` and `dev` are accepted for `valid`.

    Args:
        data: A path, or a hub id (``name``, ``owner/name``, either with ``:configuration``).
        seed: Draws the rows that are held out.
        valid_fraction: The share held out, 0 for none.
        need_train: Whether a folder or dataset without a training split is an error; False for one to judge by.

    Raises:
        MissingInputError: If nothing of that name is found here or on the hub.
        DataError: If a row is broken, a split is empty or there is no training split.
    """
    sources = _sources_of(data, need_train=need_train)
    parts = {split: Records(part) for split, part in sources.items()}
    digest = hashlib.sha256()
    for split in sorted(sources):
        digest.update(f"{split} {' '.join(source.digest() for source in sources[split])}\n".encode())
    train, valid, drawn = parts.get("train", Records([])), parts.get("valid"), False
    if valid is None:
        digest.update(f"{seed} {valid_fraction}".encode())
        chosen, held = held_out(len(train), seed=seed, valid_fraction=valid_fraction)
        train, valid, drawn = train.choose(chosen), train.choose(held), bool(held)
    return OpenedData(os.fspath(data), train, valid, parts.get("test", Records([])), drawn, digest.hexdigest())


def read_data(
    data: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    valid_fraction: float = 0.05,
    need_train: bool = True,
) -> Splits:
    """Read a data set into lists: what `open_data` takes, or rows in memory (a list of mappings).

    Raises:
        MissingInputError, DataError: As `open_data`.
    """
    if isinstance(data, str | os.PathLike):
        opened = open_data(data, seed=seed, valid_fraction=valid_fraction, need_train=need_train)
        return Splits(list(opened.train), list(opened.valid), list(opened.test))
    records = read_records(data)
    chosen, held = held_out(len(records), seed=seed, valid_fraction=valid_fraction)
    return Splits([records[row] for row in chosen], [records[row] for row in held], [])

"""Data sets that the `datasets` library opens: hub ids, saved datasets, folders with a card.

Rows come from the library's memory-mapped tables, one by one. No dataset script is run and nothing is unpickled; a
folder whose card or index names files outside it, or that holds links leading out, is refused before it is opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from strop.data.readers import Problems, RawRow, Source
from strop.errors import DataError, FileFormatError, MissingInputError
from strop.files.folders import inside

_INDEXES = ("dataset_dict.json", "state.json")


def is_hub_id(name: str) -> bool:
    """Whether a text has the form of a hub id: ``name``, ``owner/name``, either with ``:configuration`` behind it."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?", name) is not None


def checked_file(folder: Path, name: str) -> Path:
    """A file of a folder, whose name and links stay below it.

    Raises:
        DataError: If it leads out.
    """
    try:
        return inside(folder, name)
    except FileFormatError as error:
        raise DataError(f"{folder}: {error}; put the file itself there, or name it as the data") from error


def _named_files(value: Any) -> Iterator[str]:
    """File names in an index of `datasets` or in the `data_files` of a card."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from _named_files(inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in ("splits", "filename", "_data_files", "path", "data_files", "data_dir", "configs"):
                yield from _named_files(inner)


def _card(folder: Path) -> Any:
    """The settings in front of a folder's README.md."""
    import yaml

    readme = folder / "README.md"
    found = re.match(r"---\n(.*?)\n---", readme.read_text("utf-8", "replace"), re.DOTALL) if readme.is_file() else None
    try:
        loaded = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise DataError(f"{readme}: its settings are not valid YAML ({str(error).splitlines()[0]})") from error
    configs = loaded.get("configs") if isinstance(loaded, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def check_folder(folder: Path) -> None:
    """Refuse a dataset folder that leads out of itself: by a link, or by a name in its indexes or its card.

    Raises:
        DataError: If it does; the message names the file.
    """
    for path in folder.rglob("*"):
        if path.is_symlink():
            checked_file(folder, path.relative_to(folder).as_posix())
        if path.name in _INDEXES and path.is_file():
            try:
                index = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: not valid JSON ({error}); save the data set again") from error
            for name in _named_files(index):
                checked_file(path.parent, name)
    for config in _card(folder):
        for name in _named_files({key: config.get(key) for key in ("data_files", "data_dir")}):
            if "://" in name:
                raise DataError(f"{folder / 'README.md'}: names the address {name!r} as its data; fetch it yourself")
            checked_file(folder, name)


def dataset_sources(name: str, configuration: str | None = None) -> dict[str, Source]:
    """Open a hub id or a dataset folder through the `datasets` library: split name -> its rows.

    Class labels are given as their names. Dataset scripts are never run (the library no longer can).

    Raises:
        MissingInputError: If the dataset cannot be found or reached.
        DataError: If the library finds it but cannot read it, or a folder leads out of itself.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    folder = Path(name)
    if folder.is_dir():
        check_folder(folder)
    try:
        if any((folder / index).is_file() for index in _INDEXES):
            opened = datasets.load_from_disk(name)
        else:
            opened = datasets.load_dataset(name, configuration)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise MissingInputError(
            f"{name}: no such file or folder here, and no dataset of that name could be reached on the hub "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (DatasetsError, ValueError, RuntimeError, OSError) as error:
        raise DataError(f"{name}: the datasets library cannot read it ({str(error).splitlines()[0]})") from error
    if isinstance(opened, datasets.Dataset):
        opened = {"train": opened}
    return {str(split): _source(f"{name}, split {split}", dataset) for split, dataset in opened.items()}


def _source(name: str, dataset: Any) -> Source:
    import datasets

    labels = {
        column: feature for column, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)
    }

    def rows(problems: Problems) -> Iterator[RawRow]:
        problems.unit = "record"
        for number, raw in enumerate(dataset, start=1):
            row: dict[str, Any] = dict(raw)
            named = {
                column: feature.int2str(row[column])
                for column, feature in labels.items()
                if isinstance(row[column], int) and row[column] >= 0
            }
            yield RawRow(number, {**row, **named})

    def digest() -> str:
        return hashlib.sha256(str(dataset._fingerprint).encode()).hexdigest()

    return Source(name, int(dataset.data.nbytes), rows, digest, unit="record")

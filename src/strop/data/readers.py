"""Files into raw rows: jsonl, json, csv, tsv, txt, parquet, and whatever the `datasets` library opens.

A raw row is `RawRow(number, fields)`: a mapping of field names to plain Python values and the place it came from (the
line for jsonl and csv, the position in the list for json, parquet and datasets; both counted from 1). This module knows
bytes and syntax; what the fields mean is `records.py`'s part. No dataset script is ever run.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strop.errors import DataError, MissingInputError

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet")

MAX_PROBLEMS = 10

# Pieces of a plain text file: long enough for context, short enough that a file gives pieces to hold out.
PIECE_CHARACTERS = 4_000

_FIELD_CHARACTERS = 1 << 30


@dataclass(frozen=True)
class RawRow:
    """One row as it was read: its 1-based line or position, its fields, and whether a plain text ends with it."""

    number: int
    fields: Mapping[str, Any]
    ends: bool = True


@dataclass
class Problems:
    """Collects what is wrong with a source, to be raised at once: ten in full, the rest as a number.

    Attributes:
        source: The file or dataset, as the user would recognise it.
        unit: What a row number counts: ``line`` or ``record``.
    """

    source: str
    unit: str = "line"
    found: list[tuple[int, str]] = field(default_factory=list)

    def add(self, number: int, message: str) -> None:
        """Note one problem at row `number`."""
        self.found.append((number, message))

    def raise_any(self, rows: int = 0) -> None:
        """Raise a `DataError` with up to ten problems and the count of the others, if there are any.

        Args:
            rows: How many rows there are; one problem that all of them share is said once.
        """
        if not self.found:
            return
        if len(self.found) == rows > 1 and len({message for _, message in self.found}) == 1:
            raise DataError(f"{self.source}, each of the {rows:,} rows: {self.found[0][1]}")
        shown = [f"{self.source}, {self.unit} {number}: {message}" for number, message in self.found[:MAX_PROBLEMS]]
        more = len(self.found) - len(shown)
        if more:
            shown.append(f"... and {more} more of {self.source}")
        raise DataError("\n".join(shown))


def read_text(path: Path) -> str:
    """Return a file's text, which must be UTF-8 (a byte order mark is accepted and removed).

    Raises:
        MissingInputError: If the file is not there.
        DataError: If it is empty, UTF-16 or UTF-32, or not UTF-8; the message gives the line of the first wrong byte.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise MissingInputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if not content.strip():
        raise DataError(f"{path}: the file is empty; it needs at least one row")
    if content.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")):
        raise DataError(
            f"{path}: the byte order mark says UTF-16 or UTF-32; save it as UTF-8 "
            f"(iconv -f UTF-16 -t UTF-8 {path.name})"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8 "
            f"(iconv -f LATIN1 -t UTF-8 {path.name}, if that is its encoding)"
        ) from error


def _parse_json(text: str) -> Any:
    """Parse JSON; nesting too deep for Python is an error like any other."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _describe_json_error(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at column {error.colno}"
    return f"not valid JSON: {error}"


def _rows_of_jsonl(text: str, problems: Problems) -> Iterable[RawRow]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = _parse_json(line)
        except ValueError as error:
            problems.add(number, f"{_describe_json_error(error)}; each line must be one JSON object")
            continue
        if not isinstance(value, dict):
            problems.add(number, f'got {kind_of(value)}; each line must be one JSON object, as {{"text": "..."}}')
            continue
        yield RawRow(number, value)


def _rows_of_json(text: str, problems: Problems) -> Iterable[RawRow]:
    try:
        value = _parse_json(text)
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            # One object a line under the name .json is common enough to be read as what it is.
            problems.unit = "line"
            yield from _rows_of_jsonl(text, problems)
            return
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        problems.unit = "line"
        problems.add(line, f"{_describe_json_error(error)}; the file must be a list of objects")
        return
    if isinstance(value, dict):
        lists = [key for key, rows in value.items() if isinstance(rows, list)]
        value = value[lists[0]] if len(value) == 1 and lists else [value]
    if not isinstance(value, list):
        problems.add(1, f"got {kind_of(value)}; the file must be a list of objects")
        return
    for number, row in enumerate(value, start=1):
        if isinstance(row, dict):
            yield RawRow(number, row)
        else:
            problems.add(number, f"got {kind_of(row)}; each record must be an object")


def _rows_of_csv(text: str, problems: Problems, delimiters: str, known: Iterable[str]) -> Iterable[RawRow]:
    """Rows of a csv with a header; of the delimiters, the one that gives the most known field names is taken."""
    header_line = text.lstrip("\r\n").splitlines()[0]
    known = set(known)

    def hits(delimiter: str) -> int:
        return len({name.strip() for name in next(csv.reader([header_line], delimiter=delimiter), [])} & known)

    delimiter = max(delimiters, key=hits)
    previous_limit = csv.field_size_limit(_FIELD_CHARACTERS)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        start = 1
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                problems.add(start, f"not valid csv: {error}")
                return
            number, start = start, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = [name.strip() for name in cells]
                doubled = sorted({name for name in header if header.count(name) > 1})
                if doubled:
                    problems.add(number, f"the header names {', '.join(map(repr, doubled))} more than once")
                    return
                continue
            if len(cells) > len(header):
                problems.add(
                    number,
                    f"{len(cells)} cells under a header of {len(header)} ({', '.join(header)}); "
                    "put cells that contain the delimiter into double quotes",
                )
                continue
            yield RawRow(number, dict(zip(header, cells, strict=False)))
    finally:
        csv.field_size_limit(previous_limit)


def text_pieces(text: str, *, characters: int = PIECE_CHARACTERS) -> list[tuple[int, str]]:
    """Cut a plain text into consecutive pieces that together are the text: `(first line, piece)`.

    A piece ends at the first blank line after `characters` characters, or at the first line end after twice that.
    """
    pieces: list[tuple[int, str]] = []
    lines: list[str] = []
    size, first, filled = 0, 1, False
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        lines.append(line)
        size += len(line)
        blank = not line.strip()
        filled = filled or not blank
        if filled and ((size >= characters and blank) or size >= 2 * characters):
            pieces.append((first, "".join(lines)))
            lines, size, first, filled = [], 0, number + 1, False
    if filled:
        pieces.append((first, "".join(lines)))
    return pieces


def _rows_of_parquet(path: Path) -> Iterable[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield RawRow(number, row)


def read_file(path: Path, known: Iterable[str]) -> tuple[list[RawRow], Problems]:
    """Read one file by its extension.

    Args:
        path: A file with one of `EXTENSIONS`.
        known: Field names that are recognised, used to tell csv delimiters apart.

    Returns:
        The rows, and the problems found so far (the caller adds its own and raises them together). Pieces of a plain
        text have the field ``text``.

    Raises:
        MissingInputError: If the file is not there or its extension is not known.
        DataError: If it holds no row, or its bytes are not UTF-8 text or parquet.
    """
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        raise MissingInputError(
            f"{path}: the extension {extension or '(none)'} is not one that can be read; known: {', '.join(EXTENSIONS)}"
        )
    problems = Problems(str(path))
    if extension == ".parquet":
        if not path.is_file():
            raise MissingInputError(f"{path}: no such file; check the path")
        problems.unit = "record"
        rows = list(_rows_of_parquet(path))
    else:
        text = read_text(path)
        if extension in (".jsonl", ".ndjson"):
            rows = list(_rows_of_jsonl(text, problems))
        elif extension == ".json":
            problems.unit = "record"
            rows = list(_rows_of_json(text, problems))
        elif extension == ".txt":
            pieces = text_pieces(text)
            rows = [
                RawRow(line, {"text": piece}, ends=index == len(pieces) - 1)
                for index, (line, piece) in enumerate(pieces)
            ]
        else:
            rows = list(_rows_of_csv(text, problems, "\t" if extension == ".tsv" else ",;\t", known))
    if not rows and not problems.found:
        raise DataError(f"{path}: there is no row in it; it needs at least one")
    return rows, problems


def is_hub_id(name: str) -> bool:
    """Whether a text has the form of a hub id: ``name``, ``owner/name``, either with ``:configuration`` behind it."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?", name) is not None


def read_dataset(name: str, configuration: str | None = None) -> dict[str, list[RawRow]]:
    """Open a hub id or a dataset folder through the `datasets` library: split name -> rows.

    Class labels are given as their names. Dataset scripts are never run (the library no longer can).

    Raises:
        MissingInputError: If the dataset cannot be found or reached.
        DataError: If the library finds it but cannot read it.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
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
    result: dict[str, list[RawRow]] = {}
    for split, dataset in opened.items():
        labels = {
            column: feature for column, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)
        }
        rows: list[RawRow] = []
        for number, raw in enumerate(dataset, start=1):
            row: dict[str, Any] = dict(raw)
            named = {
                column: feature.int2str(row[column])
                for column, feature in labels.items()
                if isinstance(row[column], int) and row[column] >= 0
            }
            rows.append(RawRow(number, {**row, **named}))
        result[str(split)] = rows
    return result


def kind_of(value: Any) -> str:
    """The name of a value's type as people who write JSON call it."""
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)

"""Files into raw rows: jsonl, json, csv, tsv, txt, each also as .gz; parquet; and what the `datasets` library opens.

A raw row is `RawRow(number, fields)`: a mapping of field names to plain Python values and the place it came from (the
line for jsonl, csv and txt, the position in the list for json, parquet and datasets; both counted from 1). This module
knows bytes and syntax; what the fields mean is the part of `conversations.py`. No dataset script is ever run, nothing
is unpickled.

Files are read as streams: a line, a csv row or a thousand rows of parquet at a time. Only a .json list is held whole.
What JSON readers usually let pass is refused by row, since it loses data in silence: a key that stands twice in an
object, NaN and Infinity. So are other encodings than UTF-8, and NUL bytes.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from strop.data.pieces import pieces, split_text
from strop.errors import DataError, MissingInputError

PLAIN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
EXTENSIONS = (*PLAIN, ".parquet", *(f"{name}.gz" for name in PLAIN))

MAX_PROBLEMS = 10

MOST_ROW_BYTES: Final = 256 << 20
"""A line or csv row above this is refused: it is most often a file whose lines do not end as they should."""

MOST_JSON_BYTES: Final = 2 << 30
"""A .json list is read whole, so one above this is refused; jsonl is read line by line."""

_PARQUET_ROWS: Final = 1_000


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
        count: How many problems there are.
        shown: The first of them.
        alike: Whether all say the same.
    """

    source: str
    unit: str = "line"
    count: int = 0
    shown: list[tuple[int, str]] = field(default_factory=list)
    alike: bool = True

    def add(self, number: int, message: str) -> None:
        """Note one problem at row `number`."""
        self.count += 1
        self.alike = self.alike and (not self.shown or self.shown[0][1] == message)
        if len(self.shown) < MAX_PROBLEMS:
            self.shown.append((number, message))

    def raise_any(self, rows: int = 0) -> None:
        """Raise a `DataError` with up to ten problems and the count of the others, if there are any.

        Args:
            rows: How many rows there are; one problem that all of them share is said once.
        """
        if not self.count:
            return
        if self.count == rows > 1 and self.alike:
            raise DataError(f"{self.source}, each of the {rows:,} rows: {self.shown[0][1]}")
        lines = [f"{self.source}, {self.unit} {number}: {message}" for number, message in self.shown]
        if self.count > len(lines):
            lines.append(f"... and {self.count - len(lines)} more of {self.source}")
        raise DataError("\n".join(lines))


@dataclass(frozen=True)
class Source:
    """Something that gives raw rows, as often as it is asked.

    Attributes:
        name: The file or dataset, as the user would recognise it.
        size_bytes: What it takes on the disk, unpacked as far as that is known.
        rows: Reads it from the beginning; what is wrong with single rows goes into the `Problems`.
        digest: SHA-256 of what is read, as hexadecimal digits.
        unit: What a row number counts.
    """

    name: str
    size_bytes: int
    rows: Callable[[Problems], Iterator[RawRow]]
    digest: Callable[[], str]
    unit: str = "line"


# --- bytes and lines --------------------------------------------------------------------------------------------------


def extension_of(path: Path) -> str:
    """The extension that says how a file is read, `.gz` with the one before it, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def _open(path: Path) -> BinaryIO:
    try:
        return cast("BinaryIO", gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")
    except OSError as error:
        raise MissingInputError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _byte_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked, each with its end.

    Raises:
        DataError: If a line is above `MOST_ROW_BYTES`, or the gzip data are damaged or cut off.
    """
    number = 0
    with _open(path) as file:
        try:
            while line := file.readline(MOST_ROW_BYTES + 1):
                number += 1
                if len(line) > MOST_ROW_BYTES:
                    raise DataError(
                        f"{path}, line {number}: more than {MOST_ROW_BYTES >> 20} MiB without a line end; "
                        "write one row a line"
                    )
                yield line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{path}: damaged or cut off after line {number} ({error}); fetch or pack the file again "
                f"(gzip -t {path.name} tells whether it is whole)"
            ) from error
        except OSError as error:
            raise DataError(f"{path}: reading failed after line {number} ({error.strerror or error})") from error


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a file, which must be UTF-8 (a byte order mark is accepted and removed), each with its end.

    Raises:
        MissingInputError: If the file is not there.
        DataError: If it is empty, UTF-16 or UTF-32, or not UTF-8; the message gives the line of the first wrong byte.
    """
    filled = False
    for number, line in enumerate(_byte_lines(path), start=1):
        if number == 1:
            _check_encoding(path, line)
            line = line.removeprefix(b"\xef\xbb\xbf")
        if b"\0" in line:
            raise DataError(
                f"{path}, line {number}: a NUL byte at column {line.index(0) + 1}, which no text holds; the file is "
                "damaged, or no text file"
            )
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}: byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8 "
                f"(iconv -f LATIN1 -t UTF-8 {path.name}, if that is its encoding)"
            ) from error
        filled = filled or bool(text.strip())
        yield text
    if not filled:
        raise DataError(f"{path}: the file is empty; it needs at least one row")


def _check_encoding(path: Path, head: bytes) -> None:
    """Refuse UTF-16 and UTF-32, by their byte order mark or by the zeros between the letters."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")):
        raise DataError(
            f"{path}: the byte order mark says UTF-16 or UTF-32; save it as UTF-8 "
            f"(iconv -f UTF-16 -t UTF-8 {path.name})"
        )
    first, second = head[:64:2], head[1:64:2]
    zeros = first.count(0), second.count(0)
    if len(second) >= 2 and min(zeros) == 0 and max(zeros) >= 0.7 * len(second):
        order = "UTF-16BE" if zeros[0] else "UTF-16LE"
        raise DataError(
            f"{path}: a zero beside every letter, as UTF-16 without a byte order mark has; save it as UTF-8 "
            f"(iconv -f {order} -t UTF-8 {path.name})"
        )


# --- JSON -------------------------------------------------------------------------------------------------------------


class _StrictError(ValueError):
    """JSON that could be read, with something lost."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = sorted({name for name in names if names.count(name) > 1})
        raise _StrictError(
            f"{', '.join(map(repr, doubled))} stands more than once in one object, and only one value could be kept; "
            "give each its own name"
        )
    return read


def _constant(name: str) -> Any:
    raise _StrictError(f"{name} is not a JSON value; write null, a number or a text")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def parse_json(text: str) -> Any:
    """Parse JSON strictly; nesting too deep for Python is an error like any other.

    Raises:
        ValueError: If it is not JSON, a key stands twice in an object, or it holds NaN or Infinity.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _describe_json_error(error: ValueError) -> str:
    if isinstance(error, _StrictError):
        return str(error)
    if isinstance(error, json.JSONDecodeError):
        more = ", where another value begins" if error.msg == "Extra data" else ""
        return f"not valid JSON: {error.msg} at column {error.colno}{more}"
    return f"not valid JSON: {error}"


def _rows_of_jsonl(lines: Iterable[str], problems: Problems) -> Iterator[RawRow]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except _StrictError as error:
            problems.add(number, str(error))
            continue
        except ValueError as error:
            problems.add(number, f"{_describe_json_error(error)}; each line must be one JSON object")
            continue
        if not isinstance(value, dict):
            problems.add(number, f'got {kind_of(value)}; each line must be one JSON object, as {{"text": "..."}}')
            continue
        yield RawRow(number, value)


def _rows_of_json(path: Path, problems: Problems) -> Iterator[RawRow]:
    problems.unit = "record"
    lines: list[str] = []
    size = 0
    for line in text_lines(path):
        lines.append(line)
        size += len(line)
        if size > MOST_JSON_BYTES:
            raise DataError(
                f"{path}: more than {MOST_JSON_BYTES >> 30} GiB, and a .json list is read whole; write it as .jsonl, "
                f"one object a line (jq -c '.[]' {path.name}), which is read row by row"
            )
    try:
        value = parse_json("".join(lines))
    except _StrictError as error:
        raise DataError(f"{path}: {error}") from error
    except ValueError as error:
        problems.unit = "line"
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            # One object a line under the name .json is common enough to be read as what it is.
            yield from _rows_of_jsonl(lines, problems)
            return
        line_number = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        problems.add(line_number, f"{_describe_json_error(error)}; the file must be a list of objects")
        return
    del lines
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


# --- tables -----------------------------------------------------------------------------------------------------------


class _CsvRows:
    """The rows of a csv, with the limit on a field set only while one is read: it belongs to the whole process."""

    def __init__(self, lines: Iterator[str], delimiter: str) -> None:
        self.reader = csv.reader(lines, delimiter=delimiter, strict=True)

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        before = csv.field_size_limit(MOST_ROW_BYTES)
        try:
            return next(self.reader)
        finally:
            csv.field_size_limit(before)


def _rows_of_csv(lines: Iterator[str], problems: Problems, delimiters: str, known: Iterable[str]) -> Iterator[RawRow]:
    """Rows of a csv with a header; of the delimiters, the one that gives the most known field names is taken."""
    head: list[str] = []
    for line in lines:
        head.append(line)
        if line.strip("\r\n"):
            break
    names = set(known)

    def hits(delimiter: str) -> int:
        return len({name.strip() for name in next(csv.reader(head[-1:], delimiter=delimiter), [])} & names)

    def all_lines() -> Iterator[str]:
        yield from head
        yield from lines

    rows = _CsvRows(all_lines(), max(delimiters, key=hits))
    header: list[str] | None = None
    start = 1
    while True:
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(start, f"not valid csv: {error}; a quoted cell must be closed, a quote inside it doubled")
            return
        number, start = start, rows.reader.line_num + 1
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
        if len(header) > 1 and [cell.strip() for cell in cells] == header:
            problems.add(number, "the header stands here again, as where two files were joined; take the line out")
            continue
        yield RawRow(number, dict(zip(header, cells, strict=False)))


def _rows_of_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                raise DataError(f"{path}: the columns {', '.join(map(repr, doubled))} stand more than once")
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(number, row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a readable parquet file, after row {number} ({str(error).splitlines()[0]}); fetch it again, "
            "or write it anew"
        ) from error


# --- plain text -------------------------------------------------------------------------------------------------------


def _rows_of_text(lines: Iterable[str]) -> Iterator[RawRow]:
    split = (part for line in lines for part in line.splitlines(keepends=True))
    numbered = ((number, part) for number, line in enumerate(split, start=1) for part in split_text(line))
    last: tuple[int, str] | None = None
    for piece in pieces(numbered):
        if last is not None:
            yield RawRow(last[0], {"text": last[1]}, ends=False)
        last = piece
    if last is not None:
        yield RawRow(last[0], {"text": last[1]})


# --- files ------------------------------------------------------------------------------------------------------------


def file_source(path: Path, known: Iterable[str]) -> Source:
    """One file as a source, by its extension.

    Args:
        path: A file with one of `EXTENSIONS`.
        known: Field names that are recognised, used to tell csv delimiters apart.

    Raises:
        MissingInputError: If the file is not there or its extension is not known.
    """
    extension = extension_of(path)
    if extension not in EXTENSIONS:
        raise MissingInputError(
            f"{path}: the extension {extension or '(none)'} is not one that can be read; known: {', '.join(EXTENSIONS)}"
        )
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "no such file"
        raise MissingInputError(f"{path}: {reason}; check the path")
    plain = extension.removesuffix(".gz")

    def rows(problems: Problems) -> Iterator[RawRow]:
        if plain == ".parquet":
            problems.unit = "record"
            return _rows_of_parquet(path)
        if plain in (".jsonl", ".ndjson"):
            return _rows_of_jsonl(text_lines(path), problems)
        if plain == ".json":
            return _rows_of_json(path, problems)
        if plain == ".txt":
            return _rows_of_text(text_lines(path))
        return _rows_of_csv(text_lines(path), problems, "\t" if plain == ".tsv" else ",;\t", known)

    def digest() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    size = path.stat().st_size * (4 if extension.endswith(".gz") else 1)  # text packs to about a quarter
    return Source(str(path), size, rows, digest)


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
        bytes: "bytes",
    }
    return names.get(type(value), type(value).__name__)

"""The rows that a model is judged or asked by, from whatever a person names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from strop.data.records import Record, read_data, read_records
from strop.errors import DataError

Rows = str | os.PathLike[str] | Sequence[Mapping[str, Any]]
"""A file, a folder or hub id with a test split, or rows in memory."""


def held_out_records(data: Rows) -> list[Record]:
    """All rows of a file or list, the test split of a folder or hub id.

    Raises:
        MissingInputError: Nothing of that name is there.
        DataError: A row is broken, or there is no test split.
    """
    if not isinstance(data, str | os.PathLike):
        return read_records(data)
    path = Path(data)
    if path.is_file() or (path.suffix and not path.is_dir()):
        return read_records(path)
    records = read_data(path if path.is_dir() else str(data)).test
    if not records:
        raise DataError(
            f"{data}: has no test split, and the others trained and chose; name a file of rows that did neither"
        )
    return records


def rows_name(data: Rows) -> str:
    """What the rows are called."""
    return str(data) if isinstance(data, str | os.PathLike) else "rows in memory"


def row_digest(record: Record) -> str:
    """What a row says, as 16 hexadecimal digits: the same wherever it came from and whatever is learned of it."""
    turns = [[turn.role, turn.content] for turn in record.messages or ()]
    return hashlib.sha256(json.dumps([turns, record.text]).encode()).hexdigest()[:16]

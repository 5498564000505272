"""A text file that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from strop.errors import UsageError


def write_whole(path: str | os.PathLike[str], pieces: Iterable[str]) -> Path:
    """Write `pieces` to a file beside `path`, flush it to the disk, then give it the name.

    Whatever stood at `path` stays until then, and stays altogether when a piece or the disk fails. Missing folders are
    made.

    Raises:
        UsageError: `path` is a folder.
        OSError: The file cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"{target}: is a folder; name a file in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return target

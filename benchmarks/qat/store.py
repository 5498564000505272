"""Results as lines of JSON, one a cell of the study: what is there already is not measured again.

A cell's key is whatever decides its figures (seed, grid, arm, settings, split); the rest of the line is what was found.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


class Store:
    """The lines of one file.

    Args:
        path: The file; made with the first line.
        key: The names of the fields that tell cells apart.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path, self.key = path, tuple(key)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.cells: list[Cell] = [json.loads(line) for line in lines]

    def find(self, wanted: Mapping[str, Any]) -> Cell | None:
        """The cell with this key, fields that `wanted` leaves out being None."""
        for cell in self.cells:
            if all(cell.get(name) == wanted.get(name) for name in self.key):
                return cell
        return None

    def once(self, wanted: Cell, measure: Callable[[], Cell]) -> Cell:
        """The cell of this key, measured and written if it is not there."""
        found = self.find(wanted)
        if found is None:
            found = wanted | measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            self.cells.append(found)
        return found


@contextmanager
def cpu_seconds() -> Iterator[Callable[[], float]]:
    """CPU seconds of this process and of those that it waited for, since the block began."""

    def now() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    began = now()
    yield lambda: round(now() - began, 1)


def to_hex(right: Sequence[bool]) -> str:
    """Which rows are right, four a digit, the first row in the highest bit; padded with zeros at the end."""
    bits = "".join("1" if one else "0" for one in right)
    bits += "0" * (-len(bits) % 4)
    return f"{int(bits, 2):0{len(bits) // 4}x}"


def from_hex(text: str, rows: int) -> list[bool]:
    """What `to_hex` wrote."""
    return [bit == "1" for bit in f"{int(text, 16):0{4 * len(text)}b}"[:rows]]

"""`metrics.jsonl`: one JSON object a step, in the order of the steps, each step once, also after a resume.

Fields: step, loss (mean nats per supervised token), learning_rate, gradient_norm (before clipping), tokens,
supervised_tokens, tokens_per_second, step_seconds, peak_bytes; on evaluated steps also valid_loss.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strop.training.events import EventFile

NAME = "metrics.jsonl"


class MetricsFile:
    """Appends rows to a file, each flushed as it is written.

    Args:
        path: The file; it is made, or continued.
        after_step: Rows of later steps, and torn ones, are removed first: the run is about to write them again.
        events: A folder for TensorBoard's event file, made anew from the rows that stay; None: there is none.
    """

    def __init__(self, path: Path, *, after_step: int, events: Path | None = None) -> None:
        kept = [(line, row) for line, row in _rows(path) if row["step"] <= after_step]
        part = path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line, _ in kept), encoding="utf-8")
        os.replace(part, path)
        self._file = path.open("a", encoding="utf-8")
        self._events = EventFile(events, [row for _, row in kept]) if events is not None else None

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            self._events.write(row)

    def close(self) -> None:
        """Close the file, and the event file beside it."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a metrics file; empty where there is none."""
    return [row for _, row in _rows(path)]


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        return []
    rows: list[tuple[str, dict[str, Any]]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a killed process
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append((line, row))
    return rows

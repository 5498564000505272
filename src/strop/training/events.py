"""RUN/tensorboard: the metrics as an event file that TensorBoard draws, the same figures as in metrics.jsonl.

metrics.jsonl is the truth. Whenever a run begins or goes on, the event file is made anew from the rows that stand
there and then continued, so that no step is in it twice, however often the run was killed. Its clock counts training
seconds: a row's wall time is that of the row before plus `step_seconds`, so that pauses between resumes do not show.

Written with tensorboard's own record writer and without its background thread: a step is on the disk when `write`
returns. One file by a fixed name, whatever the machine is called.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from strop.errors import MissingInputError

NAME: Final = "tensorboard"
FILE: Final = "events.out.tfevents.0.strop"

TAGS: Final[Mapping[str, str]] = {
    "loss": "train/loss",
    "valid_loss": "valid/loss",
    "learning_rate": "learning_rate",
    "gradient_norm": "gradient_norm",
    "tokens_per_second": "tokens_per_second",
    "peak_bytes": "peak_bytes",
}
"""What is drawn of a row of metrics.jsonl, and what it is called there."""


def require_tensorboard() -> None:
    """Refuse a run that would write event files where the package is missing.

    Raises:
        MissingInputError: it is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingInputError(
            "tensorboard: the setting needs a package that is not installed here; pip install strop[tensorboard], or "
            "leave the setting out (metrics.jsonl holds the same figures)"
        )


class EventFile:
    """An event file that is made anew and then continued.

    Args:
        folder: Where it stands; made if it is missing. The file takes its name when all of `rows` are in it.
        rows: Rows of metrics.jsonl that are there already.

    Raises:
        MissingInputError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        require_tensorboard()
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        events: Any = event_pb2  # generated classes, which no checker knows
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(rows)
        self._time = time.time() - sum(float(row.get("step_seconds", 0.0)) for row in rows)
        part = folder / f".{FILE}.part"
        self._records = RecordWriter(part.open("wb"))
        self._records.write(events.Event(wall_time=self._time, file_version="brain.Event:2").SerializeToString())
        for row in rows:
            self.write(row)
        self._records.flush()
        os.replace(part, folder / FILE)  # the open file goes on under its name

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row of metrics.jsonl."""
        self._time += float(row.get("step_seconds", 0.0))
        values = [self._summary.Value(tag=tag, simple_value=row[key]) for key, tag in TAGS.items() if key in row]
        event = self._event(wall_time=self._time, step=row["step"], summary=self._summary(value=values))
        self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        self._records.close()

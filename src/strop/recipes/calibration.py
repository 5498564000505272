"""The rows that calibrate a model and those that judge the result, from what `--data` names.

    training rows (or all)  -> calibrate
    validation, else test   -> held out: they choose nothing, and the receipt is measured on them
    no data                 -> paragraphs that strop brings along, said and recorded

Rows are rendered through the same template as training. Copies of a row say nothing new and are left out.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from strop.data.records import Record, read_data, read_records
from strop.data.samples import prepare
from strop.data.templates import Sample
from strop.demo import everyday, text
from strop.errors import DataError
from strop.progress import SILENT, Reporter
from strop.recipes.rows import Rows, row_digest, rows_name

MAX_LENGTH: Final = 2048
"""Most tokens of a row."""

HELD_OUT: Final = 0.25
"""Share of the rows that calibrate nothing and are compared."""

LEAST_TOKENS: Final = 64
"""Fewer tokens than these say nothing about a layer's inputs."""

BUILT_IN: Final = "paragraphs of strop's own (no --data)"


@dataclass(frozen=True)
class CalibrationRows:
    """Rows by their use.

    Attributes:
        name: What they are called.
        calibrating: Rows that calibrate.
        held_out: Rows that calibrate nothing; empty where there is only one.
        sha256: Of all their token ids.
        row_digests: What each row drawn says (`row_digest`), sorted; empty for the built-in paragraphs.
    """

    name: str
    calibrating: Sequence[Sample]
    held_out: Sequence[Sample]
    sha256: str
    row_digests: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that calibrate."""
        return sum(len(sample) for sample in self.calibrating)

    def choosing(self) -> CalibrationRows:
        """Three quarters of the calibrating rows, the last quarter held out of them: to choose by."""
        count = max(1, round(len(self.calibrating) * HELD_OUT))
        kept, chosen = self.calibrating[:-count], self.calibrating[-count:]
        if not kept:
            raise DataError(f"{self.name}: a single row calibrates, and none is left to choose by; give more rows")
        return CalibrationRows(self.name, kept, chosen, f"{self.sha256} choosing", self.row_digests)

    def to_dict(self) -> dict[str, Any]:
        """What a receipt says of them."""
        return {
            "data": self.name,
            "built_in": self.name == BUILT_IN,
            "rows": len(self.calibrating),
            "tokens": self.tokens,
            "held_out_rows": len(self.held_out),
            "sha256": self.sha256,
            "row_digests": list(self.row_digests),
        }


def calibration_rows(
    data: Rows | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_rows: int,
    max_length: int,
    chat_template: str | os.PathLike[str] | None = None,
    reporter: Reporter = SILENT,
) -> CalibrationRows:
    """Draw the rows, evenly and always the same.

    Args:
        data: What `tune` takes; None for the built-in paragraphs.
        tokenizer: The model's.
        max_rows: Rows that are used in all; a quarter of them is held out.
        max_length: Most tokens of a row.
        chat_template: For models that have none, as `tune` takes it.
        reporter: Told what a user should know of the rows.

    Raises:
        DataError: no row is left, or the rows hold fewer than 64 tokens.
    """
    template = None if chat_template is None else str(chat_template)

    def samples_of(records: Sequence[Record]) -> list[Sample]:
        if not records:
            return []
        return list(prepare(records, tokenizer, max_length=min(MAX_LENGTH, max_length), chat_template=template))

    name = BUILT_IN if data is None else rows_name(data)
    if data is None:
        reporter.note(
            f"no --data: {max_rows} paragraphs of Python's documentation and everyday sentences calibrate; rows of the "
            "task that the model is for calibrate better"
        )
    calibrating_records, held_records = _drawn_rows(_built_in(max_rows) if data is None else data, max_rows)
    calibrating, held_out = samples_of(calibrating_records), samples_of(held_records)
    if not held_out and len(calibrating) > 1:  # one long text: its last windows are held out
        count = max(1, round(len(calibrating) * HELD_OUT))
        calibrating, held_out = calibrating[:-count], calibrating[-count:]
    calibrating = calibrating[:max_rows]
    held_out = held_out[: max(1, round(max_rows * HELD_OUT))]
    kept = _distinct(calibrating, [])
    judged = _distinct(held_out, kept)
    copies = len(calibrating) - len(kept) + len(held_out) - len(judged)
    if copies:
        reporter.note(f"{name}: {copies} of {len(calibrating) + len(held_out)} rows are copies and are left out")
    if not judged:
        reporter.note(f"{name}: a single row; it calibrates, and nothing is left to compare on")
    tokens = sum(len(sample) for sample in kept)
    if tokens < LEAST_TOKENS:
        raise DataError(
            f"{name}: {tokens} tokens calibrate, at least {LEAST_TOKENS} are needed; give more rows or longer ones"
        )
    digest = hashlib.sha256(repr([sample.input_ids for sample in [*kept, *judged]]).encode()).hexdigest()
    drawn = [] if data is None else [*calibrating_records, *held_records]
    return CalibrationRows(name, kept, judged, digest, tuple(sorted({row_digest(record) for record in drawn})))


def _built_in(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    library = list(text.library_paragraphs())
    rng.shuffle(library)
    rows = [library[row // 2 % len(library)] if row % 2 else everyday.paragraph(rng) for row in range(count)]
    return [{"text": row} for row in rows]


def _drawn_rows(data: Rows, max_rows: int) -> tuple[list[Record], list[Record]]:
    """Records that calibrate and records that are held out.

    Of a folder with splits, training rows calibrate and those of the validation (or test) split are held out.
    """
    if not isinstance(data, str | os.PathLike):
        read_records(data)  # refuses an empty list
    splits = read_data(data if not isinstance(data, os.PathLike) else Path(data), seed=0, valid_fraction=HELD_OUT)
    held_out = splits.valid or splits.test
    count = max(1, round(max_rows * HELD_OUT)) if held_out and max_rows > 1 else 0
    return _drawn(splits.train, max(1, max_rows - count)), _drawn(held_out, count)


def _drawn(records: list[Record], count: int) -> list[Record]:
    if len(records) <= count:
        return records
    return [records[index] for index in sorted(random.Random(0).sample(range(len(records)), count))]


def _distinct(samples: Sequence[Sample], others: Sequence[Sample]) -> list[Sample]:
    """Samples that are neither copies of one before nor of one of `others`."""
    seen = {tuple(sample.input_ids) for sample in others}
    kept: list[Sample] = []
    for sample in samples:
        said = tuple(sample.input_ids)
        if said not in seen:
            seen.add(said)
            kept.append(sample)
    return kept

"""The rows that `tune --method auto` is gated by, and what each model loses on them against the one it was made of.

The rows are those that `tune` would choose by: the data's validation split, else the share that is held out. They
choose, so that they prove nothing: which of several ways passes first is decided on them. The gate is passed where the
drop that was measured is at most the one allowed; its paired interval is told beside it, and `strop prove` answers on
rows that chose nothing.

    exact-match   the drop in the share of rows answered exactly    [share of rows]
    perplexity    the rise of the loss                              [nats per supervised token]
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from strop.config import AutoConfig, data_name
from strop.data.mixing import Mixture, open_mixture
from strop.data.records import Record
from strop.errors import DataError
from strop.evaluation.comparison import ModelResult
from strop.evaluation.side_by_side import Place, Settings, SideBySide
from strop.evaluation.statistics import MINIMUM_DOCUMENTS
from strop.precision import choose_device
from strop.recipes.rows import row_digest
from strop.scratch import Scratch

MOST_ROWS: Final = 1000
"""Rows that are judged by; of more, so many are drawn by the seed."""

CALIBRATING: Final = 128
"""Training rows that calibrate."""

Task = Literal["exact-match", "perplexity"]


class GateRows:
    """Rows by their use, drawn by the configuration's seed.

    Attributes:
        gate: rows that choose.
        calibrating: training rows that calibrate.
        task: what is judged.
        test: whether the data have rows to judge by, too.
        notes: what a reader should know of them.
    """

    def __init__(self, config: AutoConfig) -> None:
        data = open_mixture(config.data, seed=config.seed, valid_fraction=config.samples.valid_fraction)
        self.notes: list[str] = []
        self.gate = self._gate(config, data)
        self.calibrating = _drawn(data.train, CALIBRATING, config.seed)
        self.test = isinstance(config.data, str) and len(data.test) > 0
        self.task: Task = _task(config, self.gate)
        allowed = config.method.max_drop
        if self.task == "exact-match" and 1 / len(self.gate) > allowed:
            self.notes.append(
                f"one of {len(self.gate):,} rows is {100 / len(self.gate):.1f} points, more than the {100 * allowed:g} "
                "that may be lost: the gate is passed only where no more rows are lost than are gained"
            )

    def _gate(self, config: AutoConfig, data: Mixture) -> list[Record]:
        rows = len(data.valid)
        if rows < MINIMUM_DOCUMENTS:
            raise DataError(
                f"{data_name(config.data)}: {rows} rows to choose by, and at least {MINIMUM_DOCUMENTS} are needed; "
                "give the data a valid split, or hold out a larger share of the rows (valid_fraction)"
            )
        if rows > MOST_ROWS:
            self.notes.append(f"{MOST_ROWS:,} of {rows:,} validation rows are judged by (seed {config.seed})")
        return _drawn(data.valid, MOST_ROWS, config.seed)

    def digests(self) -> list[str]:
        """What each gating row says, sorted."""
        return sorted({row_digest(record) for record in self.gate})


def write_rows(records: Sequence[Record], path: Path) -> None:
    """Write rows as jsonl that every verb reads."""
    lines: list[str] = []
    for record in records:
        turns = [{"role": turn.role, "content": turn.content} for turn in record.messages or ()]
        row = {"text": record.text} if record.messages is None else {"messages": turns}
        lines.append(json.dumps(row, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Gate:
    """Measures one model after another on the gating rows, each against the first.

    Args:
        config: the settings.
        rows: the rows.
        scratch: where the reference's logits are set aside.
    """

    def __init__(self, config: AutoConfig, rows: GateRows, scratch: Scratch) -> None:
        self._config, self._rows = config, rows
        self._run = SideBySide(
            rows.gate,
            Settings(
                task="exact-match" if rows.task == "exact-match" else None,
                chat_template=config.samples.chat_template,
                speed=False,
                layer_errors=False,
                examples=0,
                device=str(choose_device(config.machine.device)),
                seed=config.seed,
            ),
            scratch,
        )

    def reference(self, model: str) -> dict[str, Any]:
        """Measure the model in full precision.

        Raises:
            DataError: it answers no row, so that nothing could be lost; too few rows fit its context.
        """
        result = self._run.measure(Place("full precision", model, 0, None))
        if result.loss.rows < MINIMUM_DOCUMENTS:
            raise DataError(
                f"{result.loss.rows} of {len(self._rows.gate)} validation rows fit the context of {model}, and at "
                f"least {MINIMUM_DOCUMENTS} are needed to choose by"
            )
        if result.score is not None and result.score.estimate == 0:
            raise DataError(
                f"{model}: answers none of {result.score.rows:,} validation rows exactly, so that nothing could be "
                "lost; name a model that does the task already (strop tune --method full), or take --task perplexity"
            )
        return {"rows": result.loss.rows, **_alone(result)}

    def measure(self, name: str, model: Path) -> dict[str, Any]:
        """What a model loses: `drop` with `low` and `high` (None without an interval), KL, loss, score."""
        result = self._run.measure(Place(name, str(model), 0, None))
        lost, sign = result.score_difference, -1.0
        if self._rows.task == "perplexity":
            lost, sign = result.loss_difference, 1.0
        assert lost is not None
        ends = [None if end is None else sign * end + 0.0 for end in (lost.low, lost.high)]
        low, high = ends if sign > 0 else reversed(ends)
        drop = {"estimate": sign * lost.estimate + 0.0, "low": low, "high": high, "rows": lost.rows}
        return {"drop": drop, "kl": None if result.kl is None else result.kl.to_dict(), **_alone(result)}


def _alone(result: ModelResult) -> dict[str, Any]:
    return {
        "score": None if result.score is None else result.score.to_dict(),
        "loss": result.loss.to_dict(),
    }


def drop_figures(drop: Mapping[str, Any], task: str) -> tuple[str, str]:
    """A drop and its interval as figures, in points or nats per token; the interval is empty where there is none.

    >>> drop_figures({"estimate": 0.02, "low": -0.01, "high": 0.05}, "exact-match")
    ('2.0', '(-1.0 to 5.0)')
    """
    size, digits = (100.0, 1) if task == "exact-match" else (1.0, 4)
    estimate = f"{size * drop['estimate'] + 0.0:.{digits}f}"
    if drop.get("low") is None or drop.get("high") is None:
        return estimate, ""
    return estimate, f"({size * drop['low']:.{digits}f} to {size * drop['high']:.{digits}f})"


def unit_of(task: str) -> str:
    """What a drop is counted in."""
    return "points" if task == "exact-match" else "nats"


def drop_words(drop: Mapping[str, Any], task: str) -> str:
    """A drop with its unit, and its interval where there is one.

    >>> drop_words({"estimate": 0.0123}, "perplexity")
    '0.0123 nats'
    """
    estimate, interval = drop_figures(drop, task)
    return f"{estimate} {unit_of(task)} {interval}".rstrip()


def _task(config: AutoConfig, gate: Sequence[Record]) -> Task:
    wanting = [record for record in gate if not any(turn.role == "assistant" for turn in record.messages or ())]
    if config.method.task is None:
        return "perplexity" if wanting else "exact-match"
    if config.method.task == "exact-match" and wanting:
        raise DataError(
            f"{wanting[0].source}, row {wanting[0].row} (and {len(wanting) - 1} more): holds no answer to match; "
            "exact-match needs conversations that an assistant's turn ends. For texts take --task perplexity"
        )
    return config.method.task


def _drawn(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    if len(records) <= count:
        return list(records)
    wanted = set(random.Random(seed).sample(range(len(records)), count))
    return [record for place, record in enumerate(records) if place in wanted]  # one pass: a large file is read again

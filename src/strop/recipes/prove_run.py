"""One proof under way: both models score batch after batch, and the test looks after each cluster of rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from strop.data.templates import Sample
from strop.errors import DataError, ModelError
from strop.evaluation.engines import Engine, open_engine
from strop.evaluation.judging import MOST_CONTEXT, Judge, Score, Task, same_tokens
from strop.evaluation.sequential import DropTest, drop_interval, rows_to_decide
from strop.progress import Reporter
from strop.recipes.certificate import FlippedRow, Result
from strop.recipes.prove_rows import ProofRow
from strop.runtime.llama_cpp import GgufModel

SHOWN: Final = 10
"""Flipped rows that are kept with their answers."""

Item = TypeVar("Item")

_CHUNK_ROWS: Final = 256  # rendered at once
_DIGITS: Final = 6  # of a drop: the test takes what the certificate holds


class BothOpen:
    """Both models, open."""

    def __init__(self, model: str, reference: str, device: str) -> None:
        self.model: Engine = open_engine(model, device=device)
        self.reference: Engine = open_engine(reference, device=device)

    def close(self) -> None:
        """Give back what llama.cpp holds."""
        for engine in (self.model, self.reference):
            opened = getattr(engine, "model", None)
            if isinstance(opened, GgufModel):
                opened.close()


@dataclass(frozen=True)
class _Seen:
    """A row that was scored by both."""

    row: ProofRow
    reference: Score
    model: Score

    @property
    def drop(self) -> float:
        """How far the model is below the reference, at most 1 either way."""
        return min(max(self.reference.value - self.model.value, -1.0), 1.0)


@dataclass(frozen=True)
class _Ready:
    """A row as tokens of both models: per record its samples."""

    row: ProofRow
    model: list[list[Sample]]
    reference: list[list[Sample]]


class Proving:
    """One proof under way."""

    def __init__(
        self,
        opened: BothOpen,
        clusters: Sequence[Sequence[ProofRow]],
        task: Task,
        max_drop: float,
        *,
        max_length: int | None,
        max_rows: int | None,
        batch_size: int,
        chat_template: str | Path | None,
    ) -> None:
        limits = [engine.context or MOST_CONTEXT for engine in (opened.model, opened.reference)]
        length = min(max_length or MOST_CONTEXT, *limits)
        self._clusters, self._task, self._max_drop, self._max_rows = clusters, task, max_drop, max_rows
        self._batch_size = batch_size
        self._model, self._reference = (
            Judge(engine, task, max_length=length, chat_template=chat_template, batch_size=batch_size)
            for engine in (opened.model, opened.reference)
        )
        self._length = length
        self._test = DropTest(max_drop)
        self._seen: list[list[_Seen]] = []  # per cluster
        self._left_out = 0
        self.drops: list[float] = []
        self.notes: list[str] = []

    def run(self, reporter: Reporter) -> None:
        """Score batch after batch until the test has decided or the rows end.

        Raises:
            DataError: Nothing can be compared, or the reference gets no row right.
            ModelError: The two read the same text as different tokens, and nats per token are asked for.
        """
        done = 0
        for batch in self._batches():
            done += sum(len(cluster) for cluster in batch)
            self._look(batch)
            reporter.advance(done, drop=round(sum(self.drops) / len(self.drops), 4))
            if self._test.decided:
                break
        if not self.drops:
            raise DataError(
                f"no row was compared: {self._left_out:,} do not fit {self._length} tokens (max_length), and of the "
                f"others no whole cluster fits max_rows {self._max_rows}"
            )
        if self._task != "perplexity" and not any(one.reference.value for one in self._rows):
            raise DataError(
                f"the reference gets none of {len(self._rows):,} rows right, so that nothing could be lost and nothing "
                "is proved; look at its answers (strop predict), at the chat template, or take --task perplexity"
            )
        if self._left_out:
            self.notes.append(f"{self._left_out:,} rows are longer than {self._length:,} tokens and were left out")

    def _batches(self) -> Iterator[list[Sequence[_Ready]]]:
        """Clusters as tokens, a batch of rows at a time, up to `max_rows`."""
        left = self._max_rows
        for chunk in _chunks(self._clusters, _CHUNK_ROWS):
            for batch in _chunks(self._rendered(chunk), self._batch_size):
                if left is None:
                    yield batch
                    continue
                batch = _first_rows(batch, left)
                left -= sum(len(cluster) for cluster in batch)
                if batch:
                    yield batch
                if not left:
                    return

    def _rendered(self, clusters: Sequence[Sequence[ProofRow]]) -> list[list[_Ready]]:
        """What both can score of these clusters, as tokens."""
        records = [record for cluster in clusters for row in cluster for record in row.records]
        model, reference = self._model.render(records), self._reference.render(records)
        found, at = [], 0
        for cluster in clusters:
            ready = []
            for row in cluster:
                places = range(at, at + len(row.records))
                at += len(row.records)
                if not all(place in model and place in reference for place in places):
                    self._left_out += 1
                    continue
                ready.append(_Ready(row, [model[place] for place in places], [reference[place] for place in places]))
                if self._task == "perplexity" and not same_tokens(ready[-1].model[0], ready[-1].reference[0]):
                    raise ModelError(
                        f"row {row.row}: the two models read its answer as different tokens, so that nats per token "
                        "do not compare; take --task exact-match or choice, or the same tokenizer and template"
                    )
            if ready:
                found.append(ready)
        return found

    def _look(self, batch: Sequence[Sequence[_Ready]]) -> None:
        rows = [ready for cluster in batch for ready in cluster]
        right = [ready.row.right for ready in rows]
        model = self._model.scores([ready.model for ready in rows], right)
        reference = self._reference.scores([ready.reference for ready in rows], right)
        seen = iter([_Seen(r.row, one, other) for r, one, other in zip(rows, reference, model, strict=True)])
        for cluster in batch:
            if self._test.decided:  # what was scored beyond the deciding row is not looked at
                return
            together = [next(seen) for _ in cluster]
            drop = round(sum(one.drop for one in together) / len(together), _DIGITS)
            self._seen.append(together)
            self.drops.append(drop)
            self._test.add([drop])

    def result(self, *, seed: int, seen_before: int) -> Result:
        """What came out."""
        verdict, rows = self._test.verdict, self._rows
        low, high = drop_interval(self.drops, self._max_drop)
        needs = rows_to_decide(self.drops, self._max_drop, seed=seed) if verdict.decision == "undecided" else None
        answers = self._task != "perplexity"
        return Result(
            decision=verdict.decision,
            drop=sum(self.drops) / len(self.drops),
            low=low,
            high=high,
            rows=len(rows),
            clusters=verdict.rows,
            e_pass=verdict.e_pass,
            e_fail=verdict.e_fail,
            needs=needs,
            reference=math.fsum(one.reference.value for one in rows) / len(rows),
            model=math.fsum(one.model.value for one in rows) / len(rows),
            lost=sum(one.drop > 0 for one in rows) if answers else 0,
            gained=sum(one.drop < 0 for one in rows) if answers else 0,
            clipped=sum(abs(one.reference.value - one.model.value) > 1 for one in rows),
            left_out=self._left_out,
            seen_before=seen_before,
        )

    @property
    def _rows(self) -> list[_Seen]:
        return [one for cluster in self._seen for one in cluster]

    def digest(self) -> str:
        """SHA-256 over number, reference's and model's score of every row seen, in order."""
        lines = (f"{one.row.row} {one.reference.value!r} {one.model.value!r}\n" for one in self._rows)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def flipped(self) -> list[FlippedRow]:
        """Rows that only one of the two gets right, lost ones first, with what was answered."""
        if self._task == "perplexity":
            return []
        flips = sorted((one for one in self._rows if one.drop), key=lambda one: -one.drop)
        shown = [one for one in flips if self._task == "choice" or _single_answer(one.row)][:SHOWN]
        return [
            FlippedRow(
                row=one.row.row,
                kind="lost" if one.drop > 0 else "gained",
                asked=one.row.asked,
                expected=one.row.answers[one.row.right or 0],
                reference=self._answer(self._reference, one.row, one.reference),
                model=self._answer(self._model, one.row, one.model),
            )
            for one in shown
        ]

    def _answer(self, judge: Judge, row: ProofRow, score: Score) -> str:
        if score.chosen is not None:
            return row.answers[score.chosen]
        return row.answers[0] if score.value else judge.written(row.records[0])


def _chunks(clusters: Sequence[Sequence[Item]], rows: int) -> Iterator[list[Sequence[Item]]]:
    """Clusters in parts of about so many rows, none divided."""
    part: list[Sequence[Item]] = []
    for cluster in clusters:
        part.append(cluster)
        if sum(map(len, part)) >= rows:
            yield part
            part = []
    if part:
        yield part


def _first_rows(clusters: Sequence[Sequence[_Ready]], rows: int) -> list[Sequence[_Ready]]:
    """Whole clusters with so many rows at the most."""
    kept: list[Sequence[_Ready]] = []
    for cluster in clusters:
        if sum(map(len, kept)) + len(cluster) > rows:
            break
        kept.append(cluster)
    return kept


def _single_answer(row: ProofRow) -> bool:
    roles = [message.role for message in row.records[0].messages or ()]
    return roles.count("assistant") == 1 and roles[-1] == "assistant"

"""One model's score on rows, in its own runtime, with its own tokenizer and chat template.

    exact-match   1 where greedy decoding writes every expected answer to the last token, else 0 (`ExactMatch`)
    perplexity    minus the nats per supervised token
    choice        1 where the right choice is the likeliest (sum of its tokens' log probabilities), else 0

What is judged is the very file, so that a template or tokenizer that was lost on the way costs it answers. Perplexity
is per token, so there both models must see the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from strop.data.records import Record
from strop.data.samples import prepare
from strop.data.templates import IGNORED, Sample, prompt_ids
from strop.evaluation.engines import Engine
from strop.evaluation.likelihood import Likelihood
from strop.evaluation.tasks import ExactMatch

Task = Literal["exact-match", "perplexity", "choice"]

MOST_CONTEXT: Final = 4096
"""Tokens of a row that are scored where the model could take more."""

_ROOM: Final = 16  # tokens beyond the expected answer that a flipped one may take


@dataclass(frozen=True)
class Score:
    """A row's score.

    Attributes:
        value: The higher the better.
        chosen: For `choice`, the place of the likeliest.
    """

    value: float
    chosen: int | None = None


class Judge:
    """A model that scores rows.

    Args:
        engine: The open model.
        task: What is scored.
        max_length: Most tokens of a row.
        chat_template: For models that have none.
        batch_size: Records per forward pass.
    """

    def __init__(
        self, engine: Engine, task: Task, *, max_length: int, chat_template: str | Path | None, batch_size: int
    ) -> None:
        self.engine, self._task = engine, task
        self._max_length, self._template, self._batch_size = max_length, chat_template, batch_size

    def render(self, records: Sequence[Record]) -> dict[int, list[Sample]]:
        """Place of a record to its samples; those that are left out (too long to be scored whole) are absent.

        For perplexity a row is cut at the longest length instead, and a text makes several samples.

        Raises:
            DataError: The template refuses a record, or none can be scored.
        """
        cut = self._task == "perplexity"
        length = self._max_length if cut else 1 << 30  # an answer that is cut is another answer
        rendered = prepare(records, self.engine.require_tokenizer(), max_length=length, chat_template=self._template)
        found: dict[int, list[Sample]] = {}
        for sample in rendered:
            found.setdefault(sample.index, []).append(sample)
        return {
            place: samples
            for place, samples in found.items()
            if all(len(sample) <= self._max_length for sample in samples)
        }

    def scores(self, rows: Sequence[Sequence[Sequence[Sample]]], right: Sequence[int | None]) -> list[Score]:
        """Score rows.

        Args:
            rows: Per row the samples of each of its records.
            right: Per row the place of the right choice; None but for `choice`.
        """
        flat = [sample for records in rows for samples in records for sample in samples]
        likelihood, exact = Likelihood(len(flat)), ExactMatch(len(flat))
        measure = exact if self._task == "exact-match" else likelihood
        self.engine.score(flat, [measure], batch_size=self._batch_size)
        found, at = [], 0
        for records, wanted in zip(rows, right, strict=True):
            parts = []
            for samples in records:
                parts.append(slice(at, at + len(samples)))
                at += len(samples)
            if self._task == "exact-match":
                found.append(Score(float(bool(exact.right[parts[0]].all()))))
            elif self._task == "perplexity":
                nats, tokens = likelihood.nll_sums[parts[0]].sum(), likelihood.tokens[parts[0]].sum()
                found.append(Score(-float(nats / tokens)))
            else:
                sums = torch.stack([likelihood.nll_sums[part].sum() for part in parts])
                chosen = int(sums.argmin())
                found.append(Score(float(chosen == wanted), chosen))
        return found

    def written(self, record: Record) -> str:
        """What the model answers to a conversation's last question, with room for a little more than is expected."""
        messages = list(record.messages or ())
        tokenizer = self.engine.require_tokenizer()
        (text,) = self.engine.answers(
            [prompt_ids(messages[:-1], tokenizer, chat_template=self._template)],
            stop_ids=self.engine.stop_ids(self._template),
            max_new_tokens=len(tokenizer.encode(messages[-1].content)) + _ROOM,
        )
        return text


def same_tokens(one: Sequence[Sample], other: Sequence[Sample]) -> bool:
    """Whether two renderings of a row supervise the same tokens."""

    def supervised(samples: Sequence[Sample]) -> list[list[int]]:
        return [[label for label in sample.labels if label != IGNORED] for sample in samples]

    return supervised(one) == supervised(other)

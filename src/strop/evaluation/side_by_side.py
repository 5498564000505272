"""Measures one model after another on the same rows, each against the first, which is the reference.

One model is in memory at a time: `measure` opens it, takes everything that is wanted of it, and lets it go. What the
others need of the reference (its logits, its weights, what it answers to some of the rows it gets wrong) is set aside
when it is measured, the large parts in a bounded temporary file. Nothing is printed or written here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from strop.data.records import Record
from strop.data.samples import prepare
from strop.data.templates import Sample, prompt_ids
from strop.errors import DataError, ModelError
from strop.evaluation.comparison import Comparison, Flip, Flips, ModelResult
from strop.evaluation.divergence import Divergence, ReferenceLogits
from strop.evaluation.engines import Engine, open_engine
from strop.evaluation.kv_cache import KVFormat
from strop.evaluation.likelihood import Likelihood
from strop.evaluation.scoring import Measure, supervised_counts
from strop.evaluation.statistics import LEVEL, bootstrap_mean, compare_proportions, paired_bootstrap, wilson_interval
from strop.evaluation.tasks import ExactMatch
from strop.evaluation.weights import keep_weights, weight_errors
from strop.memory import PeakMemory, release_unused_memory, steady_allocation
from strop.scratch import Scratch, Stored

MOST_CONTEXT: Final = 4096
"""Tokens of a row that are scored where nothing else is said and the model could take more."""

_REMEMBERED_ANSWERS: Final = 48


@dataclass(frozen=True)
class Settings:
    """How models are measured; see `strop.recipes.compare.compare`."""

    task: str | None = None
    max_length: int | None = None
    chat_template: str | Path | None = None
    batch_size: int = 8
    speed: bool = True
    kv_bytes: bool = False
    layer_errors: bool = True
    examples: int = 6
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Place:
    """A model to measure: what it is called, where it is, what its weight files take on disk, and how its cache of keys
    and values is rounded (None: not at all).
    """

    name: str
    path: str
    weights_bytes: int
    adapter_bytes: int | None
    kv_cache: KVFormat | None = None


@dataclass(frozen=True)
class _Rows:
    """The rows as tokens: samples in the records' order, each with the place of its record."""

    samples: list[Sample]
    documents: Tensor  # [samples] int64, the document each sample belongs to, 0 to documents - 1
    records: list[Record]  # [documents]
    tokens: Tensor  # [samples] int64, supervised tokens
    tokenizer: Any  # transformers', or a GGUF file's with the same names

    def by_document(self, values: Tensor) -> Tensor:
        """Sum values [samples] of each document [documents], float64."""
        return torch.zeros(len(self.records), dtype=torch.float64).index_add_(0, self.documents, values.double())


class SideBySide:
    """One comparison under way: what the reference left behind, and what each model measured.

    Args:
        records: The rows.
        settings: How to measure.
        scratch: Where the reference's logits and weights go.
    """

    def __init__(self, records: Sequence[Record], settings: Settings, scratch: Scratch) -> None:
        self._records, self._settings, self._scratch = list(records), settings, scratch
        self._results: list[ModelResult] = []
        self._notes: list[str] = []
        self._rows: _Rows | None = None
        self._logits: ReferenceLogits | None = None
        self._weights: dict[str, Stored] | None = None
        self._answers: dict[int, str] = {}  # document -> what the reference writes, for some that it gets wrong
        self._loss: dict[str, Tensor] = {}  # name -> nats per document
        self._right: dict[str, Tensor] = {}

    @property
    def rows(self) -> _Rows:
        """The rows as tokens; only there once a model was opened."""
        if self._rows is None:
            raise RuntimeError("no model was opened yet, so the rows have no tokens")
        return self._rows

    @property
    def _reference(self) -> str:
        return self._results[0].name

    def warm_up(self, place: Place) -> None:
        """Open a model and score one row unmeasured, so that one-time costs (libraries, threads) fall on no model."""
        opened = open_engine(place.path, device=self._settings.device)
        self._prepare(opened)
        opened.score([max(self.rows.samples, key=len)], [Likelihood(1)])

    def measure(self, place: Place) -> ModelResult:
        """Open one model, measure everything, and let it go.

        Raises:
            DataError: No row can be scored.
            ModelError: The vocabulary differs from the first model's, or the context is too short for a row.
        """
        release_unused_memory()
        with steady_allocation(), PeakMemory() as memory:
            opened = open_engine(place.path, device=self._settings.device)
            self._notes += opened.notes
            self._prepare(opened)
            self._check_fits(opened, place.name)
            count = len(self.rows.samples)
            likelihood, exact = Likelihood(count), ExactMatch(count)
            measures: list[Measure] = [likelihood, exact] if self._settings.task else [likelihood]
            divergence = None
            if self._logits is None:
                self._logits = ReferenceLogits(count, self._scratch)
                measures.append(self._logits)
            else:
                divergence = Divergence(self._logits, name=place.name, reference_name=self._reference)
                measures.append(divergence)
            opened.score(
                self.rows.samples,
                measures,
                batch_size=self._settings.batch_size,
                kv_cache=place.kv_cache,
            )
        self._loss[place.name] = self.rows.by_document(likelihood.nll_sums)
        if self._settings.task:
            self._right[place.name] = self.rows.by_document(~exact.right) == 0
        result = self._alone(place, opened, memory.peak_bytes)
        if divergence is None:
            self._results.append(result)
            self._keep(opened)
        else:
            result = self._against_reference(result, divergence, opened, place.kv_cache)
            self._results.append(result)
        return result

    def _prepare(self, opened: Engine) -> None:
        """Turn the records into tokens with the first model's tokenizer, once."""
        if self._rows is not None:
            return
        tokenizer, task = opened.require_tokenizer(), self._settings.task
        limit = self._settings.max_length or min(opened.context or MOST_CONTEXT, MOST_CONTEXT)
        # An answer that is cut is another answer: with a task rows are rendered whole, and left out if they do not fit.
        rendered = prepare(
            self._records, tokenizer, max_length=1 << 30 if task else limit, chat_template=self._settings.chat_template
        )
        too_long = {sample.index for sample in rendered if len(sample) > limit}
        samples = [sample for sample in rendered if sample.index not in too_long]
        if not samples:
            raise DataError(
                f"no row fits {limit} tokens (the longest has {rendered.report.longest_row_tokens}); "
                "raise max_length, or compare models with a longer context"
            )
        if too_long:
            self._notes.append(f"{len(too_long)} rows are longer than {limit} tokens and were left out.")
        if rendered.report.truncated_rows and not task:
            self._notes.append(f"{rendered.report.truncated_rows} rows were cut at {limit} tokens.")
        self._notes += [f"{count} rows were left out: {reason}." for reason, count in rendered.report.dropped.items()]
        kept = sorted({sample.index for sample in samples})
        place = {index: document for document, index in enumerate(kept)}
        documents = torch.tensor([place[sample.index] for sample in samples])
        tokens = supervised_counts(samples)
        self._rows = _Rows(samples, documents, [self._records[index] for index in kept], tokens, tokenizer)

    def _check_fits(self, opened: Engine, name: str) -> None:
        limit, longest = opened.context, max(len(sample) for sample in self.rows.samples)
        if limit is not None and longest > limit:
            raise ModelError(
                f"{name}: its context is {limit} tokens, and the longest row has {longest}; pass max_length={limit}"
            )
        ours, theirs = self.rows.tokenizer, opened.tokenizer
        if theirs is None or theirs is ours:
            return
        known, other = ours.get_vocab(), theirs.get_vocab()
        if known != other:
            differing = sorted(set(known.items()) ^ set(other.items()))[:3]
            raise ModelError(
                f"{name}: its tokenizer has {len(other):,} tokens, {self._reference}'s {len(known):,}, and they "
                f"differ (such as {', '.join(repr(token) for token, _ in differing)}); models are compared token by "
                "token, so they need the same vocabulary"
            )
        if self._settings.chat_template is None and (theirs.chat_template or "") != (ours.chat_template or ""):
            self._notes.append(
                f"{name} brings another chat template than {self._reference}; all were scored with that of "
                f"{self._reference}."
            )

    def _alone(self, place: Place, opened: Engine, peak_bytes: int) -> ModelResult:
        """What is known of a model without the reference."""
        score_interval = None
        if self._settings.task:
            right = self._right[place.name]
            score_interval = wilson_interval(int(right.sum()), len(right))
        return ModelResult(
            name=place.name,
            source=opened.source,
            format=_format(opened, place.kv_cache),
            weights_bytes=place.weights_bytes,
            adapter_bytes=place.adapter_bytes,
            peak_bytes=peak_bytes,
            loss=bootstrap_mean(
                self._loss[place.name], self.rows.by_document(self.rows.tokens), seed=self._settings.seed
            ),
            speed=opened.speed(place.kv_cache) if self._settings.speed else None,
            score=score_interval,
            kv_bytes_per_token=opened.cache_bytes(place.kv_cache) if self._settings.kv_bytes else None,
        )

    def _keep(self, opened: Engine) -> None:
        """What the other models will be compared with, beside the logits."""
        if opened.network is not None and self._settings.layer_errors:
            self._weights = keep_weights(opened.network, self._scratch)
            if self._weights is None:
                self._notes.append("The reference's weights do not fit the temporary file: no error by layer.")
        held = 0 if self._logits is None else int(self._logits.rows_held.sum())
        if held < len(self.rows.samples):
            self._notes.append(
                f"KL divergence and agreement rest on {held} of {len(self.rows.samples)} rows: the temporary file for "
                "the reference's logits holds no more."
            )
        if self._settings.task and self._settings.examples:
            wrong = (~self._right[self._reference]).nonzero().flatten().tolist()
            shown = [row for row in wrong if _single_answer(self.rows.records[row])][:_REMEMBERED_ANSWERS]
            self._answers = dict(zip(shown, self._written(opened, shown), strict=True))

    def _against_reference(
        self, result: ModelResult, divergence: Divergence, opened: Engine, kv_cache: KVFormat | None
    ) -> ModelResult:
        seed, tokens = self._settings.seed, self.rows.by_document(divergence.tokens)
        held = tokens > 0
        if held.any():
            weights = tokens[held]
            result = replace(
                result,
                kl=bootstrap_mean(self.rows.by_document(divergence.kl_sums)[held], weights, seed=seed),
                kl_99th=divergence.kl_99th,
                kl_rows=int(held.sum()),
                top1_agreement=bootstrap_mean(
                    self.rows.by_document(divergence.agreements)[held], weights, seed=seed, bounds=(0.0, 1.0)
                ),
            )
        loss_difference = paired_bootstrap(
            self._loss[self._reference], self._loss[result.name], self.rows.by_document(self.rows.tokens), seed=seed
        )
        result = replace(result, loss_difference=loss_difference)
        if self._weights is not None and opened.network is not None:
            result = replace(result, layer_errors=weight_errors(opened.network, self._weights, self._scratch) or None)
        if self._settings.task:
            difference = compare_proportions(self._right[self._reference].numpy(), self._right[result.name].numpy())
            result = replace(result, score_difference=difference, flips=self._flips(result.name, opened, kv_cache))
        return result

    def _flips(self, name: str, opened: Engine, kv_cache: KVFormat | None) -> Flips:
        right, expected = self._right[name], self._right[self._reference]
        lost = (expected & ~right).nonzero().flatten().tolist()
        gained = (right & ~expected).nonzero().flatten().tolist()
        shown_lost = [row for row in lost if _single_answer(self.rows.records[row])][: self._settings.examples]
        shown_gained = [row for row in gained if row in self._answers][: self._settings.examples]
        examples = [
            self._flip(row, self._expected(row), answer, lost=True)
            for row, answer in zip(shown_lost, self._written(opened, shown_lost, kv_cache), strict=True)
        ]
        examples += [self._flip(row, self._answers[row], self._expected(row), lost=False) for row in shown_gained]
        return Flips(len(lost), len(gained), tuple(examples))

    def _flip(self, row: int, reference_answer: str, model_answer: str, *, lost: bool) -> Flip:
        record = self.rows.records[row]
        asked = "\n".join(message.content for message in (record.messages or ())[:-1])
        kind = "lost" if lost else "gained"
        return Flip(record.row, asked, self._expected(row), reference_answer, model_answer, kind)

    def _expected(self, row: int) -> str:
        messages = self.rows.records[row].messages
        assert messages is not None
        return messages[-1].content

    def _written(self, opened: Engine, rows: Sequence[int], kv_cache: KVFormat | None = None) -> list[str]:
        """What the model writes for the rows' questions, with room for a little more than is expected."""
        if not rows:
            return []
        tokenizer, template = self.rows.tokenizer, self._settings.chat_template
        prompts = [
            prompt_ids((self.rows.records[row].messages or ())[:-1], tokenizer, chat_template=template) for row in rows
        ]
        longest = max(len(tokenizer.encode(self._expected(row))) for row in rows)
        return opened.answers(
            prompts,
            stop_ids=opened.stop_ids(template),
            max_new_tokens=longest + 16,
            kv_cache=kv_cache,
        )

    def comparison(self, data: str) -> Comparison:
        """Everything measured, as one result; `data` is what the rows are called."""
        tokens = self.rows.by_document(self.rows.tokens).long()
        if self._settings.task and not any(bool(right.any()) for right in self._right.values()):
            self._notes.append("No model answers a single row exactly: the verdicts rest on the loss.")
        digest = hashlib.sha256()
        for sample in self.rows.samples:
            digest.update(torch.tensor([len(sample), *sample.input_ids, *sample.labels]).numpy().tobytes())
        return Comparison(
            models=tuple(self._results),
            data=data,
            rows_scored=len(self.rows.records),
            supervised_tokens=int(tokens.sum()),
            rows_sha256=digest.hexdigest(),
            task=self._settings.task,
            seed=self._settings.seed,
            level=LEVEL,
            notes=tuple(self._notes),
            row_loss={name: loss.tolist() for name, loss in self._loss.items()},
            row_right={name: right.tolist() for name, right in self._right.items()},
            row_tokens=tokens.tolist(),
        )


def _single_answer(record: Record) -> bool:
    roles = [message.role for message in record.messages or ()]
    return roles.count("assistant") == 1 and roles[-1] == "assistant"


def _format(opened: Engine, kv_cache: KVFormat | None) -> str:
    return f"{opened.format} + kv {kv_cache.name}" if kv_cache else opened.format

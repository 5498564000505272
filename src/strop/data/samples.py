"""Records into samples that fit the context, with an account of everything that was cut or left out.

Conversations longer than `max_length` tokens keep their beginning; one whose answers are all cut away is left out and
counted. Plain texts longer than that are cut into consecutive windows, and nothing of them is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from strop.data.layout import PrefixError
from strop.data.records import Record
from strop.data.templates import IGNORED, Sample, TrainOn, learned_turns, render_all
from strop.errors import DataError

_SHOWN = 10


@dataclass
class DataReport:
    """What became of the rows.

    Attributes:
        rows: Records given.
        samples: Samples made (a long text makes several, a conversation that had to be split too).
        tokens: Tokens in the samples.
        supervised_tokens: Those of them that are learned.
        truncated_rows: Conversations that were cut at `max_length`.
        lost_answers: Answers cut away completely.
        cut_answers: Answers that lost their end, and with it their stop token.
        split_rows: Conversations trained turn by turn, since the template writes earlier turns differently.
        dropped: Reason -> rows left out.
        longest_row_tokens: Tokens of the longest conversation before truncation, or of the longest window.
        max_length: The limit in tokens.
    """

    max_length: int
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated_rows: int = 0
    lost_answers: int = 0
    cut_answers: int = 0
    split_rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    longest_row_tokens: int = 0

    @property
    def supervised_share(self) -> float:
        """Supervised tokens over all tokens."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    @property
    def dropped_rows(self) -> int:
        """Rows left out, for any reason."""
        return sum(self.dropped.values())

    def lines(self) -> list[str]:
        """The account in sentences, for people."""
        lines = [
            f"{self.rows:,} rows, {self.tokens:,} tokens, of which {self.supervised_tokens:,} "
            f"({self.supervised_share:.1%}) are learned"
        ]
        if self.truncated_rows:
            lines.append(
                f"{self.truncated_rows:,} rows are longer than max_length {self.max_length} (the longest has "
                f"{self.longest_row_tokens:,} tokens) and were cut: {self.lost_answers:,} answers lost, "
                f"{self.cut_answers:,} without their end"
            )
        if self.split_rows:
            lines.append(
                f"{self.split_rows:,} conversations are trained turn by turn: the chat template rewrites earlier turns"
            )
        lines.extend(f"{count:,} rows left out: {reason}" for reason, count in self.dropped.items())
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The account as plain values, for run.json."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**values, "dropped": dict(self.dropped), "supervised_share": self.supervised_share}


@dataclass(frozen=True)
class SampleSet:
    """Samples and the account of how they came about; iterates over the samples."""

    samples: list[Sample]
    report: DataReport

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def _turn_by_turn(record: Record, train_on: TrainOn) -> list[Record]:
    """One record per learned answer, ending with it; answers and turns of earlier records are context."""
    assert record.messages is not None
    pieces: list[Record] = []
    begin = 0
    learned = learned_turns(record.messages, train_on)
    for index in sorted(learned):
        message = record.messages[index]
        if message.role == "assistant":
            before = [
                m if at >= begin and at in learned else replace(m, supervise=False)
                for at, m in enumerate(record.messages[:index])
            ]
            pieces.append(replace(record, messages=(*before, message)))
            begin = index + 1
    return pieces


def _rendered(
    records: Sequence[Record], tokenizer: Any, train_on: TrainOn, chat_template: str | Path | None, report: DataReport
) -> list[Sample]:
    """Samples of all records before truncation, those that a template cannot write in one go being split by turns."""
    problems: list[str] = []
    samples: list[Sample] = []
    first = render_all(records, tokenizer, train_on=train_on, chat_template=chat_template)
    for index, (record, result) in enumerate(zip(records, first, strict=True)):
        parts: list[Sample | DataError] = [result]
        if isinstance(result, PrefixError):
            pieces = _turn_by_turn(record, train_on)
            parts = (
                render_all(pieces, tokenizer, train_on=train_on, chat_template=chat_template)
                if len(pieces) > 1
                else parts
            )
            report.split_rows += not any(isinstance(part, DataError) for part in parts)
        for part in parts:
            if isinstance(part, DataError):
                problems.append(str(part))
                break
            samples.append(replace(part, index=index))
    if problems:
        shown = problems[:_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        raise DataError("\n".join(shown))
    return samples


def _windows(sample: Sample, max_length: int, bos: int | None) -> list[Sample]:
    """Consecutive windows of a text; each begins with BOS if the text does."""
    ids = sample.input_ids
    if len(ids) <= max_length:
        return [sample]
    head = ids[:1] if bos is not None and ids[0] == bos and max_length > 1 else []
    body = ids[len(head) :]
    size = max_length - len(head)
    windows: list[Sample] = []
    for begin in range(0, len(body), size):
        piece = head + body[begin : begin + size]
        if len(piece) > 1:  # a single token predicts nothing
            windows.append(replace(sample, input_ids=piece, labels=[IGNORED, *piece[1:]], answers=((1, len(piece)),)))
    return windows


def _truncated(sample: Sample, max_length: int, report: DataReport) -> Sample:
    """The first `max_length` tokens of a conversation, with what that loses counted."""
    if len(sample) <= max_length:
        return sample
    report.truncated_rows += 1
    report.lost_answers += sum(start >= max_length for start, _ in sample.answers)
    report.cut_answers += sum(start < max_length < end for start, end in sample.answers)
    answers = tuple((start, min(end, max_length)) for start, end in sample.answers if start < max_length)
    return replace(sample, input_ids=sample.input_ids[:max_length], labels=sample.labels[:max_length], answers=answers)


def prepare(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int,
    train_on: TrainOn = "answers",
    chat_template: str | Path | None = None,
) -> SampleSet:
    """Render, truncate and count.

    Args:
        records: What `read_data` gives.
        tokenizer: A transformers tokenizer.
        max_length: Most tokens of a sample.
        train_on: ``answers``, ``last``, ``all`` or ``custom``, as for `render_all`.
        chat_template: A name, a file or a Jinja text; None for the tokenizer's own.

    Returns:
        The samples in the records' order (`Sample.index` is the record's position) and the report.

    Raises:
        DataError: If the template cannot write a record, or no token is left to learn from; the message says why.
    """
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; a sample needs at least 2 tokens, one to read and one to learn")
    report = DataReport(max_length=max_length, rows=len(records))
    samples: list[Sample] = []
    first_answers: list[int] = []
    for sample in _rendered(records, tokenizer, train_on, chat_template, report):
        record = records[sample.index]
        if record.messages is None:
            pieces = _windows(sample, max_length, tokenizer.bos_token_id)
            report.longest_row_tokens = max(report.longest_row_tokens, *(len(piece) for piece in pieces), 0)
            kept = [piece for piece in pieces if piece.supervised]
            if not kept:
                _drop(report, "the text has a single token")
            samples.extend(kept)
            continue
        report.longest_row_tokens = max(report.longest_row_tokens, len(sample))
        if not sample.supervised:
            has_answer = any(message.role == "assistant" for message in record.messages)
            _drop(
                report, "no answer is marked to be learned" if has_answer else "the conversation has no assistant turn"
            )
            continue
        first_answers.append(sample.answers[0][0] if sample.answers else 1)
        cut = _truncated(sample, max_length, report)
        if cut.supervised and (cut.answers or train_on == "all"):
            samples.append(cut)
        else:
            _drop(report, f"every answer lies beyond max_length {max_length}")
    report.samples = len(samples)
    report.tokens = sum(len(sample) for sample in samples)
    report.supervised_tokens = sum(sample.supervised for sample in samples)
    if not report.supervised_tokens:
        raise DataError(_nothing_to_learn(report, first_answers))
    return SampleSet(samples, report)


def _drop(report: DataReport, reason: str) -> None:
    report.dropped[reason] = report.dropped.get(reason, 0) + 1


def _nothing_to_learn(report: DataReport, first_answers: Sequence[int]) -> str:
    if not report.rows:
        return "no token is left to learn from: there is no row"
    reasons = "; ".join(f"{count:,} of {report.rows:,} rows: {reason}" for reason, count in report.dropped.items())
    if first_answers:
        advice = f"the earliest answer begins after {min(first_answers)} tokens: raise max_length above that"
    else:
        advice = "a row needs an assistant turn (an answer, an output, a completion) to be learned from"
    return f"no token is left to learn from ({reasons}); {advice}"

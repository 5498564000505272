"""Records into samples that fit the context, with an account of everything that was cut or left out.

Conversations longer than `max_length` tokens keep their beginning; one whose answers are all cut away is left out and
counted. Plain texts longer than that are cut into consecutive windows, and nothing of them is lost.

Records come from any iterable and are rendered some hundred at a time; `sample_chunks` holds no more than those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from strop.data.layout import PrefixError
from strop.data.literals import control_tokens
from strop.data.pieces import MOST_CHARACTERS
from strop.data.records import Message, Record
from strop.data.templates import IGNORED, Sample, TrainOn, learned_turns, render_all
from strop.errors import DataError

_SHOWN = 10

_CHUNK_ROWS: Final = 512
_CHUNK_CHARACTERS: Final = 300_000


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
        unusual: What is out of the ordinary in rows that are trained on all the same -> how many.
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
    unusual: dict[str, int] = field(default_factory=dict)
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
        lines.extend(f"{count:,} conversations {what}" for what, count in self.unusual.items())
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The account as plain values, for run.json."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        copied = {"dropped": dict(self.dropped), "unusual": dict(self.unusual)}
        return {**values, **copied, "supervised_share": self.supervised_share}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> DataReport:
        """The report that `to_dict` was made from."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class SampleSet:
    """Samples and the account of how they came about; iterates over the samples."""

    samples: Sequence[Sample]
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


class _Refused:
    """What templates would not write: ten in full, the rest as a number."""

    def __init__(self) -> None:
        self.count, self.shown = 0, list[str]()

    def add(self, problem: str) -> None:
        self.count += 1
        if len(self.shown) < _SHOWN:
            self.shown.append(problem)

    def raise_any(self) -> None:
        if self.count > len(self.shown):
            self.shown.append(f"... and {self.count - len(self.shown)} more")
        if self.shown:
            raise DataError("\n".join(self.shown))


def _rendered(
    records: Sequence[Record],
    tokenizer: Any,
    train_on: TrainOn,
    chat_template: str | Path | None,
    report: DataReport,
    refused: _Refused,
) -> list[Sample]:
    """Samples of records before truncation, those that a template cannot write in one go being split by turns."""
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
                refused.add(str(part))
                break
            samples.append(replace(part, index=index))
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


class _Reading:
    """What is looked for in conversations before they are rendered."""

    def __init__(self, tokenizer: Any, max_length: int, report: DataReport) -> None:
        self.control = control_tokens(tokenizer)
        longest = max(map(len, tokenizer.get_vocab()), default=1)
        self.most_characters = max(MOST_CHARACTERS, (max_length + 2) * longest)
        self.max_length, self.report = max_length, report

    def read(self, record: Record) -> Record:
        """The record as it is rendered: without what no row of `max_length` tokens can reach."""
        messages = record.messages
        if messages is None:
            return record
        found = next((match[0] for m in messages if (match := self.control.search(m.content))), None)
        if found is not None:
            self._note(
                "write a control token out (as in row {row}: {found!r}), which is read as plain text", record, found
            )
        pairs = list(pairwise(messages))
        if any(one.role == other.role and one.role in ("user", "assistant") for one, other in pairs):
            self._note("have two turns of the same speaker in a row (as in row {row}), kept as they are", record)
        if any(other.role == "system" for _, other in pairs):
            self._note("have a system turn after the first turn (as in row {row}), kept where it is", record)
        if sum(len(message.content) for message in messages) <= self.most_characters:
            return record
        self._note(
            f"are longer than {self.most_characters:,} characters (as in row {{row}}) and were read that far, "
            f"which is beyond max_length {self.max_length}",
            record,
        )
        return replace(record, messages=tuple(self._shortened(messages)))

    def _note(self, what: str, record: Record, found: str = "") -> None:
        """Count it under the words of the first row that has it."""
        head = what.split(" (as in")[0]
        known = next((key for key in self.report.unusual if key.startswith(head)), None)
        key = known or what.format(row=record.row, found=found)
        self.report.unusual[key] = self.report.unusual.get(key, 0) + 1

    def _shortened(self, messages: Sequence[Message]) -> Iterator[Message]:
        room = self.most_characters
        for message in messages:
            kept = message.content[: max(room, 1)]
            room -= len(kept)
            yield message if kept == message.content else replace(message, content=kept, said=message.said[: len(kept)])


def _chunks(records: Iterable[Record], reading: _Reading) -> Iterator[list[Record]]:
    """Records in parts that are rendered at once: so many rows, or so many characters."""
    chunk: list[Record] = []
    characters = 0
    for given in records:
        record = reading.read(given)
        chunk.append(record)
        characters += sum(len(m.content) for m in record.messages) if record.messages else len(record.text or "")
        if len(chunk) == _CHUNK_ROWS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def sample_chunks(
    records: Iterable[Record],
    tokenizer: Any,
    report: DataReport,
    *,
    train_on: TrainOn = "answers",
    chat_template: str | Path | None = None,
) -> Iterator[list[Sample]]:
    """Render, truncate and count, some hundred records at a time.

    Args:
        records: What `read_data` or `open_data` gives.
        tokenizer: A transformers tokenizer.
        report: The account, with `max_length`; filled in on the way and complete at the end.
        train_on: As for `prepare`.
        chat_template: As for `prepare`.

    Raises:
        DataError: As `prepare`, once all records have been seen.
    """
    max_length = report.max_length
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; a sample needs at least 2 tokens, one to read and one to learn")
    refused = _Refused()
    earliest: int | None = None
    for chunk in _chunks(records, _Reading(tokenizer, max_length, report)):
        samples: list[Sample] = []
        for sample in _rendered(chunk, tokenizer, train_on, chat_template, report, refused):
            record = chunk[sample.index]
            placed = replace(sample, index=report.rows + sample.index)
            if record.messages is None:
                samples.extend(_text_windows(placed, max_length, tokenizer.bos_token_id, report))
                continue
            report.longest_row_tokens = max(report.longest_row_tokens, len(sample))
            if not sample.supervised:
                has_answer = any(message.role == "assistant" for message in record.messages)
                reason = "no answer is marked to be learned" if has_answer else "the conversation has no assistant turn"
                _drop(report, reason)
                continue
            begin = sample.answers[0][0] if sample.answers else 1
            earliest = begin if earliest is None else min(earliest, begin)
            cut = _truncated(placed, max_length, report)
            if cut.supervised and (cut.answers or train_on == "all"):
                samples.append(cut)
            else:
                _drop(report, f"every answer lies beyond max_length {max_length}")
        report.rows += len(chunk)
        report.samples += len(samples)
        report.tokens += sum(len(sample) for sample in samples)
        report.supervised_tokens += sum(sample.supervised for sample in samples)
        if not refused.count:
            yield samples
    refused.raise_any()
    if not report.supervised_tokens:
        raise DataError(_nothing_to_learn(report, earliest))


def _text_windows(sample: Sample, max_length: int, bos: int | None, report: DataReport) -> list[Sample]:
    pieces = _windows(sample, max_length, bos)
    report.longest_row_tokens = max(report.longest_row_tokens, *(len(piece) for piece in pieces), 0)
    kept = [piece for piece in pieces if piece.supervised]
    if not kept:
        _drop(report, "the text has a single token")
    return kept


def prepare(
    records: Iterable[Record],
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
    report = DataReport(max_length=max_length)
    chunks = sample_chunks(records, tokenizer, report, train_on=train_on, chat_template=chat_template)
    return SampleSet([sample for chunk in chunks for sample in chunk], report)


def _drop(report: DataReport, reason: str) -> None:
    report.dropped[reason] = report.dropped.get(reason, 0) + 1


def _nothing_to_learn(report: DataReport, earliest: int | None) -> str:
    if not report.rows:
        return "no token is left to learn from: there is no row"
    reasons = "; ".join(f"{count:,} of {report.rows:,} rows: {reason}" for reason, count in report.dropped.items())
    if earliest is not None:
        advice = f"the earliest answer begins after {earliest} tokens: raise max_length above that"
    else:
        advice = "a row needs an assistant turn (an answer, an output, a completion) to be learned from"
    return f"no token is left to learn from ({reasons}); {advice}"

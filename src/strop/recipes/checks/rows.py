"""What became of the rows, which stand there twice, and which of them are held out as well."""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from typing import Final

from strop.data.records import Record
from strop.data.samples import SampleSet, prepare
from strop.data.templates import Sample
from strop.errors import DataError
from strop.recipes.checks.finding import Finding, are, count, share
from strop.recipes.session import Session
from strop.training.shapes import positions_of

MANY: Final = 0.01
"""Share of rows (or answers) from which duplicates, overlap and cut answers are worth a warning."""


def check_rows(session: Session) -> list[Finding]:
    """Truncation, rows left out, duplicates."""
    return [*_truncation(session), _left_out(session), _duplicates(session)]


def _truncation(session: Session) -> list[Finding]:
    report = session.train_set.report
    answers = sum(len(sample.answers) for sample in session.train_set) + report.lost_answers
    hurt = report.lost_answers + report.cut_answers
    figures = {
        "max_length": report.max_length,
        "longest_row_tokens": report.longest_row_tokens,
        "truncated_rows": report.truncated_rows,
        "lost_answers": report.lost_answers,
        "cut_answers": report.cut_answers,
    }
    if not report.truncated_rows:
        return [
            Finding(
                "fine",
                "truncation",
                f"no row is longer than max_length {report.max_length:,} (the longest has "
                f"{count(report.longest_row_tokens, 'token')})",
                "",
                figures,
            )
        ]
    limit, longest = positions_of(session.model), f"the longest row has {count(report.longest_row_tokens, 'token')}"
    advice = (
        f"shorten the rows ({longest}, and the model has {limit:,} positions)"
        if limit is not None and report.max_length >= limit
        else f"raise max_length ({longest}), or shorten the rows"
    )
    return [
        Finding(
            "warn" if hurt >= MANY * answers else "fine",
            "truncation",
            f"{report.truncated_rows:,} of {count(report.rows, 'row')} {are(report.truncated_rows)} longer than "
            f"max_length {report.max_length:,}: {count(report.lost_answers, 'answer')} lost, "
            f"{report.cut_answers:,} cut before their stop token",
            advice,
            figures,
        )
    ]


def _left_out(session: Session) -> Finding:
    report = session.train_set.report
    figures = {"rows": report.rows, "dropped": dict(report.dropped), "split_rows": report.split_rows}
    if not report.dropped:
        split = f"; {report.split_rows:,} are trained turn by turn" if report.split_rows else ""
        return Finding("fine", "rows", f"all {count(report.rows, 'row')} are trained on{split}", "", figures)
    reasons = "; ".join(f"{number:,}: {reason}" for reason, number in report.dropped.items())
    return Finding(
        "warn",
        "rows",
        f"{report.dropped_rows:,} of {count(report.rows, 'row')} {are(report.dropped_rows)} left out ({reasons})",
        "mend or shorten those rows, or take them out of the data",
        figures,
    )


def _duplicates(session: Session) -> Finding:
    records = session.splits.train
    exact, _ = _repeated(map(_same_tokens, session.train_set))
    alike, first = _repeated(map(_same_text, records))
    repeated = max(exact, alike)
    figures = {"rows": len(records), "same_tokens": exact, "same_text": alike}
    if not repeated:
        return Finding("fine", "duplicates", f"no two of the {count(len(records), 'row')} are the same", "", figures)
    where = f", the first in row {records[first].row}" if alike else ""
    if exact >= alike:
        how = f"; {exact - alike:,} of them only as they are cut at max_length" if exact > alike else ""
    else:
        how = (
            f"; {alike - exact:,} of them but for case, spaces or what was cut off"
            if exact
            else ", in other case or spaces"
        )
    return Finding(
        "warn" if repeated >= MANY * len(records) else "fine",
        "duplicates",
        f"{repeated:,} of {count(len(records), 'row')} ({share(repeated, len(records))}) repeat an earlier "
        f"one{where}{how}",
        "take the repetitions out, unless they are meant to weigh more",
        figures,
    )


def _repeated(keys: Iterable[object]) -> tuple[int, int]:
    """How many keys stood there before, and the place of the first of them."""
    seen: set[object] = set()
    number = first = 0
    for place, key in enumerate(keys):
        if key in seen:
            first = first if number else place
            number += 1
        seen.add(key)
    return number, first


def check_overlap(session: Session, *, test_tokens: bool) -> list[Finding]:
    """Rows that are trained on and held out too; `test_tokens` renders the test rows to compare them by token ids."""
    trained = set(map(_same_tokens, session.train_set))
    texts = set(map(_same_text, session.splits.train))
    findings = []
    for name, records, samples in (
        ("valid", session.splits.valid, session.valid_set),
        ("test", session.splits.test, _rendered(session, session.splits.test) if test_tokens else None),
    ):
        if not records:
            continue
        same = sum(_same_tokens(sample) in trained for sample in samples) if samples is not None else 0
        alike = sum(_same_text(record) in texts for record in records)
        overlap = max(same, alike)
        figures = {"rows": len(records), "same_tokens": same, "same_text": alike}
        title = f"{name} rows"
        if not overlap:
            findings.append(Finding("fine", title, f"none of {count(len(records), 'row')} is trained on", "", figures))
            continue
        findings.append(
            Finding(
                "warn" if overlap >= MANY * len(records) else "fine",
                title,
                f"{overlap:,} of {count(len(records), 'row')} ({share(overlap, len(records))}) {are(overlap)} trained "
                "on as well: their loss will look better than it is",
                "take them out of the training rows",
                figures,
            )
        )
    return findings


def _rendered(session: Session, records: Sequence[Record]) -> SampleSet | None:
    samples = session.config.samples
    assert samples.max_length is not None
    if not records:
        return None
    try:
        return prepare(records, session.tokenizer, max_length=samples.max_length, train_on=samples.train_on)
    except DataError:  # rows that nothing is learned from can still be compared by their text
        return None


def _same_tokens(sample: Sample) -> bytes:
    """Sixteen bytes that stand for the row's tokens, so that those of a large set fit into memory."""
    return hashlib.blake2b(array("q", sample.input_ids).tobytes(), digest_size=16).digest()


def _same_text(record: Record) -> bytes:
    """The same for its normalised text."""
    return hashlib.blake2b(normalised(record).encode(), digest_size=16).digest()


def normalised(record: Record) -> str:
    """A record's text without what does not change its meaning: case, width of characters, amount of space."""
    if record.messages is None:
        text = str(record.text)
    else:
        text = "\n".join(f"{message.role}: {message.content}" for message in record.messages)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

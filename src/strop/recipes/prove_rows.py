"""The rows of a proof: what is asked, what is expected, and which rows belong together.

exact-match and perplexity take what every other verb takes. `choice` takes rows with

    question (or prompt, or messages)   what is asked
    choices                             a list of texts, or {"text": [...], "label": [...]} as ARC has it
    answer (or label, answerKey, gold)  the right one: its place from 0, its letter or label, or its text

Rows that ask the same, or that name the same `conversation_id`, `prompt_id` or `group`, are one cluster: they are not
independent, so that they count as one, with the mean of their differences.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from strop.data.conversations import KNOWN_FIELDS, Message, RowError
from strop.data.readers import Problems, RawRow, file_source, kind_of
from strop.data.records import Record, open_data
from strop.data.templates import as_messages
from strop.errors import DataError, MissingInputError
from strop.recipes.rows import Rows, held_out_records

Task = Literal["exact-match", "perplexity", "choice"]
TASKS: Final[tuple[Task, ...]] = ("exact-match", "perplexity", "choice")

CLUSTER_FIELDS: Final = ("conversation_id", "prompt_id", "group")
_QUESTIONS: Final = ("question", "prompt", "messages")
_ANSWERS: Final = ("answer", "label", "answerKey", "gold")
_MOST_CHOICES: Final = 64


@dataclass(frozen=True)
class ProofRow:
    """One row.

    Attributes:
        row: Its number in its source.
        records: What is scored: the row; for `choice` one conversation for each choice.
        right: For `choice`, the place of the right one.
        cluster: Rows with the same text belong together.
    """

    row: int
    records: tuple[Record, ...]
    right: int | None
    cluster: str

    @property
    def asked(self) -> str:
        """The question as text, for people."""
        record = self.records[0]
        turns = list(record.messages or ())
        return "\n".join(turn.content for turn in turns[:-1]) or (record.text or "")[:200]

    @property
    def answers(self) -> list[str]:
        """The last turn of each record."""
        return [record.messages[-1].content if record.messages else "" for record in self.records]


def proof_rows(data: Rows, task: Task) -> list[ProofRow]:
    """All rows of a file or list, the test split of a folder or hub id.

    Raises:
        MissingInputError: Nothing of that name is there.
        DataError: A row is broken or does not fit the task, or there is no test split.
    """
    if task == "choice":
        return _choice_rows(data)
    records = held_out_records(data)
    if task == "exact-match":
        _require_answers(records)
    named = _named_clusters(data)
    return [ProofRow(record.row, (record,), None, named.get(record.row) or _asked(record)) for record in records]


def clusters_in_order(rows: Sequence[ProofRow], *, seed: int) -> list[list[ProofRow]]:
    """Rows that belong together, the clusters in an order drawn by `seed`: what a file's own order says must not
    decide.
    """
    found: dict[str, list[ProofRow]] = {}
    for row in rows:
        found.setdefault(row.cluster, []).append(row)
    clusters = list(found.values())
    random.Random(seed).shuffle(clusters)
    return clusters


def _require_answers(records: Sequence[Record]) -> None:
    wanting = [record for record in records if not any(turn.role == "assistant" for turn in record.messages or ())]
    if wanting:
        raise DataError(
            f"{wanting[0].source}, row {wanting[0].row} (and {len(wanting) - 1} more): holds no answer to match; "
            "exact-match needs conversations that an assistant's turn ends. For texts take --task perplexity"
        )


def _asked(record: Record) -> str:
    """What a conversation asks, so that rows with the same question are found; every text is its own."""
    if record.messages is None or len(record.messages) < 2:
        return f"row {record.source} {record.row} {record.text or ''}"
    return json.dumps([[turn.role, turn.content] for turn in record.messages[:-1]])


# --- raw rows: clusters by name, choices ------------------------------------------------------------------------------


def _named_clusters(data: Rows) -> dict[int, str]:
    """Row to the cluster that it names itself; empty where the rows name none."""
    found: dict[int, str] = {}
    for raw in _raw_rows(data):
        for name in CLUSTER_FIELDS:
            value = raw.fields.get(name)
            if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
                found[raw.number] = f"{name} {value}"
                break
    return found


def _raw_rows(data: Rows) -> Iterable[RawRow]:
    """Rows as they were written, numbered as records are; of several test files none, since their numbers repeat."""
    if not isinstance(data, str | os.PathLike):
        return [RawRow(number, fields) for number, fields in enumerate(data, start=1) if isinstance(fields, Mapping)]
    path = Path(data)
    known = (*KNOWN_FIELDS, *CLUSTER_FIELDS, "choices", *_ANSWERS)
    if path.is_file():
        source = file_source(path, known)
        return source.rows(Problems(source.name, source.unit))
    sources = getattr(open_data(data, need_train=False).test, "sources", ())
    return sources[0].rows(Problems(sources[0].name, sources[0].unit)) if len(sources) == 1 else []


def _choice_rows(data: Rows) -> list[ProofRow]:
    if isinstance(data, str | os.PathLike) and not Path(data).is_file():
        raise MissingInputError(f"{data}: is no file; for --task choice name the file of rows")
    name = str(data) if isinstance(data, str | os.PathLike) else "rows"
    problems, rows = Problems(name, "row"), []
    for raw in _raw_rows(data):
        try:
            rows.append(_choice_row(raw, name))
        except (RowError, DataError) as error:
            problems.add(raw.number, str(error))
    problems.raise_any(len(rows) + problems.count)
    if not rows:
        raise DataError(f"{name}: there is no row in it; --task choice needs rows with choices and an answer")
    return rows


def _choice_row(raw: RawRow, source: str) -> ProofRow:
    question = next((name for name in _QUESTIONS if raw.fields.get(name)), None)
    asked = raw.fields.get(question) if question else None
    if isinstance(asked, str):
        turns: tuple[Message, ...] = (Message("user", asked),)
    elif question == "messages" and isinstance(asked, list):
        turns = as_messages(asked)
    else:
        raise RowError(f"no question; one of {', '.join(_QUESTIONS)} must hold a text (messages: turns)")
    if turns[-1].role == "assistant":
        raise RowError("messages end with an answer; the choices are to answer")
    choices, labels = _choices(raw.fields.get("choices"))
    right = _right(raw.fields, choices, labels)
    records = tuple(Record(source, raw.number, messages=(*turns, Message("assistant", text))) for text in choices)
    named = next((f"{name} {raw.fields[name]}" for name in CLUSTER_FIELDS if raw.fields.get(name)), None)
    return ProofRow(raw.number, records, right, named or _asked(records[0]))


def _choices(value: Any) -> tuple[list[str], list[str]]:
    """The texts, and what each is called."""
    labels: Any = None
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label")
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise RowError(f"choices is {kind_of(value)}; a list of texts is needed, none of them empty")
    if not 2 <= len(value) <= _MOST_CHOICES or len(set(value)) != len(value):
        raise RowError(f"{len(value)} choices; 2 to {_MOST_CHOICES} are needed, all different")
    letters = [chr(ord("A") + place) for place in range(len(value))] if len(value) <= 26 else []
    if isinstance(labels, list) and len(labels) == len(value):
        return value, [str(label) for label in labels]
    return value, letters


def _right(fields: Mapping[str, Any], choices: Sequence[str], labels: Sequence[str]) -> int:
    name = next((name for name in _ANSWERS if fields.get(name) is not None), None)
    if name is None:
        raise RowError(f"no answer; one of {', '.join(_ANSWERS)} must say which choice is right")
    value = fields[name]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    if isinstance(value, str):
        for known in (choices, labels):
            if value in known:
                return list(known).index(value)
        if value.isdecimal() and int(value) < len(choices):
            return int(value)
    raise RowError(
        f"{name} is {value!r}, which is no place from 0 to {len(choices) - 1}, no label "
        f"({', '.join(labels) or 'none'}) and none of the choices"
    )

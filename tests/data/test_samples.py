"""What is cut, what is left out, and that it is counted."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.data.records import Message, Record
from strop.data.samples import prepare
from strop.data.templates import IGNORED, render
from strop.errors import DataError
from tests.data.chats import CHATML, COUNTING, TRIMMING, conversation, record
from tests.data.test_templates import bos_tokenizer
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def test_the_report_counts_rows_tokens_and_what_is_learned() -> None:
    rows = [record("what is the time", "half past six"), record("a", "b", "c", "d")]
    prepared = prepare(rows, TOKENIZER, max_length=200)
    report = prepared.report
    samples = [render(row, TOKENIZER) for row in rows]
    assert [sample.input_ids for sample in prepared] == [sample.input_ids for sample in samples]
    assert (report.rows, report.samples) == (2, 2)
    assert report.tokens == sum(len(sample.input_ids) for sample in samples)
    assert report.supervised_tokens == sum(label != IGNORED for sample in samples for label in sample.labels)
    assert report.supervised_share == report.supervised_tokens / report.tokens
    assert (report.truncated_rows, report.lost_answers, report.cut_answers, report.dropped) == (0, 0, 0, {})
    assert report.longest_row_tokens == max(len(sample) for sample in samples)
    assert f"({report.supervised_share:.1%}) are learned" in report.lines()[0]
    assert json.loads(json.dumps(report.to_dict()))["supervised_tokens"] == report.supervised_tokens


def test_truncation_counts_answers_that_were_lost_and_that_lost_their_end() -> None:
    row = record("a", "b", "c", "the quick brown fox", "e", "f")
    whole = render(row, TOKENIZER)
    (_, _), (start, end), (_, _) = whole.answers
    report = prepare([row], TOKENIZER, max_length=start + 2).report
    assert (report.truncated_rows, report.lost_answers, report.cut_answers) == (1, 1, 1)
    assert report.longest_row_tokens == len(whole)
    assert "1 answers lost, 1 without their end" in report.lines()[1]
    report = prepare([row], TOKENIZER, max_length=end).report
    assert (report.truncated_rows, report.lost_answers, report.cut_answers) == (1, 1, 0)


def test_a_row_whose_answers_are_all_cut_away_is_left_out_and_counted() -> None:
    rows = [record("long question " * 20, "x"), record("a", "b")]
    prepared = prepare(rows, TOKENIZER, max_length=40)
    assert [sample.index for sample in prepared] == [1]
    assert prepared.report.dropped == {"every answer lies beyond max_length 40": 1}
    assert prepared.report.dropped_rows == 1
    assert "1 rows left out: every answer lies beyond max_length 40" in prepared.report.lines()
    # With everything learned, the same row still teaches its beginning only as long as an answer is in it.
    assert [s.index for s in prepare(rows, TOKENIZER, max_length=40, train_on="all")] == [0, 1]


def test_nothing_to_learn_is_an_error_with_the_reason_and_the_way_out() -> None:
    rows = [record("long question " * 20, "x"), record("longer question " * 40, "x")]
    first = min(render(row, TOKENIZER).answers[0][0] for row in rows)
    with pytest.raises(DataError) as caught:
        prepare(rows, TOKENIZER, max_length=40)
    assert "2 of 2 rows: every answer lies beyond max_length 40" in str(caught.value)
    assert f"the earliest answer begins after {first} tokens: raise max_length" in str(caught.value)
    assert prepare(rows, TOKENIZER, max_length=first + 1).report.supervised_tokens == 1
    with pytest.raises(
        DataError, match=r"1 of 1 rows: the conversation has no assistant turn.*needs an assistant turn"
    ):
        prepare([record("a")], TOKENIZER, max_length=40)
    context = Record("f", 1, messages=(Message("user", "a"), Message("assistant", "b", supervise=False)))
    with pytest.raises(DataError, match="no answer is marked to be learned"):
        prepare([context], TOKENIZER, max_length=40)
    with pytest.raises(DataError, match="there is no row"):
        prepare([], TOKENIZER, max_length=40)
    with pytest.raises(DataError, match="max_length is 1"):
        prepare([record("a", "b")], TOKENIZER, max_length=1)


def test_problems_with_the_template_are_collected() -> None:
    rows = [record("a", "b", system="s", row=row) for row in range(1, 14)]
    with pytest.raises(DataError) as caught:
        prepare(rows, TOKENIZER, max_length=40, chat_template=TRIMMING)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("chats.jsonl, row 1: the chat template refuses")
    assert lines[-1] == "... and 3 more"


@settings(deadline=None, max_examples=40)
@given(
    texts=st.lists(st.text("ab \n", min_size=1, max_size=80).filter(str.strip), min_size=1, max_size=4),
    max_length=st.integers(2, 30),
    bos=st.booleans(),
)
def test_windows_hold_every_token_of_a_text_once(texts: list[str], max_length: int, bos: bool) -> None:
    tokenizer = bos_tokenizer() if bos else TOKENIZER
    rows = [Record("f.txt", place, text=text) for place, text in enumerate(texts, start=1)]
    prepared = prepare(rows, tokenizer, max_length=max_length)
    assert prepared.report.truncated_rows == 0
    for index, row in enumerate(rows):
        windows = [sample for sample in prepared if sample.index == index]
        assert all(2 <= len(window) <= max_length for window in windows)
        if bos and max_length > 1:
            assert all(window.input_ids[0] == 1 for window in windows)
        ids = [token for window in windows for token in window.input_ids[int(bos) :]]
        whole = render(row, tokenizer).input_ids[int(bos) :]
        assert ids == whole[: len(ids)]
        assert len(whole) - len(ids) <= (0 if bos else 1)  # a last token alone predicts nothing
        assert all(window.labels == [IGNORED, *window.input_ids[1:]] for window in windows)


def test_many_turns_read_as_one_by_one_and_rows_together_as_alone() -> None:
    rows = [record(*["the lazy dog", "jumps over"] * count, row=count) for count in range(1, 6)]
    rows.insert(2, Record("f.txt", 9, text="a text"))
    together = prepare(rows, TOKENIZER, max_length=300)
    assert [sample.index for sample in together] == [0, 1, 2, 3, 4, 5]
    for row, sample in zip(rows, together, strict=True):
        alone = render(row, TOKENIZER)
        assert (alone.input_ids, alone.labels) == (sample.input_ids, sample.labels)


def test_a_template_that_writes_nothing_alike_is_refused_not_split_forever() -> None:
    with pytest.raises(DataError, match=r"row 1: turn 2 \(assistant\).*training would not match serving"):
        prepare([record("a", "b")], TOKENIZER, max_length=40, chat_template=COUNTING)


def test_messages_without_the_template_of_the_tokenizer_take_the_one_that_is_passed() -> None:
    bare = tiny_tokenizer(chat_template=False)
    ours = prepare([record("a", "b")], bare, max_length=40, chat_template=CHATML)
    theirs = prepare([record("a", "b")], TOKENIZER, max_length=40)
    assert ours.samples == theirs.samples
    assert len(ours) == 1
    assert ours[0].supervised == ours.report.supervised_tokens
    assert conversation("a", "b")[1].supervise

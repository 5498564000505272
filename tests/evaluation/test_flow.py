"""Text as its tokens come: whole characters only, all of it, and nothing of a text that stops."""

from __future__ import annotations

import pytest

from strop.evaluation.flow import TextFlow
from tests.tiny import tiny_tokenizer

TEXT = "naïve 数学 🙂👍🏽 the end.\n\n  two"


def told(ids: list[int], **options) -> list[str]:
    flow = TextFlow(tiny_tokenizer(), **options)
    return [*(flow.add(token) for token in ids), flow.end()]


def test_the_pieces_are_the_text_and_none_breaks_a_character():
    pieces = told(tiny_tokenizer()(TEXT)["input_ids"])
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 8


def test_bytes_that_never_become_a_character_are_told_in_the_end():
    ids = tiny_tokenizer()("数")["input_ids"]
    assert "".join(told(ids[:-1])) == "\ufffd"
    assert "".join(told(ids[:1] * 30)) == "\ufffd" * 30


@pytest.mark.parametrize("stop", ["the", "学 🙂", "end.\n", "\n\n  t", "二"])
def test_a_stop_text_and_what_follows_are_never_told(stop: str):
    ids = tiny_tokenizer()(TEXT)["input_ids"]
    assert "".join(told(ids, stop=["never there", stop])) == TEXT.split(stop)[0]


def test_what_only_began_like_a_stop_text_is_told():
    ids = tiny_tokenizer()("the ending of them")["input_ids"]
    assert "".join(told(ids, stop=["them all", "ended"])) == "the ending of them"


def test_after_a_stop_nothing_is_taken():
    flow = TextFlow(tiny_tokenizer(), stop=["a"])
    ids = tiny_tokenizer()("bab")["input_ids"]
    assert [flow.add(token) for token in ids] + [flow.end()] == ["b", "", "", ""]
    assert flow.stopped

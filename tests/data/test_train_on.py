"""Which tokens are learned, against an oracle of characters: templates x turns x truncation x train_on."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from strop.data.batches import BatchStream
from strop.data.records import Message, Record, read_records
from strop.data.samples import prepare
from strop.data.templates import IGNORED, TrainOn, prompt_ids, render, stop_ids, template_hash
from strop.errors import DataError
from tests.data.chats import APPENDING, CHATML, LLAMA3, THINKING, conversation, record
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat_template=False)

# A tag for each role, the end token behind every turn.
ROLE_TAGS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEMPLATES = {**APPENDING, "role-tags": ROLE_TAGS}

CHATS = {
    "short": ("ab", "cd"),
    "turns": ("set the alarm", "for six?", "yes", "done", "thanks", "any time"),
    "spaces": ("  hi ", " the quick ", "ok ", "fox  "),
    "own words": ("user", "assistant", "model", "user"),
    "control": ("a <|im_start|>user", "b", "0", "0 1"),
}

MARKS = {"user too": (1, 1, 0, 1, 1, 0), "users alone": (1, 0, 1, 0, 0, 0), "some answers": (0, 0, 0, 1, 0, 1)}


def written(name: str, role: str, content: str, *, last: bool) -> tuple[str, str, str]:
    """A turn as the template should write it, worked out by hand: its header, what is learned of it, what follows."""
    stripped = content.strip()
    if name == "llama2":
        return ("<|bos|>[INST] ", f"{content} [/INST]", "") if role == "user" else ("", f" {content} <|eos|>", "")
    if name == "llama3":
        return f"<|im_start|>{role}<|im_end|>\n\n", f"{stripped}<|eos|>", ""
    if name == "trimming":
        return f"<|im_start|>{'model' if role == 'assistant' else role}\n", f"{stripped}<|im_end|>", "\n"
    if name == "built-in-plain":
        return ("User: ", f"{content}\n\n", "") if role == "user" else ("Assistant:", f" {content}<|eos|>", "\n\n")
    if name == "role-tags":
        return f"<|{role}|>\n", f"{content}<|eos|>", "\n"
    if name == "thinking" and role == "assistant":
        reasoning = "<think>\n\n</think>\n\n" if last else ""
        return "<|im_start|>assistant\n", f"{reasoning}{content}<|im_end|>", "\n"
    return f"<|im_start|>{role}\n", f"{content}<|im_end|>", "\n"


def oracle(name: str, contents: tuple[str, ...]) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and the characters of each turn that are learned when it is."""
    text = "<|bos|>" if name in ("llama3", "trimming") else ""
    spans: list[tuple[int, int]] = []
    for place, content in enumerate(contents):
        role = "assistant" if place % 2 else "user"
        header, body, rest = written(name, role, content, last=place == len(contents) - 1)
        spans.append((len(text) + len(header), len(text) + len(header) + len(body)))
        text += header + body + rest
    return text, spans


def marked(contents: tuple[str, ...], marks: tuple[int, ...]) -> Record:
    messages = [
        replace(message, supervise=bool(mark), marked=True)
        for message, mark in zip(conversation(*contents), marks, strict=False)
    ]
    return Record("chats.jsonl", 1, messages=tuple(messages))


def learned_spans(train_on: str, spans: list[tuple[int, int]], marks: tuple[int, ...]) -> list[tuple[int, int]]:
    if train_on == "answers":
        return spans[1::2]
    if train_on == "last":
        return spans[-1:]
    return [span for span, mark in zip(spans, marks, strict=False) if mark]


WAYS = [("answers", "all answers"), ("last", "the last"), *(("custom", name) for name in MARKS)]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_characters_that_are_meant_are_learned_at_every_length(name: str, chat: str) -> None:
    contents = CHATS[chat]
    text, spans = oracle(name, contents)
    ids: list[int] | None = None
    for train_on, way in WAYS:
        marks = MARKS.get(way, ())
        row = marked(contents, marks) if marks else record(*contents)
        meant = learned_spans(train_on, spans, marks)
        if not meant:
            continue
        whole = render(row, TOKENIZER, train_on=train_on, chat_template=TEMPLATES[name])  # type: ignore[arg-type]  # WAYS
        assert TOKENIZER.decode(whole.input_ids) == text
        assert ids in (None, whole.input_ids)  # what is learned changes no token
        ids = whole.input_ids
        position = 0
        for place, token in enumerate(ids):
            begin, position = position, position + len(TOKENIZER.decode([token]))
            learned = any(start < position <= end for start, end in meant)  # by its last character
            assert all(
                (begin < start) == (position <= start) for start, _ in spans[1::2]
            )  # answers' beginnings are cuts
            assert all((begin < end) == (position <= end) for _, end in spans[1::2])  # and so here
            assert whole.labels[place] == (token if learned and place else IGNORED), (way, place)
        for start, end in whole.answers:
            assert whole.labels[start:end] == ids[start:end]
        for max_length in range(2, len(ids) + 3, 3):
            expected = whole.labels[:max_length]
            if all(label == IGNORED for label in expected):
                with pytest.raises(DataError, match=f"beyond max_length {max_length}"):
                    prepare([row], TOKENIZER, max_length=max_length, train_on=train_on, chat_template=TEMPLATES[name])  # type: ignore[arg-type]  # WAYS
                continue
            [cut] = prepare([row], TOKENIZER, max_length=max_length, train_on=train_on, chat_template=TEMPLATES[name])  # type: ignore[arg-type]  # WAYS
            assert (cut.input_ids, cut.labels) == (ids[:max_length], expected)


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_learned_answer_ends_in_a_token_to_stop_at_and_begins_where_serving_asks(name: str) -> None:
    contents, template = CHATS["turns"], TEMPLATES[name]
    stops = stop_ids(TOKENIZER, chat_template=template)
    for train_on in ("answers", "last", "custom"):
        row = marked(contents, (0, 1) * 3)
        sample = render(row, TOKENIZER, train_on=train_on, chat_template=template)
        assert len(sample.answers) == (1 if train_on == "last" else 3)
        for turn, (start, end) in zip((5,) if train_on == "last" else (1, 3, 5), sample.answers, strict=True):
            assert sample.labels[end - 1] in stops
            prompt = prompt_ids(conversation(*contents)[:turn], TOKENIZER, chat_template=template)
            assert prompt == sample.input_ids[:start]


@pytest.mark.parametrize("train_on", get_args(TrainOn))
@pytest.mark.parametrize("packing", [False, True])
def test_batches_learn_the_stop_tokens_where_the_pad_token_is_the_same(train_on: TrainOn, packing: bool) -> None:
    rows = [marked(CHATS[chat][:4], (1, 1, 0, 1)) for chat in ("turns", "spaces", "own words")]
    samples = prepare(rows, TOKENIZER, max_length=128, train_on=train_on, chat_template=ROLE_TAGS)
    stop = TOKENIZER.eos_token_id
    stream = BatchStream(samples, batch_size=3, packing=packing, max_length=128, pad_id=stop)
    [batch] = stream.next_step()
    expected = {"answers": 2, "last": 1, "custom": 3, "all": 4}[train_on]
    assert int((batch.labels == stop).sum()) == expected * len(rows)
    assert batch.supervised_tokens == samples.report.supervised_tokens


def test_custom_takes_the_marks_of_the_data_and_refuses_a_row_without_any() -> None:
    turns = [
        {"role": "system", "content": "be brief", "weight": 1},
        {"role": "user", "content": "hi", "train": True},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "he", "loss_weight": 0},
        {"role": "assistant", "content": "ha", "loss_weight": 1},
    ]
    [row] = read_records([{"messages": turns}])
    sample = render(row, TOKENIZER, train_on="custom", chat_template=CHATML)
    said = [TOKENIZER.decode(sample.input_ids[start:end]) for start, end in sample.answers]
    assert said == ["be brief<|im_end|>", "hi<|im_end|>", "ha<|im_end|>"]
    rows = [row, record("a", "b", row=7)]
    with pytest.raises(DataError, match=r"chats\.jsonl, row 7: train_on is custom, but no turn says.*loss_weight"):
        prepare(rows, TOKENIZER, max_length=64, train_on="custom", chat_template=CHATML)


def test_a_marked_turn_that_the_template_does_not_write_is_refused() -> None:
    silent = "{% for m in messages if m.role != 'user' %}{{ m.content + eos_token }}{% endfor %}"
    with pytest.raises(DataError, match=r"turn 1 \(user\): it is marked to be learned, but .* does not write it"):
        render(marked(("a", "b"), (1, 1)), TOKENIZER, train_on="custom", chat_template=silent)


def test_last_honours_a_mark_of_context_and_texts_are_learned_whole() -> None:
    row = marked(("a", "b", "c", "d"), (0, 1, 0, 0))
    with pytest.raises(DataError, match="no answer is marked to be learned"):
        prepare([row], TOKENIZER, max_length=64, train_on="last", chat_template=CHATML)
    text = Record("f.txt", 1, text="the quick fox")
    for train_on in get_args(TrainOn):
        assert render(text, TOKENIZER, train_on=train_on).labels[1:] == render(text, TOKENIZER).input_ids[1:]


def test_reasoning_that_is_dropped_from_earlier_turns_needs_no_splitting_for_the_last() -> None:
    messages = conversation("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\nso\n</think>\n\nd")
    row = Record("f", 1, messages=messages)
    prepared = prepare([row], TOKENIZER, max_length=256, train_on="last", chat_template=THINKING)
    assert (len(prepared), prepared.report.split_rows) == (1, 0)
    [(start, end)] = prepared[0].answers
    assert TOKENIZER.decode(prepared[0].input_ids[start:end]) == "<think>\nso\n</think>\n\nd<|im_end|>"
    assert prepared[0].input_ids[:start] == prompt_ids(messages[:3], TOKENIZER, chat_template=THINKING)


def test_turn_by_turn_each_marked_turn_is_learned_once() -> None:
    messages = tuple(
        replace(message, marked=True)
        for message in conversation("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\nso\n</think>\n\nd")
    )
    prepared = prepare(
        [Record("f", 1, messages=messages)], TOKENIZER, max_length=256, train_on="custom", chat_template=THINKING
    )
    said = [[TOKENIZER.decode(s.input_ids[begin:end]) for begin, end in s.answers] for s in prepared]
    assert said == [
        ["a<|im_end|>", "<think>\nhm\n</think>\n\nb<|im_end|>"],
        ["c<|im_end|>", "<think>\nso\n</think>\n\nd<|im_end|>"],
    ]


def test_the_hash_changes_with_the_template_and_with_a_special_token() -> None:
    tokenizer = tiny_tokenizer()
    known = template_hash(tokenizer)
    assert known == template_hash(tiny_tokenizer())
    assert len(known) == 64
    others = {template_hash(tokenizer, LLAMA3), template_hash(TOKENIZER), template_hash(tokenizer, "plain")}
    tokenizer.eos_token = "<|pad|>"
    others.add(template_hash(tokenizer))
    assert len(others | {known}) == 5


def test_a_message_of_another_role_keeps_what_it_carries() -> None:
    call = '{"name": "f", "arguments": {}}'
    messages = (Message("user", "a"), Message("assistant", call, calls=(call,)), *conversation("b", "c"))
    row = Record("f", 1, messages=messages)
    assert render(row, TOKENIZER, train_on="last", chat_template=CHATML).supervised == 2

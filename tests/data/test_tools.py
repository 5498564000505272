"""Functions and calls, through templates that know tools and through those that do not: trained as served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strop.data.records import Message, Record, read_records
from strop.data.samples import prepare
from strop.data.templates import as_messages, chat_format, prompt_ids, render, set_chat_template, stop_ids
from strop.errors import DataError
from tests.data.chats import CHATML, THINKING
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat_template=False)

# Functions in the system turn, each call inside tags of its own, answers of tools in a turn of the user.
TAGGED = (
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}{{ '<tools>' }}"
    "{% for tool in tools %}{{ '\n' ~ tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% endif %}{% for message in messages %}"
    "{% if message.role == 'user' or message.role == 'assistant' and not message.tool_calls %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% elif message.role == 'assistant' %}{{ '<|im_start|>assistant' }}"
    "{% if message.content %}{{ '\n' + message.content }}{% endif %}"
    "{% for call in message.tool_calls %}{% if call.function is defined %}{% set call = call.function %}{% endif %}"
    '{{ \'\n<tool_call>\n{"name": "\' ~ call.name ~ \'", "arguments": \' }}'
    "{{ call.arguments | tojson ~ '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif message.role == 'tool' %}"
    "{% if loop.previtem is not defined or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# One BOS, functions in front of the first question, a single call a turn, a role of its own for what tools say.
HEADED = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|im_start|>system<|im_start|>\n\n' }}{% if tools is not none %}{{ 'Environment: ipython\n' }}{% endif %}"
    "{{ system + '<|im_end|>' }}"
    "{% if tools is not none %}{% set first = messages[0].content | trim %}{% set messages = messages[1:] %}"
    "{{ '<|im_start|>user<|im_start|>\n\nFunctions:\n\n' }}"
    "{% for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{{ first + '<|im_end|>' }}{% endif %}"
    "{% for message in messages %}{% if 'tool_calls' in message %}"
    "{% if message.tool_calls | length != 1 %}{{ raise_exception('only one call at once') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}"
    '{{ \'<|im_start|>assistant<|im_start|>\n\n{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{ call.arguments | tojson }}{{ '}' + eos_token }}"
    "{% elif message.role == 'tool' %}"
    "{{ '<|im_start|>ipython<|im_start|>\n\n' + message.content + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '<|im_start|>\n\n' + message.content | trim + '<|im_end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_start|>\n\n' }}{% endif %}"
)

# Insists on numbered calls of nine characters and on answers that bear them.
NUMBERED = (
    "{{ bos_token }}{% if tools %}{{ '[TOOLS]' + tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.tool_calls is defined %}{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('call ids have nine characters') }}{% endif %}"
    "{{ '[CALL]' + {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}"
    "{% endfor %}{{ eos_token }}{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('answers bear the call id') }}{% endif %}"
    "{{ '[RESULT]' + m.tool_call_id + m.name + m.content + '[/RESULT]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% endif %}"
    "{% endfor %}"
)

KNOWING = {"tagged": TAGGED, "headed": HEADED, "numbered": NUMBERED}

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The sky over a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the sky?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"sky": "blue"}'},
    {"role": "assistant", "content": "It is blue."},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "Any time."},
]


def learned(tokenizer: Any, record: Record, template: str) -> list[str]:
    sample = render(record, tokenizer, chat_template=template)
    return [tokenizer.decode(sample.input_ids[start:end]) for start, end in sample.answers]


@pytest.mark.parametrize("name", KNOWING)
def test_a_template_that_knows_tools_is_found_out_and_others_get_text(name: str) -> None:
    assert chat_format(TOKENIZER, KNOWING[name]).takes_tools
    for template in (CHATML, THINKING, "plain"):
        assert not chat_format(TOKENIZER, template).takes_tools


def test_calls_are_learned_as_each_template_writes_them_with_their_stop_token() -> None:
    [record] = read_records([{"messages": TURNS, "tools": [TOOL]}])
    arguments = '{"city": "Köln"}'
    expected = {
        "tagged": '<tool_call>\n{"name": "weather", "arguments": ' + arguments + "}\n</tool_call><|im_end|>",
        "headed": '{"name": "weather", "parameters": ' + arguments + "}<|eos|>",
        "numbered": '[CALL]{"name": "weather", "arguments": ' + arguments + ', "id": "000000001"}<|eos|>',
    }
    for name, template in KNOWING.items():
        first, second, third = learned(TOKENIZER, record, template)
        assert first == expected[name], name
        assert second.startswith("It is blue.<|"), name
        assert third.startswith("Any time.<|"), name
    first, *_ = learned(TOKENIZER, record, CHATML)
    assert first == '{"name": "weather", "arguments": {"city": "Köln"}}<|im_end|>'
    text = TOKENIZER.decode(render(record, TOKENIZER, chat_template=CHATML).input_ids)
    assert "be brief\n\nFunctions that can be called:\n" in text


@pytest.mark.parametrize("with_system", [True, False])
@pytest.mark.parametrize("name", KNOWING)
def test_the_tokens_are_those_that_transformers_makes_of_tools_and_calls(name: str, with_system: bool) -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    set_chat_template(tokenizer, KNOWING[name])
    turns = TURNS if with_system else TURNS[1:]
    [record] = read_records([{"messages": turns, "tools": [TOOL]}])
    theirs: list[dict[str, Any]] = []
    for turn in turns:
        turn = dict(turn)
        if "tool_calls" in turn:
            function = {"name": "weather", "arguments": {"city": "Köln"}}
            turn["tool_calls"] = [{"type": "function", "id": "000000001", "function": function}]
        if turn["role"] == "tool":
            turn |= {"tool_call_id": "000000001", "name": "weather"}
        theirs.append(turn)
    text = tokenizer.apply_chat_template(theirs, tools=[TOOL], tokenize=False)
    assert tokenizer.decode(render(record, tokenizer).input_ids) == text
    served = tokenizer.apply_chat_template(theirs[:-1], tools=[TOOL], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(prompt_ids(turns[:-1], tokenizer, tools=[TOOL])) == served


@pytest.mark.parametrize("name", [*KNOWING, "chatml", "plain"])
def test_a_prompt_with_tools_is_the_beginning_of_the_trained_row_however_it_is_given(name: str) -> None:
    template = KNOWING.get(name, name)
    row = {"messages": TURNS, "tools": [TOOL]}
    [record] = read_records([row])
    assert record.messages is not None
    sample = render(record, TOKENIZER, chat_template=template)
    for turn, (start, _) in zip((2, 4, 6), sample.answers, strict=True):
        from_record = prompt_ids(record.messages[:turn], TOKENIZER, chat_template=template)
        assert from_record == sample.input_ids[:start]
        assert prompt_ids(TURNS[:turn], TOKENIZER, tools=[TOOL], chat_template=template) == from_record


@pytest.mark.parametrize("name", [*KNOWING, "chatml"])
def test_the_published_tool_conversations_run_through_every_template(material: Path, name: str) -> None:
    template = KNOWING.get(name, name)
    records = read_records(material / "data" / "lf_glaive_toolcall_en_demo.json")
    calls = [message for record in records for message in record.messages or () if message.calls]
    assert len(calls) == 211
    prepared = prepare(records[:100], TOKENIZER, max_length=100_000, chat_template=template)
    assert len(prepared) == 100
    for record, sample in zip(records[:100], prepared, strict=True):
        assert record.messages is not None
        answers = [place for place, message in enumerate(record.messages) if message.role == "assistant"]
        assert len(sample.answers) == len(answers)
        last = answers[-1]
        asked = prompt_ids(record.messages[:last], TOKENIZER, chat_template=template)
        assert asked == sample.input_ids[: sample.answers[-1][0]]
        for place, (start, end) in zip(answers, sample.answers, strict=True):
            written = TOKENIZER.decode(sample.input_ids[start:end])
            for call in map(json.loads, record.messages[place].calls):
                assert call["name"] in written
                assert written.endswith(("<|im_end|>", "<|eos|>"))


def test_a_turn_may_speak_and_call_twice_and_the_answers_bear_the_calls_in_turn() -> None:
    calls = [{"function": {"name": name, "arguments": {"x": number}}} for number, name in enumerate(("f", "g"))]
    turns = [
        {"role": "user", "content": "both"},
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "done"},
    ]
    [record] = read_records([{"messages": turns}])
    first, _ = learned(TOKENIZER, record, TAGGED)
    assert first.startswith("I look.\n<tool_call>\n")
    assert first.count("<tool_call>") == 2
    text = TOKENIZER.decode(render(record, TOKENIZER, chat_template=NUMBERED).input_ids)
    assert "[RESULT]000000001fone[/RESULT][RESULT]000000002gtwo[/RESULT]" in text
    with pytest.raises(DataError, match="only one call at once"):
        render(record, TOKENIZER, chat_template=HEADED)


def test_a_call_that_ends_at_a_token_of_its_own_is_stopped_at() -> None:
    assert stop_ids(TOKENIZER, chat_template=HEADED) == [2, 4]  # the end token closes calls, <|im_end|> answers
    assert stop_ids(TOKENIZER, chat_template=TAGGED) == [2, 4]


def test_tools_that_are_no_list_of_functions_stay_text_in_rows_and_are_refused_as_arguments() -> None:
    row = {"messages": TURNS[1:], "tools": "call weather(city)"}
    [record] = read_records([row])
    assert record.messages is not None
    assert record.messages[0] == Message("system", "Functions that can be called:\ncall weather(city)")
    with pytest.raises(DataError, match="tools must be a list of functions"):
        as_messages([{"role": "user", "content": "x"}], tools=[{"about": "nothing"}])
    with pytest.raises(DataError, match="tool_calls need a function with a name"):
        as_messages([{"role": "assistant", "tool_calls": [{"function": {}}]}])

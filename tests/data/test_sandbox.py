"""Chat templates are programs from elsewhere: what they may do, and that they write what transformers writes."""

from __future__ import annotations

import jinja2
import pytest

from strop.data.records import Message
from strop.data.sandbox import MAX_CHARACTERS, ChatTemplate, TemplateLimitError
from strop.data.templates import prompt_ids
from strop.errors import DataError
from tests.data.chats import APPENDING, COUNTING, STOPLESS, conversation
from tests.tiny import tiny_tokenizer

CHAT = [{"role": "user", "content": "hi"}]

GROW = "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}"

ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "silent macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "loop of text": "{% for a in range(90000) %}{% for b in range(9) %}" + "x" * 5000 + "{% endfor %}{% endfor %}",
}

HUGE = {
    "repeat": "{{ 'a' * 1000000000 }}",
    "repeat a list": "{{ (['a' * 1000] * 900000000) | join }}",
    "power": "{{ 10 ** 10000000000 }}",
    "plus": GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "tilde": GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "block set": GROW + "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}",
    "join": GROW + "{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "join method": GROW + "{% set ns.s = ''.join([ns.s, ns.s]) %}{% endfor %}",
    "replace filter": "{{ 'a' | replace('a', 'b' * 1000000) | replace('b', 'c' * 1000000) }}",
    "replace method": "{{ 'a'.replace('a', 'b' * 100000).replace('b', 'c' * 100000) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "tabs": "{{ 'a\tb'.expandtabs(1000000000) }}",
    "center": "{{ 'x' | center(1000000000) }}",
    "indent": "{{ 'x\ny' | indent(1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:>1000000000}'.format('x') }}",
    "nested format": "{{ '{:>{}}'.format('x', 1000000000) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "time": "{{ strftime_now('%1000000000d') }}",
    "json": "{{ messages | tojson(indent=1000000) }}",
}

ESCAPES = {
    "class of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a class": "{{ cycler.__init__.__globals__ }}",
    "environment": "{{ self._TemplateReference__context.environment.from_string('x') }}",
    "attr filter": "{{ '' | attr('__class__') | attr('__mro__') }}{{ ''['__class__'].x }}",
    "format attribute": "{{ '{0.__class__.__mro__}'.format('') }}",
    "change the messages": "{{ messages.append(1) }}",
    "change a message": "{{ messages[0].update(role='x') }}",
    "namespace": "{% set ns = namespace(__class__=1) %}",
    "set on namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", [*ENDLESS, *HUGE])
def test_a_template_that_runs_or_grows_without_end_is_stopped(name: str) -> None:
    with pytest.raises(TemplateLimitError):
        ChatTemplate({**ENDLESS, **HUGE}[name]).render(CHAT, {})


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_reaches_nothing_outside_its_sandbox(name: str) -> None:
    try:
        text = ChatTemplate(ESCAPES[name]).render(CHAT, {}).text
    except (jinja2.TemplateError, TypeError):
        return
    assert "class" not in text
    assert "object" not in text


def test_the_limits_hold_across_rows_and_leave_honest_long_ones_alone() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    long = [{"role": "user", "content": "x" * 1_000_000}]
    for _ in range(20):
        assert len(template.render(long, {}).text) == 1_000_000
    with pytest.raises(TemplateLimitError):
        template.render(long * (MAX_CHARACTERS // 1_000_000 + 1), {})
    many = [{"role": "user", "content": "100000000000 {:>99999999999} %99999999999d"}] * 10_000
    assert len(template.render(many, {}).text) == 10_000 * len(many[0]["content"])


def test_numbers_and_format_marks_in_a_message_are_only_text() -> None:
    content = "call 100000000000 {:>99999999999} %99999999999d"
    template = ChatTemplate("{{ (messages[0].content | trim ~ '!').replace('call', 'ring') | upper }}")
    rendered = template.render([{"role": "user", "content": content}], {})
    assert rendered.text == f"{content}!".replace("call", "ring").upper()


def test_a_stopped_template_becomes_a_data_error_with_a_way_out() -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    with pytest.raises(DataError, match=r"was stopped: .*--chat-template"):
        prompt_ids([Message("user", "x")], tokenizer, chat_template="{{ messages[0].content * 100000000 }}")
    with pytest.raises(DataError, match="refused: the template has 1000000 characters"):
        prompt_ids([Message("user", "x")], tokenizer, chat_template="{{ x }}".ljust(1_000_000))


FEATURES = {
    "controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% break %}{% endfor %}",
    "whitespace": "  {%- for m in messages %}\n    {{ m.content }}\n  {%- endfor %}\n\n{% if 1 %}\nx\n{% endif %}\ny",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ '<é\"' | tojson }}",
    "macro": "{% macro f(m) %}{{ m.role }}|{{ m.content }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    "slices": "{{ messages[1:] | length }}{{ messages[-1].content[::-1] }}{{ messages[0]['role'][:2] }}",
    "tests": "{{ tools is none }}{{ x is defined }}{{ messages is sequence }}{{ 'b' in messages[0].content }}",
    "methods": "{{ 'a-b-c'.split('-') | join('+') }}{{ ' x '.strip() }}{{ 'x'.startswith('x') }}{{ 'é'.upper() }}",
    "tilde": "{{ 1 ~ none ~ 'x' ~ 2.5 }}{{ undefined ~ 'x' }}",
    "filters": "{{ messages | map(attribute='role') | list | unique | join(',') }}{{ [3, 1] | sort }}",
    "numbers": "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ '%03d' % 7 }}{{ '{:>4}'.format('x') }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}-{% endfor %}",
}


SOURCES = {
    **FEATURES,
    **{name: source for name, source in APPENDING.items() if "{" in source},
    "counting": COUNTING,
    "stopless": STOPLESS,
}


@pytest.mark.parametrize("name", SOURCES)
def test_it_writes_what_transformers_writes(name: str) -> None:
    source = SOURCES[name]
    tokenizer = tiny_tokenizer(chat_template=False)
    variables = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    for contents in (("ab", "cd"), (" a b ", "{'x': \"<é>\"}", "c\n", "\n🙂")):
        chat = [{"role": m.role, "content": m.content} for m in conversation(*contents)]
        for prompt in (False, True):
            theirs = tokenizer.apply_chat_template(
                chat, chat_template=source, tokenize=False, add_generation_prompt=prompt
            )
            ours = ChatTemplate(source).render(chat, {**variables, "add_generation_prompt": prompt})
            assert ours.text == theirs


def test_no_character_of_a_message_is_lost_or_taken_for_a_mark() -> None:
    contents = "".join(map(chr, [0xE000, 0xF8FF, 0x10FFF0, 0x10FFF1, 0x10FFFF, 0, 0x200B, 0xFEFF]))
    rendered = ChatTemplate(APPENDING["marked"]).render([{"role": "assistant", "content": contents}], {})
    assert rendered.text == f"<|im_start|>assistant\n{contents}<|im_end|>\n"
    [(start, end)] = rendered.marks
    assert rendered.text[start:end] == contents


def test_generation_marks_are_where_transformers_finds_them() -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    variables = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    chat = [{"role": m.role, "content": m.content} for m in conversation("ab", "cd", "e f", "g\nh")]
    for source in (APPENDING["marked"], APPENDING["marked-wide"]):
        theirs = tokenizer.apply_chat_template(
            chat, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
        )
        rendered = ChatTemplate(source).render(chat, variables)
        offsets = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ours = [int(any(begin <= start < end for begin, end in rendered.marks)) for start, _ in offsets]
        assert ours == theirs["assistant_masks"]

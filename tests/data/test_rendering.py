"""Hostile templates are contained: each ends in an error that names the limit, in a process that is waited for."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from strop.data import rendering
from strop.data.records import Message, Record
from strop.data.rendering import Job, TemplateStoppedError, View, render_jobs
from strop.data.samples import prepare
from strop.data.templates import prompt_ids
from strop.errors import DataError
from tests.data.chats import CHATML, LLAMA3, record
from tests.data.test_sandbox import ENDLESS, ESCAPES, GROW, HUGE
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat_template=False)

JOB = Job([{"role": "user", "content": "hi"}])

# What no count of steps or characters sees coming: only the limits of the process stop these.
SLOW = "{{ (3 ** 3900000) // (7 ** 1000000) }}"
GREEDY = GROW + "{% set ns.s = [ns.s, 'a' * 7000000, 'b' * 7000000, 'c' * 7000000] %}{% endfor %}"

OTHERS = {
    "billion passes": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "billion passes of a text": "{% for i in 'a' * 7000000 %}x{% endfor %}",
    "hoarding": GREEDY,
    "parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "operators": "{{ 1" + " + 1" * 50_000 + " }}",
    "nested blocks": "{% if 1 %}" * 5_000 + "x" + "{% endif %}" * 5_000,
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}",
    "text of a number": "{{ (10 ** 2000000) | string }}",
    "half a surrogate": "{{ '\\ud800' }}",
    "unknown filter": "{{ messages | launch }}",
    "open block": "{% for m in messages %}",
}


@pytest.fixture
def fresh_worker() -> Iterator[None]:
    """A worker of the test's own limits."""
    rendering.close_worker()
    yield
    rendering.close_worker()


def worker_id() -> int:
    assert rendering._worker is not None
    return rendering._worker.process.pid


@pytest.mark.parametrize("name", [*ENDLESS, *HUGE, *OTHERS])
def test_a_hostile_template_ends_in_an_error_that_says_what_was_hit(name: str) -> None:
    source = {**ENDLESS, **HUGE, **OTHERS}[name]
    with pytest.raises(DataError) as caught:
        prompt_ids([Message("user", "hi")], TOKENIZER, chat_template=source)
    text = str(caught.value)
    limit = "runs too long|writes more|builds a value|passes the number|out of bounds|indent of|MiB|recursion|nested"
    refusal = "refuses the turns|not valid Jinja"
    assert any(words in text for words in f"{limit}|{refusal}".split("|")), text
    assert "was stopped" in text or "refused" in text or "refuses" in text or "not valid Jinja" in text


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_that_reaches_for_pythons_insides_gets_an_error_or_nothing(name: str) -> None:
    try:
        [view] = render_jobs(ESCAPES[name], {}, [JOB])
    except (TemplateStoppedError, rendering.TemplateSyntaxError):
        return
    assert isinstance(view, rendering.TemplateRefusedError) or not {"class", "object"} & set(view.text.split())


def test_processor_time_is_limited_by_the_system_and_the_row_is_named(
    monkeypatch: pytest.MonkeyPatch, fresh_worker: None
) -> None:
    monkeypatch.setattr(rendering, "PROCESSOR_SECONDS", 1)
    source = "{% if messages[0].content == 'bad' %}" + SLOW + "{% endif %}" + CHATML
    rows = [record("good", "a", row=1), record("bad", "b", row=2), record("good", "c", row=3)]
    with pytest.raises(DataError, match=r"row 2: the chat template was stopped: .* 1 s of processor time; use another"):
        prepare(rows, TOKENIZER, max_length=64, chat_template=source)
    assert len(prepare(rows[::2], TOKENIZER, max_length=64, chat_template=source)) == 2


def test_a_deadline_by_the_clock_holds_where_the_system_limits_nothing(
    monkeypatch: pytest.MonkeyPatch, fresh_worker: None
) -> None:
    monkeypatch.setattr(rendering, "DEADLINE_SECONDS", 0.5)
    with pytest.raises(TemplateStoppedError, match=r"not ended after 0\.5 s"):
        render_jobs(SLOW, {}, [JOB])
    assert rendering._worker is None


def test_one_process_serves_all_rows_and_a_killed_one_is_waited_for(fresh_worker: None) -> None:
    for _ in range(3):
        [view] = render_jobs(CHATML, {}, [JOB])
        assert isinstance(view, View)
    first = worker_id()
    render_jobs(LLAMA3, {"bos_token": "<s>", "eos_token": "</s>"}, [JOB] * 200)
    assert worker_id() == first
    os.kill(first, signal.SIGKILL)  # from outside, while nothing is asked
    while rendering._worker is not None and rendering._worker.process.poll() is None:
        pass
    assert isinstance(render_jobs(CHATML, {}, [JOB])[0], View)
    second = worker_id()
    assert second != first
    rendering.close_worker()
    for process in (first, second):
        with pytest.raises(ChildProcessError):  # none is left to wait for, so none is a zombie
            os.waitpid(process, os.WNOHANG)


def test_an_interrupt_while_waiting_leaves_no_answer_for_the_next_question(
    monkeypatch: pytest.MonkeyPatch, fresh_worker: None
) -> None:
    render_jobs(CHATML, {}, [JOB])
    interrupted = worker_id()

    def interrupt(line: bytes) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rendering.json, "loads", interrupt)
        with pytest.raises(KeyboardInterrupt):
            render_jobs(CHATML, {}, [JOB, JOB])
    [view] = render_jobs("{{ messages[0].content }}", {}, [JOB])
    assert isinstance(view, View)
    assert view.text == "hi"
    assert worker_id() != interrupted


def test_threads_share_the_worker_and_each_gets_its_own_answers() -> None:
    wrong: list[str] = []

    def ask(number: int) -> None:
        for turn in range(20):
            text = f"{number}:{turn}"
            [view] = render_jobs("{{ messages[0].content }}", {}, [Job([{"role": "user", "content": text}])])
            if not isinstance(view, View) or view.text != text:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is nothing to fork on this system")
def test_a_forked_child_has_a_worker_of_its_own(fresh_worker: None) -> None:
    render_jobs(CHATML, {}, [JOB])
    ours = worker_id()
    child = os.fork()
    if child == 0:
        [view] = render_jobs(CHATML, {}, [JOB])
        good = isinstance(view, View) and worker_id() != ours
        rendering.close_worker()
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert isinstance(render_jobs(CHATML, {}, [JOB])[0], View)
    assert worker_id() == ours


def test_the_worker_ends_when_its_parent_is_gone_and_sees_none_of_its_secrets(
    monkeypatch: pytest.MonkeyPatch, fresh_worker: None
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    worker = rendering._Worker()
    try:
        environ = f"/proc/{worker.process.pid}/environ"
        worker.ask({"source": "x", "variables": {}, "jobs": None}, 1)
        if os.path.exists(environ):
            with open(environ, "rb") as file:
                assert b"secret" not in file.read()
        assert worker.process.stdin is not None
        worker.process.stdin.close()  # as the system does when a parent ends, however it ends
        assert worker.process.wait(timeout=30) == 0
    finally:
        worker.close()


def test_rows_are_many_to_a_message_and_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    ask = rendering._ask

    def counted(request: Any, count: int) -> list[dict[str, Any]]:
        counts.append(count)
        return ask(request, count)

    monkeypatch.setattr(rendering, "_ask", counted)
    jobs = [Job([{"role": "user", "content": str(place)}]) for place in range(1_000)]
    views = render_jobs("{{ messages[0].content }}", {}, jobs)
    assert [view.text for view in views if isinstance(view, View)] == [str(place) for place in range(1_000)]
    assert len(counts) < 20
    long = [Job([{"role": "user", "content": "x" * 600_000}])] * 3  # long conversations go alone
    counts.clear()
    render_jobs("{{ messages | length }}", {}, long)
    assert counts == [1, 1, 1]


def test_a_template_that_is_too_long_for_one_row_names_that_row() -> None:
    rows = [
        record("a", "b", row=1),
        Record("f.jsonl", 2, messages=(Message("user", "x" * 9_000_000), Message("assistant", "y"))),
    ]
    with pytest.raises(DataError, match=r"f\.jsonl, row 2: the chat template was stopped: .*8000000 characters"):
        prepare(rows, TOKENIZER, max_length=1 << 30, chat_template=CHATML)

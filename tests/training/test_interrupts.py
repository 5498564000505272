"""Ctrl-C waits for a safe point once, and not twice; the metrics file survives a kill."""

from __future__ import annotations

import json
import os
import signal
import threading

import pytest

from strop.training.interrupts import InterruptGuard
from strop.training.metrics import MetricsFile, read_metrics


def test_one_press_waits_for_the_next_check():
    with InterruptGuard() as guard:
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
        with pytest.raises(KeyboardInterrupt):
            guard.check()
        guard.check()
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_press_comes_at_once():
    with InterruptGuard():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_another_thread_changes_no_handler():
    kinds = []

    def work() -> None:
        with InterruptGuard() as guard:
            guard.check()
            kinds.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert kinds == [signal.default_int_handler]


def test_a_handler_of_the_program_is_left_alone():
    def own(_number, _frame) -> None:
        pass

    signal.signal(signal.SIGINT, own)
    try:
        with InterruptGuard():
            assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_later_and_torn_lines_are_removed_before_the_file_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, after_step=0)
    for step in (1, 2, 3):
        file.write({"step": step, "loss": 1.0 / step})
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    file = MetricsFile(path, after_step=2)
    file.write({"step": 3, "loss": 0.5})
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.5},
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_number_that_json_has_no_word_for_is_an_error(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", after_step=0)
    with pytest.raises(ValueError, match="JSON"):
        file.write({"step": 1, "loss": float("nan")})
    file.close()


def test_nothing_there_is_no_rows(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []

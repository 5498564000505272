"""Chat templates rendered in a process of their own.

A chat template is a program from elsewhere. The sandbox (`sandbox.py`) counts its steps and the size of what it builds,
but a single call of Python's own may take long or much memory before the next count, and a gap in the sandbox would
stand inside the process that trains. So every template, whoever wrote it, is compiled and rendered in one worker: a
fresh interpreter with no more than Jinja in it, which limits its own memory and processor time and is killed if no
answer comes by the deadline. There is no second path for harmless ones: 10,000 rows cost little more this way, since
a message carries many conversations and all the prompts that are cut from them, and only texts and lengths come back.

The worker is a plain subprocess (no fork, the same on every system), used again for all rows and by all threads in
turn. It is waited for whenever it ends, ends itself when its parent is gone, and is started anew after a kill and in a
forked child. What comes back is JSON, so that a worker that was taken over could only lie about a text.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

MEMORY_BYTES: Final = 1 << 30
PROCESSOR_SECONDS = 10
"""Of a conversation, with all the prompts that are cut from it."""
DEADLINE_SECONDS = 60.0
"""By the clock, for a message's answers: a busy machine stops nothing honest."""

_MOST_JOBS, _MOST_CHARACTERS = 64, 1_000_000
_KEPT = ("PATH", "SYSTEMROOT", "TZ", "LANG", "LC_ALL", "LD_LIBRARY_PATH")


class TemplateRefusedError(Exception):
    """The template raised, on these turns."""


class TemplateSyntaxError(Exception):
    """The text is not valid Jinja; the message begins with the line."""


class TemplateStoppedError(Exception):
    """A limit on time, memory or size was hit; the message says which.

    Attributes:
        place: The position of the job that hit it.
    """

    def __init__(self, message: str, place: int = 0) -> None:
        super().__init__(message)
        self.place = place


@dataclass(frozen=True)
class Job:
    """A conversation to render.

    Attributes:
        turns: What the template sees as `messages`.
        prompt: Whether the header of the assistant's next turn follows.
        parts: Beginnings of it that are wanted too: how many turns, and whether such a header follows them.
        variables: What the template sees for this job alone.
        guard: A character within each text of a control token that the turns themselves hold; "" if none does.
    """

    turns: Sequence[Mapping[str, Any]]
    prompt: bool = False
    parts: Sequence[tuple[int, bool]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    guard: str = ""

    @property
    def cost(self) -> int:
        """Characters to write, roughly."""
        return (1 + len(self.parts)) * (100 + sum(len(str(turn.get("content"))) for turn in self.turns))


@dataclass(frozen=True)
class View:
    """What a template wrote.

    Attributes:
        text: The whole.
        marks: The ranges of its generation blocks.
        parts: For each of the job's parts its length, if the whole begins with it; None if it does not; the template's
            words if it refuses those turns.
        literals: Places just within texts of control tokens that the turns themselves hold.
    """

    text: str
    marks: tuple[tuple[int, int], ...] = ()
    parts: tuple[int | str | None, ...] = ()
    literals: tuple[int, ...] = ()


class _Worker:
    """One process that renders."""

    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1"}
        command = [sys.executable, "-m", "strop.data.sandbox_worker", str(MEMORY_BYTES), str(PROCESSOR_SECONDS)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends the worker itself
        )

    def ask(self, request: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
        """Send one message and read its answers.

        Raises:
            TemplateStoppedError: The worker was killed or died; it is gone then.
        """
        sending, reading = self.process.stdin, self.process.stdout
        assert sending is not None
        assert reading is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            self.process.kill()

        watch = threading.Timer(DEADLINE_SECONDS, kill)
        watch.daemon = True
        watch.start()
        answers: list[dict[str, Any]] = []
        try:
            sending.write(json.dumps(request).encode("ascii") + b"\n")
            sending.flush()
            while len(answers) < count:
                line = reading.readline()
                if not line.endswith(b"\n"):
                    break
                answers.append(json.loads(line))
        except BrokenPipeError:
            pass
        except BaseException:  # an interrupt too leaves answers unread, which the next message must not find
            self.close()
            raise
        finally:
            watch.cancel()
        if len(answers) < count:
            code = self.close()
            raise TemplateStoppedError(_why(code, late=late.is_set()), place=len(answers))
        return answers

    def close(self) -> int:
        """End the process, wait for it, and return how it ended."""
        code = self.process.poll()
        if code is None:
            self.process.kill()
        ended = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # what was not sent yet has nobody to read it
                    continue
        return ended

    def forget(self) -> None:
        """In a forked child: leave the process to the parent, and let go of the pipes."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                getattr(pipe, "raw", pipe).close()  # what is buffered is the parent's to send
        self.process.returncode = 0


def _why(code: int, *, late: bool) -> str:
    if late:
        return f"it had not ended after {DEADLINE_SECONDS:g} s"
    if code == -getattr(signal, "SIGXCPU", 0):
        return f"it took more than {PROCESSOR_SECONDS} s of processor time"
    return f"its process ended ({code}), as it does beyond {MEMORY_BYTES >> 20} MiB of memory"


_lock = threading.Lock()
_worker: _Worker | None = None


def _ask(request: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    global _worker
    with _lock:
        if _worker is not None and _worker.process.poll() is not None:  # killed from outside, with nothing asked
            _worker.close()
            _worker = None
        worker, _worker = _worker or _Worker(), None
        answers = worker.ask(request, count)
        _worker = worker  # only one that answered to the end is used again
        return answers


def close_worker() -> None:
    """End the worker if there is one; the next rendering starts another."""
    global _worker
    with _lock:
        if _worker is not None:
            _worker.close()
            _worker = None


def _after_fork() -> None:
    global _worker, _lock
    _lock = threading.Lock()
    if _worker is not None:
        _worker.forget()
        _worker = None


atexit.register(close_worker)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    batch: list[Job] = []
    cost = 0
    for job in jobs:
        if batch and (len(batch) == _MOST_JOBS or cost + job.cost > _MOST_CHARACTERS):
            yield batch
            batch, cost = [], 0
        batch.append(job)
        cost += job.cost
    if batch:
        yield batch


def check_template(source: str) -> None:
    """Compile a template in the worker.

    Raises:
        TemplateSyntaxError: It is not valid Jinja.
        TemplateStoppedError: It is too large, or compiling it hit a limit.
    """
    [answer] = _ask({"source": source, "variables": {}, "jobs": None}, 1)
    if answer:
        raise _error(answer, 0)


def _error(answer: Mapping[str, Any], place: int) -> Exception:
    text, kind = str(answer["error"]), answer["kind"]
    if kind == "syntax":
        return TemplateSyntaxError(text)
    return TemplateStoppedError(text, place) if kind == "limit" else TemplateRefusedError(text)


def render_jobs(source: str, variables: Mapping[str, Any], jobs: Sequence[Job]) -> list[View | TemplateRefusedError]:
    """Render conversations with one template: for each what it wrote, or its refusal.

    Raises:
        TemplateStoppedError: A limit was hit; `place` says at which job. What follows it is not rendered.
        TemplateSyntaxError: The text is not valid Jinja.
    """
    views: list[View | TemplateRefusedError] = []
    for batch in _batches(jobs):
        listed = [
            {"turns": job.turns, "prompt": job.prompt, "parts": job.parts, "variables": job.variables} for job in batch
        ]
        try:
            answers = _ask({"source": source, "variables": variables, "jobs": listed}, len(batch))
        except TemplateStoppedError as error:
            raise TemplateStoppedError(str(error), len(views) + error.place) from None
        for answer in answers:
            if "error" not in answer:
                marks = tuple((start, end) for start, end in answer["marks"])
                views.append(View(answer["text"], marks, tuple(answer["parts"])))
                continue
            error = _error(answer, len(views))
            if not isinstance(error, TemplateRefusedError):
                raise error
            views.append(error)
    return views

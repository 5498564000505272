"""Kill a run at random moments, resume it, and see whether it ends in the bits of a run in one go.

`kill_until_done` forks children from this process, so that a start costs no imports; each is killed (SIGKILL) at a
random moment and the next one resumes, until one lives to the end. POSIX only.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from strop.errors import TrainingError


@dataclass(frozen=True)
class Kills:
    """What became of the children of one run: those killed, and the seconds that the last one needed."""

    killed: int
    last_seconds: float


def kill_until_done(
    work: Callable[[], None],
    *,
    most: int,
    within_seconds: float,
    draw: random.Random,
    on_kill: Callable[[int], None] | None = None,
) -> Kills:
    """Run `work` in children, killed at random, until it ends by itself.

    Args:
        work: Resumes the run and carries it to its end. It is called in a forked child only.
        most: How many children are killed; the one after them is left alone.
        within_seconds: A child is killed at a moment drawn evenly between its start and this, if it lives so long.
        draw: Draws the moments.
        on_kill: Told how many have been killed.

    Raises:
        TrainingError: `work` failed by itself.
    """
    killed = 0
    while True:
        start, child = time.monotonic(), _fork(work)
        status = _wait(child, start + draw.uniform(0, within_seconds)) if killed < most else None
        if status is None and killed < most:
            os.kill(child, signal.SIGKILL)
        if status is None:
            status = _reap(child)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return Kills(killed, time.monotonic() - start)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            raise TrainingError(f"the run failed by itself, after {killed} kills (exit status {status}); see above")
        killed += 1
        if on_kill is not None:
            on_kill(killed)


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # the child must never return into its parent's program
        import traceback

        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _wait(child: int, until: float) -> int | None:
    """The child's exit status, or None if it still runs at that moment."""
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.001)
    return None


def _reap(child: int) -> int:
    try:
        return os.waitpid(child, 0)[1]
    except BaseException:  # Ctrl-C: no child is left behind
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise

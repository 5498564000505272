"""Signals between two safe points: the first one waits for the next safe point, a second one comes at once.

Ctrl-C (SIGINT), the polite end that schedulers and `kill` ask for (SIGTERM) and a closed terminal (SIGHUP) all end a
run in the same way: at a safe point, with its state saved.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Final

from strop.errors import Terminated

_SIGNALS: Final = ("SIGINT", "SIGTERM", "SIGHUP")  # by name: Windows has no SIGHUP


class InterruptGuard:
    """Context manager under which these signals are answered at the next `check()`.

    Only the main thread can hold signal handlers; elsewhere, and for a signal whose handling the program has replaced
    by its own (nohup ignores SIGHUP), nothing is changed and the signal arrives as ever.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Raise what was asked for since the last check.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            Terminated: SIGTERM or SIGHUP, a KeyboardInterrupt that knows its signal.
        """
        number, self._asked = self._asked, None
        if number is not None:
            raise _exception(number)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            raise _exception(number)
        self._asked = number

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is not threading.main_thread():
            return self
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _exception(number: int) -> KeyboardInterrupt:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)

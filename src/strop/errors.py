"""Every exception that strop raises on purpose, as one tree.

    StropError                  something failed (exit code 1)
    ├── UsageError              the request itself cannot be carried out (exit code 2)
    │   ├── ConfigError         a setting is unknown, of the wrong type, or contradicts another
    │   ├── FormatError         a number format is unknown, or cannot hold what was asked of it
    │   ├── TargetError         a layer name or pattern matches nothing
    │   └── MissingInputError   a file, folder or extra package that was named is not there
    ├── DataError               a record cannot be read or leaves nothing to learn from
    ├── ModelError              a model folder is incomplete or does not fit its configuration
    ├── FileFormatError         a file's bytes are not what its format demands
    ├── TrainingError           training cannot go on (NaN, a gradient that never arrives)
    │   └── DiskFullError       there is no room for the state that was to be kept
    └── GateError               a step lost more than its gate allows; nothing was kept

    KeyboardInterrupt
    └── Terminated              asked to end by SIGTERM or SIGHUP (exit code 128 + the signal's number)

A message says what happened, where, what was got, what was needed, and what to do next. An error that can find several
problems at once collects them all.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class StropError(Exception):
    """Base of every error that strop raises on purpose; the command line prints it without a traceback."""

    exit_code = 1


class UsageError(StropError):
    """The request cannot be carried out as it was put."""

    exit_code = 2


class ConfigError(UsageError):
    """One or more settings are wrong."""


class FormatError(UsageError):
    """A number format is unknown, or a tensor does not fit it."""


class TargetError(UsageError):
    """A layer name or pattern matches nothing in the model."""


class MissingInputError(UsageError):
    """A file, folder or optional package that the request names is not there."""


class DataError(StropError):
    """A record cannot be read, or the data leave nothing to learn from."""


class ModelError(StropError):
    """A model folder is incomplete or does not fit its configuration."""


class FileFormatError(StropError):
    """A file's bytes are not what its format demands."""


class TrainingError(StropError):
    """Training cannot go on."""


class DiskFullError(TrainingError):
    """The disk has no room for what was to be kept."""


class GateError(StropError):
    """A step lost more than its gate allows."""


class Terminated(KeyboardInterrupt):
    """Asked to end by a signal other than Ctrl-C's.

    Args:
        number: The signal's number.

    >>> str(Terminated(15)), Terminated(15).exit_code
    ('SIGTERM', 143)
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name nearest to `name`, or an empty string.

    >>> nearest("learning_rat", ["rank", "learning_rate"])
    " (did you mean 'learning_rate'?)"
    >>> nearest("qqq", ["rank"])
    ''
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""

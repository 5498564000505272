"""How a long step tells what it is doing, without knowing who listens.

Recipes and loops call a `Reporter`; the command line shows a progress bar, Python callers get `SILENT` by default.
Nothing below `app/` prints.
"""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """What a listener must offer."""

    def note(self, text: str) -> None:
        """Show one line that stays: a finding, a warning, a result."""
        ...

    def start(self, title: str, total: float | None, unit: str) -> None:
        """Begin a step of `total` units (None where the end is not known)."""
        ...

    def advance(self, done: float, **fields: float | int | str) -> None:
        """Say that `done` units of the current step are complete, with named figures to show beside the bar."""
        ...

    def finish(self) -> None:
        """End the current step."""
        ...


class Silent:
    """A reporter that shows nothing."""

    def note(self, text: str) -> None:
        """Drop the line."""

    def start(self, title: str, total: float | None, unit: str) -> None:
        """Drop the title."""

    def advance(self, done: float, **fields: float | int | str) -> None:
        """Drop the figures."""

    def finish(self) -> None:
        """Do nothing."""


SILENT = Silent()

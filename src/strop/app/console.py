"""What a person sees in the terminal: a progress bar with true figures, tables, one-line notes.

Results go to standard output, everything else (bars, notes, errors) to standard error, so that `--json` can be piped.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from strop.recipes.checks.words import size

output = Console(soft_wrap=True, highlight=False)
messages = Console(stderr=True, soft_wrap=True, highlight=False)


class _Left(ProgressColumn):
    """Time left, from the rate so far; empty until there is one."""

    def render(self, task: Task) -> Text:
        seconds = task.time_remaining
        if seconds is None or task.finished:
            return Text("")
        minutes, rest = divmod(round(seconds), 60)
        return Text(f"{minutes}:{rest:02d} left", style="cyan")


class ConsoleReporter:
    """A `strop.progress.Reporter` that draws one bar at a time on standard error."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def note(self, text: str) -> None:
        """Print one line that stays, above the bar if there is one."""
        console = self._progress.console if self._progress else messages
        console.print(text, markup=False)

    def start(self, title: str, total: float | None, unit: str) -> None:
        """Open a bar; an unfinished one before it is closed first."""
        self.finish()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn(
                "{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}" if total else "{task.completed:.0f}"
            ),
            TextColumn("{task.fields[figures]}", style="dim", markup=False),
            TimeElapsedColumn(),
            _Left(),
            console=messages,
        )
        self._task = self._progress.add_task(title, total=total, unit=unit, figures="")
        self._progress.start()

    def advance(self, done: float, **fields: float | int | str) -> None:
        """Move the bar to `done` units and show the figures beside it."""
        if self._progress is None or self._task is None:
            return
        figures = "  ".join(f"{name.replace('_', ' ')} {_figure(name, value)}" for name, value in fields.items())
        self._progress.update(self._task, completed=done, figures=figures)

    def finish(self) -> None:
        """Close the bar."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._task = None, None


def _figure(name: str, value: float | int | str) -> str:
    if isinstance(value, str):
        return value
    if name.endswith("bytes"):
        return size(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> Table:
    """Build a plain table: the first column to the left, figures to the right."""
    grid = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, header in enumerate(headers):
        grid.add_column(header, justify="left" if index == 0 else "right", header_style="bold", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    return grid

"""What a race of ranks saw: held-out loss against rank, and against the steps."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from strop.evaluation.smallest import Standing, best_of

if TYPE_CHECKING:
    from strop.recipes.rank import RankChoice

_INK: Final = "#1f2933"
_BAND: Final = "#d9e6d5"
_CHOSEN: Final = "#1a7f37"
_COLOURS: Final = ("#3b6ea5", "#b3541e", "#7a4fa3", "#0f7b7b", "#8a6d00", "#a3325b", "#555555")


def draw(choice: RankChoice, path: Path) -> None:
    """Draw the race and put the file in place once it is whole."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.5, 4), layout="constrained")
        FigureCanvasAgg(figure)
        by_rank, by_step = figure.subplots(1, 2)
        why = "within one standard error of the best" if choice.verdict == "decided" else "that is not ruled out"
        figure.suptitle(f"rank {choice.rank}: the smallest {why} ({choice.verdict})", color=_INK, fontsize=11)
        _draw_ranks(by_rank, choice)
        _draw_steps(by_step, choice)
        save_figure(figure, path)


def _last_standings(choice: RankChoice) -> dict[int, tuple[int, Standing]]:
    """Each rank's last measurement: its step, and how it stood."""
    last: dict[int, tuple[int, Standing]] = {}
    for each in choice.rounds:
        for standing in each.board:
            last[standing.size] = (each.step, standing)
    return last


def _draw_ranks(axes: Any, choice: RankChoice) -> None:
    final = choice.rounds[-1]
    best = best_of(final.board)
    axes.axhspan(best.loss, best.loss + best.error, color=_BAND, label="best + one standard error")
    for rank, (step, standing) in sorted(_last_standings(choice).items()):
        chosen, gone = rank == choice.rank, step < final.step
        axes.errorbar(
            rank,
            standing.loss,
            yerr=standing.error,
            fmt="o",
            capsize=3,
            color=_CHOSEN if chosen else _INK,
            alpha=0.45 if gone else 1.0,
            markersize=9 if chosen else 6,
            label=f"chosen: {rank}" if chosen else None,
        )
        if gone:
            axes.annotate(f"left at step {step}", (rank, standing.loss), textcoords="offset points", xytext=(6, 6))
    axes.set_xscale("log", base=2)
    axes.set_xticks(choice.candidates, [str(rank) for rank in choice.candidates])
    axes.minorticks_off()
    axes.margins(x=0.15)
    axes.set(
        title=f"Held-out loss by rank, after {final.step} steps",
        xlabel="rank",
        ylabel=f"nats per token ({choice.held_rows} rows; bars: one standard error)",
    )
    axes.legend(frameon=False)


def _draw_steps(axes: Any, choice: RankChoice) -> None:
    for place, rank in enumerate(choice.candidates):
        points = [(each.step, s.loss) for each in choice.rounds for s in each.board if s.size == rank]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, "o-", color=_COLOURS[place % len(_COLOURS)], label=f"rank {rank}")
    axes.set(title="The race", xlabel="optimizer steps", ylabel="held-out loss, nats per token")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure and put the file in place once it is whole."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        figure.savefig(temporary, dpi=130)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

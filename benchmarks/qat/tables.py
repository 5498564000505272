"""The tables of RESULTS.md out of `results/*.jsonl`, with intervals bootstrapped over seeds and rows together.

A draw takes seeds and rows with replacement, each on its own: the same drawn rows for every drawn seed and every arm,
so that differences are paired. Intervals are the middle 95% of 10,000 draws; five seeds are few, and an interval over
them is rather too narrow than too wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from chosen import CHOSEN
from store import Cell, from_hex

DRAWS: Final = 10_000
POST_TRAINING: Final = ("gptq", "blockwise")
Scores = Mapping[str, np.ndarray]
"""By arm, which rows are right [seeds, rows], as 0 and 1."""


@dataclass(frozen=True)
class Span:
    """A figure and the interval around it."""

    value: float
    low: float
    high: float

    def text(self, factor: float = 100, sign: str = "") -> str:
        return f"{factor * self.value:{sign}.1f} ({factor * self.low:{sign}.1f} to {factor * self.high:{sign}.1f})"


def chosen_cells(cells: Sequence[Cell], grid: str, split: str, seeds: Sequence[int]) -> list[Cell]:
    """The cells of a grid with the settings that were chosen for their arms."""
    return [
        cell
        for cell in cells
        if (cell["grid"], cell["split"]) == (grid, split)
        and cell["seed"] in seeds
        and CHOSEN[grid].get(cell["arm"]) == cell["settings"]
    ]


def scores_of(cells: Sequence[Cell], seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """The arms that every seed has."""
    found: dict[str, dict[int, list[bool]]] = {}
    for cell in cells:
        found.setdefault(cell["arm"], {})[cell["seed"]] = from_hex(cell["right"], cell["rows"])
    whole = {arm: rows for arm, rows in found.items() if set(rows) == set(seeds)}
    return {arm: np.array([rows[seed] for seed in seeds], dtype=np.float64) for arm, rows in whole.items()}


def drawn_means(scores: Scores, *, seed: int = 0) -> dict[str, np.ndarray]:
    """The mean of each arm in every draw [draws]."""
    seeds, rows = next(iter(scores.values())).shape
    generator = np.random.default_rng(seed)
    seed_weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS) / seeds  # [draws, seeds]
    means = {arm: np.empty(DRAWS) for arm in scores}
    for start in range(0, DRAWS, 1000):
        part = slice(start, start + 1000)
        row_weights = generator.multinomial(rows, np.full(rows, 1 / rows), size=1000) / rows  # [1000, rows]
        for arm, right in scores.items():
            means[arm][part] = np.einsum("ds,ds->d", seed_weights[part], row_weights @ right.T)
    return means


def span(value: float, draws: np.ndarray) -> Span:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Span(value, float(low), float(high))


def score_tables(cells: Sequence[Cell], grids: Sequence[str], split: str, seeds: Sequence[int]) -> list[str]:
    """Exact match by grid and arm, each difference from full precision, and the regained shares below."""
    lines = ["| grid | arm | exact match, % (95%) | minus full, points (95%) | by seed | CPU s |", "|---" * 6 + "|"]
    shares: list[str] = []
    for grid in grids:
        own = chosen_cells(cells, grid, split, seeds)
        scores = scores_of(own, seeds)
        if "full" not in scores:
            continue
        means = drawn_means(scores)
        for arm, right in scores.items():
            value = span(right.mean(), means[arm])
            less = span(right.mean() - scores["full"].mean(), means[arm] - means["full"])
            each = ", ".join(f"{100 * one:.1f}" for one in right.mean(axis=1))
            taken = [cell["cpu_seconds"] for cell in own if cell["arm"] == arm]
            difference = "" if arm == "full" else less.text(sign="+")
            lines.append(f"| {grid} | {arm} | {value.text()} | {difference} | {each} | {np.median(taken):.0f} |")
        shares += regained(grid, scores, means)
    return [*lines, "", *shares]


def regained(grid: str, scores: Scores, means: Mapping[str, np.ndarray]) -> list[str]:
    """(arm - rounded) / (full - rounded) of every trained arm, against rounding and against the best other method."""
    best = max((arm for arm in POST_TRAINING if arm in scores), key=lambda arm: scores[arm].mean(), default=None)
    lines: list[str] = []
    for against in dict.fromkeys(("rtn", best)):
        if against is None or against not in scores:
            continue
        loss = span(scores["full"].mean() - scores[against].mean(), means["full"] - means[against])
        if loss.low <= 0:
            lines.append(f"- {grid}: {against} loses {loss.text()} points, which does not exclude zero: no share")
            continue
        for arm in scores:
            if not arm.startswith(("qat", "torchao")):
                continue
            gain = scores[arm].mean() - scores[against].mean()
            share = span(gain / loss.value, (means[arm] - means[against]) / (means["full"] - means[against]))
            lines.append(f"- {grid}: {arm} regains {share.text()}% of the {loss.text()} points that {against} loses")
    rivals = [arm for arm in scores if arm.startswith("torchao") and "8da4w" not in arm]
    for arm in (arm for arm in scores if arm.startswith("qat")):
        for rival in rivals:
            ahead = span(scores[arm].mean() - scores[rival].mean(), means[arm] - means[rival])
            lines.append(f"- {grid}: {arm} - {rival}: {ahead.text(sign='+')} points")
    return lines

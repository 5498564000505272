"""Scores by grid and arm as a picture, docs/qat-scores.png; and by the steps through the grid, docs/qat-steps.png.

python benchmarks/qat/picture.py --seeds 0 1 2 3 4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from chosen import CHOSEN
from store import Cell, Store
from study import GRIDS, LAST, TOTAL
from tables import chosen_cells, drawn_means, scores_of

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen

HERE = Path(__file__).parent
ARMS = {
    "full": ("full precision", "#444444"),
    "rtn": ("rounded to nearest", "#c8553d"),
    "gptq": ("GPTQ, then scales", "#e3a857"),
    "torchao": ("torchao's QAT", "#8aa6c1"),
    "qat": ("strop's QAT", "#1f6f8b"),
}


def draw_steps(cells: Sequence[Cell], grid: str, output: Path) -> None:
    """The development rows' score by how many of all steps went through the grid, at the chosen rate and seed 100."""
    mine = [cell for cell in cells if (cell["seed"], cell["grid"], cell["split"]) == (100, grid, "dev")]
    plain = {"learning_rate", "scales", "steps"}
    wanted = CHOSEN[grid]["qat"]
    scores = {
        cell["settings"].get("steps", LAST): 100 * cell["score"]
        for cell in mine
        if cell["arm"] == "qat" and set(cell["settings"]) <= plain and wanted.items() <= cell["settings"].items()
    }
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    places = sorted(scores)
    axes.plot(places, [scores[place] for place in places], "o-", color=ARMS["qat"][1])
    for place in places:
        axes.annotate(f"{scores[place]:.1f}", (place, scores[place]), (0, -13), textcoords="offset points", fontsize=8)
    for cell in mine:
        if cell["arm"] in ("full", "gptq"):
            label, colour = ARMS[cell["arm"]]
            axes.axhline(100 * cell["score"], color=colour, linewidth=1)
            axes.text(0, 100 * cell["score"] + 0.2, f"{label}: {100 * cell['score']:.1f}", color=colour, fontsize=8)
    axes.set_xlim(0, TOTAL)
    axes.set_xlabel(f"of {TOTAL} steps, so many through {grid}; the others before, in full precision")
    axes.set_ylabel("exact match, % of 1,000 rows")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("-o", "--output", type=Path, default=HERE.parents[1] / "docs" / "qat-scores.png")
    chosen = parser.parse_args()
    cells = Store(chosen.results / "score.jsonl", ("seed", "grid", "arm", "settings", "split")).cells
    tables = {grid: scores_of(chosen_cells(cells, grid, "test", chosen.seeds), chosen.seeds) for grid in sorted(GRIDS)}
    tables = {grid: scores for grid, scores in tables.items() if "full" in scores}
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    width = 0.8 / len(ARMS)
    for place, (arm, (label, colour)) in enumerate(ARMS.items()):
        for number, scores in enumerate(tables.values()):
            if arm not in scores:
                continue
            mean = 100 * scores[arm].mean()
            low, high = 100 * np.quantile(drawn_means(scores)[arm], [0.025, 0.975])
            at = number + (place - len(ARMS) / 2 + 0.5) * width
            axes.bar(at, mean, width, color=colour, label=label if number == 0 else None)
            axes.errorbar(at, mean, [[mean - low], [high - mean]], color="black", linewidth=0.8, capsize=2)
            axes.text(at, high + 1.5, f"{mean:.1f}", ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(tables)), list(tables))
    axes.set_ylim(0, 112)
    axes.set_ylabel("exact match, % of 1,000 rows")
    axes.set_title(
        f"The bundled model's task, {len(chosen.seeds)} seeds, the same rows and steps for every arm", fontsize=10
    )
    axes.legend(fontsize=8, ncols=len(ARMS), loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(chosen.output, dpi=140)
    draw_steps(cells, "int2", chosen.output.with_name("qat-steps.png"))


if __name__ == "__main__":
    main()

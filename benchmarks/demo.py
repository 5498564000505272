"""What the demo must show, as medians over seeds: `python benchmarks/demo.py --seeds 0 1 2 -o runs/demo-seeds`.

Prints a table to stand in RESULTS.md: every score by seed, its median, and the figures that the demo is held to.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from strop.app.console import ConsoleReporter
from strop.recipes.demo import MAIN_SPLIT, demo


def goals(figures: dict[str, Any]) -> dict[str, float | None]:
    """The figures that the demo is held to, in points of exact match on new combinations (regained: a share)."""
    scores = {name: 100 * score["estimate"] for name, score in figures["scores"][MAIN_SPLIT].items()}
    grid = figures["grid"]
    return {
        "base": scores["base"],
        "full": scores["full"],
        "full - lora": scores["full"] - scores["lora"],
        "lora - qlora": scores["lora"] - scores["qlora"],
        "full - int8": scores["full"] - scores["int8"],
        f"{grid} rounded": scores[f"{grid} rounded"],
        f"{grid} control": scores[f"{grid} control"],
        f"{grid} qat": scores[f"{grid} qat"],
        "regained, %": None if figures["regained"] is None else 100 * figures["regained"],
        "full, new phrasings": 100 * figures["scores"]["test_phrasings"]["full"]["estimate"],
        "full, new strings": 100 * figures["scores"]["test_strings"]["full"]["estimate"],
        "minutes": figures["minutes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args()
    shown = []
    for seed in chosen.seeds:
        folder = chosen.output / f"seed-{seed}"
        done = folder / "demo.json"  # a seed that was measured already is not measured again
        figures = json.loads(done.read_text()) if done.exists() else None
        shown.append(goals(figures or demo(folder, seed=seed, reporter=ConsoleReporter()).figures))
    print("| figure | " + " | ".join(f"seed {seed}" for seed in chosen.seeds) + " | median |")
    print("|---|" + "---|" * (len(chosen.seeds) + 1))
    for name in shown[0]:
        values = [column[name] for column in shown]
        known = [value for value in values if value is not None]
        cells = [
            "-" if value is None else f"{value:.1f}" for value in [*values, statistics.median(known) if known else None]
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

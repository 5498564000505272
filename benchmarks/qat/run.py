"""Quantization-aware training, measured: scores, cost, adapters, code patches; each figure once.

    setup.sh ENVIRONMENT                                           strop's needs, and torchao, the rival
    ENVIRONMENT/bin/python benchmarks/qat/run.py score --seeds 0 1 2 3 4
    ... score --seeds 100 --split dev --arms qat --settings '{"learning_rate": 2e-3}'
    ... table --seeds 0 1 2 3 4

What is in `results/` is not measured again, so that a run that was stopped goes on; models lie in `--work`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import cost as step_cost
from chosen import CHOSEN
from store import Store
from study import GRIDS, Study, write_rows
from tables import score_tables

HERE = Path(__file__).parent
SCORE_KEY = ("seed", "grid", "arm", "settings", "split")


def score(chosen: argparse.Namespace) -> None:
    """Every arm of every grid, seed after seed."""
    study = Study(chosen.work, Store(chosen.results / "score.jsonl", SCORE_KEY))
    write_rows(study.rows)
    for seed in chosen.seeds:
        for grid in chosen.grids:
            for arm, settings in CHOSEN[grid].items():
                if chosen.arms and arm not in chosen.arms:
                    continue
                began = time.monotonic()
                taken = json.loads(chosen.settings) if chosen.settings else settings
                cell = study.score(seed, grid, arm, taken, chosen.split)
                took = f"{time.monotonic() - began:.0f} s" if time.monotonic() - began > 1 else "known"
                print(f"seed {seed} {grid} {arm} {json.dumps(taken)}: {100 * cell['score']:.1f} ({took})", flush=True)


def cost(chosen: argparse.Namespace) -> None:
    """Time and memory of a step."""
    store = Store(chosen.results / "cost.jsonl", step_cost.KEY)
    step_cost.measure(chosen.work / "cost", store, chosen.kinds, chosen.pairs)
    print("\n".join(step_cost.cost_table(store.cells)))


def table(chosen: argparse.Namespace) -> None:
    """All of it, as RESULTS.md holds it."""
    cells = Store(chosen.results / "score.jsonl", SCORE_KEY).cells
    print("\n".join(score_tables(cells, chosen.grids, chosen.split, chosen.seeds)))
    print("\n".join(["", *step_cost.cost_table(Store(chosen.results / "cost.jsonl", step_cost.KEY).cells)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--work", type=Path, default=Path("runs/qat"))
    verbs = parser.add_subparsers(required=True)
    for name, verb in {"score": score, "table": table}.items():
        part = verbs.add_parser(name, help=verb.__doc__)
        part.set_defaults(verb=verb)
        part.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
        part.add_argument("--grids", nargs="+", default=list(GRIDS), choices=GRIDS)
        part.add_argument("--split", default="test", choices=["dev", "test"])
        if name == "score":
            part.add_argument("--arms", nargs="+", help="only these")
            part.add_argument("--settings", help="of the arm, as JSON, in the place of the chosen ones")
    part = verbs.add_parser("cost", help=cost.__doc__)
    part.set_defaults(verb=cost)
    part.add_argument("--kinds", nargs="+", default=["full", "qat:int4-g32", "torchao:int4-g32"])
    part.add_argument("--pairs", type=int, default=9)
    chosen = parser.parse_args()
    chosen.verb(chosen)


if __name__ == "__main__":
    main()

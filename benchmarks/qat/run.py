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

import adapters as adapter_arms
import cost as step_cost
import patches as patch_arms
from chosen import CHOSEN
from store import Store
from study import GRIDS, Study, write_rows
from tables import score_tables
from tasks import TASKS, write_tasks

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


def adapters(chosen: argparse.Namespace) -> None:
    """What of an adapter is in a Q4_0 file."""
    store = Store(chosen.results / "adapters.jsonl", adapter_arms.KEY)
    write_rows(chosen.work / "rows")
    for seed in chosen.seeds:
        for arm in chosen.arms or adapter_arms.ARMS:
            taken = json.loads(chosen.settings) if chosen.settings else {"learning_rate": 5e-3}
            cell = adapter_arms.measure(chosen.work / "adapters", store, chosen.work / "rows", seed, arm, taken)
            print(f"seed {seed} {arm}: {json.dumps(cell)}", flush=True)
    print("\n".join(adapter_arms.adapter_table(store.cells)))


def patches(chosen: argparse.Namespace) -> None:
    """Eight tasks as patches of one file."""
    store = Store(chosen.results / "patches.jsonl", patch_arms.KEY)
    tasks = write_tasks(chosen.work / "tasks")
    for seed in chosen.seeds:
        for task in chosen.tasks:
            for arm in chosen.arms or patch_arms.SETTINGS:
                taken = json.loads(chosen.settings) if chosen.settings else patch_arms.SETTINGS[arm]
                work = chosen.work / "patches"
                cell = patch_arms.measure(work, store, tasks, seed, task, arm, taken, chosen.split)
                size = f", {cell['patch_bytes'] / cell['file_bytes']:.1%} of the file" if arm == "patch" else ""
                print(f"seed {seed} {task} {arm}: {100 * cell['score']:.1f}{size}", flush=True)
        print("\n".join(patch_arms.patch_table(store.cells, chosen.split, seed)))


def table(chosen: argparse.Namespace) -> None:
    """All of it, as RESULTS.md holds it."""
    cells = Store(chosen.results / "score.jsonl", SCORE_KEY).cells
    print("\n".join(score_tables(cells, chosen.grids, chosen.split, chosen.seeds)))
    print("\n".join(["", *step_cost.cost_table(Store(chosen.results / "cost.jsonl", step_cost.KEY).cells)]))
    print(
        "\n".join(["", *adapter_arms.adapter_table(Store(chosen.results / "adapters.jsonl", adapter_arms.KEY).cells)])
    )
    cells = Store(chosen.results / "patches.jsonl", patch_arms.KEY).cells
    for seed in chosen.seeds:
        print("\n".join(["", *patch_arms.patch_table(cells, chosen.split, seed)]))


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
    for name, verb in {"adapters": adapters, "patches": patches}.items():
        part = verbs.add_parser(name, help=verb.__doc__)
        part.set_defaults(verb=verb)
        part.add_argument("--seeds", type=int, nargs="+", default=[0])
        part.add_argument("--arms", nargs="+", help="only these")
        part.add_argument("--settings", help="of the arm, as JSON, in the place of the chosen ones")
        if name == "patches":
            part.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
            part.add_argument("--split", default="test", choices=["dev", "test"])
    chosen = parser.parse_args()
    chosen.verb(chosen)


if __name__ == "__main__":
    main()

"""Quantization-aware training, measured: scores, cost, adapters, code patches; each figure once.

    setup.sh ENVIRONMENT                                           torchao's, the rival
    python benchmarks/qat/run.py score --seeds 0 1 2 3 4 --torchao ENVIRONMENT/bin/python
    python benchmarks/qat/run.py score --seeds 100 --split dev --grids int2 --arms qat --settings '{"learning_rate": 2e-3}'
    python benchmarks/qat/run.py table --seeds 0 1 2 3 4

What is in `results/` is not measured again, so that a run that was stopped goes on; models lie in `--work`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from chosen import CHOSEN
from store import Store
from study import GRIDS, Study, write_rows
from tables import score_tables

HERE = Path(__file__).parent
SCORE_KEY = ("seed", "grid", "arm", "settings", "split")


def score(chosen: argparse.Namespace) -> None:
    """Every arm of every grid, seed after seed."""
    study = Study(chosen.work, Store(chosen.results / "score.jsonl", SCORE_KEY), chosen.torchao)
    write_rows(study.rows)
    for seed in chosen.seeds:
        for grid in chosen.grids:
            for arm, settings in CHOSEN[grid].items():
                if (chosen.arms and arm not in chosen.arms) or (arm.startswith("torchao") and not chosen.torchao):
                    continue
                began = time.monotonic()
                taken = json.loads(chosen.settings) if chosen.settings else settings
                cell = study.score(seed, grid, arm, taken, chosen.split)
                took = f"{time.monotonic() - began:.0f} s" if time.monotonic() - began > 1 else "known"
                print(f"seed {seed} {grid} {arm} {json.dumps(taken)}: {100 * cell['score']:.1f} ({took})", flush=True)


def table(chosen: argparse.Namespace) -> None:
    cells = Store(chosen.results / "score.jsonl", SCORE_KEY).cells
    print("\n".join(score_tables(cells, chosen.grids, chosen.split, chosen.seeds)))


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
            part.add_argument("--torchao", type=Path, help="the interpreter of torchao's environment")
    chosen = parser.parse_args()
    chosen.verb(chosen)


if __name__ == "__main__":
    main()

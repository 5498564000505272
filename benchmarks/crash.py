"""A thousand SIGKILLs: `python -m benchmarks.crash --kills 1000`, from the project's root (POSIX).

The small run of tests/training/test_crash.py (LoRA with dropout, packing, accumulation, a checkpoint after every step)
is killed at random moments and resumed until it ends; each finished run must hold the bits of one left alone.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from tests.training.helpers import exported, run_loop
from tests.training.killing import kill_until_done
from tests.training.test_crash import RUN, narrow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    began, draw, killed, runs, differing = time.monotonic(), random.Random(chosen.seed), 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="strop-crash-") as temporary:
        folder = Path(temporary)
        run_loop(narrow(), folder / "alone", **RUN)
        wanted = exported(folder / "alone" / "last")
        seconds = 0.15
        while killed < chosen.kills:
            run_dir, runs = folder / f"run-{runs}", runs + 1
            kills = kill_until_done(
                lambda run_dir=run_dir: run_loop(narrow(), run_dir, resume=True, **RUN),
                most=min(20, chosen.kills - killed),
                within_seconds=seconds,
                draw=draw,
            )
            killed += kills.killed
            seconds = 0.9 * kills.last_seconds if kills.killed < 5 else min(seconds, kills.last_seconds)
            found = exported(run_dir / "last")
            same = found.keys() == wanted.keys() and all(found[name].equal(wanted[name]) for name in wanted)
            differing += not same
    print(f"{killed:,} kills, {runs} runs finished, {differing} of them differing, {time.monotonic() - began:.0f} s")
    raise SystemExit(1 if differing else 0)


if __name__ == "__main__":
    main()

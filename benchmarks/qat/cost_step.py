"""One contender's training steps, each when it is told to: `cost_step.py KIND MODEL ROWS RUN STEPS [options]`.

    full   lora   qlora:GRID   qat:GRID   qat:GRID@learned   qat-lora:GRID@HOLD   torchao:GRID   torchao:GRID+int8
    lora+int8   qlora:GRID+int8     the frozen base computed in int8

Prints a line of JSON when it is ready for a step and waits for a line; then the same with the CPU seconds, the seconds
and the peak of the step that it did. It is strop's own loop for all of them, bookkeeping included; only the layers
differ. The peak is that of anonymous and shared memory above its value after the imports. `--steady` lets freed
memory leave the process at once; `--length` sets the tokens of a row; `--answers` takes short rows, packed four to a
step, with the loss on their answers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import strop.recipes.tune  # noqa: F401  imports are no part of what is measured
from strop.config import TuneConfig
from strop.memory import PeakMemory, steady_allocation
from strop.recipes.session import open_session
from strop.training.loop import train
from strop.training.metrics import NAME as METRICS_NAME
from strop.training.metrics import read_metrics


class Turnstile:
    """A reporter that holds the loop between two steps."""

    def __init__(self, memory: PeakMemory, run: Path) -> None:
        self.memory, self.run, self.training = memory, run, False
        self.cpu = self.wall = 0.0

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def start(self, title: str, total: float | None, unit: str) -> None:
        self.training = title == "training"
        if self.training:
            self.wait({})

    def advance(self, done: float, **fields: float | int | str) -> None:
        if self.training:
            cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
            row = read_metrics(self.run / METRICS_NAME)[-1]
            self.wait({"cpu_seconds": cpu, "seconds": wall, "loss": row["loss"], "tokens": row["tokens"]})

    def finish(self) -> None:
        self.training = False

    def wait(self, seen: dict[str, Any]) -> None:
        print(json.dumps(seen | {"peak_bytes": self.memory.peak_bytes}), flush=True)
        if not sys.stdin.readline():
            sys.exit(0)
        self.cpu, self.wall = time.process_time(), time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("kind", "model", "rows", "run", "steps"):
        parser.add_argument(name)
    parser.add_argument("--steady", action="store_true")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--answers", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    asked = parser.parse_args()
    run, steps = asked.run, int(asked.steps)
    int8 = asked.kind.startswith(("lora", "qlora")) and asked.kind.endswith("+int8")
    who, _, grid = (asked.kind.removesuffix("+int8") if int8 else asked.kind).partition(":")
    if who == "torchao":
        from torchao_qat import base_config, prepare_layers
    else:
        base_config = prepare_layers = None
    settings: dict[str, Any] = {
        "model": asked.model,
        "data": asked.rows,
        "method": "full" if who == "torchao" else who,
        "format": (grid.partition("@")[0] or None) if who != "torchao" else None,
        "output": run,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "batch_size": 4 if asked.answers else 1,
        "packing": asked.answers,
        "max_length": asked.length,
        "train_on": "answers" if asked.answers else "all",
        "valid_fraction": 0.0,
        "dtype": asked.dtype,
        "compute": "int8" if int8 else "bf16",
    }
    extra = grid.partition("@")[2]
    if extra:
        settings |= {"scales": extra} if who == "qat" else {"hold": extra}
    Path(run).mkdir(parents=True, exist_ok=True)
    steady = steady_allocation() if asked.steady else contextlib.nullcontext()
    with steady, PeakMemory() as memory:
        reporter = Turnstile(memory, Path(run))
        session = open_session(TuneConfig.from_flat(settings), reporter=reporter)
        short = [shape for shape in session.stream.shapes(steps) if shape != (1, asked.length)]
        if short and not asked.answers:
            raise SystemExit(f"a step of another shape: {short}")
        if base_config is not None and prepare_layers is not None:
            grid, _, activations = grid.partition("+")
            prepare_layers(session.model, base_config(grid, activations or None), range_learning=False)
        torch.manual_seed(0)
        train(
            session.model,
            session.stream,
            [],
            session.train_settings(),
            Path(run),
            export=lambda folder: None,
            memory=memory,
            reporter=reporter,
        )


if __name__ == "__main__":
    main()

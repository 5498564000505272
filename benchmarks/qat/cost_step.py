"""One contender's training steps, each when it is told to: `cost_step.py KIND MODEL ROWS RUN STEPS [--steady]`.

    full   lora   qlora:GRID   qat:GRID   qat:GRID@learned   qat-lora:GRID@HOLD   torchao:GRID   torchao:GRID+int8

Prints a line of JSON when it is ready for a step and waits for a line; then the same with the CPU seconds, the seconds
and the peak of the step that it did. It is strop's own loop for all of them, bookkeeping included; only the layers
differ. The peak is that of anonymous and shared memory above its value after the imports. `--steady` lets freed
memory leave the process at once.
"""

from __future__ import annotations

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

LENGTH = 512


class Turnstile:
    """A reporter that holds the loop between two steps."""

    def __init__(self, memory: PeakMemory) -> None:
        self.memory, self.training = memory, False
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
            self.wait({"cpu_seconds": cpu, "seconds": wall, "loss": fields["loss"]})

    def finish(self) -> None:
        self.training = False

    def wait(self, seen: dict[str, Any]) -> None:
        print(json.dumps(seen | {"peak_bytes": self.memory.peak_bytes}), flush=True)
        if not sys.stdin.readline():
            sys.exit(0)
        self.cpu, self.wall = time.process_time(), time.perf_counter()


def main() -> None:
    kind, model, rows, run, steps = sys.argv[1:6]
    who, _, grid = kind.partition(":")
    if who == "torchao":
        from torchao_qat import base_config, prepare_layers
    else:
        base_config = prepare_layers = None
    settings: dict[str, Any] = {
        "model": model,
        "data": rows,
        "method": "full" if who == "torchao" else who,
        "format": (grid.partition("@")[0] or None) if who != "torchao" else None,
        "output": run,
        "max_steps": int(steps),
        "learning_rate": 1e-5,
        "batch_size": 1,
        "max_length": LENGTH,
        "train_on": "all",
        "valid_fraction": 0.0,
        "dtype": "bfloat16",
    }
    extra = grid.partition("@")[2]
    if extra:
        settings |= {"scales": extra} if who == "qat" else {"hold": extra}
    Path(run).mkdir(parents=True, exist_ok=True)
    steady = steady_allocation() if "--steady" in sys.argv else contextlib.nullcontext()
    with steady, PeakMemory() as memory:
        reporter = Turnstile(memory)
        session = open_session(TuneConfig.from_flat(settings), reporter=reporter)
        short = [shape for shape in session.stream.shapes(int(steps)) if shape != (1, LENGTH)]
        if short:
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

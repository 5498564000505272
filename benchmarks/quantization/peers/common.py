"""What every runner shares: its command line, the model it is given, and what it hands back.

    ENVIRONMENT/bin/python peers/run_hqq.py MODEL WINDOWS METHOD OUTPUT FORMAT... [--rows N]

writes into each OUTPUT/FORMAT the dense fp32 `model.safetensors`, every linear layer inside the blocks replaced by what
the peer's own code dequantizes it to, and `run.json`. `FORMAT` is strop's word for a grid (int4-g128-asym, nf4-dq).
Seconds, and CPU seconds, which a busy machine leaves alone, are those of quantizing without opening the model; the peak
is that of the process above its value after imports.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from strop.memory import PeakMemory


class Unsupported(Exception):
    """The peer has no such format or method."""


@dataclass(frozen=True)
class Job:
    """What a runner quantizes.

    Attributes:
        model: In fp32 and evaluation mode.
        folder: Where it was read from.
        calibration: Token ids [rows, length].
        windows: The file that they are from.
        format: The grid, as `--format` writes it.
        method: The peer's method.
        output: The folder for the result, for peers that write files of their own.
    """

    model: Any
    folder: Path
    calibration: Tensor
    windows: Path
    format: str
    method: str
    output: Path

    @property
    def bits(self) -> int:
        return int(self._integer()[1])

    @property
    def group(self) -> int:
        return int(self._integer()[2])

    @property
    def symmetric(self) -> bool:
        return self._integer()[3] is None

    def linears(self) -> dict[str, nn.Linear]:
        """The linear layers inside the blocks, by full name: what is quantized."""
        return {
            f"model.layers.{name}": module
            for name, module in self.model.model.layers.named_modules()
            if isinstance(module, nn.Linear)
        }

    def _integer(self) -> re.Match[str]:
        found = re.fullmatch(r"int(\d)-g(\d+)(-asym)?", self.format)
        if found is None:
            raise Unsupported(f"{self.format}: not an integer grid in groups")
        return found


@dataclass(frozen=True)
class Outcome:
    """What a runner hands back.

    Attributes:
        tensors: Dequantized weights, and whatever else the method changed, by the model's names.
        bits_per_weight: Codes, scales and zero points over the quantized layers, as the peer stores them.
    """

    tensors: dict[str, Tensor]
    bits_per_weight: float


def grid_bits(bits: int, group: int, *, scale: int = 16, zero: int = 0) -> float:
    """Bits per weight of codes with `scale` and `zero` bits per group."""
    return bits + (scale + zero) / group


def run(quantize: Callable[[Job], Outcome], *packages: str) -> None:
    """Read the command line and quantize to each format in a fork of its own, made after the imports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("method")
    parser.add_argument("output", type=Path)
    parser.add_argument("formats", nargs="+")
    parser.add_argument("--rows", type=int, default=128, help="calibration windows to use")
    chosen = parser.parse_args()
    for format in chosen.formats:
        folder = chosen.output / format
        folder.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            with (folder / "log.txt").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            try:
                record = _one(quantize, chosen, format, packages)
            except Unsupported as reason:
                record = {"status": "unsupported", "reason": str(reason)}
            except BaseException as error:  # whatever a peer raises is its result here
                traceback.print_exc()
                record = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
            (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n")
            sys.stderr.flush()
            os._exit(0)
        os.waitpid(child, 0)


def _one(quantize: Callable[[Job], Outcome], chosen: argparse.Namespace, format: str, packages: tuple[str, ...]) -> Any:
    torch.manual_seed(0)
    with PeakMemory() as memory:
        job = Job(
            AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval(),
            chosen.model,
            load_file(chosen.windows)["calibration"][: chosen.rows],
            chosen.windows,
            format,
            chosen.method,
            chosen.output / format,
        )
        wanted = {f"{name}.weight" for name in job.linears()}
        dense = {name: tensor.detach().clone() for name, tensor in job.model.state_dict().items()}
        if job.model.config.tie_word_embeddings:
            del dense["lm_head.weight"]
        began, cpu_began = time.monotonic(), time.process_time()
        outcome = quantize(job)
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in outcome.tensors.items()}
    wrong = [name for name in wanted if name not in tensors or torch.equal(tensors[name], dense[name])]
    unknown = sorted(set(tensors) - set(dense))
    if wrong or unknown:
        raise RuntimeError(f"left as they were: {wrong}; not in the model: {unknown}")
    save_file(dense | tensors, job.output / "model.safetensors", metadata={"format": "pt"})
    return {
        "status": "done",
        "bits_per_weight": outcome.bits_per_weight,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_bytes": memory.peak_bytes,
        "threads": torch.get_num_threads(),
        "rows": len(job.calibration),
        "versions": {name: importlib.metadata.version(name) for name in (*packages, "torch", "transformers")},
    }

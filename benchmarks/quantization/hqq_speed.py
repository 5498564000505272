"""HQQ: strop's against the hqq package's, CPU seconds and error in HQQ's own norm, on the same weights in one process.

    PYTHONPATH=src OMP_NUM_THREADS=1 ENVIRONMENT/bin/python benchmarks/quantization/hqq_speed.py [MODEL] [--runs 7]

ENVIRONMENT is the one that `setup_peers.sh` makes for hqq. Weights are random ones (normal, rows of different widths,
one value in a thousand five times as large) and all linear layers inside the blocks of MODEL. What is measured is each
side's whole call, codes packed, and the package's loop alone; the two take turns, and the median counts. Errors are the
mean |weight - rounded|^0.7 as a share of rounding to nearest with strop's grid, whose zero points are integers; the
package's zero points are float16, which costs 16 bits a group where strop's take 2 to 4. The last column rounds them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from torch import Tensor

from strop.methods import hqq, rtn
from strop.methods.hqq import power_error
from strop.numerics import parse_scheme

FORMATS = ("int4-g64-asym", "int4-g32-asym", "int3-g64-asym", "int2-g32-asym")
SHAPES = ((256, 256), (512, 1024), (1024, 2048), (2048, 5632))


class Loop:
    """The package's loop, its CPU seconds added up."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._loop: Callable[..., Any] = Quantizer.optimize_weights

    def __call__(self, **arguments: Any) -> Any:
        began = time.process_time()
        found = self._loop(**arguments)
        self.seconds += time.process_time() - began
        return found


def random_weight(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    weight *= torch.exp(0.3 * torch.randn(rows, 1, generator=generator))
    weight[torch.rand(rows, columns, generator=generator) < 1e-3] *= 5
    return weight


def model_weights(folder: Path) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [part.weight.data for part in model.model.layers.modules() if isinstance(part, torch.nn.Linear)]


def restored(codes: Tensor, meta: dict[str, Any], shape: torch.Size, *, whole: bool) -> Tensor:
    """The package's values with scales and zero points as stored, or with the zero points rounded to integers."""
    zero = meta["zero"].half().float()
    values = {"scale": meta["scale"].half().float(), "zero": zero.round() if whole else zero}
    return Quantizer.dequantize(codes, meta | values | {"compute_dtype": torch.float32}).view(shape)


def compare(name: str, weights: list[Tensor], format: str, runs: int, loop: Loop) -> str:
    scheme = parse_scheme(format)
    chosen = BaseQuantizeConfig(nbits=scheme.bits, group_size=scheme.group_size, axis=1)["weight_quant_params"]
    ours, theirs, loops = [], [], []
    found, packed = [], []
    for _ in range(runs):
        began = time.process_time()
        found = [hqq(weight, scheme) for weight in weights]
        ours.append(time.process_time() - began)
        loop.seconds, began = 0.0, time.process_time()
        packed = [Quantizer.quantize(w, device="cpu", compute_dtype=torch.float16, **chosen) for w in weights]
        theirs.append(time.process_time() - began)
        loops.append(loop.seconds)
    errors = [0.0, 0.0, 0.0]
    for weight, own, (codes, meta) in zip(weights, found, packed, strict=True):
        plain = power_error(weight, rtn(weight, scheme))
        values = [restored(codes, meta, weight.shape, whole=whole) for whole in (False, True)]
        errors[0] += power_error(weight, own) / plain / len(weights)
        for place, value in enumerate(values, start=1):
            errors[place] += (weight - value).abs().pow(0.7).mean().item() / plain / len(weights)
    spread = [
        f"{1000 * statistics.median(each):.0f} ({1000 * min(each):.0f} to {1000 * max(each):.0f})"
        for each in (ours, theirs, loops)
    ]
    shares = [statistics.median(ours) / statistics.median(each) for each in (theirs, loops)]
    return (
        f"| {name} | {format} | {' | '.join(spread)} | {shares[0]:.2f} | {shares[1]:.2f} | "
        + " | ".join(f"{error:.4f}" for error in errors)
        + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    loop = Loop()
    Quantizer.optimize_weights = loop
    sets = {f"[{rows}, {columns}]": [random_weight(rows, columns)] for rows, columns in SHAPES}
    if arguments.model is not None:
        weights = model_weights(arguments.model)
        sets[f"{len(weights)} layers of {arguments.model.name}"] = weights
    print("| weights | grid | strop, CPU ms | hqq | its loop | strop / hqq | strop / loop | error | hqq | rounded |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, weights in sets.items():
        for format in FORMATS:
            print(compare(name, weights, format, arguments.runs, loop), flush=True)


if __name__ == "__main__":
    main()

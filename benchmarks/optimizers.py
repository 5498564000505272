"""What does a step of each optimizer cost, and hold? `python -m benchmarks.optimizers --parameters 4000000`

torch's fused AdamW, strop's adamw-8bit, and bitsandbytes' 8-bit AdamW where its CPU build has one, over the same
weights and gradients: the square matrices of a small model. The three take turns, so that what else the machine does
falls on all alike; the table gives the median of a step and its spread (quartiles), the median of the paired ratio to
fused AdamW, and the bytes of the state. Time is the process's own (CPU seconds), which another process's load moves
less than the wall clock.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from strop.training.optimizers import make_optimizer

SIDE = 512
WARM = 2


def bitsandbytes_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer | str:
    """The rival over these parameters, or why there is none."""
    try:
        import bitsandbytes
    except ImportError as error:
        return f"not installed ({error})"
    optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-4)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        return f"its CPU build has no step ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    return optimizer


def tensors(parameters: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    count = max(1, round(parameters / SIDE**2))
    return [nn.Parameter(0.02 * torch.randn(SIDE, SIDE, generator=generator)) for _ in range(count)]


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors of the state, each storage once."""
    storages = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())


def step_seconds(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
    start = time.process_time()
    optimizer.step()
    return time.process_time() - start


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parameters", type=int, default=4_000_000)
    options.add_argument("--pairs", type=int, default=15, help="steps of each, in turns (at least 7)")
    options.add_argument("--threads", type=int, default=1)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    weights = {name: tensors(asked.parameters) for name in ("adamw", "adamw-8bit", "bitsandbytes AdamW8bit")}
    makers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer | str]] = {
        "adamw": lambda ps: make_optimizer("adamw", _named(ps), learning_rate=1e-4, weight_decay=0.01),
        "adamw-8bit": lambda ps: make_optimizer("adamw-8bit", _named(ps), learning_rate=1e-4, weight_decay=0.01),
        "bitsandbytes AdamW8bit": bitsandbytes_adamw,
    }
    made = {name: make(weights[name]) for name, make in makers.items()}
    for name, optimizer in made.items():
        if isinstance(optimizer, str):
            print(f"{name}: {optimizer}")
    running = {name: optimizer for name, optimizer in made.items() if not isinstance(optimizer, str)}
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(WARM + max(7, asked.pairs)):
        for name, optimizer in running.items():
            taken = step_seconds(optimizer, weights[name], turn)
            if turn >= WARM:
                seconds[name].append(taken)
    count = sum(parameter.numel() for parameter in weights["adamw"])
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "bitsandbytes") if _there(name)]
    print(f"{count:,} parameters, {len(seconds['adamw'])} pairs, {asked.threads} thread(s), {', '.join(versions)}\n")
    print("| optimizer | ms a step (quartiles) | times fused AdamW (quartiles) | state, MB | bytes a parameter |")
    print("|---|---|---|---|---|")
    for name, taken in seconds.items():
        ratios = [one / other for one, other in zip(taken, seconds["adamw"], strict=True)]
        state = held_bytes(running[name])
        print(
            f"| {name} | {_spread([1000 * one for one in taken])} | {_spread(ratios)} | {state / 1e6:.1f} | "
            f"{state / count:.2f} |"
        )


def _named(parameters: list[nn.Parameter]) -> dict[str, nn.Parameter]:
    return {str(place): parameter for place, parameter in enumerate(parameters)}


def _there(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()

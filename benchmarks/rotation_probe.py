"""Does rotating the residual stream help rounding? KL to full precision on held-out tokens, with and without.

    python benchmarks/rotation_probe.py MODEL TEXT.txt int3-g32 int2-g32

Calibration is 8,192 tokens of the text, 4,096 others judge; the figures stand in LOG.md (2026-11-25).
"""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from strop.layers.rotation import rotate_residual
from strop.layers.surgery import linear_modules
from strop.methods import METHODS, Statistics
from strop.methods.hadamard import randomized_hadamard
from strop.models import load
from strop.numerics import parse_scheme

LENGTH, CALIBRATING, HELD_OUT = 256, 32, 16


def gather(model: nn.Module, windows: Tensor) -> dict[str, Statistics]:
    sums: dict[str, Tensor] = {}

    def add(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, 1).double()
        sums[name] = sums.get(name, 0) + x.t() @ x

    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in linear_modules(model).items()]
    for window in windows:
        model(window[None])
    for hook in hooks:
        hook.remove()
    moments = {name: (total / windows.numel()).float() for name, total in sums.items()}
    return {name: Statistics(h.diagonal().clone(), windows.numel(), hessian=h) for name, h in moments.items()}


def log_probabilities(model: nn.Module, windows: Tensor) -> Tensor:
    return torch.cat([model(window[None]).logits for window in windows]).log_softmax(dim=-1)


@torch.no_grad()
def main(source: str, text: str, *formats: str) -> None:
    opened = load(source, dtype="float32")
    ids: list[int] = []
    content = Path(text).read_text(encoding="utf-8")
    for start in range(0, 400 * LENGTH, 400):
        ids += opened.require_tokenizer()(content[start : start + 400], add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: (CALIBRATING + HELD_OUT) * LENGTH]).view(-1, LENGTH)
    calibrating, held_out = windows[:CALIBRATING], windows[CALIBRATING:]
    exact = log_probabilities(opened.model, held_out)
    models = {"as it is": opened.model}
    for seed in (0, 1):
        rotated = copy.deepcopy(opened.model)
        generator = torch.Generator().manual_seed(seed)
        rotate_residual(rotated, randomized_hadamard(rotated.config.hidden_size, generator))
        models[f"rotated, seed {seed}"] = rotated
    for label, model in models.items():
        statistics, layers = gather(model, calibrating), linear_modules(model)
        dense = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        for form in formats:
            for method in ("rtn", "search", "gptq"):
                for name, layer in layers.items():
                    scheme = parse_scheme(form)
                    if scheme.group_size and dense[name].shape[1] % scheme.group_size:
                        scheme = parse_scheme(form.replace(f"g{scheme.group_size}", "g43"))  # stories260K's 172 inputs
                    layer.weight.copy_(METHODS[method](dense[name], scheme, statistics[name]).dequantize())
                divergence = (exact.exp() * (exact - log_probabilities(model, held_out))).sum(dim=-1).mean().item()
                print(f"{label:18} {form:10} {method:7} KL {divergence:.4f} nats per token", flush=True)
        for name, layer in layers.items():
            layer.weight.copy_(dense[name])


if __name__ == "__main__":
    main(*sys.argv[1:])

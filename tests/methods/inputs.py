"""Inputs of linear layers with what real ones have: features that go together, a few large ones; and real ones."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from strop.layers.surgery import linear_modules
from strop.methods import Statistics
from strop.models import load


def statistics_of(inputs: Tensor) -> Statistics:
    """Statistics of inputs [tokens, in], as calibration gathers them."""
    x = inputs.double()
    hessian = (x.t() @ x / len(x)).float()
    return Statistics(hessian.diagonal().clone(), rows=len(x), hessian=hessian)


def correlated(columns: int, *, tokens: int | None = None, seed: int = 0) -> Tensor:
    """Inputs [tokens, columns] whose features mix a few hidden ones, of scales from 0.03 to 3."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 4 * columns if tokens is None else tokens
    hidden = torch.randn(tokens, max(1, columns // 4), generator=generator)
    mixed = hidden @ torch.randn(hidden.shape[1], columns, generator=generator)
    noise = torch.randn(tokens, columns, generator=generator)
    return (mixed / hidden.shape[1] ** 0.5 + 0.3 * noise) * (
        10.0 ** (2 * torch.rand(columns, generator=generator) - 1.5)
    )


def weight(rows: int, columns: int, *, seed: int = 1) -> Tensor:
    """A weight [rows, columns] of heavy-tailed values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, columns, generator=generator) * 0.1


@functools.cache
def real_layers(model: str, material: Path) -> dict[str, tuple[Tensor, Statistics]]:
    """Weight and statistics of every linear layer of a real model ("stories260K" or "demo"), over 4,096 tokens."""
    opened = load(material / "models" / model if model == "stories260K" else model, dtype="float32")
    file = "tinystories_4M_lowercase.txt" if model == "stories260K" else "wikitext2_valid.txt"
    text = (material / "data" / file).read_text(encoding="utf-8")[:20_000]
    ids: list[int] = []
    for start in range(0, len(text), 400):  # a longer text makes the tokenizer warn
        ids += opened.require_tokenizer()(text[start : start + 400], add_special_tokens=False)["input_ids"]
    linears = linear_modules(opened.model)
    sums = {name: torch.zeros(module.weight.shape[1], module.weight.shape[1]) for name, module in linears.items()}

    def gather(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, 1)
        sums[name] += x.t() @ x

    hooks = [module.register_forward_pre_hook(functools.partial(gather, name)) for name, module in linears.items()]
    windows = torch.tensor(ids[:4096]).view(-1, 1, 256)
    with torch.no_grad():
        for window in windows:
            opened.model(window)
    for hook in hooks:
        hook.remove()
    made = {name: total / windows.numel() for name, total in sums.items()}
    return {
        name: (
            module.weight.detach(),
            Statistics(made[name].diagonal().clone(), rows=windows.numel(), hessian=made[name]),
        )
        for name, module in linears.items()
    }

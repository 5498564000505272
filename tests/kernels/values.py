"""Weights that are hard to round, and the instruction sets that this machine has."""

from __future__ import annotations

import torch
from torch import Tensor

from strop import kernels

HERE = kernels.in_use().runnable
"""The instruction sets of this machine: none without the library, and the tests that need one say so."""

SHAPES = [(1, 1), (1, 64), (5, 31), (3, 33), (4, 255), (11, 257), (40, 1024)]


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    integers = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(integers), b.view(integers))


def plain(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def hard(rows: int, columns: int, *, steps: int = 15, seed: int = 0) -> Tensor:
    """Rows of zeros, of -0.0, constants, subnormals, huge values, one sign, an outlier, and exact ties of a grid."""
    weight = plain(rows, columns, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    kinds = ["ties", "zero", "minus zero", "constant", "subnormal", "huge", "tiny", "positive", "negative", "outlier"]
    for row in range(rows):
        kind = kinds[(row + seed) % len(kinds)]
        if kind == "ties":  # a range of `steps` steps, the values on the points and half way between them
            weight[row] = torch.randint(-steps, steps + 1, (columns,), generator=generator) / 2
        elif kind in ("zero", "minus zero"):
            weight[row] = 0.0 if kind == "zero" else -0.0
        elif kind == "constant":
            weight[row] = -1.7
        elif kind in ("subnormal", "huge", "tiny"):
            weight[row] *= {"subnormal": 1e-41, "huge": 1e4, "tiny": 1e-8}[kind]
        elif kind in ("positive", "negative"):
            weight[row] = weight[row].abs() * (1 if kind == "positive" else -1)
        elif kind == "outlier":
            weight[row, columns // 2] = 300.0
            weight[row, : columns // 3] = -0.0
    return weight

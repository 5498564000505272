"""int8 products against an int64 oracle, at the extremes, and where the machine's own instruction saturates."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from strop.errors import FormatError
from strop.numerics import int8_matmul as module
from strop.numerics.int8_matmul import MOST_INPUTS, float_product, int8_matmul, native_is_exact, native_product

SHAPES = [(1, 1, 1), (1, 31, 7), (2, 33, 5), (3, 2688, 16), (17, 255, 33), (40, 4096, 8)]


def matrices(tokens: int, inputs: int, outputs: int, kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (tokens, inputs), generator=generator)
    weight = torch.randint(-128, 128, (outputs, inputs), generator=generator)
    if kind != "random":
        x.fill_({"high": 127, "low": -128, "apart": 127}[kind])
        weight.fill_({"high": 127, "low": -128, "apart": -128}[kind])
    return x.to(torch.int8), weight.to(torch.int8)


@pytest.mark.parametrize("kind", ["random", "high", "low", "apart"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_sum_equals_the_int64_one(shape: tuple[int, int, int], kind: str) -> None:
    x, weight = matrices(*shape, kind)
    expected = x.long() @ weight.long().T
    assert int8_matmul(x, weight).dtype == torch.int32
    assert int8_matmul(x, weight).long().equal(expected)
    assert float_product(x, weight).long().equal(expected)


def test_no_tokens_give_no_rows() -> None:
    assert int8_matmul(torch.zeros(0, 8, dtype=torch.int8), torch.zeros(3, 8, dtype=torch.int8)).shape == (0, 3)


def test_more_inputs_than_int32_surely_holds_are_refused() -> None:
    wide = torch.zeros(1, MOST_INPUTS + 1, dtype=torch.int8)
    with pytest.raises(FormatError, match="fit 32 bits"):
        int8_matmul(wide, wide)


def test_sums_stay_exact_under_autocast() -> None:
    x, weight = matrices(3, 2688, 16, "random")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float_product(x, weight).long().equal(x.long() @ weight.long().T)


def test_an_operation_that_saturates_is_found_out_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(x: Tensor, weight: Tensor) -> Tensor:  # pairs summed in 16 bits, as AVX2 without VNNI does
        pairs = (x.int()[:, None, :] + 128) * weight.int()[None]
        pairs = torch.nn.functional.pad(pairs, (0, pairs.shape[-1] % 2))
        sums = pairs.unflatten(-1, (-1, 2)).sum(-1).clamp(-32768, 32767).sum(-1)
        return (sums - 128 * weight.int().sum(-1)).int()

    monkeypatch.setattr(module, "native_product", saturating)
    native_is_exact.cache_clear()
    try:
        x, weight = matrices(3, 64, 4, "high")
        assert not saturating(x, weight).long().equal(x.long() @ weight.long().T)
        assert int8_matmul(x, weight).long().equal(x.long() @ weight.long().T)
    finally:
        native_is_exact.cache_clear()


def test_sums_are_exact_where_the_cpu_has_no_vnni() -> None:
    """oneDNN is held to AVX2, in a process of its own: torch._int_mm saturates there, ours must not."""
    program = (
        "import torch; from strop.numerics.int8_matmul import *\n"
        "x = torch.full((3, 64), 127, dtype=torch.int8); w = torch.full((5, 64), 127, dtype=torch.int8)\n"
        "assert int8_matmul(x, w).eq(64 * 127 * 127).all()\n"
        "print(native_is_exact('cpu'), bool(native_product(x, w).eq(64 * 127 * 127).all()))"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    trusted, exact = done.stdout.split()
    assert trusted == exact  # on a machine without oneDNN's AVX2 kernels both are True


def test_the_native_product_is_trusted_only_where_it_equals_the_oracle() -> None:
    x, weight = matrices(17, 255, 33, "apart")
    if native_is_exact("cpu"):
        assert native_product(x, weight).long().equal(x.long() @ weight.long().T)

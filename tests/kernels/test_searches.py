"""The searches of superblocks, bit for bit as the PyTorch reference does them, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strop import kernels
from strop.kernels import searches
from strop.methods.block_fit import search_six_bit
from strop.methods.superblocks import search_super_scale
from strop.numerics.scheme import GGUF_TYPES

pytestmark = pytest.mark.usefixtures("instruction_set")

COLUMNS = 512


def weight(kind: str) -> Tensor:
    """float32 [5, 512]: an odd number of rows of two superblocks."""
    x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(len(kind)))
    if kind == "large":
        return x * 1e4
    if kind == "subnormal":
        return x * 1e-41
    if kind == "overflowing errors":
        x[0] *= 1e20
        x[0, 256:] = 0
        return x.clamp(-9e5, 9e5)
    if kind == "constant":
        return torch.full_like(x, -0.37)
    if kind == "one side":
        return x.abs() + 5
    if kind == "outliers":
        return torch.where(x.abs() > 2.5, 1000 * x, x)
    if kind == "zeros":
        x[1] = 0
        x[2, :40] = 0
        x[3, ::2] = -0.0
    return x


KINDS = ("normal", "large", "subnormal", "overflowing errors", "constant", "one side", "outliers", "zeros")


def table(kind: str) -> Tensor | None:
    if kind == "none":
        return None
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)) ** 3
    if kind == "with gaps":
        importance[::7] = 0
        importance[64:96] = 0
    return importance


def six_bit(x: Tensor, importance: Tensor | None) -> list[Tensor]:
    weights = torch.ones(1) if importance is None else importance.view(1, -1, 16, 16)
    return list(search_six_bit(x.view(len(x), -1, 16, 16), weights))


def four_bit(x: Tensor, importance: Tensor | None) -> list[Tensor]:
    weights = None if importance is None else importance.view(1, -1, 32)
    found = search_super_scale(x.view(len(x), -1, 32), GGUF_TYPES["q4_k"].format, weights)
    return [found.scale, found.minimum, found.sub_scale, found.sub_minimum]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.float16 else tensor


@pytest.mark.parametrize("search", [four_bit, six_bit])
@pytest.mark.parametrize("importance", ["none", "random", "with gaps"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_search_is_the_references_bit_for_bit(search, kind, importance):
    x, weights = weight(kind), table(importance)
    found = search(x, weights)
    with kernels.forced("reference"):
        expected = search(x, weights)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("search", [searches.search_four_bit, searches.search_six_bit])
def test_the_kernel_does_the_work_and_threads_change_nothing(search):
    x, weights = weight("normal").repeat(71, 1), table("random")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(search(x, weights))
    finally:
        torch.set_num_threads(before)
    one, three = results
    assert one is not None
    assert three is not None
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("search", [searches.search_four_bit, searches.search_six_bit])
def test_what_has_no_scale_and_other_kinds_of_tensors_are_left_to_the_reference(search):
    x = weight("normal")
    assert search(x, None) is not None
    assert search(x * 1e9, None) is None
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = x.clone()
        spoiled[-1, -1] = bad
        assert search(spoiled, None) is None
    for other in (x.double(), x[:, :300], x.T, x[:0]):
        assert search(other, None) is None
    assert search(x, torch.ones(COLUMNS + 1)) is None

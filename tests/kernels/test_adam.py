"""A step of AdamW with moments in 8 bits: the reference's bits, on every instruction set, whatever the threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from strop import kernels
from strop.kernels import adam
from strop.numerics.codebook import dynamic_map
from strop.numerics.dynamic8 import cells, quantize_blocks
from strop.training.adamw8bit import AdamW8bit

SIZES = [4096, 4097, 5000, 70_001]
"""Parameters of fewer have float32 moments; blocks are of 256."""


def gradients(size: int, steps: int = 4) -> list[Tensor]:
    """Of every size that float32 has, zeros among them, whole blocks of them too."""
    generator = torch.Generator().manual_seed(size)
    drawn = []
    for _ in range(steps):
        gradient = torch.randn(size, generator=generator) * 10.0 ** torch.randint(-20, 6, (size,), generator=generator)
        gradient[torch.rand(size, generator=generator) < 0.1] = 0.0
        gradient[512:1024] = 0.0
        gradient[1024:1280] *= 1e-25
        drawn.append(gradient)
    return drawn


def trained(size: int, given: list[Tensor], **options: float) -> dict[str, Tensor]:
    """Weights and state after some steps."""
    weight = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(1)))
    optimizer = AdamW8bit([weight], lr=1e-2, **options)
    for gradient in given:
        weight.grad = gradient.clone()
        optimizer.step()
    return {"weight": weight.detach(), **optimizer.state[weight]}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name].nan_to_num(7.0), value.nan_to_num(7.0)), name


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "eps": 1e-6}], ids=["plain", "decay"])
@pytest.mark.parametrize("size", SIZES)
def test_steps_have_the_references_bits(instruction_set: str, size: int, options: dict[str, float]) -> None:
    given = gradients(size)
    got = trained(size, given, **options)
    with kernels.forced("reference"):
        assert_same(got, trained(size, given, **options))


def test_gradients_in_bfloat16_are_read_as_they_are(instruction_set: str) -> None:
    cpu, size = torch.device("cpu"), 1000
    rates = adam.Rates(0.1, 0.999, 0.001, 2.0, 1e-8, 0.99, -0.01)
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for given in (gradient, gradient.float()):
        weight, moments = torch.ones(size), []
        for signed in (True, False):
            codes, scales = quantize_blocks(torch.linspace(0.1, 1, size), signed=signed)
            tables = dynamic_map(cpu, signed=signed), *cells(cpu, signed=signed)
            moments.append(adam.Moment(codes, scales, *tables))
        assert adam.step(weight, given, moments[0], moments[1], rates)
        found.append([weight, *moments[0].tensors()[:2], *moments[1].tensors()[:2]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.equal(found[0][0], torch.ones(size))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_not_finite_spoils_its_block_as_in_the_reference(instruction_set: str, value: float) -> None:
    given = gradients(4099)
    given[1][300] = value
    got = trained(4099, given)
    with kernels.forced("reference"):
        assert_same(got, trained(4099, given))
    assert got["weight"][300].isnan()
    assert got["weight"][:256].isfinite().all()


def test_the_threads_do_not_matter(instruction_set: str) -> None:
    size, threads = 300_000, torch.get_num_threads()
    given, found = gradients(size, steps=2), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(trained(size, given))
    finally:
        torch.set_num_threads(threads)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_a_matrix_that_lies_turned_is_moved(instruction_set: str) -> None:
    plain = torch.randn(70, 80, generator=torch.Generator().manual_seed(3))
    moved = []
    for turned in (False, True):
        start = plain.t().contiguous().t() if turned else plain.clone()
        weight = nn.Parameter(start)
        weight.grad = plain * 0.1
        AdamW8bit([weight], lr=1e-2).step()
        moved.append(weight.detach())
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], plain)

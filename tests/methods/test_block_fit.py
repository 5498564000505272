"""The least-squares searches behind GGUF's blocks, against slow oracles that try every scale of a fine grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strop.methods.block_fit import codes_of_step, fit_line, fit_step, search_six_bit


def blocks(count: int = 24, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, size, generator=generator), torch.rand(count, size, generator=generator) ** 3


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_comes_near_the_best_of_a_fine_grid(bits: int, weighted: bool) -> None:
    x, weights = blocks()
    weights = weights if weighted else torch.ones_like(x)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    best = torch.full((x.shape[0],), torch.inf, dtype=torch.float64)
    reach = x.abs().amax(-1, keepdim=True).double()
    for wide in torch.linspace(-1.3, 1.3, 602).tolist():
        scale = reach * wide / high
        error = (weights * ((x / scale).round().clamp(low, high) * scale - x).square()).sum(-1)
        best = torch.minimum(best, error)
    scale = fit_step(x, weights, bits)
    mine = (weights * (codes_of_step(x, scale, bits) * scale.unsqueeze(-1) - x).square()).sum(-1)
    assert mine.sum() < 1.06 * best.sum()
    assert best.sum() < 1.02 * mine.sum()  # the oracle is one


@pytest.mark.parametrize("weighted", [False, True])
def test_a_line_comes_near_the_best_of_a_fine_grid(weighted: bool) -> None:
    x, weights = blocks()
    weights = weights if weighted else torch.ones_like(x)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    best = torch.full((x.shape[0],), torch.inf)
    for wide in torch.linspace(0.5, 1.1, 61).tolist():
        for shift in torch.linspace(-0.1, 0.45, 56).tolist():
            scale, offset = (high - low) * wide / 15, low + shift * (high - low)
            codes = ((x - offset) / scale).round().clamp(0, 15)
            best = torch.minimum(best, (weights * (codes * scale + offset - x).square()).sum(-1))
    scale, offset = (part.unsqueeze(-1) for part in fit_line(x, weights, 4))
    codes = ((x - offset) / scale).round().clamp(0, 15)
    mine = (weights * (codes * scale + offset - x).square()).sum(-1)
    assert mine.sum() < 1.08 * best.sum()


def test_six_bits_come_near_scales_that_are_not_rounded() -> None:
    """The oracle has a float32 scale for each 16 values, the best of a fine grid."""
    x, _ = blocks(4 * 16, 16)
    best = torch.full((x.shape[0],), torch.inf)
    for wide in torch.linspace(-1.1, 1.1, 1002).tolist():
        scale = x.abs().amax(-1, keepdim=True) * wide / 32
        best = torch.minimum(best, ((x / scale).round().clamp(-32, 31) * scale - x).square().sum(-1))
    d, sub_scales, codes = search_six_bit(x.view(4, 16, 16), torch.ones(1))
    values = codes.float() * (d.float().unsqueeze(-1) * sub_scales).unsqueeze(-1)
    assert (values - x.view(4, 16, 16)).square().sum() < 1.2 * best.sum()


def test_values_on_a_grid_are_found_again() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-8, 8, (10, 32), generator=generator).float()
    codes[:, 0] = -8
    steps = torch.rand(10, generator=generator) + 0.1
    assert torch.allclose(fit_step(codes * steps.unsqueeze(-1), torch.ones(1), 4), steps, rtol=1e-6)
    codes += 8
    codes[:, 1] = 15
    scale, offset = fit_line(codes * steps.unsqueeze(-1) - 3, torch.ones(10, 32), 4)
    assert torch.allclose(scale, steps, rtol=1e-5)
    assert torch.allclose(offset, torch.full((10,), -3.0), rtol=1e-5)


def test_blocks_in_which_nothing_counts_have_no_scale() -> None:
    x, _ = blocks(3)
    assert fit_step(x, torch.zeros(3, 32), 4).tolist() == [0, 0, 0]
    assert [part.tolist() for part in fit_line(x, torch.zeros(3, 32), 4)] == [[0, 0, 0], [0, 0, 0]]

"""The dynamic map against bitsandbytes', and codes against a slow search over all levels."""

from __future__ import annotations

import bitsandbytes.functional as peer
import pytest
import torch

from strop.numerics.codebook import dynamic_map
from strop.numerics.dynamic8 import BLOCK, dequantize_blocks, quantize_blocks

CPU = torch.device("cpu")


def spread(count: int, *, signed: bool, seed: int = 0) -> torch.Tensor:
    """Values over many decades, with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * 10.0 ** (-8 * torch.rand(count, generator=generator))
    values[torch.rand(count, generator=generator) < 0.05] = 0.0
    return values if signed else values.abs()


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_bitsandbytes(signed):
    assert torch.equal(dynamic_map(CPU, signed=signed), peer.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_codes_are_those_of_a_search_over_all_levels(signed, count):
    values = spread(count, signed=signed)
    codes, scale = quantize_blocks(values, signed=signed)
    levels = dynamic_map(CPU, signed=signed).double()
    for start in range(0, count, BLOCK):
        block = values[start : start + BLOCK]
        largest = block.abs().max()
        assert scale[start // BLOCK] == largest
        relative = (block * (1.0 / largest)).double() if largest > 0 else block.double()
        nearest = (relative.unsqueeze(1) - levels).abs().argmin(dim=1)
        if not signed:
            nearest = torch.where(block > 0, nearest.clamp(min=1), nearest)
        assert torch.equal(codes[start : start + BLOCK].long(), nearest)


def test_signed_codes_agree_with_bitsandbytes_blockwise():
    values = spread(64 * BLOCK, signed=True)
    expected, state = peer.quantize_blockwise(values, code=dynamic_map(CPU), blocksize=BLOCK)
    codes, scale = quantize_blocks(values, signed=True)
    assert torch.equal(scale, state.absmax)
    large = values.abs() > 0.01 * scale.repeat_interleave(BLOCK)  # below, its CPU search is coarse: 4 levels off
    assert (codes == expected)[large].double().mean() > 0.998
    mine, theirs = dequantize_blocks(codes, scale, signed=True), peer.dequantize_blockwise(expected, state)
    assert (mine - values).abs().sum() <= (theirs - values).abs().sum() * (1 + 1e-6)


def test_what_was_stored_unsigned_is_stored_again_the_same():
    """Not so signed: the map has 1 and no -1, so a block whose largest number is negative shrinks."""
    values = spread(3000, signed=False)
    once = dequantize_blocks(*quantize_blocks(values, signed=False), signed=False)
    assert torch.equal(dequantize_blocks(*quantize_blocks(once, signed=False), signed=False), once)


def test_what_is_above_zero_is_never_stored_as_zero_where_it_divides():
    values = torch.tensor([0.0, 1e-12, 1e-30, 1.0])
    stored = dequantize_blocks(*quantize_blocks(values, signed=False), signed=False)
    assert (stored > 0).tolist() == [False, True, True, True]


@pytest.mark.parametrize("signed", [True, False])
def test_a_block_of_zeros_stays_zero(signed):
    stored = dequantize_blocks(*quantize_blocks(torch.zeros(300), signed=signed), signed=signed)
    assert torch.equal(stored, torch.zeros(300))

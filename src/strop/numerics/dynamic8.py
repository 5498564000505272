"""Eight bits for the state of an optimizer: blocks of 256 numbers, each the nearest level of the dynamic map.

    value = level(code) * scale,    scale = the largest magnitude of the block

(Dettmers and others, "8-bit Optimizers via Block-wise Quantization", 2022; blocks of 256 as in today's bitsandbytes,
2048 in the paper). Values are flat float32 [n], codes uint8 [n], scales float32 [ceil(n / 256)]; the last block may be
shorter. A level is found in two look-ups: the upper 16 bits of a float32 (sign, exponent, 7 bits of mantissa) name a
cell so narrow that it holds at most one midpoint between levels.

One deviation from the nearest level, for unsigned values: what is above zero is never stored as zero. A second moment
that became zero beside a first moment that did not would divide by nothing but epsilon.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from strop.numerics.codebook import dynamic_map

BLOCK: Final = 256
"""Numbers that share a scale."""

BYTES_EACH: Final = 1 + 4 / BLOCK
"""Bytes of one stored number: its code, and its share of a scale."""

_LEAST_SCALE: Final = 1e-38
_HALF: Final = 2**15


@functools.cache
def cells(device: torch.device, *, signed: bool) -> tuple[Tensor, Tensor]:
    """The code below each of 2^16 cells (uint8), and the midpoint in or next above it (float32, infinity: none)."""
    levels = dynamic_map(torch.device("cpu"), signed=signed)
    midpoints = (levels[:-1] + levels[1:]) / 2
    upper = torch.arange(-_HALF, _HALF, dtype=torch.int32, device="cpu") << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)
    ends = torch.where(ends[0].abs() <= 1, ends, 0.0)  # no number beyond 1 comes, nor one that is none
    below = torch.bucketize(ends.amin(0), midpoints)
    assert int((torch.bucketize(ends.amax(0), midpoints) - below).max()) <= 1
    edge = torch.cat([midpoints, torch.full_like(midpoints[:1], torch.inf)])[below]
    return below.to(torch.uint8).to(device), edge.to(device)


def quantize_blocks(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of flat float32 values; between two levels the lower one is taken.

    Args:
        values: float32 [n], finite; not negative where unsigned.
        signed: which map.
    """
    count = values.numel()
    padded = functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)  # [n] -> [blocks, 256]
    scale = padded.abs().amax(dim=1) if signed else padded.amax(dim=1)
    relative = (padded * (1.0 / scale.clamp(min=_LEAST_SCALE)).unsqueeze(1)).view(-1)[:count]
    below, edge = cells(values.device, signed=signed)
    cell = (relative.view(torch.int32) >> 16).add_(_HALF)
    codes = below.index_select(0, cell).add_(relative > edge.index_select(0, cell))
    if not signed:
        codes = torch.maximum(codes, (values > 0).view(torch.uint8))
    return codes, scale


def dequantize_blocks(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """The float32 values [n] of codes [n] and scales [ceil(n / 256)]."""
    count = codes.numel()
    levels = dynamic_map(codes.device, signed=signed).index_select(0, codes.view(-1).to(torch.int32))
    whole = count - count % BLOCK
    levels[:whole].view(-1, BLOCK).mul_(scale[: whole // BLOCK].unsqueeze(1))
    if whole < count:
        levels[whole:].mul_(scale[-1])
    return levels

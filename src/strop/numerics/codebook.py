"""NF4 and FP4: the nearest level of a table, and block scales quantized once more (double quantization).

Values arrive in float32 as [rows, groups, size] with one scale, the largest magnitude, per block; codes leave as uint8.
The arithmetic is that of bitsandbytes on a CPU, so that codes agree with it bit for bit: values are multiplied by the
float32 reciprocal of the scale and compared with the midpoints between levels, a value on a midpoint taking the lower
level. The one deviation: FP4 has two codes for zero (0 and 8), and here zero is always code 0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.numerics.formats import CodebookFormat
from strop.numerics.scheme import NESTED_BLOCK

_CELLS = 512
_LEAST_SCALE = 1e-38
"""Scales below this are taken as this when dividing, as bitsandbytes does; the stored scale stays as it is."""


@functools.cache
def level_table(form: CodebookFormat, device: torch.device) -> Tensor:
    """The levels as float32 [2^bits], in the order of the codes."""
    return torch.tensor(form.levels, dtype=torch.float32, device=device)


@functools.cache
def _cells(form: CodebookFormat, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tables that find the nearest level in two look-ups, ten times as fast as a binary search.

    [-1, 1] is cut into cells so narrow that none holds two midpoints between levels. The level nearest to a value in a
    cell is then the one that lies below the cell, or the next one if the value is beyond the cell's only midpoint.

    Returns:
        Levels below each cell (uint8 [cells + 1], counted in ascending order); the midpoint in or next above each
        (float32, infinity above the last); the code of each ascending level, None where that is its place.
    """
    first_code: dict[float, int] = {}
    for code, level in enumerate(form.levels):
        first_code.setdefault(level, code)  # -0.0 == 0.0: FP4's second zero is left out
    ascending = sorted(first_code)
    levels = torch.tensor(ascending, dtype=torch.float32, device="cpu")  # not a default device, such as meta
    midpoints = (levels[:-1] + levels[1:]) / 2
    starts = torch.arange(_CELLS + 1, device="cpu") * (2 / _CELLS) - 1
    slack = 1e-6  # a value within float32's rounding of a cell's end may be counted to the cell beside it
    below = torch.bucketize(starts - slack, midpoints)
    beyond = torch.bucketize(starts + 2 / _CELLS + slack, midpoints, right=True)
    if (beyond - below).max() > 1:
        raise ValueError(f"{form.name}: levels closer than {2 / _CELLS} need more cells")
    edge = torch.cat([midpoints, torch.full_like(midpoints[:1], torch.inf)])[below]
    codes = [first_code[level] for level in ascending]
    order = None if codes == list(range(len(codes))) else torch.tensor(codes, dtype=torch.uint8, device=device)
    return below.to(device=device, dtype=torch.uint8), edge.to(device), order


@functools.cache
def _pair_table(form: CodebookFormat, device: torch.device) -> Tensor:
    """The two levels of every byte of two 4-bit codes, as the bits of one int64: [256]."""
    byte = torch.arange(256, device=device)
    levels = level_table(form, device)
    return torch.stack([levels[byte & 15], levels[byte >> 4]], dim=1).view(torch.int64).view(256)


def nearest_codes(x: Tensor, scale: Tensor, form: CodebookFormat) -> Tensor:
    """Codes of the levels nearest to x / scale.

    Args:
        x: float32 [rows, groups, size].
        scale: float32 [rows, groups, 1], not negative.
        form: The table.

    Returns:
        uint8, the shape of x.
    """
    below, edge, order = _cells(form, x.device)
    relative = (x * (1.0 / scale.clamp(min=_LEAST_SCALE))).clamp_(-1.0, 1.0).view(-1)
    cell = (relative + 1.0).mul_(_CELLS / 2).to(torch.int32).clamp_(0, _CELLS)
    places = below.index_select(0, cell).add_(relative > edge.index_select(0, cell))
    if order is not None:
        places = order.index_select(0, places.to(torch.int32))
    return places.view(x.shape)


def level_values(codes: Tensor, scale: Tensor, form: CodebookFormat) -> Tensor:
    """The values of codes: level * scale, float32, the shape of codes."""
    levels = level_table(form, codes.device)
    return levels.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape).mul_(scale)


def packed_level_values(packed: Tensor, scale: Tensor, form: CodebookFormat) -> Tensor:
    """The values of packed 4-bit codes, two at a time: uint8 [rows, bytes] to float32 [rows, 1, 2 * bytes]."""
    pairs = torch.take(_pair_table(form, packed.device), packed.long())
    return pairs.view(torch.float32).unsqueeze(1).mul_(scale)


@dataclass(frozen=True)
class NestedScale:
    """Block scales under double quantization: scale = level(code) * block_scale + offset.

    Attributes:
        codes: uint8 [blocks], positions in the 8-bit dynamic map.
        scale: float32 [ceil(blocks / 256)].
        offset: float32 scalar tensor, the mean of the scales.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def dequantize(self) -> Tensor:
        """The block scales, float32 [blocks]."""
        levels = dynamic_map(self.codes.device).index_select(0, self.codes.to(torch.int32))
        blocks = levels.numel()
        padded = torch.nn.functional.pad(levels, (0, -blocks % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
        return (padded * self.scale.unsqueeze(1)).view(-1)[:blocks].add_(self.offset)


def nest(scale: Tensor) -> NestedScale:
    """Quantize block scales (float32 [blocks]) to 8 bits: subtract their mean, then blocks of 256 in the dynamic map.

    QLoRA (Dettmers and others, 2023), section 3, with the map and the arithmetic of bitsandbytes.
    """
    offset = scale.mean()
    centred = scale - offset
    blocks = centred.numel()
    padded = torch.nn.functional.pad(centred, (0, -blocks % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    block_scale = padded.abs().amax(dim=1)
    levels = dynamic_map(scale.device)
    relative = padded * (1.0 / block_scale.clamp(min=_LEAST_SCALE)).unsqueeze(1)
    codes = torch.bucketize(relative, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)
    return NestedScale(codes.view(-1)[:blocks].contiguous(), block_scale, offset)


@functools.cache
def dynamic_map(device: torch.device, *, signed: bool = True) -> Tensor:
    """The 256 levels of the 8-bit dynamic map, ascending, float32.

    Seven decades, 10^-6 to 10^0, each with 2^i evenly spaced magnitudes (i = 0 to 6), their negatives, zero and one
    ("8-bit Approximations for Parallelism in Deep Learning", Dettmers 2015). Unsigned, the sign's bit doubles the
    magnitudes of every decade ("8-bit Optimizers via Block-wise Quantization", Dettmers and others 2022, section 2.2).
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float32, device="cpu")
        magnitudes = [value.item() for value in 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)]
        levels += magnitudes + ([-magnitude for magnitude in magnitudes] if signed else [])
    return torch.tensor(sorted(levels), dtype=torch.float32, device=device)

"""Scales for GGUF's blocks, by weighted least squares: one for each block, or a step and an offset, or a superblock's.

    fit_step    x = s * q        q of b signed bits                Q4_0, Q5_0
    fit_line    x = s * q + m    q of b unsigned bits              Q4_1, Q5_1
    search_six_bit               x = d * sc * q, sc of 8 signed bits for each 16 of 256 values, q of 6     Q6_K

Each tries several grids around the one that covers the block; the codes of a grid give the scale that fits them best
(least squares with the codes held), and the scale that leaves the least sum of weights * error^2 is kept. llama.cpp's
`make_qx_quants` and `make_qkx3_quants` (Kawrakow, 2023) do so too; refitting codes and scale in turn, and moving the
sub-scales of a superblock once its d is rounded, are additions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strop.kernels import searches
from strop.numerics.reductions import halved_sum

_STEPS = tuple(0.2 * step for step in range(-4, 5))
"""What is added to the code that the value of largest magnitude takes."""
_FACTORS = (1.08, 1.16, 1.24, 1.32, -1.0, -1.08)
"""Multiples of that code: values that count for little are clipped, or the longer side of the grid is the other."""
_LINE_STEPS = (-1.5, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
"""A range is cut into this many steps more than the grid has."""
_LINE_CUTS = ((0.06, 0.06), (0.12, 0.0), (0.0, 0.12), (0.24, 0.0), (0.0, 0.24), (0.15, 0.15))
"""Shares of a range cut off below and above."""
_MOVES = (-4, -3, -2, -1, 1, 2, 3, 4)
"""How far a sub-scale is moved once its superblock's d is rounded."""
_ROUNDS = 2
_LARGEST = 65504.0


def fit_step(x: Tensor, weights: Tensor, bits: int) -> Tensor:
    """The s of least sum of weights * (x - s * q)^2 that the search finds, q from -2^(bits - 1) to 2^(bits - 1) - 1.

    Args:
        x: float32 [..., values], finite; values a power of two.
        weights: Broadcasts with x, not negative.
        bits: Of a code.

    Returns:
        float32 [...]; 0 where a block has no value that counts.
    """
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    extreme = _extreme(torch.where(weights > 0, x, 0.0)).unsqueeze(-1)
    weighted = weights * x
    unit = x / torch.where(extreme == 0, 1.0, extreme)
    best, scale = torch.zeros(x.shape[:-1]), torch.zeros(x.shape[:-1])
    for reach in (*(low + step for step in _STEPS), *(low * factor for factor in _FACTORS)):
        codes = (unit * reach).round_().clamp_(low, high)
        best, scale = _better_step(weighted, weights, codes, best, scale)
    for _ in range(_ROUNDS):
        codes = codes_of_step(x, scale, bits)
        best, scale = _better_step(weighted, weights, codes, best, scale)
    return scale


def fit_line(x: Tensor, weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The s and m of least sum of weights * (x - s * q - m)^2 that the search finds, q from 0 to 2^bits - 1.

    Args:
        x: float32 [blocks, values], finite.
        weights: float32 of the same shape, not negative.
        bits: Of a code.

    Returns:
        s, not negative, and m, float32 [blocks].
    """
    top = (1 << bits) - 1
    counts = weights > 0
    low = torch.where(counts, x, torch.inf).amin(-1)
    high = torch.where(counts, x, -torch.inf).amax(-1)
    some = low <= high  # otherwise the block has no value that counts
    low, high = torch.where(some, low, 0.0), torch.where(some, high, 0.0)
    scale, offset = (high - low) / top, low
    best = _line_errors(x, weights, scale, offset, top)
    tries = [(0.0, steps / (top + steps)) for steps in _LINE_STEPS]
    for below, above in (*tries, *_LINE_CUTS):
        step, start = (high - low) * (1 - below - above) / top, low + below * (high - low)
        for _ in range(_ROUNDS):
            step, start = _least_squares(x, weights, _line_codes(x, step, start, top), step, start)
            error = _line_errors(x, weights, step, start, top)
            better = error < best
            best = torch.where(better, error, best)
            scale, offset = torch.where(better, step, scale), torch.where(better, start, offset)
    return scale, offset


def search_six_bit(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q6_K's numbers for superblocks: d, the sub-scales and the codes of least weighted squared error.

    A superblock that the plain grid, whose scales span each group's own range, serves as well keeps it.

    Args:
        x: float32 [rows, superblocks, 16, 16], finite.
        weights: float32, of every column [1, superblocks, 16, 16] or one for all, not negative.

    Returns:
        d float16 [rows, superblocks] (infinite where it overflows), sub-scales int8 [rows, superblocks, 16], and codes
        int8 like x, from -32 to 31.
    """
    table = None if weights.numel() == 1 and bool(weights == 1) else weights.reshape(-1)
    if (native := searches.search_six_bit(x.view(x.shape[0], -1), table)) is not None:
        d, sub_scales, codes = native
        return d.view(x.shape[:-2]), sub_scales.view(x.shape[:-1]), codes.view(x.shape)
    plain_d, plain_scales = _nested(_extreme(x) / -32)
    d, sub_scales = _nested(fit_step(x, weights, 6))
    errors = _errors(x, weights, d, sub_scales)
    for _ in range(_ROUNDS):
        for move in _MOVES:
            moved = (sub_scales + move).clamp_(-128, 127)
            error = _errors(x, weights, d, moved)
            sub_scales = torch.where(error < errors, moved, sub_scales)
            errors = torch.minimum(error, errors)
        product = codes_of_step(x, d.float().unsqueeze(-1) * sub_scales, 6) * sub_scales.unsqueeze(-1)
        square = halved_sum(halved_sum(weights * product * product))
        fitted = (halved_sum(halved_sum(weights * product * x)) / torch.where(square > 0, square, 1.0)).half()
        error = _errors(x, weights, fitted, sub_scales)
        better = (halved_sum(error) < halved_sum(errors)) & (square > 0)
        d, errors = torch.where(better, fitted, d), torch.where(better.unsqueeze(-1), error, errors)
    better = halved_sum(errors) < halved_sum(_errors(x, weights, plain_d, plain_scales))
    d, sub_scales = torch.where(better, d, plain_d), torch.where(better.unsqueeze(-1), sub_scales, plain_scales)
    codes = codes_of_step(x, d.float().unsqueeze(-1) * sub_scales, 6)
    return d, sub_scales.to(torch.int8), codes.to(torch.int8)


def _nested(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [superblocks, 16] as d float16 and codes of 8 bits, float32: the one of largest magnitude becomes -128."""
    d = (_extreme(scales) / -128).half()
    return d, (scales / _divisor(d.float()).unsqueeze(-1)).round_().clamp_(-128, 127)


def codes_of_step(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest codes of x [..., values] on the grid of scale [...], float32; 0 where the scale is 0."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return (x / _divisor(scale).unsqueeze(-1)).round_().clamp_(low, high)


def _divisor(scale: Tensor) -> Tensor:
    """The scale, infinite where it is 0, so that what is divided by it becomes 0."""
    return torch.where(scale == 0, torch.inf, scale)


def _extreme(x: Tensor) -> Tensor:
    """The value of largest magnitude along the last dimension, with its sign."""
    high, low = x.amax(-1), x.amin(-1)
    return torch.where(high > -low, high, low)


def _better_step(
    weighted: Tensor, weights: Tensor, codes: Tensor, best: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep the scale that fits some codes where the error falls by more: by (sum w x q)^2 / (sum w q^2)."""
    product, square = halved_sum(weighted * codes), halved_sum(weights * codes * codes)
    fitted = product / torch.where(square > 0, square, 1.0)
    gain = fitted * product
    better = gain > best
    return torch.where(better, gain, best), torch.where(better, fitted, scale)


def _errors(x: Tensor, weights: Tensor, d: Tensor, sub_scales: Tensor) -> Tensor:
    """Weighted squared error of each group of 16 with its nearest codes; infinite where d overflowed."""
    scale = d.float().unsqueeze(-1) * sub_scales
    errors = halved_sum(weights * (codes_of_step(x, scale, 6) * scale.unsqueeze(-1) - x).square())
    return errors.nan_to_num_(torch.inf)


def _line_codes(x: Tensor, scale: Tensor, offset: Tensor, top: int) -> Tensor:
    return ((x - offset.unsqueeze(-1)) / _divisor(scale).unsqueeze(-1)).round_().clamp_(0, top)


def _line_errors(x: Tensor, weights: Tensor, scale: Tensor, offset: Tensor, top: int) -> Tensor:
    codes = _line_codes(x, scale, offset, top)
    return (weights * (codes * scale.unsqueeze(-1) + offset.unsqueeze(-1) - x).square()).sum(-1)


def _least_squares(x: Tensor, weights: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset that fit x to its codes best; those given where the codes do not tell."""
    weighted = weights * codes
    total, first, second = weights.sum(-1), weighted.sum(-1), (weighted * codes).sum(-1)
    x_first, x_total = (weighted * x).sum(-1), (weights * x).sum(-1)
    determinant = total * second - first * first
    solvable = determinant > 1e-6 * total * second
    safe = torch.where(solvable, determinant, 1.0)
    slope = ((total * x_first - first * x_total) / safe).clamp_(0.0, _LARGEST)
    level = ((second * x_total - first * x_first) / safe).clamp_(-_LARGEST, _LARGEST)
    return torch.where(solvable, slope, scale), torch.where(solvable, level, offset)

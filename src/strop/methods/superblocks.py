"""Q4_K's scales and minimums, searched for the least weighted squared error.

Three steps, each of which only ever lowers the error of what it touches:

1. For each group of 32, several steps around its range / 15; the codes of each give a new scale and minimum by weighted
   least squares (the minimum not negative), and those new codes, twice. The best of all is kept.
2. Scales and minimums are rounded to 6-bit codes of their superblock. The two float16 numbers are fitted again by
   weighted least squares with all codes of the superblock held, and the codes of scales and minimums moved by one
   where that helps: rounding them singly errs, since a scale one higher may go with a minimum one higher.
3. A superblock that the plain grid serves as well keeps the plain grid.

llama.cpp's K-quants (Kawrakow, 2023) search ranges and fit by least squares too; the fit of step 2 is an addition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strop.kernels import searches
from strop.numerics.formats import IntFormat
from strop.numerics.groups import row_chunks
from strop.numerics.reductions import halved_sum
from strop.numerics.superblock import SuperScale, plain_super_scale, super_scale_of

_STEPS = (-1.5, -0.5, 0.0, 0.5, 1.5, 3.0, 5.0)  # a range is cut into 15 + this many steps
_FITS = 2
_GAIN = 1e-5  # an error must fall by this share to count, as in `observers`
_LARGEST = 65504.0 * 63
_MOVES = tuple((up, down) for up in (-1, 0, 1) for down in (-1, 0, 1) if (up, down) != (0, 0))


def search_super_scale(
    groups: Tensor, form: IntFormat, importance: Tensor | None = None, *, where: str = "weight"
) -> SuperScale:
    """Superblocks whose grid leaves the least sum of importance * (x - rounded)^2, never more than the plain ones.

    Args:
        groups: [out, groups, 32], any float dtype; a multiple of eight groups.
        form: The codes' format, uint4.
        importance: float32 [1, groups, 32], not negative; None for 1.
        where: The weight's name, for messages.

    Raises:
        FormatError: As `plain_super_scale`.
    """
    table = None if importance is None else importance.reshape(-1)
    found = [
        _searched(groups[rows].float(), table, form, where)
        for rows in row_chunks(groups.shape[0], groups[0].numel(), values=1 << 17)
    ]
    return SuperScale(
        torch.cat([part.scale for part in found]),
        torch.cat([part.minimum for part in found]),
        torch.cat([part.sub_scale for part in found]),
        torch.cat([part.sub_minimum for part in found]),
    )


def _searched(x: Tensor, table: Tensor | None, form: IntFormat, where: str) -> SuperScale:
    """The three steps for some rows of groups, float32 [rows, groups, 32], their columns weighted [columns]."""
    if (native := searches.search_four_bit(x.view(len(x), -1), table)) is not None:
        return SuperScale.of_codes(*native)
    weights = torch.ones_like(x[:1]) if table is None else table.view(x[:1].shape)
    plain = plain_super_scale(x, form, where=where)
    scale, minimum = _group_by_group(x, weights, form)
    d, dmin, sub_scale, sub_minimum = super_scale_of(scale, minimum).unpacked()
    for _ in range(_FITS):
        sub_scale, sub_minimum = _moved(x, weights, form, d, dmin, sub_scale, sub_minimum)
        d, dmin = _fitted(x, weights, form, d, dmin, sub_scale, sub_minimum)
    found = SuperScale.of_codes(d, dmin, sub_scale, sub_minimum)
    errors = [_errors(x, weights, form, one.scales(), one.minimums()) for one in (found, plain)]
    better, kept = (halved_sum(error.view(error.shape[0], -1, 8)) for error in errors)  # [rows, superblocks]
    return found.where(better < kept * (1 - _GAIN), plain)


def _group_by_group(x: Tensor, weights: Tensor, form: IntFormat) -> tuple[Tensor, Tensor]:
    """Step 1: scale and minimum of each group, float32 [rows, groups], before they are rounded to 6 bits."""
    low, high = x.amin(dim=-1).clamp_(max=0.0), x.amax(dim=-1)
    scale, minimum = (high - low) / form.steps, -low
    best = _errors(x, weights, form, scale, minimum)
    used = torch.where(weights > 0, x, 0.0)  # what no input ever meets takes no room
    low, high = used.amin(dim=-1).clamp_(max=0.0), used.amax(dim=-1)
    for steps in _STEPS:
        step, offset = (high - low) / (form.steps + steps), -low
        for _ in range(_FITS):
            step, offset = _least_squares(x, weights, _codes(x, step, offset, form), step, offset)
            error = _errors(x, weights, form, step, offset)
            better = error < best * (1 - _GAIN)
            best = torch.where(better, error, best)
            scale, minimum = torch.where(better, step, scale), torch.where(better, offset, minimum)
    return scale, minimum


def _least_squares(x: Tensor, weights: Tensor, codes: Tensor, step: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum that fit x to its codes best; those given where the codes do not tell."""
    weighted = weights * codes
    total, first, second = halved_sum(weights), halved_sum(weighted), halved_sum(weighted * codes)
    x_first, x_total = halved_sum(weighted * x), halved_sum(weights * x)
    determinant = total * second - first * first
    solvable = determinant > 1e-6 * total * second
    safe = torch.where(solvable, determinant, 1.0)
    slope = (total * x_first - first * x_total) / safe
    level = (second * x_total - first * x_first) / safe
    through_zero = x_first / torch.where(second > 0, second, 1.0)
    slope = torch.where(level > 0, through_zero, slope).clamp_(0.0, _LARGEST)
    level = (-level).clamp_(0.0, _LARGEST)
    return torch.where(solvable, slope, step), torch.where(solvable, level, offset)


def _moved(
    x: Tensor, weights: Tensor, form: IntFormat, d: Tensor, dmin: Tensor, sub_scale: Tensor, sub_minimum: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes of scales and minimums, moved by at most one each where that lowers a group's error."""
    best = _errors(x, weights, form, _spread(d, sub_scale), _spread(dmin, sub_minimum))
    kept_scale, kept_minimum = sub_scale, sub_minimum
    for up, down in _MOVES:
        moved_scale, moved_minimum = (sub_scale + up).clamp_(0, 63), (sub_minimum + down).clamp_(0, 63)
        error = _errors(x, weights, form, _spread(d, moved_scale), _spread(dmin, moved_minimum))
        better = error < best * (1 - _GAIN)
        best = torch.where(better, error, best)
        kept_scale = torch.where(better, moved_scale, kept_scale)
        kept_minimum = torch.where(better, moved_minimum, kept_minimum)
    return kept_scale, kept_minimum


def _fitted(
    x: Tensor, weights: Tensor, form: IntFormat, d: Tensor, dmin: Tensor, sub_scale: Tensor, sub_minimum: Tensor
) -> tuple[Tensor, Tensor]:
    """The two numbers of each superblock by least squares with all codes held; kept where the error then falls."""
    scale, minimum = _spread(d, sub_scale), _spread(dmin, sub_minimum)
    before = _errors(x, weights, form, scale, minimum)
    one = _codes(x, scale, minimum, form) * sub_scale.unsqueeze(-1)  # x = d * one - dmin * other
    other = sub_minimum.unsqueeze(-1).expand_as(one)

    def total(values: Tensor) -> Tensor:  # [rows, groups, 32] -> [rows, superblocks]
        return halved_sum(halved_sum(weights * values).view(x.shape[0], -1, 8))

    aa, ab, bb = total(one * one), total(one * other), total(other * other)
    ax, bx = total(one * x), total(other * x)
    determinant = aa * bb - ab * ab
    solvable = determinant > 1e-6 * aa * bb
    safe = torch.where(solvable, determinant, 1.0)
    new_d = torch.where(solvable, (bb * ax - ab * bx) / safe, ax / torch.where(aa > 0, aa, 1.0))
    new_dmin = torch.where(solvable, (ab * ax - aa * bx) / safe, dmin.float())
    new_d, new_dmin = (part.clamp_(0.0, 65504.0).half() for part in (new_d, new_dmin))
    after = _errors(x, weights, form, _spread(new_d, sub_scale), _spread(new_dmin, sub_minimum))
    old, new = (halved_sum(error.view(error.shape[0], -1, 8)) for error in (before, after))
    better = new < old * (1 - _GAIN)
    return torch.where(better, new_d, d), torch.where(better, new_dmin, dmin)


def _spread(unit: Tensor, codes: Tensor) -> Tensor:
    """Unit [rows, superblocks] times codes [rows, groups], float32."""
    return (codes.view(*unit.shape, 8) * unit.float().unsqueeze(-1)).view(codes.shape)


def _codes(x: Tensor, scale: Tensor, minimum: Tensor, form: IntFormat) -> Tensor:
    """The nearest codes on each group's grid, float32 [rows, groups, 32]."""
    divisor = torch.where(scale > 0, scale, torch.inf).unsqueeze(-1)
    return ((x + minimum.unsqueeze(-1)) / divisor).round_().clamp_(0, form.steps)


def _errors(x: Tensor, weights: Tensor, form: IntFormat, scale: Tensor, minimum: Tensor) -> Tensor:
    """Weighted squared error of each group, [rows, groups]."""
    difference = _codes(x, scale, minimum, form).mul_(scale.unsqueeze(-1)).sub_(minimum.unsqueeze(-1)).sub_(x)
    return halved_sum(difference.square_().mul_(weights))

"""GPTQ: round one input column after another, and let the columns still to come make up for each error.

With H the mean of x^T x over the inputs, D = weight - rounded and H + damping * mean(diag H) * I = R R^T, R upper
triangular, the layer's squared output error falls apart into columns:

    trace(D (R R^T) D^T) = sum over j of R_jj^2 * |a_j - q_j|^2,    a_j = w_j + sum over k < j of d_k * R_kj / R_jj

so that rounding each a_j to the grid's nearest q_j, in order, is the greedy least of it. The a_j are the very values to
which the paper's updates with the inverse of H bring the columns (Frantar and others, "GPTQ", arXiv 2210.17323,
algorithm 1); QuIP (arXiv 2307.13304, section 3) shows the two to be one. Here no inverse is needed, and the factor R
also says how much an error of each column will count, R_jj^2: that is what the scales are searched with.

    target      the weight to be rounded: what comes nearest to full precision over the inputs that there are
    factor      R, and the order of the columns, in panels
    sweep       the a_j, in blocks: what all columns before a block did to it is one matrix product
    refit       the best scales for the codes found

The inputs x of a layer are those that the quantized layers before it give, and no longer the x' of the full-precision
model. Where that drift was measured, D = mean of (x' - x)^T x, what is rounded is not W but

    W + W D (H + damping * mean(diag H) * I)^-1        of least |W x' - . x|^2 + damping * |. - W|^2 over the tokens,

so that a layer also makes up for what was lost before it, as far as its inputs still tell. "GPTAQ" (Li and others,
arXiv 2504.02692) brings the same term into each column's turn; here it is there before the first.

Groups are static: a column belongs to the group in which it stands in the weight, whichever its turn, so that an order
costs nothing at run time. `benchmarks/LOG.md` (2026-11-25) has the figures behind the defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from strop.errors import DataError, FormatError, UsageError, nearest
from strop.methods.base import Statistics, check_statistics
from strop.methods.rtn import rtn
from strop.methods.search import search, searched_scale
from strop.numerics import grid
from strop.numerics.codebook import nest
from strop.numerics.groups import row_chunks, spread
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.reductions import all_finite
from strop.numerics.scales import stored_zero_point
from strop.numerics.scheme import Granularity, Scheme

Order = Literal["pivot", "activation", "group", "none"]
"""Which column comes first.

    pivot       the last column is the one of least mean square, the one before it that of least mean square given the
                last, and so on (the greedy order of Chen and others, arXiv 2507.18553, here a panel at a time)
    activation  from the largest mean square to the least (the paper's authors' "act-order")
    group       whole groups by their largest mean square, and so within each (Gafni and others, arXiv 2505.14638)
    none        from left to right
"""

_PANEL = 32
"""Columns that are ordered and factored together."""

_MOST_DAMPING = 1.0
"""Damping is raised to this share of the mean square at the most."""

_MARGIN = 1e-4
"""Share by which one float32 sum of squares must lie below another to be taken for less."""


def gptq(
    weight: Tensor,
    scheme: Scheme,
    statistics: Statistics | None = None,
    *,
    where: str = "weight",
    order: Order = "pivot",
    block: int = 128,
    damping: float = 0.01,
    passes: int | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> QuantizedTensor:
    """Round a weight [out, in] so that the layer's outputs err least, by GPTQ.

    Its `output_error`, from the target where there is drift, is never above that of searched or plain rounding: where
    it would be, that result is returned.
    Columns of inputs that were always zero get no error from others and give none (their rows of H are zero): they are
    rounded to nearest, not set to zero as the paper's code has it, for other data may reach them.

    Deviations from the paper: the scales of all groups are searched beforehand, each column weighted by R_jj^2; the
    second pass searches them again on the values a_j that the first one rounded, and is taken where it errs less; at
    last each group's scale is set to the least-squares one for its codes, group by group (the second stage of Kim and
    others, arXiv 2602.02126; not under double quantization, nor where blocks reach over rows).

    Args:
        weight: Any float dtype.
        scheme: The grid; any.
        statistics: With the inputs' `hessian`, and their `drift` where it is to be made up for.
        where: The weight's name, for messages.
        order: Which column comes first.
        block: Columns between two matrix products; any size gives the same values, up to rounding in float32.
        damping: Added to the diagonal of H, as a share of its mean. Doubled where H cannot be factored, up to 1.
        passes: How often columns are rounded and scales searched; None for 2 at 3 bits and fewer, else 1, for there
            the second gains little.
        note: Told, with the weight's name, where damping was raised and where another rounding was taken.

    Raises:
        FormatError: As `quantize_tensor`.
        DataError: No Hessian; it is of another width, not finite, or of no inputs whatever (not positive semidefinite).
        UsageError: An option out of its range.
    """
    _check_options(order, block, damping, passes)
    hessian = _check_hessian(statistics, weight, where=where)
    searched = search(weight, scheme, statistics, where=where)  # refuses what cannot be quantized, too
    if not hessian.diagonal().any():
        note(f"{where}: every input was zero in calibration; rounded to nearest")
        return rtn(weight, scheme, where=where)
    factored, used = _factor_damped(hessian, _groups_of(scheme, weight.shape[1]), order, damping, where=where)
    if used != damping:
        note(f"{where}: damping {used:.3g} instead of {damping:.3g}, since the Hessian could not be factored")
    if passes is None:
        passes = 2 if scheme.bits <= 3 else 1
    dense = weight.detach().float()
    if statistics is not None and statistics.drift is not None:
        dense = target(dense, hessian, statistics.drift.to(hessian), used)
    found = _rounded(dense, scheme, hessian, factored, block=block, passes=passes, where=where)
    limit = _output_error(dense, found, hessian)
    best = found
    for nearest_rounding in (searched, rtn(weight, scheme, where=where)):
        error = _output_error(dense, nearest_rounding, hessian, limit=limit * (1 + _MARGIN))
        if error <= limit * (1 + _MARGIN):
            best, limit = nearest_rounding, error
    if best is not found:
        note(f"{where}: rounding to nearest errs no more than GPTQ and was taken")
    return best


@dataclass(frozen=True, eq=False)
class Factor:
    """H + damping, factored: R R^T with the rows and columns of H in `order`.

    Attributes:
        order: int64 [in]; order[j] is the column whose turn is j.
        gains: float32 [in, in], R_kj / R_jj: unit upper triangular.
        importance: float32 [in], R_jj^2 by the column's own place: what a squared error of the column counts.
    """

    order: Tensor
    gains: Tensor
    importance: Tensor


def factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> Factor | None:
    """Factor H + damping * mean(diag H) * I, columns in `order` or, without one, in pivot order.

    Args:
        hessian: float32 [in, in], symmetric.
        damping: A share of the mean of the diagonal.
        order: int64 [in]; None finds the order, `_PANEL` columns at a time: of those left, the ones of least mean
            square given the columns that come after them.

    Returns:
        None where the sum is not positive definite in float32.
    """
    columns = hessian.shape[0]
    added = damping * hessian.diagonal().mean()
    remaining = hessian.diagonal() + added  # the mean squares given the columns that were placed
    lower = torch.zeros_like(hessian)  # R^T but for the order: rows by turn, the last first, columns as in the weight
    turns: list[Tensor] = []
    for start in range(0, columns, _PANEL):
        end = min(start + _PANEL, columns)
        if order is None:
            picked = remaining.argsort(stable=True)[: end - start]
        else:
            picked = order[columns - end : columns - start].flip(0)
        panel = hessian[picked]  # [panel, in]
        panel[torch.arange(end - start, device=panel.device), picked] += added
        panel.addmm_(lower[:start, picked].t(), lower[:start], alpha=-1)
        corner = _cholesky(panel[:, picked])
        if corner is None:
            return None
        panel = _solve_lower(corner, panel)
        panel[:, torch.isinf(remaining)] = 0.0
        panel[:, picked] = corner.t()
        lower[start:end] = panel
        remaining -= panel.square().sum(dim=0)
        remaining[picked] = torch.inf
        turns.append(picked)
    places = torch.cat(turns).flip(0)
    gains = lower[:, places].flip(0).t()  # R
    diagonal = gains.diagonal()
    importance = torch.empty_like(diagonal)
    importance[places] = diagonal.square()
    return Factor(places, gains / diagonal, importance)


def sweep(
    weight: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor | None, factored: Factor, *, block: int
) -> Tensor:
    """The values a_j that the columns have when their turn comes, float32 [out, in], in the weight's own order.

    Rounding them with the same scales gives the codes; what each is rounded to here is bitwise that.

    Args:
        weight: float32 [out, in].
        scheme: The grid.
        scale: In the stored shape and dtype.
        zero_point: In the format's own codes, or None.
        factored: The inputs' factor.
        block: Columns between two matrix products.
    """
    order, gains = factored.order, factored.gains
    code_scale, size = _by_column(scale.float(), scheme, weight.shape)
    value_scale = code_scale
    if scheme.double_quant:
        value_scale, _ = _by_column(nest(scale).dequantize(), scheme, weight.shape)
    zeros = None
    if zero_point is not None:
        zeros, _ = _by_column(stored_zero_point(zero_point, scheme.format), scheme, weight.shape)
    values = weight.t()[order]  # [in, out]: a column of the weight is a row here, in one piece of memory
    columns, rows = values.shape
    errors = torch.empty_like(values)  # d_j
    places = [int(column) // size for column in order]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        original = values[start:end].clone()
        values[start:end].addmm_(gains[:start, start:end].t(), errors[:start])
        for turn in range(start, end):
            value = values[turn]
            value.addmv_(errors[start:turn].t(), gains[start:turn, turn])
            place = places[turn]
            zero = None if zeros is None else zeros[place].view(-1, 1, 1)
            column = value.view(rows, 1, 1)
            scales = code_scale[place].view(-1, 1, 1), value_scale[place].view(-1, 1, 1)
            rounded = grid.rounded(column, *scales, zero, scheme.format)
            torch.sub(original[turn - start], rounded.view(rows), out=errors[turn])
    result = torch.empty_like(values)
    result[order] = values
    return result.t().contiguous()


def target(weight: Tensor, hessian: Tensor, drift: Tensor, damping: float) -> Tensor:
    """The weight whose outputs over the inputs x come nearest to those of `weight` over x', see the module's docstring.

    Args:
        weight: float32 [out, in].
        hessian: float32 [in, in].
        drift: float32 [in, in], as in `Statistics`.
        damping: A share of the mean of the diagonal, with which the Hessian can be factored.

    Returns:
        float32 [out, in]; `weight` itself where there is no drift, or where the sum cannot be factored after all.
    """
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    lower = _cholesky(damped)
    if lower is None or not drift.any():
        return weight
    return weight + torch.cholesky_solve((weight @ drift).t(), lower).t()


def refit(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """The same codes with the scales of least output error, found for one group after another.

    With d the error of a row and v the row's codes less the zero point, those of other groups taken for zero, the best
    change of the group's scale is (d H v^T) / (v H v^T). A scale that its dtype cannot hold stays as it was.

    Args:
        weight: float32 [out, in].
        quantized: Its codes; not under double quantization, and with blocks that end where rows do.
        hessian: float32 [in, in].
    """
    scheme = quantized.scheme
    rows, columns = quantized.shape
    size = scheme.group_size or columns
    scale = quantized.scales().view(-1, columns // size).clone()  # [out, groups], or [1, 1]
    values = quantized.dequantize()
    places = values.view(rows, -1, size) / scale.unsqueeze(-1)
    errors = weight - values
    for group in range(columns // size):
        inside = slice(group * size, (group + 1) * size)
        codes, old = places[:, group], scale[:, group]
        strength = ((codes @ hessian[inside, inside]) * codes).sum(dim=1)
        pull = ((errors @ hessian[:, inside]) * codes).sum(dim=1)
        if scheme.granularity is Granularity.TENSOR:
            strength, pull = strength.sum().view(1), pull.sum().view(1)
        new = (old + pull / strength).to(scheme.scale_dtype).float()
        new = torch.where(torch.isfinite(new) & (new * old > 0), new, old)
        errors[:, inside] += (old - new).unsqueeze(1) * codes
        scale[:, group] = new
    return replace(quantized, scale=scale.view(quantized.scales().shape).to(scheme.scale_dtype))


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower triangle L of L L^T, or None where the matrix is not positive definite."""
    lower, failed = cast(tuple[Tensor, Tensor], torch.linalg.cholesky_ex(matrix))  # pyright: ignore[reportUnknownMemberType]
    return lower if failed.item() == 0 and torch.isfinite(lower).all() else None


def _solve_lower(lower: Tensor, right: Tensor) -> Tensor:
    """X of `lower X = right`."""
    return cast(Tensor, torch.linalg.solve_triangular(lower, right, upper=False))  # pyright: ignore[reportUnknownMemberType]


def _rounded(
    weight: Tensor, scheme: Scheme, hessian: Tensor, factored: Factor, *, block: int, passes: int, where: str
) -> QuantizedTensor:
    """The best pass, its scales refitted."""
    seen, best = weight, None
    for _ in range(passes):
        scale, zero_point = searched_scale(seen, scheme, factored.importance, where=where)
        seen = sweep(weight, scheme, scale, zero_point, factored, block=block)
        result = quantize_tensor(seen, scheme, scale=scale, zero_point=zero_point, where=where)
        error = _column_error(seen, result, factored.importance)
        if best is None or error < best[0]:
            best = error, result
    assert best is not None
    whole_rows = scheme.granularity is not Granularity.BLOCK or weight.shape[1] % (scheme.group_size or 1) == 0
    return refit(weight, best[1], hessian) if whole_rows and not scheme.double_quant else best[1]


def _column_error(values: Tensor, quantized: QuantizedTensor, importance: Tensor) -> float:
    """Sum over columns of R_jj^2 * |a_j - q_j|^2, the damped output error."""
    difference = values - quantized.dequantize()
    return (difference.square_().sum(dim=0, dtype=torch.float64) @ importance.double()).item()


def _output_error(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor, limit: float = math.inf) -> float:
    """`output_error` with products in float32, and some value above `limit` as soon as it is known to be above."""
    restored, rows = quantized.dequantize(), weight.shape[0]
    total = 0.0
    for part in row_chunks(rows, weight.shape[1]):
        error = weight[part] - restored[part]
        total += ((error @ hessian) * error).sum(dtype=torch.float64).item() / rows
        if total > limit:
            break
    return total


def _by_column(parts: Tensor, scheme: Scheme, shape: torch.Size) -> tuple[Tensor, int]:
    """Scales or zero points as [groups, out] (or [1, 1]), and how many columns in a row share one."""
    rows, columns = shape
    size = _groups_of(scheme, columns)
    if size == 1 and scheme.granularity is Granularity.BLOCK:  # blocks reach over the ends of rows
        each = spread(parts).expand(-1, 1, scheme.group_size or 1).reshape(-1)[: rows * columns]
        return each.view(rows, columns).t().contiguous(), 1
    return parts.view(-1, columns // size).t().contiguous(), size


def _groups_of(scheme: Scheme, columns: int) -> int:
    """How many columns in a row share their scales; 1 where a codebook's blocks reach over the ends of rows."""
    size = scheme.group_size or columns
    return size if columns % size == 0 else 1


def _factor_damped(hessian: Tensor, size: int, order: Order, damping: float, *, where: str) -> tuple[Factor, float]:
    """The factor, and the damping that it took."""
    turns = _turns(hessian.diagonal(), size, order)
    used = damping
    while (factored := factor(hessian, used, turns)) is None:
        if used >= _MOST_DAMPING:
            raise DataError(
                f"{where}: the Hessian is not that of any inputs (it has negative eigenvalues); gather it in float32 "
                "or float64 as the mean of x^T x"
            )
        used = min(max(2 * used, 0.001), _MOST_DAMPING)
    return factored, used


def _turns(mean_square: Tensor, size: int, order: Order) -> Tensor | None:
    """The order of the columns; None where it is found with the factor."""
    if order == "pivot":
        return None
    if order == "none":
        return torch.arange(len(mean_square), device=mean_square.device)
    if order == "activation":
        return mean_square.argsort(descending=True, stable=True)
    groups = mean_square.view(-1, size)
    inner = groups.argsort(dim=1, descending=True, stable=True)
    outer = groups.amax(dim=1).argsort(descending=True, stable=True)
    starts = torch.arange(0, len(mean_square), size, device=mean_square.device)
    return (inner + starts.unsqueeze(1))[outer].reshape(-1)


def _check_options(order: str, block: int, damping: float, passes: int | None) -> None:
    orders = get_args(Order)
    if order not in orders:
        raise UsageError(f"gptq: order {order!r} is unknown{nearest(order, orders)}; there are {', '.join(orders)}")
    if block < 1 or (passes is not None and passes < 1):
        raise UsageError(f"gptq: block and passes are at least 1, got {block} and {passes}")
    if not 0 <= damping <= _MOST_DAMPING:
        raise UsageError(f"gptq: damping lies from 0 to {_MOST_DAMPING:g}, got {damping:g}")


def _check_hessian(statistics: Statistics | None, weight: Tensor, *, where: str) -> Tensor:
    """The Hessian, float32 [in, in], on the weight's device."""
    if statistics is None or statistics.hessian is None:
        raise DataError(f"{where}: GPTQ needs second moments of the inputs; calibrate on data, or take search or hqq")
    if weight.ndim != 2:
        raise FormatError(f"{where}: a weight is [out, in], got {list(weight.shape)}")
    check_statistics(statistics, weight, where=where)
    hessian, columns = statistics.hessian, weight.shape[1]
    if tuple(hessian.shape) != (columns, columns):
        raise DataError(f"{where}: a Hessian of {list(hessian.shape)} for a weight with {columns} inputs")
    if not all_finite(hessian):
        raise DataError(f"{where}: the Hessian holds NaN or infinite values; calibrate on finite activations")
    if (hessian.diagonal() < 0).any():
        raise DataError(f"{where}: the Hessian has negative mean squares on its diagonal; it is not that of any inputs")
    return hessian.to(device=weight.device, dtype=torch.float32)

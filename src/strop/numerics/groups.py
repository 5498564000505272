"""A weight cut into the groups that share a scale, and put together again.

Every scheme is worked on in one shape, [rows, groups, size], a view of the weight where that is possible:

    TENSOR, CHANNEL   [out, 1, in]             scales [1, 1, 1] or [out, 1, 1]
    GROUP             [out, in / size, size]   scales [out, in / size, 1]
    BLOCK             [blocks, 1, size]        scales [blocks, 1, 1]; a short last block is filled with zeros

Scales are stored without the last dimension, and a codebook's as [blocks]: `spread` gives them the shape above.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from strop.errors import FormatError
from strop.numerics.scheme import Granularity, Scheme

CHUNK_VALUES = 1 << 19
"""Values worked on at a time, so that float32 scratch stays within a core's cache and memory within bounds."""


def plan_shape(shape: tuple[int, ...], scheme: Scheme, *, where: str = "weight") -> tuple[int, ...]:
    """Shape of the scales that a weight of `shape` gets; refuses before any work what cannot be cut into groups.

    Raises:
        FormatError: The shape is not [out, in] of at least one value, or the group size does not divide `in`; the
            message names the divisors nearest to the group size.

    >>> from strop.numerics.scheme import parse_scheme
    >>> plan_shape((8, 64), parse_scheme("int4-g32"))
    (8, 2)
    """
    if len(shape) != 2 or min(shape) < 1:
        raise FormatError(f"{where}: {scheme.name} quantizes weights of shape [out, in], got {list(shape)}")
    rows, columns = shape
    size = scheme.group_size
    if scheme.granularity is Granularity.GROUP and size is not None and columns % size:
        fixed = scheme.super_size is not None or scheme.has_power_scale
        raise FormatError(
            f"{where}: in_features {columns} is not divisible by group size {size} ({scheme.name}); "
            f"{_smaller(columns) if fixed else _advice(columns, size)}"
        )
    if scheme.super_size is not None and columns % scheme.super_size:
        raise FormatError(
            f"{where}: in_features {columns} is not divisible by the superblock of {scheme.super_size} that "
            f"{scheme.name} has; {_smaller(columns)}"
        )
    return scheme.scale_shape((rows, columns))


def split(weight: Tensor, scheme: Scheme) -> Tensor:
    """Cut a weight [out, in] into [rows, groups, size] (table above), dtype kept; no copy unless a block is short."""
    rows, columns = weight.shape
    if scheme.granularity is Granularity.BLOCK and scheme.group_size is not None:
        flat = weight.reshape(-1)
        missing = -flat.numel() % scheme.group_size
        if missing:
            flat = torch.nn.functional.pad(flat, (0, missing))
        return flat.view(-1, 1, scheme.group_size)
    return weight.reshape(rows, -1, scheme.group_size or columns)


def restore(groups: Tensor, shape: tuple[int, int]) -> Tensor:
    """Undo `split`: [rows, groups, size] to [out, in], without what filled a short last block."""
    rows, columns = shape
    return groups.reshape(-1)[: rows * columns].view(rows, columns)


def spread(scale: Tensor) -> Tensor:
    """Scales or zero points as stored, in the shape that multiplies [rows, groups, size]."""
    return scale.view(-1, 1, 1) if scale.ndim == 1 else scale.unsqueeze(-1)


def group_range(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, float32: [rows, groups, size] to two of [rows, groups].

    NaN where a group holds one. Two passes, because `aminmax` over a short dimension takes ten times as long.
    """
    low = torch.empty(groups.shape[:-1], dtype=torch.float32, device=groups.device)
    high = torch.empty_like(low)
    for rows in row_chunks(groups.shape[0], groups[0].numel()):
        piece = groups[rows].float()
        torch.amin(piece, dim=-1, out=low[rows])
        torch.amax(piece, dim=-1, out=high[rows])
    return low, high


def row_chunks(rows: int, values_per_row: int, *, values: int = CHUNK_VALUES) -> Iterator[slice]:
    """Slices of `rows` rows that hold about `values` values each, at least one row."""
    step = max(1, values // values_per_row)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def rows_of(spread_scale: Tensor, rows: slice) -> Tensor:
    """The part of `spread` scales that belongs to a slice of rows; one scale for all rows belongs to each."""
    return spread_scale if spread_scale.shape[0] == 1 else spread_scale[rows]


def _smaller(columns: int) -> str:
    """What a width takes that a format with fixed groups does not fit."""
    return "use gguf:q4_0 or int4-g32" if columns % 32 == 0 else f"with int4, {_advice(columns, 32)}"


def _advice(columns: int, size: int) -> str:
    """Which group sizes would do: the divisors around the one asked for, or none."""
    divisors = [number for number in range(2, columns) if columns % number == 0]
    near = sorted(sorted(divisors, key=lambda number: abs(number - size))[:3])
    if not near:
        return "no group size divides it; quantize per channel"
    listed = ", ".join(str(number) for number in near[:-1])
    return f"use {listed} or {near[-1]}" if listed else f"use {near[-1]}"

"""Weights to the bytes of GGUF's blocks and back, a bounded piece at a time.

`encode` writes f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q4_k and q6_k; `decode` reads these and q2_k, q3_k and
q5_k, so that files of others open. The layouts of the blocks stand in `small_blocks` and `k_blocks`.

Without importance q4_0 to q8_0 are llama.cpp's own bytes; q4_k and q6_k are searched for the least squared error. With
an importance of every column (an importance matrix: the mean square of what the column multiplies) all but q8_0, and
the floats, keep the least sum of importance * (weight - stored)^2 that their searches find.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strop.errors import FileFormatError, FormatError
from strop.files.gguf.small_blocks import SMALL_BLOCKS, SmallBlock
from strop.files.gguf.types import type_named

_PIECE = 1 << 19
"""Values worked on at a time."""

_FLOATS: Mapping[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def encode(weight: Tensor, type_name: str, importance: Tensor | None = None, *, where: str = "weight") -> Bytes:
    """The bytes of a weight in a type.

    Args:
        weight: Any float dtype and shape, rows last: [out, in], or [experts, out, in].
        type_name: One of `ENCODED`.
        importance: Of every column, float [in], or of every expert's [experts, in]; not negative. What has no room for
            it (floats, q8_0) goes without.
        where: The weight's name, for messages.

    Returns:
        uint8, the shape of the weight with bytes for a row last.

    Raises:
        FormatError: The type is not written, the row is not a whole number of blocks, the weight holds NaN or infinite
            values, or one too large for the type's float16.
    """
    kind = type_named(type_name)
    if kind.name not in ENCODED:
        raise FormatError(f"{where}: {kind.name} is not written; these are: {', '.join(ENCODED)}")
    if not weight.is_floating_point():
        raise FormatError(f"{where}: a weight has a float dtype, got {weight.dtype}")
    *lead, columns = weight.shape or (1,)
    row_bytes = kind.row_bytes(columns, where=where)
    rows = weight.detach().reshape(-1, columns)
    importances = None if importance is None else _importance_of_rows(importance, weight, where)
    result = np.empty((rows.shape[0], row_bytes), np.uint8)
    step = max(1, _PIECE // columns)
    for start in range(0, rows.shape[0], step):
        piece = rows[start : start + step].float().cpu()
        if not torch.isfinite(piece).all():
            raise FormatError(
                f"{where}: holds NaN or infinite values; no type stores them without spoiling what is beside"
            )
        some = None if importances is None else importances(start, start + piece.shape[0])
        found = _encoded(piece, kind.name, some, where)
        result[start : start + step] = found.view(piece.shape[0], row_bytes).numpy()
    return result.reshape(*lead, row_bytes)


def decode(
    raw: Bytes, type_name: str, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, where: str = "weight"
) -> Tensor:
    """The weight that bytes stand for, computed in float32 and rounded once to `dtype`.

    Args:
        raw: uint8, as `encode` returns it or `GgufFile.raw`.
        type_name: One of `DECODED`.
        shape: The weight's, rows last.
        dtype: Of the result.
        where: The weight's name, for messages.

    Raises:
        FormatError: The type is not read.
        FileFormatError: The bytes are not those of a weight of this shape.
    """
    kind = type_named(type_name)
    if kind.name not in DECODED:
        raise FormatError(f"{where}: {kind.name} is not read; these are: {', '.join(DECODED)}")
    needed = kind.nbytes(shape, where=where)
    flat = np.ascontiguousarray(raw).reshape(-1)
    if flat.dtype != np.uint8 or flat.size != needed:
        raise FileFormatError(
            f"{where}: {flat.size:,} items of {flat.dtype}; {kind.name} {list(shape)} takes {needed:,} bytes"
        )
    blocks = flat.reshape(-1, kind.block_bytes)
    result = torch.empty((blocks.shape[0], kind.block), dtype=dtype)
    step = max(1, _PIECE // kind.block)
    for start in range(0, blocks.shape[0], step):
        piece = torch.from_numpy(blocks[start : start + step].copy())  # a mapped file is read-only and unaligned
        result[start : start + step] = _decoded(piece, kind.name)
    return result.reshape(tuple(shape))


def _encoded(piece: Tensor, name: str, importance: Tensor | None, where: str) -> Tensor:
    """Rows as bytes, uint8; importance float32 of the rows' shape, or None."""
    if name in _FLOATS:
        stored = piece.to(_FLOATS[name])
        if not torch.isfinite(stored).all():
            largest = piece.abs().max().item()
            raise FormatError(f"{where}: holds {largest:g}, which {name} cannot hold; use bf16 or f32")
        return stored.view(torch.uint8)
    small = SMALL_BLOCKS[name]
    return _small_blocks(piece.view(-1, 32), small, where)


def _small_blocks(x: Tensor, small: SmallBlock, where: str) -> Tensor:
    codes, d, m = small.codes(x)
    _check_scales(where, d, m)
    return small.to_bytes(codes, d, m)


def _decoded(blocks: Tensor, name: str) -> Tensor:
    """Blocks of bytes as values, float32 [blocks, values]."""
    if name in _FLOATS:
        return blocks.view(_FLOATS[name]).float()
    return SMALL_BLOCKS[name].values(blocks)


def _check_scales(where: str, *scales: Tensor | None) -> None:
    """Refuse scales that overflowed float16."""
    if not all(scale is None or bool(torch.isfinite(scale).all()) for scale in scales):
        raise FormatError(
            f"{where}: the scale of a block overflows float16, whose largest value is 65504; keep this tensor in f32 "
            "or bf16, or scale the weights down"
        )


def _importance_of_rows(importance: Tensor, weight: Tensor, where: str) -> Callable[[int, int], Tensor]:
    """A function that gives the importances of the rows from one to another, float32 [rows, in]."""
    columns = weight.shape[-1]
    given = importance.detach().float().cpu()
    if given.shape not in ((columns,), (weight.shape[0], columns)) or (given.ndim == 2 and weight.ndim != 3):
        raise FormatError(f"{where}: importance {list(given.shape)} does not fit a weight {list(weight.shape)}")
    if not torch.isfinite(given).all() or (given < 0).any():
        raise FormatError(f"{where}: importances are finite and not negative")
    each = weight.shape[-2] if given.ndim == 2 else max(1, weight.numel() // columns)
    table = given.view(-1, columns)
    return lambda start, end: table[torch.arange(start, end) // each]


ENCODED = (*_FLOATS, *SMALL_BLOCKS)
"""The types that `encode` writes."""

DECODED = (*_FLOATS, *SMALL_BLOCKS)
"""The types that `decode` reads."""

"""Weights to the bytes of GGUF's blocks and back, a bounded piece at a time.

`encode` writes f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q4_k and q6_k; `decode` reads these, q2_k, q3_k, q5_k,
mxfp4 and f64, and through the `gguf` package the types of its codebooks (iq4_xs and its like) and of three values
(tq1_0, tq2_0), so that files of others open. The layouts of the blocks stand in `small_blocks` and `k_blocks`.

Without importance q4_0 to q8_0 are llama.cpp's own bytes; q4_k and q6_k are searched for the least squared error. With
an importance of every column (an importance matrix: the mean square of what the column multiplies) all but q8_0 and
the floats keep the least sum of importance * (weight - stored)^2 that their searches find, never more than plain
rounding leaves.

A `QuantizedTensor` whose grid one of the types has goes there code by code, and back: `transcoding`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from strop.errors import FormatError
from strop.files.gguf.k_blocks import K_BLOCKS, KParts, parts_of, q6_k_bytes
from strop.files.gguf.small_blocks import SMALL_BLOCKS, SmallBlock, mxfp4_values
from strop.files.gguf.transcoding import Bytes, blocks_of, from_raw, q4_k_blocks, transcode
from strop.files.gguf.types import GgmlType, type_named
from strop.methods.base import Statistics
from strop.methods.block_fit import codes_of_step, fit_line, fit_step, search_six_bit
from strop.methods.search import search
from strop.numerics.reductions import all_finite
from strop.numerics.scheme import GGUF_TYPES

_PIECE = 1 << 18
"""Values worked on at a time."""

_FLOATS: Mapping[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

__all__ = ["DECODED", "ENCODED", "decode", "encode", "from_raw", "transcode"]

ENCODED = (*_FLOATS, *SMALL_BLOCKS, "q4_k", "q6_k")
"""The types that `encode` writes."""

_BY_PACKAGE = ("iq2_xxs", "iq2_xs", "iq3_xxs", "iq1_s", "iq4_nl", "iq3_s", "iq2_s", "iq4_xs", "iq1_m")
_BY_PACKAGE += ("tq1_0", "tq2_0", "nvfp4")

DECODED = (*_FLOATS, "f64", *SMALL_BLOCKS, *K_BLOCKS, "mxfp4", *_BY_PACKAGE)
"""The types that `decode` reads."""


def encode(weight: Tensor, type_name: str, importance: Tensor | None = None, *, where: str = "weight") -> Bytes:
    """The bytes of a weight in a type.

    Args:
        weight: Any float dtype and shape, rows last: [out, in], or [experts, out, in].
        type_name: One of `ENCODED`.
        importance: Of every column, float [in], or of every expert's [experts, in]; not negative. What has no room for
            it (floats, q8_0) goes without.
        where: The weight's name, for messages.

    Returns:
        uint8, the shape of the weight with the bytes of a row last.

    Raises:
        FormatError: The type is not written, the row is not a whole number of blocks, the weight holds NaN or infinite
            values or one too large for the type, or the importance does not fit the weight.
    """
    kind = type_named(type_name)
    if kind.name not in ENCODED:
        raise FormatError(f"{where}: {kind.name} is not written; these are: {', '.join(ENCODED)}")
    if not weight.is_floating_point():
        raise FormatError(f"{where}: a weight has a float dtype, got {weight.dtype}")
    if not weight.numel():
        raise FormatError(f"{where}: {list(weight.shape)} holds no value at all")
    *lead, columns = weight.shape or (1,)
    row_bytes = kind.row_bytes(columns, where=where)
    rows = weight.detach().reshape(-1, columns)
    result = np.empty((rows.shape[0], row_bytes), np.uint8)
    for part, weights in _parts(weight, importance, kind, where):
        piece = rows[part].float().cpu()
        if not all_finite(piece):
            raise FormatError(
                f"{where}: holds NaN or values that are infinite in float32, which would spoil the block around them"
            )
        result[part] = _encoded(piece, kind.name, weights, where).view(-1, row_bytes).numpy()
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
    blocks = blocks_of(raw, kind, shape, where=where)
    result = torch.empty((blocks.shape[0], kind.block), dtype=dtype)
    step = _PIECE // kind.block
    for start in range(0, blocks.shape[0], step):
        piece = torch.from_numpy(blocks[start : start + step].copy())  # a mapped file is read-only and unaligned
        result[start : start + step] = _decoded(piece, kind.name)
    return result.reshape(tuple(shape))


def _parts(
    weight: Tensor, importance: Tensor | None, kind: GgmlType, where: str
) -> Iterator[tuple[slice, Tensor | None]]:
    """Slices of the rows, bounded, and the importance that all rows of a slice share, float32 [in]."""
    columns = weight.shape[-1] if weight.ndim else 1
    total = weight.numel() // columns
    tables, each = [None], total
    if importance is not None:
        given = importance.detach().float().cpu()
        experts = weight.shape[0] if weight.ndim == 3 else 0
        if tuple(given.shape) not in ((columns,), (experts, columns)):
            raise FormatError(f"{where}: importance {list(given.shape)} does not fit a weight {list(weight.shape)}")
        if not torch.isfinite(given).all() or (given < 0).any():
            raise FormatError(f"{where}: importances must be finite and not negative; calibrate on finite activations")
        tables = [_livened(one, kind) for one in given.view(-1, columns)]
        each = total // len(tables)
    step = max(1, _PIECE // columns)
    for number, table in enumerate(tables):
        for start in range(number * each, (number + 1) * each, step):
            yield slice(start, min(start + step, (number + 1) * each)), table


def _livened(importance: Tensor, kind: GgmlType) -> Tensor:
    """Importances in which no group that shares a scale counts for nothing at all: it would be stored as zeros."""
    if kind.block == 1:
        return importance
    groups = importance.view(-1, 16 if kind.name == "q6_k" else 32)
    least = 1e-6 * importance.mean() if importance.any() else torch.tensor(1.0)
    return torch.where(groups.amax(-1, keepdim=True) > 0, groups, least).view(-1)


def _encoded(piece: Tensor, name: str, importance: Tensor | None, where: str) -> Tensor:
    """Rows float32 [rows, in] as bytes, uint8; importance float32 [in], or None."""
    if name in _FLOATS:
        stored = piece.to(_FLOATS[name])
        if not all_finite(stored):
            largest = piece.abs().max().item()
            raise FormatError(f"{where}: holds {largest:g}, which {name} cannot hold; use f32")
        return stored.view(torch.uint8)
    if name == "q4_k":
        statistics = None if importance is None else Statistics(importance, rows=1)
        return q4_k_blocks(search(piece, GGUF_TYPES[name], statistics, where=where))
    weights = torch.ones(1) if importance is None else importance
    if name == "q6_k":
        weights = weights.view(1, -1, 16, 16) if importance is not None else weights.view(1, 1, 1, 1)
        d, sub_scales, codes = search_six_bit(piece.view(piece.shape[0], -1, 16, 16), weights)
        _check_scales(where, d)
        return q6_k_bytes(KParts(codes.view(-1, 16, 16), d.view(-1, 1), sub_scales.view(-1, 16)))
    small = SMALL_BLOCKS[name]
    codes, d, m = small.codes(piece.view(-1, 32))
    if importance is not None and small.bits < 8:
        codes, d, m = _searched(piece, small, importance, codes, d, m)
    _check_scales(where, d, m)
    return small.to_bytes(codes, d, m)


def _searched(
    piece: Tensor, small: SmallBlock, importance: Tensor, codes: Tensor, d: Tensor, m: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Blocks whose scales are searched; those given where the search gains nothing."""
    x, weights = piece.view(piece.shape[0], -1, 32), importance.view(1, -1, 32)
    if small.has_minimum:
        scale, offset = fit_line(x, weights, small.bits)
        new_d, new_m = scale.view(-1, 1).half(), offset.view(-1, 1).half()
        places = (x.view(-1, 32) - new_m.float()) / torch.where(new_d == 0, torch.inf, new_d.float())
        new_codes = places.round_().clamp_(0, (1 << small.bits) - 1).nan_to_num_(0.0)
    else:
        new_d, new_m = fit_step(x, weights, small.bits).view(-1, 1).half(), None
        new_codes = codes_of_step(x.view(-1, 32), new_d.view(-1).float(), small.bits) + small.middle
    new_codes = new_codes.to(torch.uint8)
    spread = weights.expand_as(x).reshape(-1, 32)
    old, new = (
        (spread * (small.values_of(*parts) - x.view(-1, 32)).square()).sum(-1, keepdim=True)
        for parts in ((codes, d, m), (new_codes, new_d, new_m))
    )
    better = new < old
    kept_m = None if m is None or new_m is None else torch.where(better, new_m, m)
    return torch.where(better, new_codes, codes), torch.where(better, new_d, d), kept_m


def _decoded(blocks: Tensor, name: str) -> Tensor:
    """Blocks of bytes as values, float32 [blocks, values]."""
    if name in _FLOATS:
        return blocks.view(_FLOATS[name]).float()
    if name == "f64":
        return blocks.view(torch.float64).float()
    if name == "mxfp4":
        return mxfp4_values(blocks)
    if name in SMALL_BLOCKS:
        return SMALL_BLOCKS[name].values(blocks)
    return parts_of(name, blocks).values() if name in K_BLOCKS else _decoded_by_package(blocks, name)


def _decoded_by_package(blocks: Tensor, name: str) -> Tensor:
    """What the `gguf` package makes of blocks whose tables of values it has."""
    from gguf import GGMLQuantizationType, quants

    with np.errstate(all="ignore"):  # any bytes may stand for infinite scales
        values = quants.dequantize(blocks.numpy(), GGMLQuantizationType[name.upper()])
    return torch.from_numpy(values.astype(np.float32, copy=False))


def _check_scales(where: str, *scales: Tensor | None) -> None:
    """Refuse scales that overflowed float16."""
    if not all(scale is None or bool(torch.isfinite(scale).all()) for scale in scales):
        raise FormatError(
            f"{where}: the scale of a block overflows float16, whose largest value is 65504; keep this tensor in f32 "
            "or bf16, or scale the weights down"
        )

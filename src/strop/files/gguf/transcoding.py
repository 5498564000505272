"""`QuantizedTensor` to the blocks of GGUF and back, code by code: what one holds exactly the other has bit for bit.

    ours                                    GGUF          value
    2 to 4 bits, symmetric, groups of 32 n  q4_0          d * q, q from -8 to 7
    5 bits, likewise                        q5_0          q from -16 to 15
    6 to 8 bits, likewise                   q8_0          q from -128 to 127
    q4_k, mxfp4                             q4_k, mxfp4   the same numbers in another order
    int3-g16-sf32                           q3_k          only from GGUF: d * sc, exact in float32, is our scale
    int6-g16-sf32                           q6_k          likewise

A type is exact where every scale is one that float16 holds: always with float16 scales, seldom with others. Larger
groups (or whole rows and tensors) repeat their scale in every block. Zero points and codebooks have no such type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strop.errors import FileFormatError, FormatError
from strop.files.gguf.k_blocks import KParts, parts_of, q4_k_bytes
from strop.files.gguf.small_blocks import SMALL_BLOCKS, mxfp4_bytes, mxfp4_parts
from strop.files.gguf.types import TYPES, GgmlType, type_named
from strop.numerics.formats import IntFormat
from strop.numerics.groups import row_chunks
from strop.numerics.packing import pack, packed_size
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Granularity, Mode, Scheme, parse_scheme
from strop.numerics.superblock import SuperScale

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_SCHEMES = {
    "q4_0": parse_scheme("int4-g32-full"),
    "q5_0": parse_scheme("int5-g32-full"),
    "q8_0": parse_scheme("int8-g32"),
    "q4_k": parse_scheme("q4_k"),
    "mxfp4": parse_scheme("mxfp4"),
    "q3_k": parse_scheme("int3-g16-sf32"),
    "q6_k": parse_scheme("int6-g16-sf32"),
}


def scheme_of(type_name: str) -> Scheme | None:
    """The scheme that `from_raw` gives a type, or None where none of ours holds its codes and scales."""
    return _SCHEMES.get(type_name.lower())


def transcode(quantized: QuantizedTensor) -> tuple[str, Bytes] | None:
    """The type that holds a quantized weight exactly, and its bytes.

    Returns:
        The type's name and uint8 [out, bytes of a row], whose decoded values are `quantized.dequantize()` bit for bit
        (but for the sign of a zero in mxfp4); None where no type does.
    """
    name = _type_for(quantized.scheme, quantized.shape[1])
    if name is None or quantized.group_index is not None:
        return None
    rows, columns = quantized.shape
    if name == "q4_k":
        return name, q4_k_blocks(quantized).view(rows, -1).cpu().numpy()
    if name == "mxfp4":
        assert quantized.scale is not None
        found = mxfp4_bytes(quantized.stored_codes().view(-1, 32), quantized.scale.view(torch.uint8).view(-1, 1))
        return name, found.view(rows, -1).cpu().numpy()
    scales = quantized.scales().cpu()
    exact = scales.half()
    if not exact.float().equal(scales):  # NaN is not equal to itself
        return None
    form, small = quantized.scheme.format, SMALL_BLOCKS[name]
    assert isinstance(form, IntFormat)
    per_row = exact.expand(rows, -1)
    d = per_row.repeat_interleave(columns // per_row.shape[1] // 32, dim=1)  # [out, blocks]
    result = np.empty((rows, TYPES[name].row_bytes(columns)), np.uint8)
    codes = quantized.stored_codes().cpu()
    for part in row_chunks(rows, columns):
        signed = codes[part].to(torch.int16) + form.qmin
        stored = signed.to(torch.int8).view(torch.uint8) if name == "q8_0" else (signed + small.middle).to(torch.uint8)
        found = small.to_bytes(stored.view(-1, 32), d[part].reshape(-1, 1), None)
        result[part] = found.view(signed.shape[0], -1).numpy()
    return name, result


def from_raw(raw: Bytes, type_name: str, shape: tuple[int, int], *, where: str = "weight") -> QuantizedTensor:
    """A weight of a GGUF file as one of ours, its codes kept; `dequantize` gives the file's values bit for bit.

    Args:
        raw: uint8, as `GgufFile.raw` gives it.
        type_name: q4_0, q5_0, q8_0, q4_k, q3_k, q6_k or mxfp4: those for which `scheme_of` has a scheme.
        shape: (out, in).
        where: The weight's name, for messages.

    Raises:
        FormatError: None of our schemes holds the type.
        FileFormatError: The bytes are not those of a weight of this shape, or a scale is NaN or infinite.
    """
    kind = type_named(type_name)
    scheme = scheme_of(kind.name)
    if scheme is None:
        raise FormatError(
            f"{where}: none of strop's schemes holds the codes of {kind.name}; those of {', '.join(_SCHEMES)} are "
            "kept. Decode it and quantize again, which is a second, lossy step"
        )
    blocks = blocks_of(raw, kind, shape, where=where)
    bits = scheme.bits
    codes = torch.empty((shape[0], packed_size(shape[1], bits)), dtype=torch.uint8)
    scales: list[Tensor] = []
    supers: list[tuple[Tensor, ...]] = []
    for part in row_chunks(shape[0], shape[1]):
        per_row = shape[1] // kind.block
        piece = torch.from_numpy(blocks[part.start * per_row : part.stop * per_row].copy())
        rows = part.stop - part.start
        if kind.name in SMALL_BLOCKS:
            found, d, _ = SMALL_BLOCKS[kind.name].from_bytes(piece)
            stored = found ^ 128 if bits == 8 else found  # int8 to the code less -128
            _check_finite(d, kind, where)
            scales.append(d.view(rows, -1))
        elif kind.name == "mxfp4":
            stored, exponents = mxfp4_parts(piece)
            scale = exponents.contiguous().view(scheme.scale_dtype)
            _check_finite(scale.float(), kind, where)
            scales.append(scale.view(rows, -1))
        else:
            parts = parts_of(kind.name, piece)
            _check_finite(parts.d, kind, where)
            if parts.dmin is not None and parts.sub_minimum is not None:
                _check_finite(parts.dmin, kind, where)
                stored = parts.codes
                supers.append(
                    tuple(one.reshape(rows, -1) for one in (parts.d, parts.dmin, parts.sub_scale, parts.sub_minimum))
                )
            else:
                stored = (parts.codes + (1 << (bits - 1))).view(torch.uint8)
                scales.append(parts.scales().view(rows, -1))
        codes[part] = pack(stored.reshape(rows, shape[1]), bits)
    if scheme.super_size is not None:
        d, dmin, sub_scale, sub_minimum = (torch.cat(one) for one in zip(*supers, strict=True))
        super_scale = SuperScale.of_codes(d, dmin, sub_scale, sub_minimum)
        return QuantizedTensor(codes, None, None, scheme, shape, super_scale=super_scale)
    return QuantizedTensor(codes, torch.cat(scales), None, scheme, shape)


def q4_k_blocks(quantized: QuantizedTensor) -> Tensor:
    """The superblocks of a weight whose scheme is Q4_K, uint8 [superblocks, 144]."""
    assert quantized.super_scale is not None
    d, dmin, sub_scale, sub_minimum = quantized.super_scale.unpacked()
    codes = quantized.stored_codes().view(-1, 8, 32)
    sub_scale, sub_minimum = (part.view(-1, 8).to(torch.uint8) for part in (sub_scale, sub_minimum))
    return q4_k_bytes(KParts(codes, d.reshape(-1, 1), sub_scale, dmin.reshape(-1, 1), sub_minimum))


def blocks_of(raw: Bytes, kind: GgmlType, shape: Sequence[int], *, where: str = "weight") -> Bytes:
    """The bytes of a weight cut into blocks, uint8 [blocks, bytes].

    Raises:
        FileFormatError: They are not those of a weight of this shape.
    """
    needed = kind.nbytes(shape, where=where)
    flat = np.ascontiguousarray(raw).reshape(-1)
    if flat.dtype != np.uint8 or flat.size != needed:
        raise FileFormatError(
            f"{where}: {flat.size:,} items of {flat.dtype}; {kind.name} {list(shape)} takes {needed:,} bytes"
        )
    return flat.reshape(-1, kind.block_bytes)


def _type_for(scheme: Scheme, columns: int) -> str | None:
    """The type whose codes hold a scheme's, before its scales are looked at."""
    if scheme.activations is not None:  # no type rounds what it is multiplied with
        return None
    if scheme.super_size is not None:
        return "q4_k"
    if scheme.has_power_scale:
        return "mxfp4"
    form = scheme.format
    if not isinstance(form, IntFormat) or scheme.mode is Mode.ASYMMETRIC or scheme.granularity is Granularity.BLOCK:
        return None
    size = scheme.group_size or columns
    if size % 32 or columns % 32:
        return None
    return "q4_0" if form.bits <= 4 else "q5_0" if form.bits == 5 else "q8_0"


def _check_finite(scale: Tensor, kind: GgmlType, where: str) -> None:
    if not torch.isfinite(scale).all():
        raise FileFormatError(f"{where}: a scale of its {kind.name} blocks is NaN or infinite; the file is damaged")

"""The superblocks of 256 values, Q2_K to Q6_K: codes, scales and bytes.

    Q2_K  16 bytes: sc low, m high, of 16 values each; 64 of codes; d, dmin f16      d * sc * q - dmin * m
    Q3_K  32 bytes of high bits, 64 of low codes, 12 of 6-bit sc; d f16              d * (sc - 32) * (q - 4)
    Q4_K  d, dmin f16; 12 bytes of 6-bit sc and m of 32 values each; 128 of codes    d * sc * q - dmin * m
    Q5_K  d, dmin f16; 12 bytes as above; 32 of high bits, 128 of low codes          d * sc * q - dmin * m
    Q6_K  128 bytes of low codes, 64 of high codes, 16 int8 sc of 16 values; d f16   d * sc * (q - 32)

Codes lie interleaved: of 64 values (128 in Q2_K, Q3_K and Q6_K) byte j holds values j, j + 32, ..., lowest bits first;
in Q6_K's low codes byte j holds values j and j + 64. The twelve bytes of Q4_K and Q5_K hold eight sc and eight m:

    byte j      sc[j]     | high bits of sc[j + 4]     j: 0 to 3
    byte j + 4  m[j]      | high bits of m[j + 4]
    byte j + 8  low bits of sc[j + 4] and, above, of m[j + 4]

Both products are exact in float32, and so any order of the operations gives llama.cpp's values, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KParts:
    """What superblocks hold: value = scale * code - minimum.

    Attributes:
        codes: uint8 or int8 [superblocks, groups, values].
        d: float16 [superblocks, 1].
        sub_scale: Of every group, uint8 or int8 [superblocks, groups].
        dmin: float16 [superblocks, 1], or None without minimums.
        sub_minimum: Of every group, uint8 [superblocks, groups], or None.
    """

    codes: Tensor
    d: Tensor
    sub_scale: Tensor
    dmin: Tensor | None = None
    sub_minimum: Tensor | None = None

    def scales(self) -> Tensor:
        """The step of every group, float32 [superblocks, groups], exact."""
        return self.d.float() * self.sub_scale.float()

    def values(self) -> Tensor:
        """What the superblocks stand for, float32 [superblocks, 256]."""
        values = self.codes.float() * self.scales().unsqueeze(-1)
        if self.dmin is not None and self.sub_minimum is not None:
            values -= (self.dmin.float() * self.sub_minimum.float()).unsqueeze(-1)
        return values.view(-1, 256)


def parts_of(name: str, blocks: Tensor) -> KParts:
    """What superblocks of a type hold; blocks uint8 [superblocks, bytes]."""
    return _PARTS[name](blocks)


def q4_k_bytes(parts: KParts) -> Tensor:
    """Superblocks of Q4_K as they lie in a file, uint8 [superblocks, 144]."""
    assert parts.dmin is not None
    assert parts.sub_minimum is not None
    sc, m = parts.sub_scale, parts.sub_minimum
    packed = torch.cat(
        [
            sc[:, :4] | sc[:, 4:] >> 4 << 6,
            m[:, :4] | m[:, 4:] >> 4 << 6,
            (sc[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
        ],
        dim=-1,
    )
    pairs = parts.codes.view(-1, 4, 2, 32)
    codes = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return torch.cat([_two_bytes(parts.d), _two_bytes(parts.dmin), packed, codes.view(-1, 128)], dim=-1)


def q6_k_bytes(parts: KParts) -> Tensor:
    """Superblocks of Q6_K as they lie in a file, uint8 [superblocks, 210]; codes int8 from -32 to 31."""
    codes = (parts.codes + 32).to(torch.uint8)
    low = (codes & 15).view(-1, 2, 2, 64)
    low = low[:, :, 0] | low[:, :, 1] << 4
    high = (codes >> 4).view(-1, 2, 4, 32)
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    sub_scale = parts.sub_scale.view(torch.uint8)
    return torch.cat([low.view(-1, 128), high.view(-1, 64), sub_scale, _two_bytes(parts.d)], dim=-1)


def _q2_k(blocks: Tensor) -> KParts:
    scales = blocks[:, :16]
    codes = _spread(blocks[:, 16:80], 32, 2).view(-1, 16, 16)
    return KParts(codes, _half(blocks, 80), scales & 15, _half(blocks, 82), scales >> 4)


def _q3_k(blocks: Tensor) -> KParts:
    low = _spread(blocks[:, 32:96], 32, 2).view(torch.int8)
    high = _spread(blocks[:, :32], 32, 1).view(torch.int8)  # a bit that is not set takes 4 off
    low_scale = _spread(blocks[:, 96:104], 8, 4)
    high_scale = _spread(blocks[:, 104:108], 4, 2)
    scale = (low_scale | high_scale << 4).view(torch.int8) - 32
    return KParts((low - (1 - high) * 4).view(-1, 16, 16), _half(blocks, 108), scale)


def _q4_k(blocks: Tensor) -> KParts:
    sub_scale, sub_minimum = _six_bits(blocks[:, 4:16])
    codes = _spread(blocks[:, 16:], 32, 4).view(-1, 8, 32)
    return KParts(codes, _half(blocks, 0), sub_scale, _half(blocks, 2), sub_minimum)


def _q5_k(blocks: Tensor) -> KParts:
    sub_scale, sub_minimum = _six_bits(blocks[:, 4:16])
    codes = _spread(blocks[:, 48:], 32, 4) | _spread(blocks[:, 16:48], 32, 1) << 4
    return KParts(codes.view(-1, 8, 32), _half(blocks, 0), sub_scale, _half(blocks, 2), sub_minimum)


def _q6_k(blocks: Tensor) -> KParts:
    codes = _spread(blocks[:, :128], 64, 4) | _spread(blocks[:, 128:192], 32, 2) << 4
    codes = codes.view(torch.int8) - 32
    sub_scale = blocks[:, 192:208].contiguous().view(torch.int8)
    return KParts(codes.view(-1, 16, 16), _half(blocks, 208), sub_scale)


_PARTS: Mapping[str, Callable[[Tensor], KParts]] = {
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}

K_BLOCKS = tuple(_PARTS)
"""The types of superblocks."""


def _spread(packed: Tensor, width: int, bits: int) -> Tensor:
    """Codes of interleaved bytes: of each `width` bytes first the lowest bits of all, then the next; [n, codes]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(1, 1, -1, 1)
    rows = packed.shape[0]
    return (packed.reshape(rows, -1, 1, width) >> shifts & (1 << bits) - 1).view(rows, -1)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight sc and eight m of twelve bytes, uint8 [n, 8] each."""
    first, second, third = packed.split(4, dim=-1)
    sub_scale = torch.cat([first & 63, (third & 15) | first >> 6 << 4], dim=-1)
    sub_minimum = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=-1)
    return sub_scale, sub_minimum


def _half(blocks: Tensor, place: int) -> Tensor:
    """The float16 at a place of every block, [n, 1]."""
    return blocks[:, place : place + 2].contiguous().view(torch.float16)


def _two_bytes(half: Tensor) -> Tensor:
    return half.contiguous().view(torch.uint8)

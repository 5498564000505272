"""The blocks of 32 values: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0, codes and bytes.

    Q4_0  d f16, 16 bytes       byte j holds codes j (low) and j + 16 (high)          d * (q - 8)
    Q4_1  d f16, m f16, 16 bytes                                                      d * q + m
    Q5_0  d f16, 4 bytes, 16 bytes   bit j of the first four is bit 4 of code j       d * (q - 16)
    Q5_1  d f16, m f16, 4 bytes, 16 bytes                                             d * q + m
    Q8_0  d f16, 32 int8                                                              d * q

Plain rounding is llama.cpp's, bit for bit (`quantize_row_q4_0_ref` and its like in ggml-quants.c): codes are chosen
against the scale before it is rounded to float16, and halves go up. With an importance for every column, d (and m) are
searched for the least weighted squared error, and codes are the nearest ones on the grid that is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SmallBlock:
    """One type: bits of a code, and whether a minimum is stored beside the scale."""

    bits: int
    has_minimum: bool

    @property
    def middle(self) -> int:
        """The code that stands for zero where there is no minimum."""
        return 0 if self.has_minimum else 1 << (self.bits - 1)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Plain rounding of blocks, float32 [blocks, 32]: codes uint8, d and m float16 [blocks, 1]."""
        if self.bits == 8:
            return _codes_of_8_bits(x)
        top = (1 << self.bits) - 1
        if self.has_minimum:
            low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
            d = (high - low) / top
            places, half = (x - low) * _inverse(d), 0.5
        else:
            low = None
            d = _extreme(x) / -self.middle
            places, half = x * _inverse(d), self.middle + 0.5
        codes = places.add_(half).clamp_(0, top).to(torch.uint8)  # truncates
        return codes, d.half(), None if low is None else low.half()

    def to_bytes(self, codes: Tensor, d: Tensor, m: Tensor | None) -> Tensor:
        """Blocks as they lie in a file, uint8 [blocks, bytes]."""
        parts = [d.view(torch.uint8)] if m is None else [d.view(torch.uint8), m.view(torch.uint8)]
        if self.bits == 8:
            return torch.cat([*parts, codes], dim=-1)
        if self.bits == 5:
            parts.append(_bits_to_bytes(codes >> 4))
        low = codes & 15
        return torch.cat([*parts, low[:, :16] | low[:, 16:] << 4], dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Undo `to_bytes`: codes uint8 [blocks, 32], d and m float16 [blocks, 1]."""
        place = 4 if self.has_minimum else 2
        scales = blocks[:, :place].contiguous().view(torch.float16)
        rest = blocks[:, place:]
        if self.bits == 8:
            codes = rest
        else:
            low = rest[:, -16:]
            codes = torch.cat([low & 15, low >> 4], dim=-1)
            if self.bits == 5:
                codes |= _bytes_to_bits(rest[:, :4]) << 4
        return codes, scales[:, :1], scales[:, 1:] if self.has_minimum else None

    def values(self, blocks: Tensor) -> Tensor:
        """What blocks stand for, float32 [blocks, 32]."""
        codes, d, m = self.from_bytes(blocks)
        if self.bits == 8:
            return codes.view(torch.int8).float() * d.float()
        values = (codes.float() - self.middle) * d.float()
        return values if m is None else values.add_(m.float())


SMALL_BLOCKS = {
    "q4_0": SmallBlock(4, has_minimum=False),
    "q4_1": SmallBlock(4, has_minimum=True),
    "q5_0": SmallBlock(5, has_minimum=False),
    "q5_1": SmallBlock(5, has_minimum=True),
    "q8_0": SmallBlock(8, has_minimum=False),
}
"""The types by their names."""


def _codes_of_8_bits(x: Tensor) -> tuple[Tensor, Tensor, None]:
    """Q8_0: d = largest magnitude / 127, codes int8 as uint8, halves away from zero."""
    d = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).abs_() / 127  # 0, never -0
    places = x * _inverse(d)
    size = places.abs()
    whole = size.floor()
    whole += (size.sub_(whole).mul_(2)).floor_()  # not floor(size + 0.5): that sum may round up to a whole number
    return (whole * places.sign()).to(torch.int8).view(torch.uint8), d.half(), None


def _extreme(x: Tensor) -> Tensor:
    """The value of largest magnitude of each block, with its sign, the first of two that are equal; [blocks, 1]."""
    high, low = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    extreme = torch.where(high > -low, high, low)
    tied = (high == -low).squeeze(-1)
    if tied.any():
        some = x[tied]
        extreme[tied] = some.gather(-1, some.abs().argmax(-1, keepdim=True))
    return extreme


def _inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where float32 has no such number."""
    inverse = 1 / d
    return torch.where(torch.isfinite(inverse), inverse, 0.0)


def _bits_to_bytes(bits: Tensor) -> Tensor:
    """32 bits of each block, uint8 0 or 1 [blocks, 32], as four bytes."""
    places = torch.arange(8, dtype=torch.uint8)
    return (bits.view(-1, 4, 8) << places).sum(-1, dtype=torch.uint8)


def _bytes_to_bits(packed: Tensor) -> Tensor:
    """Undo `_bits_to_bytes`."""
    places = torch.arange(8, dtype=torch.uint8)
    return (packed.unsqueeze(-1) >> places & 1).view(-1, 32)

"""Codes of any tensor in groups along its last dimension, each with an offset: what a cache of keys and values holds.

    x ~ low + scale * code,    code 0 to 2^bits - 1,    low = min of the group, scale = (max - min) / (2^bits - 1)

    packed  uint8    [..., ceil(size * bits / 8)], least significant first (`packing`)
    scale   float16  [..., size / group]
    low     float16  [..., size / group]

The grid need not hold zero (keys have channels far from it). Codes are chosen against the stored scale and offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from strop.errors import ModelError
from strop.numerics.packing import pack, packed_size, unpack

_META_BYTES = 4  # scale and low


@dataclass(frozen=True, eq=False)
class Grouped:
    """The parts that the module's docstring gives, of values [..., size]."""

    packed: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    size: int

    @classmethod
    def of(cls, x: Tensor, *, bits: int, group: int) -> Grouped:
        """Round x [..., size] in groups of `group`, which divides size.

        Raises:
            ModelError: A value is not finite, or beyond float16's range.
        """
        size = x.shape[-1]
        groups = x.float().reshape(*x.shape[:-1], size // group, group)  # [..., size] -> [..., groups, group]
        lowest, highest = groups.amin(dim=-1), groups.amax(dim=-1)
        low = lowest.half()
        scale = ((highest - lowest) / ((1 << bits) - 1)).half().clamp(min=2.0**-24)
        if not (torch.isfinite(low).all() and torch.isfinite(highest.half()).all() and torch.isfinite(scale).all()):
            raise ModelError(
                "the key-value cache: keys or values are not finite, or beyond 65504, which float16 scales cannot "
                "reach; leave the cache in full precision (no --kv-cache), or look for what broke the model"
            )
        codes = ((groups - low.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)).round_().clamp_(0, (1 << bits) - 1)
        return cls(pack(codes.to(torch.uint8).flatten(-2), bits), scale, low, bits, size)

    def values(self, dtype: torch.dtype) -> Tensor:
        """What the codes stand for, [..., size], computed in float32."""
        codes = unpack(self.packed, self.bits, self.size).float()
        groups = codes.view(*self.scale.shape, -1)  # [..., size] -> [..., groups, group]
        return (groups * self.scale.float().unsqueeze(-1) + self.low.float().unsqueeze(-1)).flatten(-2).to(dtype)

    def joined(self, other: Grouped, dim: int) -> Grouped:
        """Both, one after the other along a dimension that is not the last."""
        parts = zip(self.tensors(), other.tensors(), strict=True)
        return Grouped(*(torch.cat(pair, dim=dim) for pair in parts), bits=self.bits, size=self.size)

    def chosen(self, rows: Tensor) -> Grouped:
        """The rows of the first dimension that `rows` [count] names."""
        return Grouped(*(part.index_select(0, rows) for part in self.tensors()), bits=self.bits, size=self.size)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """packed, scale, low."""
        return self.packed, self.scale, self.low


def grouped_bytes(size: int, *, bits: int, group: int) -> int:
    """Bytes of `size` values in groups of `group`.

    >>> grouped_bytes(64, bits=4, group=32)
    40
    """
    return packed_size(size, bits) + _META_BYTES * (size // group)

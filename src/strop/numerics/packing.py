"""Codes of 2 to 8 bits to bytes and back: dense, least significant bit first, along the last dimension.

Code k of a row occupies the bits k * bits to (k + 1) * bits - 1 of that row's bytes; bit 0 of a row is the least
significant bit of its first byte. Two 4-bit codes a, b make the byte `b << 4 | a`; 3-bit codes a to h make three bytes:

    bit    7  6  5  4  3  2  1  0
    byte 0 c1 c0 b2 b1 b0 a2 a1 a0
    byte 1 f0 e2 e1 e0 d2 d1 d0 c2
    byte 2 h2 h1 h0 g2 g1 g0 f2 f1

A row is padded with zero bits to a whole byte. Other orders (the high nibble first, 32-bit words) belong to `files`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take: ceil(count * bits / 8)."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes densely along the last dimension.

    Args:
        codes: Integers in [0, 2^bits), any integer dtype, [..., count].
        bits: 2 to 8.

    Returns:
        uint8 [..., ceil(count * bits / 8)].

    >>> pack(torch.tensor([1, 2, 3]), 4).tolist()  # 0x21, 0x03
    [33, 3]
    """
    slots, size = _period(bits)
    count = codes.shape[-1]
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes.clone()
    if count % slots:
        codes = torch.nn.functional.pad(codes, (0, slots - count % slots))
    periods = codes.reshape(*codes.shape[:-1], -1, slots)  # [..., count] -> [..., periods, slots]
    packed = torch.zeros((*periods.shape[:-1], size), dtype=torch.uint8, device=codes.device)
    for slot in range(slots):
        byte, shift = divmod(slot * bits, 8)
        packed[..., byte] |= periods[..., slot] << shift  # uint8: what is shifted out belongs to the next byte
        if shift + bits > 8:
            packed[..., byte + 1] |= periods[..., slot] >> (8 - shift)
    return packed.flatten(-2)[..., : packed_size(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: uint8 [..., ceil(count * bits / 8)].
        bits: 2 to 8.
        count: Number of codes in a row.

    Returns:
        uint8 codes [..., count].

    >>> unpack(torch.tensor([33, 3], dtype=torch.uint8), 4, 3).tolist()
    [1, 2, 3]
    """
    slots, size = _period(bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_size(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits are {packed_size(count, bits)} uint8 bytes a row, "
            f"got {packed.shape[-1]} of {packed.dtype}"
        )
    if bits == 8:
        return packed.clone()
    if packed.shape[-1] % size:
        packed = torch.nn.functional.pad(packed, (0, size - packed.shape[-1] % size))
    periods = packed.reshape(*packed.shape[:-1], -1, size)  # [..., bytes] -> [..., periods, size]
    codes = torch.empty((*periods.shape[:-1], slots), dtype=torch.uint8, device=packed.device)
    for slot in range(slots):
        byte, shift = divmod(slot * bits, 8)
        target = codes[..., slot]
        torch.bitwise_right_shift(periods[..., byte], shift, out=target)
        if shift + bits > 8:
            target |= periods[..., byte + 1] << (8 - shift)
        if shift + bits != 8:
            target &= (1 << bits) - 1
    return codes.flatten(-2)[..., :count].contiguous()


def _period(bits: int) -> tuple[int, int]:
    """Codes and bytes after which the bit pattern repeats: (2, 1) at 4 bits, (8, 3) at 3 bits."""
    if not 2 <= bits <= 8:
        raise ValueError(f"packing takes 2 to 8 bits a code, got {bits}")
    common = math.gcd(bits, 8)
    return 8 // common, bits // common

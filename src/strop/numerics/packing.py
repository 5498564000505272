"""Codes of 2 to 8 bits to bytes and back: dense, least significant bit first, along the last dimension.

Code k of a row occupies the bits k * bits to (k + 1) * bits - 1 of that row's bytes; bit 0 of a row is the least
significant bit of its first byte. Two 4-bit codes a, b make the byte `b << 4 | a`; 3-bit codes a to h make three bytes:

    bit    7  6  5  4  3  2  1  0
    byte 0 c1 c0 b2 b1 b0 a2 a1 a0
    byte 1 f0 e2 e1 e0 d2 d1 d0 c2
    byte 2 h2 h1 h0 g2 g1 g0 f2 f1

A row is padded with zero bits to a whole byte. Other orders (the high nibble first, 32-bit words) belong to `files`.

2 and 4 bits, which training steps unpack again and again, are spread within whole machine words; the other widths are
shifted slot by slot. Both give the same bytes (on a big-endian machine only the second is used).
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

# A byte of codes spread over a word with a code in each byte: the shifts that move its halves (and theirs) apart.
_WORDS: dict[int, tuple[torch.dtype, tuple[int, ...], int]] = (
    {4: (torch.int16, (4,), 0x0F0F), 2: (torch.int32, (12, 6), 0x03030303)} if sys.byteorder == "little" else {}
)


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
    if bits in _WORDS:
        return _gather_words(codes, bits)
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
    if bits in _WORDS:
        codes = _spread_words(packed, bits)
        return codes if codes.shape[-1] == count else codes[..., :count].contiguous()
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


def _spread_words(packed: Tensor, bits: int) -> Tensor:
    """Each byte of codes into a word, one code a byte: 4 bits 0xBA to 0x0B0A, 2 bits 0bDDCCBBAA to 0x0D0C0B0A."""
    dtype, shifts, mask = _WORDS[bits]
    words = packed.to(dtype)
    for shift in shifts:
        words |= words << shift
    words &= mask
    return words.view(torch.uint8)


def _gather_words(codes: Tensor, bits: int) -> Tensor:
    """Undo `_spread_words`; the last dimension is a whole number of words."""
    dtype, shifts, _ = _WORDS[bits]
    if not codes.is_contiguous() or codes.storage_offset() % dtype.itemsize:
        codes = codes.clone(memory_format=torch.contiguous_format)
    words = codes.view(dtype)
    for shift in reversed(shifts):
        words = words | words >> shift
    return words.to(torch.uint8)  # keeps the lowest byte


def _period(bits: int) -> tuple[int, int]:
    """Codes and bytes after which the bit pattern repeats: (2, 1) at 4 bits, (8, 3) at 3 bits."""
    if not 2 <= bits <= 8:
        raise ValueError(f"packing takes 2 to 8 bits a code, got {bits}")
    common = math.gcd(bits, 8)
    return 8 // common, bits // common

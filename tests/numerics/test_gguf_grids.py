"""Q4_0 and Q8_0: what our codes and scales mean in GGUF's blocks, decoded from the bytes by the layout alone."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from strop.methods import search
from strop.numerics import QuantizedTensor, Scheme, parse_format, quantize_tensor

from .schemes import hard_weights, overflows

Q4_0, Q8_0 = parse_format("gguf:q4_0").scheme, parse_format("gguf:q8_0").scheme


def blocks_of(quantized: QuantizedTensor) -> list[bytes]:
    """Blocks of 32 values: float16 d, then Q4_0's nibbles q + 8 (byte j: j low, j + 16 high) or Q8_0's int8 q."""
    assert quantized.scale is not None
    assert quantized.scale.dtype == torch.float16
    blocks = []
    pairs = zip(quantized.scale.view(-1).tolist(), quantized.stored_codes().view(-1, 32).tolist(), strict=True)
    for scale, codes in pairs:
        if quantized.scheme == Q4_0:
            body = bytes(codes[j] | codes[j + 16] << 4 for j in range(16))
        else:
            body = struct.pack("<32b", *(code - 128 for code in codes))
        blocks.append(struct.pack("<e", scale) + body)
    return blocks


def decoded(block: bytes) -> list[float]:
    (d,) = struct.unpack_from("<e", block)
    if len(block) == 18:
        return [d * ((block[2 + j % 16] >> 4 * (j // 16) & 15) - 8) for j in range(32)]
    return [d * q for q in struct.unpack_from("<32b", block, 2)]


def check(quantized: QuantizedTensor) -> None:
    blocks = blocks_of(quantized)
    assert {len(block) for block in blocks} == {18 if quantized.scheme == Q4_0 else 34}
    assert 8 * sum(map(len, blocks)) == quantized.bits_per_weight * quantized.shape[0] * quantized.shape[1]
    values = torch.tensor([value for block in blocks for value in decoded(block)])
    assert values.equal(quantized.dequantize().view(-1))


def test_a_block_of_q4_0_is_the_one_computed_by_hand() -> None:
    """The value of largest magnitude, 4, is code -8, so d is -0.5 (0xb800); 0 is nibble 8 and 1 is -2 + 8 = 6."""
    row = torch.zeros(1, 32)
    row[0, 0], row[0, 1], row[0, 16] = 4.0, 1.0, -3.5
    (block,) = blocks_of(quantize_tensor(row, Q4_0))
    assert block.hex() == "00b8" + "f0" + "86" + "88" * 14
    assert decoded(block)[:2] == [4.0, 1.0]
    assert decoded(block)[16] == -3.5


@given(hard_weights(96))
@settings(deadline=None, max_examples=40)
def test_values_are_those_of_the_bytes(weight: Tensor) -> None:
    for scheme in (Q4_0, Q8_0):
        if not overflows(weight, scheme):
            check(quantize_tensor(weight, scheme))
            check(search(weight, scheme))


@pytest.mark.parametrize("scheme", [Q4_0, Q8_0], ids=["q4_0", "q8_0"])
def test_blocks_of_the_format_are_on_our_grid(scheme: Scheme) -> None:
    """Every value that a block can hold is kept when it is rounded to our grid with the block's own scale."""
    d = torch.tensor([[0.37], [-0.02], [2.0**-24], [60000.0]]).half()
    codes = torch.arange(-8, 8).repeat(2) if scheme == Q4_0 else torch.arange(-128, 128)
    weight = d.float() * codes
    scale = d.repeat(1, codes.numel() // 32)
    assert quantize_tensor(weight, scheme, scale=scale).dequantize().equal(weight)

"""Packing: bytes written by hand, a slow oracle, and round trips of every width and length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.numerics import pack, packed_size, packing, unpack


def pack_by_arithmetic(codes: list[int], bits: int) -> list[int]:
    """One long integer, the first code lowest, cut into bytes: slow and obvious."""
    whole = sum(code << (place * bits) for place, code in enumerate(codes))
    return list(whole.to_bytes(-(-len(codes) * bits // 8), "little"))


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (2, [1, 2, 3, 0], [0b00_11_10_01]),
        (2, [3, 0, 0, 1, 2], [0b01_00_00_11, 0b10]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
        (3, [7, 5, 6], [0b10_101_111, 0b1]),
        (4, [0x1, 0x2, 0xF, 0x0], [0x21, 0x0F]),
        (4, [0xA, 0xB, 0xC], [0xBA, 0x0C]),
        (8, [0, 1, 128, 255], [0, 1, 128, 255]),
    ],
)
def test_bytes_are_those_written_by_hand(bits: int, codes: list[int], expected: list[int]) -> None:
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == expected
    assert packed.dtype == torch.uint8
    assert unpack(packed, bits, len(codes)).tolist() == codes


@st.composite
def code_rows(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits = draw(st.integers(2, 8))
    count = draw(st.integers(1, 40))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)
    return bits, draw(st.lists(row, min_size=1, max_size=3))


@given(code_rows())
@settings(deadline=None, max_examples=200)
def test_packing_is_dense_and_undone_by_unpacking(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    codes = torch.tensor(rows, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.tolist() == [pack_by_arithmetic(row, bits) for row in rows]
    assert packed.shape[-1] == packed_size(codes.shape[-1], bits)
    assert torch.equal(unpack(packed, bits, codes.shape[-1]), codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_machine_words_and_single_slots_give_the_same_bytes(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 2**bits, (3, 37), generator=torch.Generator().manual_seed(0))
    by_words = pack(codes, bits)
    unpacked_by_words = unpack(by_words, bits, 37)
    monkeypatch.setattr(packing, "_WORDS", {})  # as on a big-endian machine
    assert torch.equal(pack(codes, bits), by_words)
    assert torch.equal(unpack(by_words, bits, 37), unpacked_by_words)


@pytest.mark.parametrize("bits", range(2, 9))
def test_strided_and_offset_codes_pack_alike(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (16, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(pack(codes.t(), bits), pack(codes.t().contiguous(), bits))
    assert torch.equal(pack(codes.view(-1)[1:17], bits), pack(codes.view(-1)[1:17].clone(), bits))
    packed = pack(codes, bits)
    wider = torch.cat([packed, packed], dim=1)
    assert torch.equal(unpack(wider[:, : packed.shape[1]], bits, 9), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_input_is_left_alone_and_the_output_is_new(bits: int) -> None:
    codes = torch.zeros(8, dtype=torch.uint8)
    packed = pack(codes, bits)
    packed += 1
    assert codes.sum() == 0
    codes = unpack(packed, bits, 8)
    codes += 1
    assert packed.tolist() == [1] * bits


def test_wrong_widths_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 to 8 bits"):
        pack(torch.zeros(4, dtype=torch.uint8), 1)
    with pytest.raises(ValueError, match="3 codes of 4 bits are 2 uint8 bytes a row, got 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, 3)
    with pytest.raises(ValueError, match=r"got 2 of torch\.int32"):
        unpack(torch.zeros(2, dtype=torch.int32), 4, 3)

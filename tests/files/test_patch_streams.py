"""The streams of a patch: any numbers come back, near the entropy bound; whatever does not fit is refused."""

from __future__ import annotations

import lzma
import math
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.errors import FileFormatError
from strop.files.gguf import patch_streams
from strop.files.gguf.block_fields import Field, Plane
from strop.files.gguf.patch_rest import pack_rest, unpack_rest
from strop.files.gguf.patch_streams import (
    ANEW,
    MOVED_BYTES,
    MOVED_RICE,
    STAYED,
    Cursor,
    number,
    pack_field,
    stream,
    unpack_field,
)

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 16, 32, 64)


def cursor(data: bytes) -> Cursor:
    return Cursor(memoryview(data), 0, len(data), "a.patch")


class Bare(Field):
    """A field whose blocks are its numbers."""

    def read(self, blocks: np.ndarray) -> np.ndarray:
        return blocks


def field_of(bits: int) -> Field:
    return Bare("codes", bits, (Plane(0, max(1, bits // 8), 1, (0,), bits),))


def unpacked(packed: bytes, before: np.ndarray, field: Field) -> tuple[np.ndarray, int]:
    place = cursor(packed)
    numbers, count = unpack_field(place, before, field, "t")
    assert place.place == len(packed)
    return before if numbers is None else numbers, count


@given(st.integers(0, (1 << 63) - 1))
def test_a_whole_number_comes_back(value: int) -> None:
    assert cursor(number(value)).number("n", value) == value
    if value:
        with pytest.raises(FileFormatError, match="at most"):
            cursor(number(value)).number("n", value - 1)


def test_a_whole_number_has_an_end() -> None:
    with pytest.raises(FileFormatError, match="more than 63 bits"):
        cursor(b"\xff" * 40).number("n", 1 << 70)
    with pytest.raises(FileFormatError, match="0 are left"):
        cursor(b"\xff").number("n", 1000)


@given(st.binary(max_size=300) | st.integers(0, 5000).map(bytes))
def test_a_stream_comes_back_and_is_hardly_longer_than_its_bytes(raw: bytes) -> None:
    packed = stream(raw)
    assert cursor(packed).stream(len(raw), "s") == raw
    assert len(packed) <= len(raw) + 3


def sealed_stream(kind: int, packed: bytes) -> bytes:
    return bytes([kind]) + number(len(packed)) + packed


def bomb(kind: str) -> bytes:
    raw = bytes(100 << 20)
    if kind == "deflate":
        deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        return sealed_stream(1, deflate.compress(raw) + deflate.flush())
    return sealed_stream(2, lzma.compress(raw, lzma.FORMAT_RAW, filters=patch_streams._LZMA))


@pytest.mark.parametrize("kind", ["deflate", "lzma"])
def test_of_a_bomb_no_more_is_made_than_it_should_hold(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    packed = bomb(kind)

    class Watched:
        def __init__(self, inner: object) -> None:
            self.inner = inner

        def decompress(self, data: object, most: int) -> bytes:
            made = self.inner.decompress(data, most)
            asked.append(len(made))
            return made

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    deflate, unpack = zlib.decompressobj, lzma.LZMADecompressor
    monkeypatch.setattr(zlib, "decompressobj", lambda *given, **named: Watched(deflate(*given, **named)))
    monkeypatch.setattr(lzma, "LZMADecompressor", lambda *given, **named: Watched(unpack(*given, **named)))
    with pytest.raises(FileFormatError, match="does not hold the 1,000 bytes"):
        cursor(packed).stream(1000, "s")
    assert asked == [1001]


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (b"", "0 are left"),
        (b"\x04\x00", "the kind of s is 4"),
        (b"\x00\x04abc", "s takes 4 bytes, and 3 are left"),
        (b"\x00\x09abc", "the length of s is 9; at most 4"),
        (b"\x00\x03abc", "does not hold the 5 bytes"),
        (b"\x00\x06abcdef", "does not hold the 5 bytes"),
        (b"\x01\x03\x07bc", "cannot be unpacked"),
        (b"\x02\x03abc", "cannot be unpacked"),
        (b"\x03\x01a", "does not hold the 5 bytes"),
        (sealed_stream(1, stream(b"aaaaaaaaaaaaaaaaaaaa")[2:]), "does not hold the 5 bytes"),
    ],
)
def test_a_stream_that_is_none_is_refused(packed: bytes, said: str) -> None:
    with pytest.raises(FileFormatError, match=said):
        cursor(packed).stream(5, "s")


def test_a_stream_with_something_after_its_end_is_refused() -> None:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = deflate.compress(b"abcde") + deflate.flush()
    assert cursor(sealed_stream(1, packed)).stream(5, "s") == b"abcde"
    with pytest.raises(FileFormatError, match="does not hold"):
        cursor(sealed_stream(1, packed + b"x")).stream(5, "s")
    with pytest.raises(FileFormatError, match="does not hold"):
        cursor(sealed_stream(1, packed[:-1])).stream(5, "s")


@st.composite
def two_lots(draw: st.DrawFn) -> tuple[int, np.ndarray, np.ndarray]:
    bits = draw(st.sampled_from(WIDTHS))
    field = field_of(bits)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    count = draw(st.integers(1, 4000))
    before = rng.integers(0, 1 << bits, count, np.uint64, endpoint=False) if bits < 64 else rng.bytes(8 * count)
    before = np.frombuffer(before, np.uint64) if isinstance(before, bytes) else before
    density = draw(st.sampled_from([0.0, 0.0005, 0.003, 0.02, 0.2, 0.6, 1.0]))
    largest = draw(st.sampled_from([1, 2, 300, (1 << 63) - 1]))
    moves = rng.integers(-largest, largest, count, np.int64, endpoint=True).astype(np.uint64)
    after = np.where(rng.random(count) < density, before + moves, before) & np.uint64((1 << bits) - 1)
    return bits, before.astype(field.dtype), after.astype(field.dtype)


@given(two_lots())
def test_any_numbers_come_back(lots: tuple[int, np.ndarray, np.ndarray]) -> None:
    bits, before, after = lots
    packed, moved = pack_field(before, after, field_of(bits))
    again, counted = unpacked(packed, before, field_of(bits))
    assert (again == after).all()
    assert again.dtype == after.dtype
    assert moved == counted == np.count_nonzero(before != after)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_largest_moves_come_back(bits: int) -> None:
    ends = [0, (1 << bits) - 1, (1 << bits) >> 1, ((1 << bits) >> 1) - 1]
    before = np.array([one for one in ends for _ in ends] * 100, field_of(bits).dtype)
    after = np.array(ends * len(ends) * 100, field_of(bits).dtype)
    assert (unpacked(pack_field(before, after, field_of(bits))[0], before, field_of(bits))[0] == after).all()


@pytest.mark.parametrize("density", [0.005, 0.01, 0.02, 0.05, 0.2])
def test_moves_by_one_at_random_cost_at_most_a_twentieth_more_than_their_entropy(density: float) -> None:
    rng = np.random.default_rng(3)
    before = rng.integers(1, 15, 1 << 18, np.uint8)
    moved = rng.random(before.size) < density
    after = np.where(moved, before + rng.choice([-1, 1], before.size), before).astype(np.uint8)
    packed, count = pack_field(before, after, field_of(4))
    n, m = before.size, int(moved.sum())
    bound = (math.lgamma(n + 1) - math.lgamma(m + 1) - math.lgamma(n - m + 1)) / math.log(2) + m
    assert count == m
    assert bound / 8 < len(packed) < 1.05 * bound / 8
    if density == 0.02:
        assert len(packed) < 1.01 * bound / 8


def test_numbers_that_have_nothing_in_common_cost_hardly_more_than_themselves() -> None:
    rng = np.random.default_rng(4)
    before, after = rng.integers(0, 16, (2, 1 << 16), np.uint8)
    packed, _ = pack_field(before, after, field_of(4))
    assert packed[0] == ANEW
    assert len(packed) < 1.02 * before.size / 2  # deflate's mark for the end is a seventeenth code


def test_each_way_is_used_where_it_is_the_shortest() -> None:
    rng = np.random.default_rng(5)
    before = rng.integers(0, 16, 1 << 16, np.uint8)
    evenly = np.where(rng.random(before.size) < 0.02, before ^ 1, before)
    mixed = before.copy()
    mixed[:5000] ^= (rng.random(5000) < 0.3).astype(np.uint8)
    mixed[5000:] ^= (rng.random(before.size - 5000) < 0.003).astype(np.uint8)
    ways = [pack_field(before, after, field_of(4))[0][0] for after in (before, evenly, mixed)]
    assert ways == [STAYED, MOVED_RICE, MOVED_BYTES]


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        ("04", "how it is kept is 4"),
        ("01 0b", "how many moved is 11; at most 10"),
        ("01 00 00 00 0000 0000 0000 0000", "the gaps are not those of 0 of 10"),
        ("01 01 05", "k is 5; at most 4"),
        ("01 01 03 02", "the length is 2; at most 1"),
        ("01 01 00 02 0002ffc0 0000 000100 000100", "the gaps are not those of 1 of 10"),  # gap 10
        ("01 01 00 01 0001ff 0000 000100 000100", "the gaps are not those of 1 of 10"),  # no end
        ("02 01 01 0001ff 000100 000100", "the gaps are not those of 1 of 10"),  # goes on
        ("02 01 01 00010a 000100 000100", "the gaps are not those of 1 of 10"),  # gap 10
        ("02 02 01 000105 000100 00020000", "the gaps are not those of 2 of 10"),
        ("02 01 01 000105 000100 00020000", "the sizes does not hold the 1 bytes"),
        ("03 000100", "the numbers does not hold the 10 bytes"),
    ],
)
def test_streams_that_are_not_those_of_the_numbers_are_refused(packed: str, said: str) -> None:
    with pytest.raises(FileFormatError, match=rf"^a.patch: at byte \d+: t: .*{said}"):
        unpack_field(cursor(bytes.fromhex(packed)), np.arange(10, dtype=np.uint8), field_of(4), "t")


def test_a_field_is_these_bytes() -> None:
    """Numbers 3, 4 and 290 moved, by 1, -2 and 8: gaps 3, 0 and 285, signs 010, sizes 0, 1 and 7."""
    before = np.zeros(300, np.uint8)
    after = before.copy()
    after[[3, 4, 290]] = 1, 14, 8
    moves = "0001 40  0003 000107"
    in_bytes = bytes.fromhex("02 03 04  0004 0300ff1e" + moves)
    # k = 6: quotients 0, 0 and 4 as 0 0 11110, then 000011 000000 011101
    in_rice = bytes.fromhex("01 03 06 01  0001 3c  0003 0c0740" + moves)
    assert pack_field(before, after, field_of(4)) == (in_bytes, 3)
    for packed in (in_bytes, in_rice):
        again, count = unpacked(packed, before, field_of(4))
        assert (again == after).all()
        assert count == 3


@given(
    st.binary(max_size=400),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 200), st.binary(max_size=30)), max_size=6),
)
def test_any_rest_comes_back(before: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    after = before
    for place, length, fresh in edits:
        after = after[:place] + fresh + after[place + length :]
    packed, new = pack_rest(before, after)
    place = cursor(packed)
    assert unpack_rest(place, before, len(after)) == (after, new)
    assert place.place == len(packed)


def test_a_text_that_changed_leaves_what_lies_around_it() -> None:
    rng = np.random.default_rng(6)
    start, end = rng.bytes(100_000), rng.bytes(2_000_000)
    packed, new = pack_rest(start + b"one name" + end + b"1", start + b"quite another name" * 9 + end + b"2")
    assert new < 300
    assert len(packed) < 400


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        ("8102", "the number of copies is 257"),
        ("01 0b 00 00", "a copy is 11; at most 10"),
        ("01 05 06 00 00 0000", "reaches past"),
        ("01 00 05 01 00 0000", "reaches past"),
        ("01 00 09 00 00 0000", "reaches past"),
        ("01 00 05 00 00 0000", "make 5 bytes, 8 are needed"),
        ("01 00 08 00 01 000161", "make 8 bytes, 8 are needed"),
    ],
)
def test_copies_that_do_not_fit_are_refused(packed: str, said: str) -> None:
    with pytest.raises(FileFormatError, match=said):
        unpack_rest(cursor(bytes.fromhex(packed)), b"0123456789", 8)

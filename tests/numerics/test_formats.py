"""Formats: ranges, bit fields and values, against torch's casts, `struct` and bitsandbytes' tables."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.numerics import FORMATS, CodebookFormat, FloatFormat, IntFormat

FLOATS = ["fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2"]


def float_format(name: str) -> FloatFormat:
    form = FORMATS[name]
    assert isinstance(form, FloatFormat)
    return form


def codebook_format(name: str) -> CodebookFormat:
    form = FORMATS[name]
    assert isinstance(form, CodebookFormat)
    return form


def test_the_formats_that_were_asked_for_are_there() -> None:
    integers = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)}
    assert set(FORMATS) == integers | {"fp32", "fp16", "bf16", "fp8", "fp8_e4m3", "fp8_e5m2", "mxfp4", "nf4", "fp4"}
    assert FORMATS["fp8"] is FORMATS["fp8_e4m3"]


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_hold_two_to_the_bits_codes_from_qmin_to_qmax(bits: int) -> None:
    signed, unsigned = FORMATS[f"int{bits}"], FORMATS[f"uint{bits}"]
    assert isinstance(signed, IntFormat)
    assert isinstance(unsigned, IntFormat)
    assert (signed.qmin, signed.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (unsigned.qmin, unsigned.qmax) == (0, 2**bits - 1)
    assert len(signed.values()) == len(unsigned.values()) == 2**bits


@pytest.mark.parametrize("name", FLOATS)
def test_float_limits_are_those_of_torch(name: str) -> None:
    form = float_format(name)
    limits = torch.finfo(form.dtype)
    assert form.bits == limits.bits
    assert form.max_value == limits.max
    assert form.min_normal == limits.smallest_normal
    assert form.min_subnormal == limits.smallest_normal * limits.eps


def test_seven_point_three_two_in_half_precision() -> None:
    """1 sign, 5 exponent, 10 significand bits: not "7" and ".32" but 1.830078125 * 2^2."""
    bits = float_format("fp16").decompose(7.32)
    assert bits.fields == ("0", "10001", "1101010010")
    assert (bits.power, bits.fraction) == (2, 1.830078125)
    assert bits.stored == 7.3203125 == struct.unpack("<e", struct.pack("<e", 7.32))[0]
    assert bits.error == 7.3203125 - 7.32


def test_seven_point_three_two_in_single_precision() -> None:
    bits = float_format("fp32").decompose(7.32)
    assert tuple(len(field) for field in bits.fields) == (1, 8, 23)
    assert bits.code == struct.unpack("<I", struct.pack("<f", 7.32))[0]
    assert bits.stored == torch.tensor(7.32, dtype=torch.float32).item()


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None, max_examples=200)
def test_decompose_rounds_as_struct_packs(x: float) -> None:
    for name, letter, code_letter in (("fp16", "e", "H"), ("fp32", "f", "I")):
        bits = float_format(name).decompose(x)
        try:
            packed = struct.pack("<" + letter, x)
        except OverflowError:
            packed = struct.pack("<" + letter, math.copysign(math.inf, x))
        assert bits.code == struct.unpack("<" + code_letter, packed)[0]
        assert bits.stored == struct.unpack("<" + letter, packed)[0]


@given(st.floats(width=32, allow_nan=False))
@settings(deadline=None, max_examples=200)
def test_decompose_rounds_as_torch_casts(x: float) -> None:
    for name in ("bf16", "fp8_e4m3", "fp8_e5m2"):
        form = float_format(name)
        bits = form.decompose(x)
        if not form.has_infinity and abs(x) > form.max_value:
            continue  # torch's versions differ: NaN in the older, saturation in the newer
        cast = torch.tensor(x, dtype=torch.float32).to(form.dtype)
        stored = cast.float().item()
        assert bits.stored == stored
        code = cast.view(torch.uint8 if form.bits == 8 else torch.int16).item() & (2**form.bits - 1)
        assert bits.code == code


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_every_code_of_the_8_bit_floats_means_what_torch_says(name: str) -> None:
    form = float_format(name)
    theirs = torch.arange(256, dtype=torch.uint8).view(form.dtype).float().tolist()
    significands = 2**form.mantissa_bits
    for code, value in enumerate(theirs):
        ours = form.value_of(code >> 7, (code & 127) // significands, code % significands)
        assert ours == value or (math.isnan(ours) and math.isnan(value))
    assert list(form.values()) == sorted({value for value in theirs if math.isfinite(value)})


def test_overflow_is_infinity_where_there_is_one_and_saturates_elsewhere() -> None:
    assert float_format("fp16").decompose(65520.0).stored == math.inf
    assert float_format("fp16").decompose(65519.99).stored == 65504.0
    assert float_format("fp8_e5m2").decompose(-61440.0).stored == -math.inf
    assert float_format("fp8").decompose(1000.0).stored == 448.0
    assert float_format("fp8").decompose(-math.inf).stored == -448.0


@pytest.mark.parametrize("name", FLOATS)
def test_nan_infinity_and_negative_zero_keep_their_kind_where_the_format_has_it(name: str) -> None:
    form = float_format(name)
    assert math.isnan(form.decompose(math.nan).stored)
    assert form.decompose(-0.0).sign == 1
    assert form.decompose(-0.0).stored == 0.0
    assert form.decompose(-math.inf).stored == (-math.inf if form.has_infinity else -form.max_value)


def test_values_of_a_wide_float_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fp32 has 2\^32 codes"):
        float_format("fp32").values()


def test_nf4_has_the_published_levels() -> None:
    published = "-1 -.6962 -.5251 -.3949 -.2844 -.1848 -.0911 0 .0796 .1609 .2461 .3379 .4407 .5626 .7230 1"
    levels = codebook_format("nf4").values()
    assert [round(level, 4) for level in levels] == [float(text) for text in published.split()]
    assert sum(level < 0 for level in levels) == 7
    assert levels[7] == 0.0


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codebooks_equal_those_of_bitsandbytes(name: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.get_4bit_type(name, device="cpu")
    assert torch.equal(torch.tensor(codebook_format(name).levels), theirs)

"""Our codes to GGUF's blocks and back: bit for bit, or not at all."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strop.errors import FileFormatError, FormatError
from strop.files.gguf.blocks import decode, encode, from_raw, transcode
from strop.files.gguf.transcoding import scheme_of
from strop.files.gguf.types import TYPES
from strop.methods import search
from strop.numerics import QuantizedTensor, parse_format, parse_scheme, quantize_tensor
from tests.numerics.schemes import hard_weights, overflows

EXACT = {
    "int4-g32-full": "q4_0",
    "int4-g32": "q4_0",
    "int4-g64-full": "q4_0",
    "int4-g128": "q4_0",
    "int3-g32": "q4_0",
    "int2-g32-full": "q4_0",
    "int4-sf16": "q4_0",
    "int4-tensor-sf16": "q4_0",
    "int4-g32-sbf16": "q4_0",
    "int5-g32": "q5_0",
    "int8-g32": "q8_0",
    "int8-g128": "q8_0",
    "int6-g32-full": "q8_0",
    "q4_k": "q4_k",
    "mxfp4": "mxfp4",
}
"""Schemes and the types that hold them exactly; bfloat16 scales of ordinary size are float16 ones too."""

INEXACT = ("int4-g32-asym", "int8", "int4", "nf4", "fp8", "int4-g16", "int8-a8")

KEPT = ("q4_0", "q5_0", "q8_0", "q4_k", "q3_k", "q6_k", "mxfp4")
"""The types whose codes one of our schemes holds."""


def random_weight(rows: int = 12, columns: int = 512) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """And not just the same values: -0 is not 0."""
    return one.view(torch.int32).equal(other.view(torch.int32))


def same_values(one: Tensor, other: Tensor, name: str) -> bool:
    """The same bits; in mxfp4, whose -0 llama.cpp reads as 0, the same numbers."""
    return one.equal(other) if name == "mxfp4" else same_bits(one, other)


def read_by_gguf(raw: np.ndarray, name: str) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name.upper()]))


@pytest.mark.parametrize(("text", "name"), EXACT.items(), ids=EXACT)
def test_a_grid_that_a_type_has_is_transcoded_bit_for_bit(text: str, name: str) -> None:
    quantized = quantize_tensor(random_weight(), parse_scheme(text))
    found = transcode(quantized)
    assert found is not None
    assert found[0] == name
    assert found[1].shape == (12, TYPES[name].row_bytes(512))
    assert same_values(read_by_gguf(found[1], name), quantized.dequantize(), name)
    assert same_values(decode(found[1], name, (12, 512)), quantized.dequantize(), name)


@given(hard_weights(256), st.sampled_from(["int4-g32-full", "int8-g32", "int5-g32", "q4_k"]))
@settings(deadline=None, max_examples=60)
def test_hard_weights_are_transcoded_bit_for_bit(weight: Tensor, text: str) -> None:
    scheme = parse_scheme(text)
    if text == "q4_k":
        try:
            quantized = search(weight, scheme)
        except FormatError:
            return
    elif overflows(weight, scheme):
        return
    else:
        quantized = quantize_tensor(weight, scheme)
    found = transcode(quantized)
    assert found is not None
    assert same_bits(read_by_gguf(found[1], found[0]), quantized.dequantize())


@pytest.mark.parametrize("text", INEXACT)
def test_a_grid_that_no_type_has_is_left_alone(text: str) -> None:
    assert transcode(quantize_tensor(random_weight(), parse_scheme(text))) is None


def test_scales_of_float32_are_transcoded_only_where_float16_holds_them() -> None:
    weight = random_weight(4, 64)
    weight[:, 0] = 8.0  # the largest: a scale of -1
    scheme = parse_scheme("int4-full")
    found = transcode(quantize_tensor(weight.clamp(-7.9, 8), scheme))
    assert found is not None
    assert found[0] == "q4_0"
    assert transcode(quantize_tensor(weight.clamp(-7.9, 8), parse_scheme("int8-a8"))) is None  # inputs are rounded too
    weight[2, 0] = 8.1
    assert transcode(quantize_tensor(weight.clamp(-7.9, 8.1), scheme)) is None


def test_a_width_of_no_whole_blocks_is_left_alone() -> None:
    assert transcode(quantize_tensor(random_weight(4, 48), parse_scheme("int4-sf16"))) is None


def test_transcoding_is_what_quantizing_gave_and_not_a_second_rounding() -> None:
    """Searched codes differ from those that encoding the rounded weight would choose."""
    quantized = search(random_weight(), parse_format("gguf:q4_0").scheme)
    found = transcode(quantized)
    assert found is not None
    assert not np.array_equal(found[1], encode(quantized.dequantize(), "q4_0"))


def random_blocks(name: str, rows: int = 6, seed: int = 0) -> np.ndarray:
    """Blocks of any bytes whose float16 numbers are finite."""
    kind = TYPES[name]
    raw = np.random.default_rng(seed).integers(0, 256, (rows * 2, kind.block_bytes), dtype=np.uint8)
    if name == "mxfp4":
        raw[:, 0] = raw[:, 0] // 2 + 64  # exponents that float32 has, whatever they multiply
        return raw.reshape(rows, -1)
    for place in {"q4_k": (0, 2), "q3_k": (108,), "q6_k": (208,)}.get(name, (0,)):
        raw[:, place + 1] &= 0xBF  # not the largest exponent
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("name", KEPT)
def test_codes_of_a_file_are_kept(name: str) -> None:
    raw, shape = random_blocks(name), (6, 2 * TYPES[name].block)
    quantized = from_raw(raw, name, shape)
    assert quantized.scheme == scheme_of(name)
    assert same_values(quantized.dequantize(), read_by_gguf(raw, name), name)
    again = QuantizedTensor.from_tensors(quantized.tensors(), quantized.scheme, shape)
    assert same_bits(again.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q8_0", "q4_k", "mxfp4"])
def test_there_and_back_gives_the_same_bytes(name: str) -> None:
    raw = random_blocks(name)
    found = transcode(from_raw(raw, name, (6, 2 * TYPES[name].block)))
    assert found is not None
    assert found[0] == name
    assert np.array_equal(found[1], raw)


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "q4_k", "mxfp4"])
def test_ours_from_a_file_is_ours_as_it_went_in(name: str) -> None:
    scheme = scheme_of(name)
    assert scheme is not None
    quantized = search(random_weight(), scheme)
    found = transcode(quantized)
    assert found is not None
    back = from_raw(found[1], name, (12, 512))
    assert back.scheme == quantized.scheme
    for part, tensor in quantized.tensors().items():
        assert tensor.view(torch.uint8).equal(back.tensors()[part].view(torch.uint8)), part


def test_what_is_not_kept_is_refused_with_the_types_that_are() -> None:
    with pytest.raises(FormatError, match=r"blk: none of strop's schemes holds the codes of q5_k; those of q4_0, "):
        from_raw(np.zeros(176, np.uint8), "q5_k", (1, 256), where="blk")
    with pytest.raises(FileFormatError, match=r"takes 18 bytes"):
        from_raw(np.zeros(17, np.uint8), "q4_0", (1, 32))


@pytest.mark.parametrize(
    ("name", "place"), [("q4_0", 0), ("q8_0", 0), ("q4_k", 0), ("q4_k", 2), ("q6_k", 208), ("mxfp4", 0)]
)
def test_a_scale_that_is_not_finite_is_refused(name: str, place: int) -> None:
    raw = random_blocks(name)
    infinite = b"\xff" if name == "mxfp4" else np.float16(np.inf).tobytes()
    raw[3, place : place + len(infinite)] = np.frombuffer(infinite, np.uint8)
    with pytest.raises(FileFormatError, match=rf"blk: a scale of its {name} blocks is NaN or infinite"):
        from_raw(raw, name, (6, 2 * TYPES[name].block), where="blk")


def test_a_weight_in_activation_order_is_not_taken_for_one_in_order():
    held = quantize_tensor(torch.randn(4, 64), parse_scheme("int4-g32-full"))
    assert transcode(held) is not None
    index = torch.tensor([0, 1] * 32, dtype=torch.int32)
    assert transcode(dataclasses.replace(held, group_index=index)) is None

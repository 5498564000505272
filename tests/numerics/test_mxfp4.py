"""MXFP4: elements and scales by OCP's specification, decoded from its bits alone, and by the gguf package."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strop.errors import FormatError
from strop.numerics import FORMATS, FloatFormat, QuantizedTensor, fake_quantize, parse_scheme, quantize_tensor

from .schemes import hard_weights

MXFP4 = parse_scheme("mxfp4")
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def weight(rows: int = 5, columns: int = 96, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def bits_of(scale: Tensor) -> Tensor:
    assert scale.dtype == torch.float8_e8m0fnu
    return scale.view(torch.uint8)


def decoded(codes: Tensor, scale_bits: Tensor) -> Tensor:
    """Values by OCP Microscaling v1.0: element bits s e e m (bias 1, e = 0 subnormal), scale 2^(byte - 127)."""
    values = []
    for row, scales in zip(codes.tolist(), scale_bits.tolist(), strict=True):
        for place, code in enumerate(row):
            sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
            magnitude = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
            values.append((-1) ** sign * magnitude * 2.0 ** (scales[place // 32] - 127))
    return torch.tensor(values, dtype=torch.float64).view(codes.shape)


def nearest(x: float, scale: float) -> float:
    """The slow way: the level with the least distance, the one with an even mantissa of two that are equally near."""
    by_distance = sorted(range(8), key=lambda code: (abs(abs(x) / scale - LEVELS[code]), code & 1))
    return (-1.0 if x < 0 else 1.0) * LEVELS[by_distance[0]] * scale


def test_the_elements_are_those_of_the_specification() -> None:
    form = FORMATS["mxfp4"]
    assert isinstance(form, FloatFormat)
    assert (form.bits, form.bias, form.max_value, form.min_normal, form.min_subnormal) == (4, 1, 6.0, 1.0, 0.5)
    assert form.values() == (*(-level for level in reversed(LEVELS[1:])), *LEVELS)
    assert [form.value_of(code >> 3, code >> 1 & 3, code & 1) for code in range(8)] == list(LEVELS)


@pytest.mark.parametrize(
    ("x", "stored"),
    [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4), (5.1, 6), (7.9, 6), (100, 6), (-2.6, -3)],
)
def test_ties_go_to_the_even_mantissa_and_what_is_too_large_to_six(x: float, stored: float) -> None:
    """By the bits, one number at a time, and by the grid with a scale of 1."""
    form = FORMATS["mxfp4"]
    assert isinstance(form, FloatFormat)
    assert form.decompose(x).stored == stored
    row = torch.full((1, 32), float(x))
    assert quantize_tensor(row, MXFP4, scale=torch.ones(1, 1)).dequantize()[0, 0].item() == stored


def test_the_bytes_of_a_block_are_those_computed_by_hand() -> None:
    """Largest magnitude 12: floor(log2(12)) - 2 = 1, so the scale is 2, the byte 128, and the levels doubled."""
    row = torch.tensor([[*(2 * level for level in LEVELS), *(-2 * level for level in LEVELS)] * 2])
    quantized = quantize_tensor(row, MXFP4)
    assert quantized.scale is not None
    assert bits_of(quantized.scale).tolist() == [[128]]
    assert quantized.codes[0, :8].numpy().tobytes().hex() == "1032547698badcfe"
    assert quantized.dequantize().equal(row)
    assert quantized.bits_per_weight == MXFP4.bits_per_weight((1, 32)) == 4.25


@given(hard_weights(64))
@settings(deadline=None, max_examples=80)
def test_values_scales_and_rounding_are_those_of_the_specification(weight: Tensor) -> None:
    quantized = quantize_tensor(weight, MXFP4)
    assert quantized.scale is not None
    stored = bits_of(quantized.scale)
    values = decoded(quantized.stored_codes(), stored)
    assert values.equal(quantized.dequantize().double())
    for block, byte in zip(weight.float().view(-1, 32), stored.view(-1).tolist(), strict=True):
        largest = block.double().abs().max().item()
        power = max(int(torch.tensor(largest, dtype=torch.float64).log2().floor()) - 2, -127) if largest else 0
        assert byte == power + 127
    expected = [
        nearest(x, 2.0 ** (stored[row, column // 32].item() - 127))
        for row, numbers in enumerate(weight.double().tolist())
        for column, x in enumerate(numbers)
    ]
    assert values.view(-1).tolist() == expected


@given(hard_weights(96), st.booleans())
@settings(deadline=None, max_examples=60)
def test_fake_equals_real_bitwise(weight: Tensor, halved: bool) -> None:
    scale = None
    if halved:
        scale = quantize_tensor(weight, MXFP4).scales() / 2
        scale = scale.clamp(min=2.0**-127)
    real = quantize_tensor(weight, MXFP4, scale=scale).dequantize(weight.dtype)
    fake = fake_quantize(weight, MXFP4, scale=scale)
    integers = torch.int32 if weight.dtype == torch.float32 else torch.int16
    assert fake.view(integers).equal(real.view(integers))


def test_the_gradient_stops_beyond_the_largest_level() -> None:
    row = torch.tensor([[7.9, -6.1, 6.0, 0.3] + [0.0] * 28]).requires_grad_()
    fake_quantize(row, MXFP4).sum().backward()
    assert row.grad is not None
    assert row.grad[0, :4].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_the_gguf_package_reads_and_writes_the_same_values() -> None:
    """GGUF's block: the scale's byte, then 16 bytes, byte j with element j low and element j + 16 high."""
    gguf = pytest.importorskip("gguf")
    quantized = quantize_tensor(weight(), MXFP4)
    assert quantized.scale is not None
    codes = quantized.stored_codes().view(-1, 32)
    blocks = torch.cat([bits_of(quantized.scale).view(-1, 1), codes[:, :16] | codes[:, 16:] << 4], dim=1).view(5, -1)
    theirs = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert torch.from_numpy(theirs).equal(quantized.dequantize())
    written = torch.from_numpy(gguf.quants.quantize(weight().numpy(), gguf.GGMLQuantizationType.MXFP4))
    assert written.view(-1, 17)[:, 0].equal(blocks.view(-1, 17)[:, 0])


def test_a_tensor_is_rebuilt_from_its_parts_and_others_are_refused() -> None:
    quantized = quantize_tensor(weight(), MXFP4)
    parts = quantized.tensors()
    assert QuantizedTensor.from_tensors(parts, MXFP4, (5, 96)).dequantize().equal(quantized.dequantize())
    with pytest.raises(FormatError, match=r"scale is \[5, 3\] torch.uint8, needed \[5, 3\] torch.float8_e8m0fnu"):
        QuantizedTensor.from_tensors(parts | {"scale": bits_of(parts["scale"])}, MXFP4, (5, 96))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_no_power_of_two_are_refused(scale: float) -> None:
    with pytest.raises(FormatError, match=r"scales must be finite|powers of two"):
        quantize_tensor(torch.ones(1, 32), MXFP4, scale=torch.full((1, 1), scale))


@pytest.mark.parametrize("columns", [1, 31, 33, 172, 255, 257])
def test_widths_that_no_block_divides_are_refused(columns: int) -> None:
    with pytest.raises(FormatError, match=f"layer: in_features {columns} is not divisible by group size 32 .mxfp4."):
        quantize_tensor(torch.ones(2, columns), MXFP4, where="layer")


def test_a_width_of_84_blocks_is_taken() -> None:
    assert quantize_tensor(torch.ones(2, 2688), MXFP4).dequantize().equal(torch.ones(2, 2688))


def test_weights_near_the_end_of_float32_have_finite_scales() -> None:
    row = torch.full((1, 32), 3.3e38)
    restored = quantize_tensor(row, MXFP4).dequantize()
    assert torch.isfinite(restored).all()
    assert (restored[0, 0] / 3.3e38).item() == pytest.approx(6 / 7.7585, rel=0.01)

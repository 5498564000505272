"""Q4_K's grid: the byte layout decoded by hand, by the gguf package, and the scales and minimums that are chosen."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from strop.errors import FormatError
from strop.numerics import QuantizedTensor, SuperScale, fake_quantize, parse_format, parse_scheme, quantize_tensor
from strop.numerics.superblock import super_scale_of

from .schemes import hard_weights

Q4_K = parse_format("gguf:q4_k").scheme


def weight(rows: int = 3, columns: int = 512, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def q4_k_bytes(quantized: QuantizedTensor) -> bytes:
    """A weight in GGUF's layout, 144 bytes a superblock: d, dmin, 12 bytes of 6-bit codes, 128 bytes of 4-bit codes.

    The first four groups have their scales in the low 6 bits of bytes 0 to 3 and their minimums in those of 4 to 7; of
    the other four, bytes 8 to 11 hold the low 4 bits (scale low, minimum high) and the top 2 bits of bytes 0 to 7 the
    rest. 32 bytes hold two groups of codes, the first in the low halves.
    """
    assert quantized.super_scale is not None
    d, dmin, scales, minimums = quantized.super_scale.unpacked()
    codes = quantized.stored_codes().view(-1, 8, 32).tolist()
    blocks = []
    for block in range(d.numel()):
        sc, m = scales.view(-1, 8)[block].tolist(), minimums.view(-1, 8)[block].tolist()
        packed = [sc[j] | (sc[j + 4] >> 4) << 6 for j in range(4)]
        packed += [m[j] | (m[j + 4] >> 4) << 6 for j in range(4)]
        packed += [(sc[j + 4] & 15) | (m[j + 4] & 15) << 4 for j in range(4)]
        nibbles = [
            low | high << 4
            for pair in range(4)
            for low, high in zip(*codes[block][2 * pair : 2 * pair + 2], strict=True)
        ]
        blocks.append(struct.pack("<ee", d.view(-1)[block].item(), dmin.view(-1)[block].item()))
        blocks.append(bytes(packed + nibbles))
    return b"".join(blocks)


def decoded(data: bytes) -> list[float]:
    """The values of Q4_K bytes, by the layout alone, in exact arithmetic until float32 rounds the difference."""
    values = []
    for start in range(0, len(data), 144):
        d, dmin = struct.unpack_from("<ee", data, start)
        packed, codes = data[start + 4 : start + 16], data[start + 16 : start + 144]
        for group in range(8):
            if group < 4:
                sc, m = packed[group] & 63, packed[group + 4] & 63
            else:
                sc = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
                m = packed[group + 4] >> 4 | packed[group] >> 6 << 4
            half = codes[group // 2 * 32 : group // 2 * 32 + 32]
            values += [d * sc * (byte >> 4 if group % 2 else byte & 15) - dmin * m for byte in half]
    return values


def test_the_bytes_of_a_superblock_are_those_computed_by_hand() -> None:
    """Scales 1 1 2 3 5 5 6 63 eighths, minimums 0 0 0 0 63 0 1 2 quarters, codes 1 2 1 2 ..."""
    parts = {
        "codes": torch.full((1, 128), 0x21, dtype=torch.uint8),
        "super_scale": torch.tensor([[0.125]], dtype=torch.float16),
        "super_minimum": torch.tensor([[0.25]], dtype=torch.float16),
        "sub_scale": torch.tensor([[0x41, 0x20, 0x0C, 0x45, 0x61, 0xFC]], dtype=torch.uint8),
        "sub_minimum": torch.tensor([[0, 0, 0, 0x3F, 0x10, 0x08]], dtype=torch.uint8),
    }
    quantized = QuantizedTensor.from_tensors(parts, Q4_K, (1, 256))
    assert quantized.scales().tolist() == [[0.125, 0.125, 0.25, 0.375, 0.625, 0.625, 0.75, 7.875]]
    minimums = quantized.minimums()
    assert minimums is not None
    assert minimums.tolist() == [[0.0, 0.0, 0.0, 0.0, 15.75, 0.0, 0.25, 0.5]]
    assert quantized.dequantize()[0, :2].tolist() == [0.125, 0.25]  # the first code is the low nibble
    assert quantized.dequantize()[0, 254:].tolist() == [7.375, 15.25]
    assert q4_k_bytes(quantized).hex() == "00300034" + "010102c3" + "c0000000" + "f505162f" + "1122" * 64


@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_the_bytes_decoded_by_their_layout(seed: int) -> None:
    quantized = quantize_tensor(weight(seed=seed), Q4_K)
    data = q4_k_bytes(quantized)
    assert 8 * len(data) / (3 * 512) == 4.5 == quantized.bits_per_weight
    assert torch.tensor(decoded(data)).equal(quantized.dequantize().view(-1))


def test_the_gguf_package_reads_the_same_values() -> None:
    gguf = pytest.importorskip("gguf")
    quantized = quantize_tensor(weight(), Q4_K)
    data = torch.frombuffer(bytearray(q4_k_bytes(quantized)), dtype=torch.uint8).view(3, -1)
    theirs = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType.Q4_K)
    assert torch.from_numpy(theirs).equal(quantized.dequantize())


def test_plain_superblocks_span_the_range_of_their_groups() -> None:
    """The largest scale and minimum of a superblock are exact but for float16; zero is the top of what is negative."""
    row = torch.zeros(1, 256)
    row[0, :32] = torch.linspace(-4.0, 11.0, 32)
    row[0, 32:64] = torch.linspace(-2.0, 5.5, 32)
    row[0, 64:96] = torch.linspace(3.0, 7.5, 32)  # a minimum above zero is taken as zero
    quantized = quantize_tensor(row, Q4_K)
    assert quantized.super_scale is not None
    d, dmin, scales, minimums = quantized.super_scale.unpacked()
    assert d.item() == torch.tensor(1 / 63).half().item()
    assert dmin.item() == torch.tensor(4 / 63).half().item()
    assert scales.tolist() == [[63, 32, 32, 0, 0, 0, 0, 0]]  # 1, 0.5, 7.5 / 15
    assert minimums.tolist() == [[63, 32, 0, 0, 0, 0, 0, 0]]
    assert quantized.dequantize()[0, 96:].count_nonzero() == 0


def test_a_scale_that_is_subnormal_in_float16_clips_nothing() -> None:
    """2.4 of float16's smallest steps round to 2, of which 63 would fall short by 16%."""
    row = torch.zeros(1, 256)
    row[0, :32] = torch.linspace(0.0, 2.4 * 2**-24 * 63 * 15, 32)
    quantized = quantize_tensor(row, Q4_K)
    assert quantized.super_scale is not None
    assert quantized.super_scale.scale.item() == 3 * 2**-24
    assert (quantized.dequantize() - row).abs().max() <= (quantized.scales().max() + 15 * 3 * 2**-24) / 2


@given(hard_weights(256))
@settings(deadline=None, max_examples=60)
def test_errors_are_bounded_by_a_step_and_what_6_bits_lose(weight: Tensor) -> None:
    """Half a step, the clipping that a scale rounded down costs, and the rounding of the minimum."""
    if (weight.float().view(-1, 32).amin(-1) < -65519 * 63).any():
        with pytest.raises(FormatError, match="overflow float16"):
            quantize_tensor(weight, Q4_K)
        return
    quantized = quantize_tensor(weight, Q4_K)
    assert quantized.super_scale is not None
    d, dmin = (part.double().repeat_interleave(256, dim=1) for part in quantized.super_scale.unpacked()[:2])
    step = quantized.scales().double().repeat_interleave(32, dim=1)
    error = (quantized.dequantize().double() - weight.double()).abs()
    range_ = weight.double().view(-1, 8, 32).abs().amax(-1).repeat_interleave(32, dim=1)
    bound = step / 2 + 15 * d / 2 + dmin / 2 + 64 * 2**-11 * (15 * d + dmin) + range_ * 2**-20
    assert (error <= bound).all()


@given(hard_weights(512))
@settings(deadline=None, max_examples=40)
def test_fake_equals_real_bitwise(weight: Tensor) -> None:
    if (weight.float().view(-1, 32).amin(-1) < -65519 * 63).any():
        with pytest.raises(FormatError, match="overflow float16"):
            fake_quantize(weight, Q4_K)
        return
    real = quantize_tensor(weight, Q4_K).dequantize(weight.dtype)
    integers = torch.int32 if weight.dtype == torch.float32 else torch.int16
    assert fake_quantize(weight, Q4_K).view(integers).equal(real.view(integers))


def test_the_gradient_stops_where_the_grid_is_short_and_passes_elsewhere() -> None:
    x = weight()
    x.view(3, 2, 8, 32)[:, :, ::2] *= 0.05  # 63 * 0.05 is 3.15, and a scale of 3 leaves some of the range out
    x.requires_grad_()
    rounded = fake_quantize(x, Q4_K)
    rounded.sum().backward()
    quantized = quantize_tensor(x, Q4_K)
    step, minimum = quantized.scales(), quantized.minimums()
    assert minimum is not None
    places = (x.detach().view(3, -1, 32) + minimum.unsqueeze(-1)) / step.unsqueeze(-1)
    inside = (places >= -0.5) & (places <= 15.5)
    assert 0.95 < inside.float().mean() < 1.0
    assert x.grad is not None
    assert x.grad.view(3, -1, 32).equal(inside.float())


def test_scales_and_zero_points_of_other_methods_are_rounded_to_superblocks() -> None:
    x = weight()
    scale = x.view(3, -1, 32).abs().amax(-1) / 8
    zero_point = torch.full_like(scale, 7.5)
    given_both = quantize_tensor(x, Q4_K, scale=scale, zero_point=zero_point)
    same = quantize_tensor(x, Q4_K, super_scale=super_scale_of(scale, scale * 7.5))
    assert given_both.dequantize().equal(same.dequantize())
    assert given_both.scales().sub(scale).abs().max() <= scale.max() / 63
    assert fake_quantize(x, Q4_K, scale=scale, zero_point=zero_point).equal(same.dequantize())


def test_a_rounded_weight_keeps_its_codes_in_the_superblocks_that_rounded_it() -> None:
    """What a method that moves codes itself relies on: its values, given back with their superblocks, are kept."""
    first = quantize_tensor(weight(), Q4_K)
    again = quantize_tensor(first.dequantize(), Q4_K, super_scale=first.super_scale)
    assert again.codes.equal(first.codes)
    assert again.dequantize().equal(first.dequantize())


@pytest.mark.parametrize(
    ("text", "parts", "said"),
    [
        ("q4_k", {"scale": torch.ones(3, 16)}, r"takes a zero_point of shape \[3, 16\], got none"),
        ("q4_k", {"scale": torch.ones(3, 1), "zero_point": torch.ones(3, 1)}, r"takes a scale of shape \[3, 16\]"),
        ("q4_k", {"scale": -torch.ones(3, 16), "zero_point": torch.ones(3, 16)}, "finite and not negative"),
        ("q4_k", {"super_scale": super_scale_of(torch.ones(3, 8), torch.ones(3, 8))}, "super_scale is"),
        ("int4", {"super_scale": super_scale_of(torch.ones(3, 16), torch.ones(3, 16))}, "has no superblocks"),
        (
            "q4_k",
            {"super_scale": super_scale_of(torch.ones(3, 16), torch.ones(3, 16)), "scale": torch.ones(3, 16)},
            "give no others beside them",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(text: str, parts: dict[str, Tensor | SuperScale], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        quantize_tensor(weight(), parse_scheme(text), **parts)  # type: ignore[arg-type]  # of two kinds


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    x = weight()
    x[1, 300] = value
    for parts in ({}, {"super_scale": super_scale_of(torch.ones(3, 16), torch.ones(3, 16))}):
        with pytest.raises(FormatError, match="weight: holds"):
            quantize_tensor(x, Q4_K, **parts)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (1, "per channel"),
        (31, "no group size divides it"),
        (33, "use 3 or 11"),
        (172, "use 2, 4 or 43"),
        (255, "use 15, 17 or 51"),
        (257, "no group size divides it"),
        (2688, "not divisible by the superblock of 256 that q4_k has; use gguf:q4_0 or int4-g32"),
    ],
)
def test_widths_that_no_superblock_divides_are_refused_with_what_would_do(columns: int, said: str) -> None:
    with pytest.raises(FormatError, match=f"layer: in_features {columns} is not divisible") as raised:
        quantize_tensor(torch.ones(2, columns), Q4_K, where="layer")
    assert said in str(raised.value)

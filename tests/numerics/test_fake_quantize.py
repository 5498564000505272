"""Fake quantization: bitwise what is stored; the gradient passes straight through and stops where the grid clips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strop.errors import FormatError
from strop.numerics import choose_scale, fake_quantize, parse_scheme, quantize_tensor

from .schemes import ALL_TEXTS, hard_weights, overflows


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    integers = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ALL_TEXTS)
def test_fake_quantize_equals_quantize_then_dequantize_bitwise(text: str, dtype: torch.dtype) -> None:
    weight = torch.randn(7, 24, generator=torch.Generator().manual_seed(3)).to(dtype)
    scheme = parse_scheme(text)
    assert bitwise_equal(fake_quantize(weight, scheme), quantize_tensor(weight, scheme).dequantize(dtype))


@given(hard_weights(), st.sampled_from(ALL_TEXTS))
@settings(deadline=None, max_examples=250)
def test_fake_equals_real_on_hard_weights(weight: Tensor, text: str) -> None:
    scheme = parse_scheme(text)
    if overflows(weight, scheme):
        with pytest.raises(FormatError, match="overflows"):
            fake_quantize(weight, scheme)
        return
    assert bitwise_equal(fake_quantize(weight, scheme), quantize_tensor(weight, scheme).dequantize(weight.dtype))


@pytest.mark.parametrize("text", ["int4-g32", "int3", "int4-g64-asym", "int8-tensor", "nf4-dq", "fp8"])
def test_fake_equals_real_across_the_pieces_of_a_large_weight(text: str) -> None:
    weight = torch.randn(600, 2048, generator=torch.Generator().manual_seed(4))
    weight[::7] *= 100
    scheme = parse_scheme(text)
    assert bitwise_equal(fake_quantize(weight, scheme), quantize_tensor(weight, scheme).dequantize())


@pytest.mark.parametrize("text", [text for text in ALL_TEXTS if "full" not in text])
def test_the_gradient_passes_straight_through_a_grid_that_covers_the_weight(text: str) -> None:
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    fake_quantize(weight, parse_scheme(text)).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize(("text", "outside"), [("int4", 7.51), ("int4-asym", 12.51), ("nf4", 1.001), ("fp8", 448.1)])
def test_the_gradient_is_zero_where_a_given_scale_clips(text: str, outside: float) -> None:
    scheme = parse_scheme(text)
    columns = 64 if text == "nf4" else 4
    row = torch.zeros(1, columns)
    row[0, :4] = torch.tensor([outside, outside * 0.99, -outside * 3, 0.1])
    weight = row.requires_grad_()
    scale = torch.ones(1) if text == "nf4" else torch.ones(1, 1)
    zero_point = torch.tensor([[-5]]) if text == "int4-asym" else None
    fake_quantize(weight, scheme, scale=scale, zero_point=zero_point).backward(torch.full_like(weight, 2.0))
    assert weight.grad is not None
    assert weight.grad[0, :4].tolist() == [0.0, 2.0, 0.0, 2.0]


def test_the_full_range_grid_stops_the_gradient_on_its_short_side() -> None:
    weight = torch.tensor([[-8.0, 7.4, 7.9, 0.0]]).requires_grad_()  # scale 1: codes from -8 to 7
    rounded = fake_quantize(weight, parse_scheme("int4-full"))
    rounded.sum().backward()
    assert rounded.tolist() == [[-8.0, 7.0, 7.0, 0.0]]
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1.0, 1.0, 0.0, 1.0]]


def test_a_given_scale_is_that_of_the_stored_weight() -> None:
    scheme = parse_scheme("int4-g8-asym")
    weight = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    groups = weight.view(3, 3, 8)
    scale, zero_point = choose_scale(
        groups.amin(-1) / 2, groups.amax(-1) / 2, scheme.format, scheme.mode, scale_dtype=scheme.scale_dtype
    )
    real = quantize_tensor(weight, scheme, scale=scale, zero_point=zero_point)
    assert torch.equal(fake_quantize(weight, scheme, scale=scale, zero_point=zero_point), real.dequantize())
    assert not torch.equal(fake_quantize(weight, scheme), real.dequantize())


@pytest.mark.parametrize(
    ("scale", "zero_point", "said"),
    [
        (torch.ones(3, 1), torch.zeros(3, 1), r"scales of shape \[3, 3\], got \[3, 1\]"),
        (torch.zeros(3, 3), torch.zeros(3, 3), "finite and not zero"),
        (torch.full((3, 3), 1e6), torch.zeros(3, 3), "finite and not zero"),
        (torch.ones(3, 3), None, "takes a zero point beside its scale"),
        (torch.ones(3, 3), torch.zeros(3), r"the scales' shape \[3, 3\], got \[3\]"),
        (torch.ones(3, 3), torch.zeros(3, 3, dtype=torch.uint8), r"in the codes of int4 \(-8 to 7\)"),
        (torch.ones(3, 3), torch.full((3, 3), 8), "of int4 lie from -8 to 7, got 8 to 8"),
    ],
)
def test_scales_that_do_not_fit_are_refused(scale: Tensor, zero_point: Tensor | None, said: str) -> None:
    for call in (quantize_tensor, fake_quantize):
        with pytest.raises(FormatError, match=said):
            call(torch.ones(3, 24), parse_scheme("int4-g8-asym"), scale=scale, zero_point=zero_point)


@pytest.mark.parametrize(
    ("text", "scale"), [("int4", torch.ones(3, 1)), ("nf4", torch.ones(2)), ("fp8", torch.ones(3, 1))]
)
def test_nan_is_refused_under_a_given_scale_too(text: str, scale: Tensor) -> None:
    weight = torch.ones(3, 24)
    weight[1, 1] = float("nan")
    for call in (quantize_tensor, fake_quantize):
        with pytest.raises(FormatError, match="weight: holds NaN"):
            call(weight, parse_scheme(text), scale=scale)


def test_a_zero_point_for_a_scheme_without_one_is_refused() -> None:
    with pytest.raises(FormatError, match="int4 takes no zero point"):
        fake_quantize(torch.ones(3, 24), parse_scheme("int4"), scale=torch.ones(3, 1), zero_point=torch.zeros(3, 1))


def test_the_weight_is_left_alone() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    for text in ALL_TEXTS:
        if (size := parse_scheme(text).group_size) is None or 64 % size == 0:
            fake_quantize(weight, parse_scheme(text))
            quantize_tensor(weight, parse_scheme(text)).dequantize()
    assert torch.equal(weight, before)


def test_a_transposed_weight_is_rounded_like_its_copy() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).t()
    for text in ("int4-g8", "nf4", "fp8", "int8-tensor"):
        assert torch.equal(
            fake_quantize(weight, parse_scheme(text)), fake_quantize(weight.contiguous(), parse_scheme(text))
        )

"""Affine quantization: the worked examples, the error bound on everything, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strop.errors import FormatError
from strop.numerics import (
    FORMATS,
    FloatFormat,
    IntFormat,
    Mode,
    Scheme,
    choose_scale,
    dequantize,
    fake_quantize,
    parse_scheme,
    quantize,
    quantize_tensor,
)
from strop.numerics.groups import split
from strop.numerics.scales import smallest_positive

from .schemes import (
    ALL_TEXTS,
    CODEBOOK_TEXTS,
    FLOAT_TEXTS,
    INTEGER_TEXTS,
    hard_weights,
    ideal_scale,
    overflows,
    stored_scale,
)


def integers(name: str) -> IntFormat:
    form = FORMATS[name]
    assert isinstance(form, IntFormat)
    return form


def test_the_symmetric_example_of_the_notes() -> None:
    """[0, 1000] as unsigned 8-bit integers: scale 3.92, zero point 0, 250 is stored as 64."""
    scale, zero_point = choose_scale(0.0, 1000.0, integers("uint8"), Mode.SYMMETRIC)
    assert scale.item() == torch.tensor(1000 / 255).item()
    assert round(scale.item(), 4) == 3.9216
    assert zero_point is None
    codes = quantize(torch.tensor([250.0, 0.0, 1000.0]), scale, zero_point, integers("uint8"))
    assert codes.tolist() == [64, 0, 255]
    assert codes.dtype == torch.uint8
    assert dequantize(codes, scale, zero_point)[0].item() == pytest.approx(250.98, abs=0.01)


def test_the_asymmetric_example_of_the_notes() -> None:
    """[-20, 1000]: scale 4.0, round(-20 / 4) = -5, zero point 5, -20 is stored as 0."""
    scale, zero_point = choose_scale(-20.0, 1000.0, integers("uint8"), Mode.ASYMMETRIC)
    assert zero_point is not None
    assert (scale.item(), zero_point.item(), zero_point.dtype) == (4.0, 5, torch.uint8)
    codes = quantize(torch.tensor([-20.0, 0.0, 1000.0]), scale, zero_point, integers("uint8"))
    assert codes.tolist() == [0, 5, 255]
    assert dequantize(codes, scale, zero_point).tolist() == [-20.0, 0.0, 1000.0]


@pytest.mark.parametrize(
    ("mode", "low", "high", "scale", "zero_point"),
    [
        (Mode.SYMMETRIC, -15.0, 3.0, 2.0, None),  # 15 / 7.5
        (Mode.SYMMETRIC, -3.0, 15.0, 2.0, None),
        (Mode.SYMMETRIC_FULL, -16.0, 3.0, 2.0, None),  # -16 / -8
        (Mode.SYMMETRIC_FULL, -3.0, 16.0, -2.0, None),
        (Mode.ASYMMETRIC, -10.0, 20.0, 2.0, -3),  # 30 / 15, round(-8 + 5)
        (Mode.ASYMMETRIC, 15.0, 30.0, 2.0, -8),  # widened to [0, 30]
        (Mode.ASYMMETRIC, -30.0, -15.0, 2.0, 7),  # widened to [-30, 0]
    ],
)
def test_scales_of_int4_follow_the_formulas(
    mode: Mode, low: float, high: float, scale: float, zero_point: int | None
) -> None:
    got_scale, got_zero = choose_scale(low, high, integers("int4"), mode)
    assert got_scale.item() == scale
    assert (None if got_zero is None else got_zero.item()) == zero_point


def test_a_scale_is_rounded_to_the_dtype_that_stores_it() -> None:
    scale, _ = choose_scale(-1.0, 1.0, integers("int4"), Mode.SYMMETRIC, scale_dtype=torch.float16)
    assert scale.dtype == torch.float16
    assert scale.item() == torch.tensor(1 / 7.5).half().item()


def test_ties_round_to_even() -> None:
    codes = quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), torch.tensor(1.0), None, integers("int4"))
    assert codes.tolist() == [0, 2, 2, 0, -2]


def check_bound(weight: Tensor, scheme: Scheme) -> None:
    """|restored - x| <= half a stored step (full range: one) + steps * |stored scale - ideal scale|."""
    quantized = quantize_tensor(weight, scheme)
    assert quantized.scale is not None
    groups = split(weight, scheme)
    restored = split(quantized.dequantize(), scheme).double()
    stored = stored_scale(scheme, quantized.scale)
    steps = 2**scheme.bits - 1 if scheme.mode is Mode.ASYMMETRIC else 2 ** (scheme.bits - 1)
    share = 1.0 if scheme.mode is Mode.SYMMETRIC_FULL else 0.5
    rounding = 2.0**-22 * groups.double().abs() + 2.0**-149  # float32 arithmetic, subnormal products
    bound = share * stored.abs() + steps * (stored - ideal_scale(scheme, groups)).abs() + rounding
    error = (restored - groups.double()).abs()
    assert (error <= bound).all(), (scheme.name, error.max().item(), bound.max().item())


@given(hard_weights(), st.sampled_from(INTEGER_TEXTS))
@settings(deadline=None, max_examples=250)
def test_the_error_is_below_half_a_step_and_the_scales_own_rounding(weight: Tensor, text: str) -> None:
    scheme = parse_scheme(text)
    if overflows(weight, scheme):
        with pytest.raises(FormatError, match="a scale overflows float16"):
            quantize_tensor(weight, scheme)
    else:
        check_bound(weight, scheme)


@pytest.mark.parametrize("text", INTEGER_TEXTS)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 1e-38, 6e-8, 1.0, -1.0, 60000.0, -60000.0])
def test_constant_tensors_are_within_the_bound(text: str, value: float) -> None:
    check_bound(torch.full((2, 24), value), parse_scheme(text))


@pytest.mark.parametrize("text", [text for text in INTEGER_TEXTS if parse_scheme(text).scale_dtype != torch.float16])
def test_weights_of_ten_million_are_within_the_bound(text: str) -> None:
    weight = 1e7 * torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    check_bound(weight, parse_scheme(text))


def test_the_symmetric_error_is_half_a_step_also_where_the_largest_value_is_clipped() -> None:
    """7.5 steps round to 8 and are clipped to 7: the ends of the range are half a step off, not more."""
    quantized = quantize_tensor(torch.tensor([[7.5, -7.5, 3.0, 0.0]]), parse_scheme("int4"))
    assert quantized.dequantize().tolist() == [[7.0, -8.0, 3.0, 0.0]]


@given(hard_weights(), st.sampled_from(ALL_TEXTS))
@settings(deadline=None, max_examples=200)
def test_scales_of_what_is_not_zero_are_not_zero_and_zeros_stay_zeros(weight: Tensor, text: str) -> None:
    scheme = parse_scheme(text)
    if overflows(weight, scheme):
        return
    quantized = quantize_tensor(weight, scheme)
    scales = quantized.scales()
    assert torch.isfinite(scales).all()
    if text not in CODEBOOK_TEXTS:
        assert (scales != 0).all()
    elif not scheme.double_quant:
        assert torch.equal(scales == 0, split(weight, scheme).abs().amax((1, 2)) == 0)
    assert (quantized.dequantize()[weight == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", list(Mode))
def test_a_scale_too_small_for_its_dtype_is_the_smallest_positive_there_is(dtype: torch.dtype, mode: Mode) -> None:
    scale, _ = choose_scale(-1e-45, 0.0, integers("int8"), mode, scale_dtype=dtype)
    assert scale.item() == smallest_positive(dtype) == torch.nextafter(torch.zeros((), dtype=dtype), scale).item()


def test_a_zero_point_stays_a_code_where_a_subnormal_scale_is_rounded_down() -> None:
    """1.4 times float16's smallest number is stored as that number: 255 steps of it do not reach the range's end."""
    low = -255 * 1.4 * smallest_positive(torch.float16)
    scale, zero_point = choose_scale(low, 0.0, integers("int8"), Mode.ASYMMETRIC, scale_dtype=torch.float16)
    assert scale.item() == smallest_positive(torch.float16)
    assert zero_point is not None
    assert zero_point.item() == 127


@pytest.mark.parametrize("text", ["int4-g8", "int4-g8-full", "int4-g8-asym", "fp8-g8", "int4-sf16"])
def test_a_scale_that_overflows_float16_is_refused_by_name(text: str) -> None:
    weight = torch.ones(2, 24)
    weight[1, 3] = 6e7
    with pytest.raises(FormatError) as raised:
        quantize_tensor(weight, parse_scheme(text), where="model.layers.0.q_proj")
    assert "model.layers.0.q_proj: a scale overflows float16, whose largest value is 65504" in str(raised.value)
    assert "per channel" in str(raised.value)
    assert "-sf32" in str(raised.value)


def test_a_scale_that_overflows_float32_is_refused() -> None:
    with pytest.raises(FormatError, match="a scale overflows float32"):
        quantize_tensor(torch.tensor([[-3e38, 3e38]]), parse_scheme("int2-asym"))


@pytest.mark.parametrize("text", ALL_TEXTS)
@pytest.mark.parametrize(
    ("value", "named"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")]
)
@pytest.mark.parametrize("call", [quantize_tensor, fake_quantize])
def test_nan_and_infinity_are_refused_by_name(text: str, value: float, named: str, call: object) -> None:
    weight = torch.ones(3, 24)
    weight[2, 23] = value
    assert callable(call)
    with pytest.raises(FormatError, match=f"weight: holds {named} values"):
        call(weight, parse_scheme(text))


def test_an_unsigned_grid_without_zero_point_refuses_negative_values() -> None:
    with pytest.raises(FormatError, match="use the asymmetric scheme, or int8"):
        choose_scale(-1.0, 1.0, integers("uint8"), Mode.SYMMETRIC)
    with pytest.raises(FormatError, match="needs a signed format, got uint8"):
        choose_scale(0.0, 1.0, integers("uint8"), Mode.SYMMETRIC_FULL)


@given(hard_weights(), st.sampled_from(FLOAT_TEXTS))
@settings(deadline=None, max_examples=200)
def test_8_bit_floats_err_by_half_a_unit_in_the_last_place(weight: Tensor, text: str) -> None:
    scheme = parse_scheme(text)
    form = scheme.format
    assert isinstance(form, FloatFormat)
    if overflows(weight, scheme):
        return
    quantized = quantize_tensor(weight, scheme)
    assert quantized.scale is not None
    groups = split(weight, scheme).double()
    scale = stored_scale(scheme, quantized.scale)
    limits = torch.finfo(form.dtype)
    ideal = ideal_scale(scheme, groups)
    last_place = torch.maximum(groups.abs() * limits.eps, scale * limits.smallest_normal * limits.eps)
    bound = last_place / 2 * 1.001 + limits.max * (scale - ideal).abs() * 1.001 + 2.0**-149
    assert ((split(quantized.dequantize(), scheme).double() - groups).abs() <= bound).all()


@given(hard_weights(), st.sampled_from(ALL_TEXTS))
@settings(deadline=None, max_examples=200)
def test_requantizing_at_the_same_scale_changes_nothing(weight: Tensor, text: str) -> None:
    scheme = parse_scheme(text)
    if scheme.double_quant or overflows(weight, scheme):
        return  # double quantization rounds the scales again each time
    once = quantize_tensor(weight, scheme)
    assert once.scale is not None
    if (once.scale.float().abs() < 1e-30).any():
        return  # products with a subnormal scale are not exact
    zero_point = None
    if once.zero_point is not None:
        zero_point = once.zero_point.int() + (0 if text.startswith("u") else -(2 ** (scheme.bits - 1)))
    again = quantize_tensor(once.dequantize(), scheme, scale=once.scale, zero_point=zero_point)
    assert torch.equal(once.dequantize(), again.dequantize())


@given(hard_weights(columns=8), st.sampled_from(["int4", "int8-asym", "int3-full", "fp8"]))
@settings(deadline=None, max_examples=100)
def test_rounding_is_monotonic_at_a_fixed_scale(weight: Tensor, text: str) -> None:
    ascending = weight.float().sort(dim=1).values
    restored = quantize_tensor(ascending, parse_scheme(text)).dequantize()
    assert (restored.diff(dim=1) >= 0).all()

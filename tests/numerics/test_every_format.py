"""Every integer width, group and mode, and every other format: fake is real, errors are bounded, planned bytes true."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strop.errors import FormatError
from strop.numerics import IntFormat, Scheme, fake_quantize, parse_scheme, plan_shape, quantize_tensor, unpack
from strop.numerics.groups import split

from .schemes import hard_weights, ideal_scale, overflows

COLUMNS = 256
GROUPS = ("", "-tensor", "-g16", "-g32", "-g64", "-g128", "-g256")
INTEGERS = [
    f"int{bits}{group}{mode}" for bits, group, mode in itertools.product(range(2, 9), GROUPS, ("", "-full", "-asym"))
]
OTHERS = ["nf4", "nf4-dq", "fp4", "fp4-dq", "fp8", "fp8_e5m2", "fp8-g16", "mxfp4", "q4_k"]
ODD_WIDTHS = [1, 31, 33, 172, 255, 257, 2688]


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))


def check(weight: Tensor, scheme: Scheme) -> Tensor:
    """Fake equals real, bits and bytes are those planned, codes come back from their bytes; returns the values."""
    shape = (weight.shape[0], weight.shape[1])
    quantized = quantize_tensor(weight, scheme)
    restored = quantized.dequantize()
    assert fake_quantize(weight, scheme).view(torch.int32).equal(restored.view(torch.int32))
    assert quantized.bits_per_weight == scheme.bits_per_weight(shape)
    assert quantized.scales().shape == plan_shape(shape, scheme)
    codes = quantized.stored_codes()
    assert int(codes.max()) < 1 << scheme.bits
    if quantized.codes.ndim == 2:
        assert unpack(quantized.codes, scheme.bits, shape[1]).equal(codes)
    return restored


def is_within_bounds(weight: Tensor, restored: Tensor, scheme: Scheme) -> bool:
    """Half a step and what the scale's own rounding shifts; a whole step on the short side of the full range."""
    groups = split(weight, scheme).double()
    ideal = ideal_scale(scheme, groups).abs()
    precision = 2.0**-11 if scheme.scale_dtype == torch.float16 else 2.0**-24
    smallest = 2.0**-24 if scheme.scale_dtype == torch.float16 else 2.0**-149
    steps = 1.0 if scheme.mode.value == "symmetric_full" else 0.5
    bound = ideal * (steps + (1 << scheme.bits) * (precision + 2.0**-22)) + smallest * (1 << scheme.bits)
    return bool(((split(restored, scheme).double() - groups).abs() <= bound).all())


@pytest.mark.parametrize("text", INTEGERS)
def test_every_integer_grid_of_16_to_per_channel_is_exact_bounded_and_as_large_as_planned(text: str) -> None:
    scheme = parse_scheme(text)
    weight = normal(3, COLUMNS)
    assert is_within_bounds(weight, check(weight, scheme), scheme)


@given(hard_weights(COLUMNS), st.sampled_from(INTEGERS))
@settings(deadline=None, max_examples=120)
def test_hard_weights_on_every_integer_grid(weight: Tensor, text: str) -> None:
    scheme, weight = parse_scheme(text), weight.float()
    if not overflows(weight, scheme):
        assert is_within_bounds(weight, check(weight, scheme), scheme)


@pytest.mark.parametrize("text", OTHERS)
def test_every_other_format_is_exact_and_as_large_as_planned(text: str) -> None:
    """And its squared error is between what 4 and 8 bits may cost a normal weight."""
    weight, scheme = normal(3, 2 * COLUMNS), parse_scheme(text)
    lost = (check(weight, scheme) - weight).square().sum() / weight.square().sum()
    assert lost < (0.025 if scheme.bits == 4 else 0.004)


@pytest.mark.parametrize("columns", ODD_WIDTHS)
@pytest.mark.parametrize("text", ["int2", "int3-asym", "int5-full", "int7", "int8-tensor", "nf4", "nf4-dq", "fp8"])
def test_formats_without_groups_take_any_width(text: str, columns: int) -> None:
    check(normal(2, columns), parse_scheme(text))


@pytest.mark.parametrize("columns", ODD_WIDTHS)
@pytest.mark.parametrize("text", ["int2-g16", "int4-g32", "int8-g64-asym", "int3-g128-full", "mxfp4", "q4_k"])
def test_formats_with_groups_take_what_they_divide_and_refuse_the_rest_by_name(text: str, columns: int) -> None:
    scheme, weight = parse_scheme(text), normal(2, columns)
    if columns % (scheme.super_size or scheme.group_size or 1) == 0:
        check(weight, scheme)
        return
    for call in (quantize_tensor, fake_quantize):
        with pytest.raises(FormatError, match=rf"weight: in_features {columns} is not divisible") as raised:
            call(weight, scheme)
    assert "use " in str(raised.value) or "per channel" in str(raised.value)


@pytest.mark.parametrize("text", [*INTEGERS[::7], *OTHERS])
def test_one_by_one_weights_and_zeros_are_held(text: str) -> None:
    scheme = parse_scheme(text)
    columns = scheme.super_size or scheme.group_size or 1
    zeros = torch.zeros(1, columns)
    assert check(zeros, scheme).equal(zeros)
    if isinstance(scheme.format, IntFormat) and scheme.group_size is None:
        one = check(torch.ones(1, 1), scheme)
        assert abs(one.item() - 1) <= 0.34  # 2 bits: 1.5 steps make 1, and 2 or 1 of them are held

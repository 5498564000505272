"""Schemes and the parser of `--format`: what is read, what is refused and how, and what a weight costs."""

from __future__ import annotations

import pytest
import torch

from strop.errors import FormatError
from strop.numerics import FORMATS, Granularity, Mode, Scheme, parse_format, parse_scheme, plan_shape, quantize_tensor

from .schemes import ALL_TEXTS


@pytest.mark.parametrize("text", [*ALL_TEXTS, "int4-g32-full", "nf4-g64-dq", "INT4-G32", " int8 ", "int4-asym-g32"])
def test_a_name_reads_back_as_the_same_scheme(text: str) -> None:
    scheme = parse_scheme(text)
    assert parse_scheme(scheme.name) == scheme
    assert str(scheme) == scheme.name


@pytest.mark.parametrize(
    ("text", "mode", "granularity", "group_size", "scale_dtype", "double_quant"),
    [
        ("int8", Mode.SYMMETRIC, Granularity.CHANNEL, None, torch.float32, False),
        ("int8-tensor", Mode.SYMMETRIC, Granularity.TENSOR, None, torch.float32, False),
        ("int4-g32", Mode.SYMMETRIC, Granularity.GROUP, 32, torch.float16, False),
        ("int4-g128-asym", Mode.ASYMMETRIC, Granularity.GROUP, 128, torch.float16, False),
        ("int4-g32-full", Mode.SYMMETRIC_FULL, Granularity.GROUP, 32, torch.float16, False),
        ("int4-g32-sbf16", Mode.SYMMETRIC, Granularity.GROUP, 32, torch.bfloat16, False),
        ("nf4", Mode.SYMMETRIC, Granularity.BLOCK, 64, torch.float32, False),
        ("fp4-dq", Mode.SYMMETRIC, Granularity.BLOCK, 64, torch.float32, True),
        ("fp8", Mode.SYMMETRIC, Granularity.CHANNEL, None, torch.float32, False),
    ],
)
def test_texts_mean_what_the_documentation_says(
    text: str,
    mode: Mode,
    granularity: Granularity,
    group_size: int | None,
    scale_dtype: torch.dtype,
    double_quant: bool,
) -> None:
    base = FORMATS[text.split("-")[0]]
    assert parse_scheme(text) == Scheme(base, mode, granularity, group_size, scale_dtype, double_quant)


def test_gguf_types_are_their_grids() -> None:
    spec = parse_format("gguf:q4_0")
    assert (spec.container, spec.name) == ("gguf", "gguf:q4_0")
    assert spec.scheme == parse_scheme("int4-g32-full")
    assert spec.scheme.scale_dtype == torch.float16
    assert parse_format("gguf:q8_0").scheme == parse_scheme("int8-g32")


def test_a_format_without_a_container_is_its_scheme() -> None:
    spec = parse_format("int4-g32")
    assert (spec.container, spec.scheme, str(spec)) == (None, parse_scheme("int4-g32"), "int4-g32")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nf5", "did you mean 'nf4'"),
        ("itn4-g32", "did you mean 'int4'"),
        ("int16", "the nearest is int8"),
        ("int1", "the nearest is int2"),
        ("bf16", "stores weights as they are"),
        ("q4_0", "write gguf:q4_0"),
        ("q4_k", "write gguf:q4_k"),
        ("q4_k-g64", "write gguf:q4_k"),
        ("mxfp4-g16", "a block of MXFP4 is 32 inputs"),
        ("mxfp4-tensor", "a block of MXFP4 is 32 inputs"),
        ("mxfp4-sf16", "a power of two (E8M0)"),
        ("mxfp4-asym", "only integer formats have a zero point"),
        ("mxfp5", "did you mean 'mxfp4'"),
        ("", "unknown format ''"),
        ("int4-g32-asim", "did you mean 'asym'"),
        ("int4-32", "unknown part '32'"),
        ("int4-g", "unknown part 'g'"),
        ("int4-g1", "at least 2 values"),
        ("int4-g32-g64", "both -g32 and -g64"),
        ("int4-full-asym", "both -full and -asym"),
        ("int4-dq", "double quantization is for nf4 and fp4"),
        ("nf4-asym", "only integer formats have a zero point"),
        ("nf4-tensor", "blocks of the flattened weight"),
        ("nf4-g48", "a power of two from 32 to 4096"),
        ("nf4-sf16", "stored in float32"),
        ("uint4", "holds no negative weight"),
        ("uint4-full", "holds no negative weight"),
        ("gguf:q4_k_m", "the nearest is gguf:q4_k"),
        ("gguf:q8_k", "the nearest is gguf:q8_0"),
        ("gguf:", "q4_0, q8_0, q4_k"),
        ("mlx:int4-g64", "int4-g64 without a container is there"),
        ("onnx:nothing", "int4-g32 without a container"),
        ("ggufs:q4_0", "did you mean 'gguf'"),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest_that_is(text: str, said: str) -> None:
    with pytest.raises(FormatError) as raised:
        parse_format(text)
    assert said in str(raised.value)
    assert repr(text) in str(raised.value)


def test_a_scheme_takes_no_container() -> None:
    with pytest.raises(FormatError, match="no container fits here, got 'gguf'"):
        parse_scheme("gguf:q4_0")


def test_every_problem_of_a_scheme_is_named_at_once() -> None:
    with pytest.raises(FormatError) as raised:
        Scheme(FORMATS["fp8"], Mode.ASYMMETRIC, Granularity.GROUP, None, torch.float64, double_quant=True)
    message = str(raised.value)
    for part in ("zero point", "group size", "torch.float64", "double quantization"):
        assert part in message


@pytest.mark.parametrize("text", ALL_TEXTS)
@pytest.mark.parametrize("shape", [(3, 24), (5, 48)])
def test_the_planned_bits_per_weight_are_those_of_the_tensor(text: str, shape: tuple[int, int]) -> None:
    scheme = parse_scheme(text)
    quantized = quantize_tensor(torch.randn(shape, generator=torch.Generator().manual_seed(0)), scheme)
    assert scheme.bits_per_weight(shape) == quantized.bits_per_weight


def test_double_quantization_costs_what_qlora_says() -> None:
    """0.127 bits of overhead remain of 0.5: 0.373 saved."""
    single, double = (parse_scheme(text).bits_per_weight((4096, 4096)) for text in ("nf4", "nf4-dq"))
    assert single == 4.5
    assert round(double, 3) == 4.127
    assert round(single - double, 3) == 0.373


def test_a_group_size_that_does_not_divide_is_refused_with_those_that_would() -> None:
    with pytest.raises(FormatError) as raised:
        plan_shape((16, 1000), parse_scheme("int4-g128"), where="model.layers.3.mlp.down_proj")
    assert str(raised.value) == (
        "model.layers.3.mlp.down_proj: in_features 1000 is not divisible by group size 128 (int4-g128); "
        "use 100, 125 or 200"
    )


@pytest.mark.parametrize("columns", [1, 31, 33, 255, 257, 2688])
def test_shapes_that_do_not_divide_are_refused_and_never_skipped(columns: int) -> None:
    scheme = parse_scheme("int4-g32")
    weight = torch.ones(2, columns)
    if columns % 32 == 0:
        assert plan_shape((2, columns), scheme) == (2, columns // 32)
        assert quantize_tensor(weight, scheme).shape == (2, columns)
        return
    with pytest.raises(FormatError, match=f"in_features {columns} is not divisible"):
        plan_shape((2, columns), scheme)
    with pytest.raises(FormatError, match=f"in_features {columns} is not divisible"):
        quantize_tensor(weight, scheme)


def test_a_prime_width_is_sent_to_per_channel() -> None:
    with pytest.raises(FormatError, match="no group size divides it; quantize per channel"):
        plan_shape((2, 31), parse_scheme("int4-g8"))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 8), ()])
def test_what_is_not_a_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match="shape"):
        plan_shape(shape, parse_scheme("nf4"))

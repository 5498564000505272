"""Fake quantization, codes and values by every kernel: the bits of the PyTorch reference, whatever the values."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from strop import kernels
from strop.errors import FormatError
from strop.kernels import operations
from strop.numerics import QuantizedTensor, Scheme, accelerated, fake_quantize, parse_scheme, quantize_tensor

from .values import SHAPES, bitwise_equal, hard, plain

INTEGERS = [
    *(f"int{bits}" for bits in range(2, 9)),
    *(f"int{bits}-{mode}" for bits in (2, 3, 4, 8) for mode in ("asym", "full")),
    *(f"int{bits}-g{size}{mode}" for bits in (2, 3, 4, 8) for size in (16, 32, 64) for mode in ("", "-asym", "-full")),
    *("int4-g128", "int3-g256-full", "int6-g128-asym", "int5-g8", "int7-g24-asym", "int3-g11", "int4-g51-full"),
    *("int4-g32-sf32", "int4-g32-sbf16", "int8-g16-asym-sbf16", "int4-g64-asym-sf32", "int5-sf16", "int4-sbf16-full"),
    *("uint4-g16-asym", "uint8-asym", "uint2-g32-asym", "int8-tensor", "int4-tensor-asym", "int2-tensor-full"),
]
CODEBOOKS = ["nf4", "nf4-g32", "nf4-g4096", "nf4-dq", "fp4", "fp4-g128", "fp4-dq"]
SCHEMES = [parse_scheme(text) for text in (*INTEGERS, *CODEBOOKS)]
DTYPES = [torch.float32, torch.bfloat16]


def weights(scheme: Scheme, shape: tuple[int, int]) -> list[Tensor]:
    """Weights of a shape that the scheme can cut, as they are and hard ones, whose ranges its scales can hold."""
    rows, columns = shape
    size = scheme.group_size
    if scheme.granularity.value == "group" and size is not None:
        columns = -(-columns // size) * size
    return [plain(rows, columns), *(hard(rows, columns, steps=2**scheme.bits - 1, seed=seed) for seed in range(3))]


@functools.cache
def by_reference(
    scheme: Scheme, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor, dict[str, Tensor], dict[torch.dtype, Tensor]]]:
    """Weights of all shapes, each with what the reference makes of it: rounded, its parts, their values."""
    cases: list[tuple[Tensor, Tensor, dict[str, Tensor], dict[torch.dtype, Tensor]]] = []
    with kernels.forced("reference"):
        for weight in (weight.to(dtype) for shape in SHAPES for weight in weights(scheme, shape)):
            real = quantize_tensor(weight, scheme)
            values = {out: real.dequantize(out) for out in DTYPES}
            cases.append((weight, fake_quantize(weight, scheme), real.tensors(), values))
    return cases


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_every_bit_is_the_reference_s(instruction_set: str, scheme: Scheme, dtype: torch.dtype) -> None:
    for weight, fake, real, values in by_reference(scheme, dtype):
        assert accelerated.fake_quantize(weight, scheme, None, None) is not None, "the kernels did not do it"
        assert bitwise_equal(fake_quantize(weight, scheme), fake), weight.shape
        made = quantize_tensor(weight, scheme)
        assert made.tensors().keys() == real.keys()
        for name, part in real.items():
            assert bitwise_equal(made.tensors()[name], part), (weight.shape, name)
        for out, expected in values.items():
            assert bitwise_equal(made.dequantize(out), expected), (weight.shape, out)


@pytest.mark.parametrize("text", ["int4-g32-full", "int3-full", "int4-g16-asym", "int8", "int4-tensor", "nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_given_scales_and_the_gradient_are_the_reference_s(instruction_set: str, text: str, dtype: torch.dtype) -> None:
    scheme = parse_scheme(text)
    for shape in SHAPES:
        for weight in weights(scheme, shape):
            drawn = weight.to(dtype)
            with kernels.forced("reference"):
                found = quantize_tensor(drawn, scheme)
            assert found.scale is not None
            scale = (found.scale.float() * 0.4).clamp(min=1e-5) if "full" not in text else found.scale
            zero = None
            if found.zero_point is not None:
                zero = found.zero_point.int() - 8
            upstream = plain(*drawn.shape, seed=9).to(dtype)
            upstream[0, 0] = -0.0
            results: list[list[Tensor]] = []
            for name in ("reference", instruction_set):
                with kernels.forced(name):
                    leaf = drawn.clone().requires_grad_()
                    rounded = fake_quantize(leaf, scheme, scale=scale, zero_point=zero)
                    rounded.backward(upstream)
                    assert leaf.grad is not None
                    results.append([rounded.detach(), leaf.grad])
                    results[-1] += list(quantize_tensor(drawn, scheme, scale=scale, zero_point=zero).tensors().values())
            for expected, got in zip(*results, strict=True):
                assert bitwise_equal(got, expected), shape


def test_a_clipped_gradient_is_differentiable_again(instruction_set: str) -> None:
    weight = plain(3, 33).requires_grad_()
    upstream = plain(3, 33, seed=1).requires_grad_()
    rounded = fake_quantize(weight, parse_scheme("int3-full"))
    (grad,) = torch.autograd.grad(rounded, weight, upstream, create_graph=True)
    grad.sum().backward()
    with kernels.forced("reference"):
        other = plain(3, 33, seed=1).requires_grad_()
        (expected,) = torch.autograd.grad(
            fake_quantize(weight, parse_scheme("int3-full")), weight, other, create_graph=True
        )
        expected.sum().backward()
    assert torch.equal(grad, expected)
    assert upstream.grad is not None
    assert other.grad is not None
    assert torch.equal(upstream.grad, other.grad)
    assert 0 < upstream.grad.sum() < upstream.numel()  # the grid is short on one side


@pytest.mark.parametrize("text", ["int4-g32", "int3-g32-full", "int4-asym", "int8-tensor", "nf4", "nf4-dq"])
def test_the_number_of_threads_changes_nothing(instruction_set: str, text: str) -> None:
    weight, scheme = hard(301, 512), parse_scheme(text)  # enough values for three threads to be used
    before = torch.get_num_threads()
    found: list[list[Tensor]] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = weight.clone().requires_grad_()
            rounded = fake_quantize(leaf, scheme)
            rounded.backward(plain(301, 512, seed=3))
            assert leaf.grad is not None
            real = quantize_tensor(weight, scheme)
            found.append([rounded.detach(), leaf.grad, *real.tensors().values(), real.dequantize(torch.bfloat16)])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(bitwise_equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("text", ["int4-g32", "int3-full", "int4-g16-asym", "int8-tensor", "nf4", "nf4-dq"])
def test_what_is_not_finite_is_refused_in_the_reference_s_words(instruction_set: str, text: str, value: float) -> None:
    scheme = parse_scheme(text)
    for place in ((0, 0), (2, 63), (299, 127)):
        weight = plain(300, 128)
        weight[place] = value
        for call in (fake_quantize, quantize_tensor):
            with pytest.raises(FormatError, match=r"weight: holds (NaN|infinite) values"):
                call(weight, scheme)


def test_a_scale_that_overflows_is_refused_in_the_reference_s_words(instruction_set: str) -> None:
    weight = plain(4, 64)
    weight[3, 5] = 1e7
    for text in ("int4-g32", "int4-g32-asym", "int4-g32-full"):
        for call in (fake_quantize, quantize_tensor):
            with pytest.raises(FormatError, match="a scale overflows float16"):
                call(weight, parse_scheme(text))
    weight[3, 5], weight[3, 6] = 3e38, -3e38  # the range itself overflows
    for call in (fake_quantize, quantize_tensor):
        with pytest.raises(FormatError, match="a scale overflows float32"):
            call(weight, parse_scheme("int4-g32-asym-sf32"))


def test_float16_scales_round_as_torch_s_do_at_every_edge(instruction_set: str) -> None:
    """int8 symmetric, s = x / 127.5: subnormal scales, ties between two float16 numbers, the largest there is."""
    scales = torch.cat(
        [
            torch.arange(1, 400) * 2.0**-26,  # halves and quarters of subnormal steps
            (1 + torch.arange(0, 64) * 2.0**-12) * 2.0**-14,
            (1 + torch.arange(0, 64) * 2.0**-12) * 3.0,
            torch.tensor([65504.0, 65519.0, 65519.996, 2.0**-24, 2.0**-25, 2.0**-30]),
        ]
    )
    weight = torch.zeros(scales.numel(), 32)
    weight[:, 0] = scales * 127.5
    for text in ("int8-g32", "int8-g32-sbf16"):
        made = quantize_tensor(weight, parse_scheme(text)).scale
        with kernels.forced("reference"):
            expected = quantize_tensor(weight, parse_scheme(text)).scale
        assert made is not None
        assert expected is not None
        assert bitwise_equal(made, expected)


def test_values_of_every_float16_scale_are_the_reference_s(instruction_set: str) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    scale = every[torch.isfinite(every)].view(-1, 1)
    codes = torch.randint(0, 256, (scale.numel(), 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    held = QuantizedTensor(codes, scale, None, parse_scheme("int4-g32"), (scale.numel(), 32))
    for dtype in DTYPES:
        with kernels.forced("reference"):
            expected = held.dequantize(dtype)
        assert bitwise_equal(held.dequantize(dtype), expected)


def test_views_and_other_dtypes_are_left_to_the_reference(instruction_set: str) -> None:
    base = plain(64, 96)
    for weight in (base.t(), base[:, 1:65], base[::2], base.half(), base.double()):
        for text in ("int4-g16", "nf4"):
            scheme = parse_scheme(text)
            assert accelerated.fake_quantize(weight, scheme, None, None) is None
            made = quantize_tensor(weight, scheme)
            with kernels.forced("reference"):
                expected = quantize_tensor(weight, scheme)
            assert bitwise_equal(made.codes, expected.codes)


def test_an_offset_into_memory_changes_nothing(instruction_set: str) -> None:
    """Contiguous tensors that begin at an odd address of four bytes, which no vector is aligned to."""
    store = hard(9, 257).reshape(-1)
    for offset in (1, 3, 7):
        weight = store[offset : offset + 2048].view(8, 256)
        for text in ("int4-g32", "int3-full", "nf4"):
            with kernels.forced("reference"):
                expected = fake_quantize(weight, parse_scheme(text))
            assert bitwise_equal(fake_quantize(weight, parse_scheme(text)), expected)


def test_parts_that_do_not_fit_are_not_read(instruction_set: str) -> None:
    """Codes and scales of other sizes than the shape needs are left to the reference, which refuses them."""
    grid = operations.AffineGrid(4, -8, operations.SYMMETRIC, 32)
    codes, scale = torch.zeros((4, 32), dtype=torch.uint8), torch.ones(4, 2)
    call = operations.dequantize_affine
    assert call(codes, 64, grid, scale=scale, zero=None, dtype=torch.float32) is not None
    assert call(codes[:, :31].contiguous(), 64, grid, scale=scale, zero=None, dtype=torch.float32) is None
    assert call(codes, 96, grid, scale=scale, zero=None, dtype=torch.float32) is None
    assert call(codes, 64, grid, scale=scale[:3], zero=None, dtype=torch.float32) is None
    assert call(codes, 64, grid, scale=scale, zero=codes[:, :2].contiguous(), dtype=torch.float32) is None
    short = QuantizedTensor(codes[:, :31].contiguous(), scale.half(), None, parse_scheme("int4-g32"), (4, 64))
    with pytest.raises(ValueError, match="codes of 4 bits are 32 uint8 bytes a row"):
        short.dequantize()
    assert operations.mask_gradient(torch.ones(4, 64), torch.zeros((8, 3), dtype=torch.uint8), 32) is None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_torch_compile_traces_the_reference(instruction_set: str) -> None:
    weight, scheme = hard(4, 64), parse_scheme("int4-g32-full")
    compiled = torch.compile(lambda w: fake_quantize(w, scheme), backend="eager")
    assert bitwise_equal(compiled(weight), fake_quantize(weight, scheme))

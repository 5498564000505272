"""Products of a few tokens with packed weights: within the bound of float32 sums, on every shape and grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from strop import kernels
from strop.layers.quant_linear import QuantLinear
from strop.numerics import QuantizedTensor, accelerated, parse_scheme, quantize_tensor

from .values import bitwise_equal, hard, plain

TEXTS = [
    *("int8", "int8-g32", "int8-g16-asym", "int8-g24", "int8-tensor", "int8-full", "uint8-asym"),
    *("int4", "int4-g8", "int4-g16-asym", "int4-g32", "int4-g32-full", "int4-g64-asym", "int4-g128", "int4-g256-asym"),
    *("int4-g12", "int4-g48-asym", "int4-g384", "int4-asym", "int4-tensor-asym", "int4-g64-sbf16", "uint4-g32-asym"),
    *("int2-g32", "int3-g32-asym", "int3", "int5-g64", "int6", "nf4", "nf4-g32", "nf4-g128", "nf4-dq", "fp4"),
]
COLUMNS = (1, 31, 33, 64, 96, 255, 257, 384, 1000, 1056, 5632)
UNIT = 2.0**-24  # float32's rounding


def fitting(text: str, columns: int) -> int:
    size = parse_scheme(text).group_size
    return columns if size is None else -(-columns // size) * size


def allowed(x: Tensor, held: QuantizedTensor) -> Tensor:
    """How far a float32 sum may be off: a share of the magnitudes that were added, float64 [tokens, out].

    Sixteen lanes or fewer take turns, so that no partial sum has more than in / 8 + 64 additions behind it, each off by
    at most UNIT of a total below the sum of |x| * 2^bits * scale (codes and zero points may be summed apart).
    """
    spread = held.scales().double().abs()
    rows, columns = held.shape
    size = held.scheme.group_size or columns
    if spread.ndim == 1:
        steps = spread.repeat_interleave(size)[: rows * columns].view(rows, columns)
    else:
        steps = spread.expand(rows, -1).repeat_interleave(columns // spread.shape[1], dim=1)
    if held.scheme.name.startswith(("int", "uint")):
        steps = steps * 2**held.scheme.bits
    return (columns / 8 + 64) * UNIT * (x.double().abs() @ steps.T)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_products_are_within_the_bound_of_their_sums(instruction_set: str, text: str, dtype: torch.dtype) -> None:
    scheme = parse_scheme(text)
    for columns in (fitting(text, columns) for columns in COLUMNS):
        for rows, weight in ((1, plain(1, columns)), (13, hard(13, columns, seed=columns))):
            held = quantize_tensor(weight, scheme)
            bias = plain(1, rows, seed=5).view(-1).to(dtype)
            for tokens in (1, 2, 3, 4):
                x = plain(tokens, columns, seed=tokens).to(dtype)
                x[-1, columns // 2] = 100.0
                got = accelerated.product(x, scheme, held.shape, held.tensors(), bias)
                if held.scheme.granularity.value == "block" and columns % (scheme.group_size or 1):
                    assert got is None
                    continue
                assert got is not None, (columns, tokens)
                assert (got.dtype, got.shape) == (dtype, (tokens, rows))
                expected = x.double() @ held.dequantize().double().T + bias.double()
                slack = allowed(x, held) + UNIT * expected.abs()
                if dtype == torch.bfloat16:
                    slack += 2.0**-8 * (expected.abs() + slack)  # the sum is rounded once
                worst = ((got.double() - expected).abs() - slack).max()
                assert worst <= 0, (columns, tokens, worst.item())


def is_tiled(instruction_set: str, x: Tensor, held: QuantizedTensor) -> bool:
    """Whether weights are decoded into bfloat16, and so rounded to it."""
    few = 8 if held.scheme.bits == 8 else 4
    return instruction_set == "amx" and x.dtype == torch.bfloat16 and len(x) > few


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_products_of_many_tokens_are_within_the_bound_of_their_sums(
    instruction_set: str, text: str, dtype: torch.dtype
) -> None:
    scheme = parse_scheme(text)
    for columns in sorted({fitting(text, columns) for columns in (1, 31, 33, 255, 257, 512, 1056)}):
        rows = 37
        held = quantize_tensor(hard(rows, columns, seed=columns), scheme)
        bias = plain(1, rows, seed=5).view(-1).to(dtype)
        for tokens in (5, 9, 16, 17, 64):
            x = plain(tokens, columns, seed=tokens).to(dtype)
            x[-1, columns // 2] = 100.0
            got = accelerated.product(x, scheme, held.shape, held.tensors(), bias)
            if got is None:
                continue  # a dense weight is faster
            assert (got.dtype, got.shape) == (dtype, (tokens, rows))
            tiled = is_tiled(instruction_set, x, held)
            weight = held.dequantize(torch.bfloat16 if tiled else torch.float32)
            expected = x.double() @ weight.double().T + bias.double()
            slack = allowed(x, held) + UNIT * expected.abs()
            if tiled:  # pairs of columns are added one after the other, and subnormal weights and sums are zeros
                slack = 8 * slack + 2.0**-125 * (x.double().abs().sum(1, keepdim=True) + columns)
            if dtype == torch.bfloat16:
                slack += 2.0**-8 * (expected.abs() + slack)  # the sum is rounded once
            worst = ((got.double() - expected).abs() - slack).max()
            assert worst <= 0, (columns, tokens, worst.item())


@pytest.mark.parametrize("text", ["int8", "int4-g32", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_kernels_take_the_rows_of_a_batch(instruction_set: str, text: str, dtype: torch.dtype) -> None:
    held = quantize_tensor(plain(24, 64), parse_scheme(text))
    most = 4 if dtype == torch.float32 else 64 if instruction_set == "amx" else 16  # float32 keeps a dense model's bits
    for tokens in (1, 4, 5, 8, most, most + 1):
        got = accelerated.product(plain(tokens, 64).to(dtype), held.scheme, held.shape, held.tensors(), None)
        portable = instruction_set == "portable"
        assert (got is not None) == (tokens <= (4 if portable else most)), tokens


@pytest.mark.parametrize("text", ["int8", "int4-g64-asym", "nf4", "int3-g32"])
def test_a_token_of_a_tile_gives_the_same_whatever_stands_beside_it(instruction_set: str, text: str) -> None:
    held, x = quantize_tensor(plain(37, 320), parse_scheme(text)), plain(64, 320, seed=1).bfloat16()
    whole = accelerated.product(x, held.scheme, held.shape, held.tensors(), None)
    part = accelerated.product(x[20:40], held.scheme, held.shape, held.tensors(), None)
    if whole is None or part is None:
        pytest.skip(f"{instruction_set} has no tiles")
    assert bitwise_equal(whole[20:40], part)


@pytest.mark.parametrize("tokens", [2, 9, 20])
@pytest.mark.parametrize("text", ["int8", "int4-g32", "int4-g64-asym", "nf4", "int3-g32"])
def test_the_number_of_threads_changes_no_product(instruction_set: str, text: str, tokens: int) -> None:
    held, x = quantize_tensor(plain(300, 512), parse_scheme(text)), plain(tokens, 512, seed=1)
    x = x if tokens == 2 else x.bfloat16()
    if accelerated.product(x, held.scheme, held.shape, held.tensors(), None) is None:
        pytest.skip("a dense weight is faster")
    before = torch.get_num_threads()
    found: list[Tensor] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = accelerated.product(x, held.scheme, held.shape, held.tensors(), None)
            assert made is not None
            found.append(made)
    finally:
        torch.set_num_threads(before)
    assert bitwise_equal(found[0], found[1])
    assert bitwise_equal(found[0], found[2])


@pytest.mark.parametrize("text", ["int8-g32", "int4-g32", "nf4"])
def test_a_row_alone_gives_what_it_gives_among_others(instruction_set: str, text: str) -> None:
    held, x = quantize_tensor(plain(17, 320), parse_scheme(text)), plain(4, 320, seed=1)
    together = accelerated.product(x, held.scheme, held.shape, held.tensors(), None)
    assert together is not None
    for token in range(4):
        alone = accelerated.product(x[token], held.scheme, held.shape, held.tensors(), None)
        assert alone is not None
        assert bitwise_equal(alone, together[token])


def test_nan_and_infinities_of_the_input_reach_the_output(instruction_set: str) -> None:
    for text in ("int8", "int4-g32", "nf4", "int3-g32"):
        held = quantize_tensor(plain(5, 320).abs() + 0.5, parse_scheme(text))
        for value in (float("nan"), float("inf")):
            for place in (0, 319):
                x = torch.ones(2, 320)
                x[1, place] = value
                for tokens, dtype in ((2, torch.float32), (12, torch.bfloat16)):
                    many = torch.cat([x, torch.ones(tokens - 2, 320)]).to(dtype)
                    got = accelerated.product(many, held.scheme, held.shape, held.tensors(), None)
                    if got is None:
                        assert tokens == 12
                        continue  # a dense weight is faster
                    assert torch.isfinite(got[0]).all()
                    assert torch.isfinite(got[2:]).all()
                    assert not torch.isfinite(got[1]).any(), (text, value)  # an infinity times zero is NaN


@pytest.mark.parametrize("text", ["int4-g32", "nf4-dq", "int8"])
def test_a_layer_multiplies_a_few_rows_by_the_kernels_and_many_by_the_dense_weight(
    instruction_set: str, text: str
) -> None:
    layer = QuantLinear(quantize_tensor(plain(24, 64), parse_scheme(text)), plain(1, 24, seed=2).view(-1))
    for shape in ((1, 1, 64), (1, 4, 64), (64,), (1, 5, 64), (3, 7, 64), (0, 64)):
        x = plain(1, max(1, torch.Size(shape).numel()), seed=3).view(-1)[: torch.Size(shape).numel()].view(shape)
        with torch.no_grad():
            got = layer(x)
            with kernels.forced("reference"):
                expected = layer(x)
        assert got.shape == expected.shape == (*shape[:-1], 24)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert layer(torch.ones(1, 64, dtype=dtype)).dtype == dtype


def test_a_row_that_wants_a_gradient_gets_it_through_the_dense_weight(instruction_set: str) -> None:
    layer = QuantLinear(quantize_tensor(plain(24, 64), parse_scheme("int4-g32")))
    x = plain(1, 64, seed=3).requires_grad_()
    y = layer(x)
    with kernels.forced("reference"):
        assert bitwise_equal(y, layer(x))
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.dense_weight().sum(0, keepdim=True), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_inputs_that_lie_apart_are_gathered_first(instruction_set: str) -> None:
    held = quantize_tensor(plain(24, 64), parse_scheme("int4-g32"))
    layer, x = QuantLinear(held), plain(64, 3, seed=3).t()
    assert not x.is_contiguous()
    with torch.no_grad():
        got = layer(x)
    torch.testing.assert_close(got, nn.functional.linear(x, held.dequantize()), rtol=1e-5, atol=1e-5)

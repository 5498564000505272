"""What lies between a block's products, against PyTorch: values, gradients, odd shapes, NaN, threads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from strop.kernels import block
from strop.kernels.block import HeadNorm, Heads, Scores, Turns

TYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
"""Of the residual stream, and of what products take."""

CLOSE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
WIDTHS = [1, 2, 31, 33, 255, 257, 576]

pytestmark = pytest.mark.usefixtures("instruction_set")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_close(found: Tensor, expected: Tensor, *, dtype: torch.dtype | None = None) -> None:
    """Within the rounding of `dtype` (that of `found`), relative to the largest magnitude there is."""
    assert found.shape == expected.shape
    bound = CLOSE[dtype or found.dtype] * max(1.0, float(expected.abs().max()))
    assert float((found.double() - expected.double()).abs().max()) <= bound


def expected_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize(("stream", "compute"), TYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_norm_and_its_gradients(stream, compute, width):
    x, add, gain = random(5, width, dtype=stream), random(5, width, dtype=compute, seed=1), random(width, seed=2)
    total, y, reciprocal = block.norm(x, gain, 1e-5, compute, add=add)
    assert torch.equal(total, (x.float() + add.float()).to(stream))
    reference = total.double().requires_grad_()
    weight = gain.double().requires_grad_()
    wanted = expected_norm(reference, weight, 1e-5)
    assert (y.dtype, reciprocal.dtype) == (compute, torch.float32)
    assert_close(y, wanted.detach())
    grad, past = random(5, width, dtype=compute, seed=3), random(5, width, dtype=stream, seed=4)
    wanted.backward(grad.double())
    assert reference.grad is not None
    assert weight.grad is not None
    found = block.norm_backward(grad, total, gain, reciprocal, past)
    assert found.dtype == stream
    assert_close(found, reference.grad + past.double())
    assert_close(block.norm_backward(grad, total, gain, reciprocal, None), reference.grad)
    assert_close(block.norm_gain(grad, total, reciprocal), weight.grad, dtype=torch.float32)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_a_norm_of_each_head_leaves_the_other_columns(dtype):
    x, gain = random(3, 5 * 8, dtype=dtype), random(8)
    y = torch.full_like(x, 7.0)
    norm = HeadNorm(2, 8, 8, gain, 1e-6)
    reciprocal = norm.forward(x, y)
    reference, weight = x.double().requires_grad_(), gain.double().requires_grad_()
    wanted = expected_norm(reference.view(3, 5, 8)[:, 1:3], weight, 1e-6).reshape(3, 16)
    assert_close(y[:, 8:24], wanted.detach())
    assert bool((y[:, :8] == 7).all())
    assert bool((y[:, 24:] == 7).all())
    grad, back = random(3, 40, dtype=dtype, seed=1), torch.full_like(x, 7.0)
    wanted.backward(grad[:, 8:24].double())
    assert reference.grad is not None
    assert weight.grad is not None
    gains = norm.backward(grad, x, reciprocal, back)
    assert_close(back[:, 8:24], reference.grad[:, 8:24])
    assert bool((back[:, :8] == 7).all())
    assert_close(gains, weight.grad, dtype=torch.float32)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' rotation, of the first values of a head: x [rows, heads, length, size]."""
    count = cos.shape[-1]
    part, rest = x[..., :count], x[..., count:]
    half = torch.cat([-part[..., count // 2 :], part[..., : count // 2]], -1)
    return torch.cat([part * cos + half * sin, rest], -1)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["same positions", "positions of each row"])
@pytest.mark.parametrize(("size", "count"), [(8, 8), (8, 4), (2, 2), (64, 64)])
def test_heads_are_split_and_turned(dtype, shared, size, count):
    heads = Heads(queries=6, keys=2, size=size, rows=2, length=5, turned=count)
    angles = random(1 if shared else 2, 5, count)
    turns = Turns(*(f(angles).reshape(-1, count) for f in (torch.cos, torch.sin)), shared=shared)
    x = random(10, 10 * size, dtype=dtype)
    q, k, v = block.split_heads(x, x, heads, turns)
    reference = x.double().requires_grad_()
    by_head = reference.view(2, 5, 10, size).transpose(1, 2)  # [rows, heads, length, size]
    cos, sin = (f(angles.double())[:, None] for f in (torch.cos, torch.sin))
    queries = turned(by_head[:, :6], cos, sin).view(2, 2, 3, 5, size).transpose(2, 3).reshape(4, 15, size)
    keys = turned(by_head[:, 6:8], cos, sin).reshape(4, 5, size)
    values = by_head[:, 8:].reshape(4, 5, size)
    for found, wanted in ((q, queries), (k, keys), (v, values)):
        assert_close(found, wanted.detach())
    grads = [random(*one.shape, dtype=dtype, seed=place) for place, one in enumerate((q, k, v))]
    torch.autograd.backward([queries, keys, values], [grad.double() for grad in grads])
    assert reference.grad is not None
    assert_close(block.split_heads_backward(*grads, heads, turns), reference.grad)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_heads_are_merged(dtype):
    heads = Heads(queries=6, keys=2, size=8, rows=2, length=5, turned=8)
    given, reciprocal = random(4, 15, 8, dtype=dtype), random(4, 15, seed=1).abs()
    wanted = (given.double() * reciprocal[..., None]).view(2, 2, 5, 3, 8).transpose(1, 2).reshape(10, 48)
    merged = block.merge_heads(given, reciprocal, heads)
    assert_close(merged, wanted)
    grad = random(10, 48, dtype=dtype, seed=2)
    back, products = block.merge_heads_backward(grad, merged, heads)
    assert torch.equal(back, grad.view(2, 5, 2, 3, 8).transpose(1, 2).reshape(4, 15, 8))
    each = (grad.double() * merged.double()).view(2, 5, 2, 3, 8).transpose(1, 2).reshape(4, 15, 8).sum(-1)
    assert_close(products, each, dtype=torch.float32)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("which", ["causal", "packed", "sliding", "nothing"])
def test_softmax_over_the_keys_that_a_token_sees(dtype, length, which):
    heads = Heads(queries=4, keys=2, size=8, rows=2, length=length, turned=8)
    last = torch.arange(length, dtype=torch.int32).expand(2, length).contiguous()
    first = {
        "causal": torch.zeros_like(last),
        "packed": torch.where(last >= length // 2, length // 2, 0).to(torch.int32),
        "sliding": (last - 2).clamp(min=0),
        "nothing": last + 1,
    }[which]
    scores, scaling = random(4, length * 2, length, dtype=dtype) * 4, 0.37
    part = Scores(heads, scaling, first, last, token=0, tokens=length, key=0)
    reciprocal, logarithm = torch.zeros(4, length * 2), torch.zeros(4, length * 2)
    found = scores.clone()
    part.softmax(found, reciprocal, logarithm)
    places = torch.arange(length)
    sees = (places >= first[..., None]) & (places <= last[..., None])  # [rows, length, keys]
    sees = sees[:, None, :, None].expand(2, 2, length, 2, length).reshape(4, length * 2, length)
    scaled = (scores.double() * scaling).requires_grad_()
    wanted = torch.softmax(scaled.masked_fill(~sees, -math.inf), -1).nan_to_num(0.0)
    assert_close(found.double() * reciprocal[..., None], wanted.detach(), dtype=dtype)
    assert not found[~sees].any()
    grad = random(*scores.shape, dtype=dtype, seed=1)
    products = (wanted.detach() * grad.double()).sum(-1).float()
    back, again = grad.clone(), scores.clone()
    part.softmax_backward(again, back, products, logarithm)
    wanted.backward(grad.double())
    assert scaled.grad is not None
    assert_close(again, wanted.detach())
    assert_close(back, scaled.grad.nan_to_num(0.0) * scaling)


def test_a_part_of_the_scores_is_the_same_part_of_all():
    heads = Heads(queries=4, keys=2, size=8, rows=2, length=12, turned=8)
    last = torch.arange(12, dtype=torch.int32).expand(2, 12).contiguous()
    first = (last // 4 * 4).to(torch.int32)
    scores = random(4, 24, 12)
    whole, part = scores.clone(), scores[:, 8:16, 4:8].contiguous()
    sums = [torch.zeros(4, 24) for _ in range(4)]
    Scores(heads, 0.5, first, last, 0, 12, 0).softmax(whole, sums[0], sums[1])
    Scores(heads, 0.5, first, last, 4, 4, 4).softmax(part, sums[2], sums[3])
    assert torch.equal(part, whole[:, 8:16, 4:8])
    for all_rows, some_rows in ((sums[0], sums[2]), (sums[1], sums[3])):
        assert torch.equal(all_rows[:, 8:16], some_rows[:, 8:16])


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_and_its_gradient(dtype, width):
    x, grad = random(3, 2 * width, dtype=dtype) * 5, random(3, width, dtype=dtype, seed=1)
    reference = x.double().requires_grad_()
    wanted = functional.silu(reference[:, :width]) * reference[:, width:]
    assert_close(block.swiglu(x), wanted.detach())
    wanted.backward(grad.double())
    back, again = block.swiglu_backward(grad, x)
    assert reference.grad is not None
    assert_close(back, reference.grad)
    assert torch.equal(again, block.swiglu(x))


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_cross_entropy_and_its_gradient(dtype, width):
    logits, labels = random(6, width, dtype=dtype) * 6, torch.arange(6) % width
    labels[2] = -100
    reference = logits.double().requires_grad_()
    wanted = functional.cross_entropy(reference, labels, ignore_index=-100, reduction="none")
    found = logits.clone()
    losses = block.cross_entropy(found, labels)
    assert_close(losses, wanted.detach(), dtype=torch.float32)
    wanted.sum().backward()
    assert reference.grad is not None
    assert_close(found, reference.grad)
    assert not found[2].any()


def test_large_logits_neither_overflow_nor_vanish():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0], [-120.0, -120.0, -120.0]])
    losses = block.cross_entropy(logits, torch.tensor([0, 1, 2]))
    assert torch.allclose(losses, torch.tensor([0.0, 0.0, math.log(3)]))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stays_none(value):
    """A loss or a gradient must not look finite where an input is not."""
    x = random(2, 40)
    x[1, 3] = value
    assert not torch.isfinite(block.cross_entropy(x.clone(), torch.tensor([0, 1]))[1])
    assert not torch.isfinite(block.norm(x, torch.ones(40), 1e-5, torch.float32)[1][1]).all()
    assert torch.isfinite(block.norm(x, torch.ones(40), 1e-5, torch.float32)[1][0]).all()
    heads = Heads(queries=1, keys=1, size=2, rows=1, length=2, turned=2)
    scores = torch.tensor([[[0.0, 0.0], [0.0, value]]])
    first, last = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([[0, 1]], dtype=torch.int32)
    reciprocal, logarithm = torch.zeros(1, 2), torch.zeros(1, 2)
    Scores(heads, 1.0, first, last, 0, 2, 0).softmax(scores, reciprocal, logarithm)
    assert not torch.isfinite(scores[0, 1] * reciprocal[0, 1]).all()
    assert torch.isfinite(scores[0, 0] * reciprocal[0, 0]).all()


def test_a_label_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="label"):
        block.cross_entropy(random(2, 3), torch.tensor([0, 3]))


def test_no_row_is_no_error():
    assert block.cross_entropy(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)).shape == (0,)
    assert block.swiglu(torch.empty(0, 8)).shape == (0, 4)


def test_threads_change_no_bit():
    x, gain, grad = random(300, 256), random(256), random(300, 256, seed=1)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            total, y, reciprocal = block.norm(x, gain, 1e-5, torch.float32)
            back, gains = (
                block.norm_backward(grad, total, gain, reciprocal, None),
                block.norm_gain(grad, total, reciprocal),
            )
            logits = x.clone()
            losses = block.cross_entropy(logits, torch.arange(300) % 256)
            results.append([y, back, gains, block.swiglu(x), losses, logits])
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

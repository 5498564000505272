"""Grids give in training the very values that they store, learn as their papers say, and move no more than they may."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.errors import FormatError
from strop.layers.grids import FACTORS, CodeMoves, LearnedGrid, MovesGrid, RangeGrid, ZeroMoves
from strop.methods import search
from strop.numerics.groups import restore, split, spread
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scheme import parse_format, parse_scheme

DESTINATIONS = [
    "int8", "int4", "int4-g32", "int4-g32-asym", "int3-g32", "int2-g32", "int2", "nf4", "mxfp4",
    "gguf:q4_0", "gguf:q8_0", "gguf:q4_k",
]  # fmt: skip
PLAIN = ["int4-g32", "int3-g32-asym", "int2", "gguf:q4_0", "gguf:q8_0", "nf4", "fp8"]


def _weight(seed: int = 0, shape: tuple[int, int] = (16, 256)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _scheme(text: str):
    return parse_format(text).scheme


def _start(text: str, weight: torch.Tensor) -> QuantizedTensor:
    return search(weight, _scheme(text), None)


@pytest.mark.parametrize("text", DESTINATIONS)
def test_a_range_grid_gives_what_rounding_to_nearest_stores(text):
    weight, scheme = _weight(), _scheme(text)
    grid = RangeGrid(scheme, (16, 256))
    stored = quantize_tensor(weight, scheme)
    assert torch.equal(grid.rounded(weight), stored.dequantize())
    assert torch.equal(grid.settled(weight).codes, stored.codes)


@pytest.mark.parametrize("text", [text for text in DESTINATIONS if text != "gguf:q4_k"])
def test_held_scales_stay_while_the_weight_moves_and_what_is_stored_agrees(text):
    weight, scheme = _weight(), _scheme(text)
    grid = RangeGrid(scheme, (16, 256), holds=True)
    assert torch.equal(grid.rounded(weight), quantize_tensor(weight, scheme).dequantize())
    grid.hold(weight)
    before = grid.settled(weight)
    assert torch.equal(before.dequantize(), quantize_tensor(weight, scheme).dequantize())
    moved = 3 * weight
    grid.hold(moved)  # a second call changes nothing
    after = grid.settled(moved)
    assert torch.equal(after.scales(), before.scales())
    assert torch.equal(grid.rounded(moved), after.dequantize())
    assert not torch.equal(after.codes, before.codes)


def test_scales_of_a_superblock_cannot_be_held_or_learned_or_counted():
    with pytest.raises(FormatError, match="superblock"):
        RangeGrid(_scheme("gguf:q4_k"), (16, 256), holds=True)
    start = quantize_tensor(_weight(), _scheme("gguf:q4_k"))
    for make in (lambda: LearnedGrid(start), lambda: MovesGrid(start, 0.1), lambda: CodeMoves(start, 0.1)):
        with pytest.raises(FormatError, match="plain scales"):
            make()


@pytest.mark.parametrize("text", PLAIN)
def test_a_learned_grid_begins_at_its_start_and_stores_what_it_trained(text):
    weight = _weight()
    start = _start(text, weight)
    grid = LearnedGrid(start)
    assert torch.equal(grid.rounded(weight), start.dequantize())
    with torch.no_grad():
        grid.factor.uniform_(0.7, 1.4, generator=torch.Generator().manual_seed(1))
        if grid.zero is not None:
            grid.zero += 0.6
    moved = weight + 0.1 * _weight(2)
    stored = grid.settled(moved)
    assert torch.equal(grid.rounded(moved), stored.dequantize())
    assert stored.scale is not None
    assert stored.scale.dtype == start.scheme.scale_dtype
    assert not torch.equal(stored.scale, start.scale)


@pytest.mark.parametrize("text", ["int4-g32", "int2", "int3-g32-asym"])
def test_learned_scales_and_zero_points_get_the_gradients_of_lsq(text):
    """Esser and others, equation 3; Bhalgat and others, equation 7; in float64, value by value."""
    weight = _weight().requires_grad_()
    grid = LearnedGrid(_start(text, weight.detach()))
    sent = _weight(5)
    grid.rounded(weight).backward(sent)
    scheme, scale = grid.scheme, spread(grid.begun).double()
    groups, above = split(weight.detach(), scheme).double(), split(sent, scheme).double()
    form = scheme.format
    zero = spread(grid.zero.detach()).double() if grid.zero is not None else torch.full_like(scale, -form.qmin)
    places = groups / scale + zero
    inside = (places.round() >= 0) & (places.round() <= form.steps)
    codes = places.round().clamp(0, form.steps)
    by_scale = torch.where(inside, codes - zero - groups / scale, codes - zero)
    largest = form.qmax if form.signed else form.steps
    g = 1 / math.sqrt(weight.numel() / grid.factor.numel() * largest)
    expected = (above * by_scale).sum(-1, keepdim=True) * scale * g  # the factor multiplies the start
    torch.testing.assert_close(grid.factor.grad, expected.view(grid.factor.shape).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, restore(above * inside, (16, 256)).float())
    if grid.zero is not None:
        by_zero = (above * torch.where(inside, 0.0, -1.0) * scale).sum(-1) * g
        torch.testing.assert_close(grid.zero.grad, by_zero.view(grid.zero.shape).float(), rtol=1e-4, atol=1e-5)


def test_learned_scales_that_would_vanish_or_turn_are_stopped_and_counted():
    grid = LearnedGrid(_start("int4-g32", _weight()))
    with torch.no_grad():
        grid.factor[0, 0], grid.factor[1, 1], grid.factor[2, 2] = -3.0, 0.0, 1e9
    assert grid.keep_in_bounds() == 3
    assert grid.factor.min() == FACTORS[0]
    assert grid.factor.max() == FACTORS[1]
    assert torch.isfinite(grid.rounded(_weight())).all()
    assert grid.keep_in_bounds() == 0


@settings(max_examples=40, deadline=None)
@given(
    share=st.floats(0.0, 1.0),
    text=st.sampled_from(["int4-g32", "int2-g32-asym", "gguf:q4_0", "nf4"]),
    seed=st.integers(0, 99),
    size=st.floats(0.001, 2.0),
)
def test_no_more_codes_leave_the_start_than_may_and_those_that_do_want_it_most(share, text, seed, size):
    weight = _weight(seed, (4, 64))
    start = _start(text, weight)
    grid = MovesGrid(start, share)
    moved = weight + size * _weight(seed + 1, (4, 64))
    stored = grid.settled(moved)
    assert torch.equal(grid.rounded(moved), stored.dequantize())
    assert torch.equal(stored.scale, start.scale)
    changed = stored.stored_codes() != start.stored_codes()
    free = MovesGrid(start, 1.0).settled(moved).stored_codes()
    wanted = free != start.stored_codes()
    assert int(changed.sum()) == min(int(share * 256), int(wanted.sum()))
    assert torch.equal(stored.stored_codes()[changed], free[changed])
    far = split(moved - start.dequantize(), start.scheme).abs() / spread(start.scale.float()).abs()
    far = restore(far, (4, 64))
    left = wanted & ~changed
    if changed.any() and left.any():
        assert far[changed].min() >= far[left].max()


def test_the_gradient_of_limited_moves_reaches_every_weight():
    weight = _weight().requires_grad_()
    MovesGrid(_start("int4-g32", weight.detach()), 0.0).rounded(weight).backward(_weight(3))
    assert torch.equal(weight.grad, _weight(3))


@settings(max_examples=30, deadline=None)
@given(
    steps=st.floats(-1.45, 1.45), text=st.sampled_from(["int4-g32", "int8-g32", "gguf:q4_0"]), rows=st.integers(1, 40)
)
def test_code_moves_sum_to_the_change_in_every_row_and_no_change_moves_nothing(steps, text, rows):
    start = _start(text, 0.1 * _weight(0, (rows, 256)))
    codes, grid = start.stored_codes().int(), CodeMoves(start, 1.0)
    assert torch.equal(grid.settled(start.dequantize()).codes, start.codes)
    groups = split(start.dequantize(), start.scheme)
    moved = restore(groups + steps * spread(start.scale.float()), (rows, 256))
    stored = grid.settled(moved)
    by = stored.stored_codes().int() - codes
    inner = (codes > 1) & (codes < int(codes.max()) - 1)  # these have room to move
    assert ((by - steps).abs()[inner] < 1 + 1e-4).all()
    for row in range(rows):
        mean = by[row][inner[row]].float().mean().item()
        assert abs(mean - steps) < 0.12
    assert torch.equal(grid.rounded(moved), stored.dequantize())


def test_of_more_moves_than_may_be_the_furthest_stay():
    start = quantize_tensor(_weight(), parse_scheme("int4-g32"))
    free, few = CodeMoves(start, 1.0), CodeMoves(start, 0.05)
    moved = start.dequantize() + 0.1 * _weight(4)
    moved[3, 5] = start.dequantize()[3, 5] - 4 * start.dequantize()[3, 5].sign()  # far above every other
    all_codes, codes, begun = (x.stored_codes() for x in (free.settled(moved), few.settled(moved), start))
    changed = codes != begun
    assert int((all_codes != begun).sum()) > 0.05 * 4096 >= int(changed.sum()) > 0.04 * 4096
    assert torch.equal(codes[changed], all_codes[changed])
    assert changed[3, 5]


def test_zero_moves_move_whole_groups_by_whole_steps_that_sum_to_the_change():
    start = quantize_tensor(_weight(), parse_scheme("int4-g32-asym"))
    grid = ZeroMoves(start, 1.0)
    held = start.dequantize()
    assert torch.equal(grid.settled(held).zero_point, start.zero_point)
    moved = held + 0.25 * restore(spread(start.scale.float()).expand_as(split(held, start.scheme)), (16, 256))
    stored = grid.settled(moved)
    assert torch.equal(stored.codes, start.codes)
    by = start.zero_point.int() - stored.zero_point.int()
    assert set(by.flatten().tolist()) == {0, 1}
    assert abs(by.float().mean().item() - 0.25) < 0.05
    assert torch.equal(grid.rounded(moved), stored.dequantize())
    few = ZeroMoves(start, 0.1).settled(moved)
    assert int((few.zero_point != start.zero_point).sum()) == int(0.1 * start.zero_point.numel())


def test_zero_moves_want_zero_points():
    with pytest.raises(FormatError, match="no zero points"):
        ZeroMoves(quantize_tensor(_weight(), parse_scheme("int4-g32")), 0.1)


def test_groups_in_activation_order_are_refused():
    start = quantize_tensor(_weight(), parse_scheme("int4-g32"))
    ordered = dataclasses.replace(start, group_index=torch.arange(256, dtype=torch.int32) % 8)
    for make in (LearnedGrid, lambda start: MovesGrid(start, 0.1), lambda start: CodeMoves(start, 0.1)):
        with pytest.raises(FormatError, match="plain scales"):
            make(ordered)


def test_a_change_of_far_more_steps_than_there_are_codes_goes_the_way_it_points():
    scheme = parse_scheme("int4-g32")
    start = quantize_tensor(torch.full((1, 32), 1e-7), scheme)
    stored = CodeMoves(start, 1.0).settled(start.dequantize() + 1e-2)
    assert (stored.stored_codes() == 15).all()
    with pytest.raises(FormatError, match="grids of integers"):
        CodeMoves(quantize_tensor(_weight(), parse_scheme("nf4")), 0.1)

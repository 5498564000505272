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
    with pytest.raises(FormatError, match="codes themselves"):
        LearnedGrid(start)
    for make in (lambda: MovesGrid(start, 0.1), lambda: CodeMoves(start, 0.1)):
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


def test_code_moves_move_nothing_without_a_change_and_then_the_largest_changes_by_their_steps():
    start = quantize_tensor(_weight(), parse_scheme("int4-g32"))
    grid = CodeMoves(start, 0.25)
    held = start.dequantize()
    assert torch.equal(grid.settled(held).codes, start.codes)
    size = spread(start.scale.float()).abs()
    change = restore(torch.zeros_like(split(held, start.scheme)) + 0.01 * size, (16, 256))
    small, large = held.clone(), held.clone()
    small[0, :8] += change[0, :8]  # far below half a step, and yet the only ones there are
    large[3, 5] += 250 * change[3, 5]
    moved = grid.settled(small).stored_codes().int() - start.stored_codes().int()
    inside = start.stored_codes()[0, :8] < 15
    assert torch.equal(moved[0, :8], inside.int())
    assert moved[0, 8:].abs().sum() + moved[1:].abs().sum() == 0
    by = grid.settled(large).stored_codes().int() - start.stored_codes().int()
    assert by[3, 5] == min(round(2.5), 15 - int(start.stored_codes()[3, 5]))
    assert by.abs().sum() == by[3, 5].abs()
    assert torch.equal(grid.rounded(small), grid.settled(small).dequantize())


def test_the_codes_that_move_grow_with_the_run():
    start = quantize_tensor(_weight(), parse_scheme("int3-g32"))
    grid = CodeMoves(start, 0.5)
    moved = start.dequantize() + 0.01 * _weight(4)
    counts = []
    for progress in (0.0, 0.1, 0.5, 1.0):
        grid.progress = progress
        counts.append(int((grid.settled(moved).stored_codes() != start.stored_codes()).sum()))
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[1] <= 0.05 * 4096 < counts[2] <= 0.25 * 4096 < counts[3] <= 0.5 * 4096


def test_zero_moves_move_whole_groups_by_whole_steps():
    start = quantize_tensor(_weight(), parse_scheme("int4-g32-asym"))
    grid = ZeroMoves(start, 0.1)
    held = start.dequantize()
    assert torch.equal(grid.settled(held).zero_point, start.zero_point)
    step = start.scale.float()[2, 3]
    held[2, 96:128] += 0.2 * step
    stored = grid.settled(held)
    assert torch.equal(stored.codes, start.codes)
    expected = start.zero_point.clone()
    expected[2, 3] -= 1
    assert torch.equal(stored.zero_point, expected)
    assert torch.equal(grid.rounded(held), stored.dequantize())
    torch.testing.assert_close(stored.dequantize()[2, 96:128], start.dequantize()[2, 96:128] + step)


def test_zero_moves_want_zero_points():
    with pytest.raises(FormatError, match="no zero points"):
        ZeroMoves(quantize_tensor(_weight(), parse_scheme("int4-g32")), 0.1)


def test_groups_in_activation_order_are_refused():
    start = quantize_tensor(_weight(), parse_scheme("int4-g32"))
    ordered = dataclasses.replace(start, group_index=torch.arange(256, dtype=torch.int32) % 8)
    with pytest.raises(FormatError, match="plain scales"):
        CodeMoves(ordered, 0.1)

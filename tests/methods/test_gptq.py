"""GPTQ: the paper's column-wise algorithm in float64 is the oracle; it never errs more than rounding to nearest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strop.errors import DataError, FormatError, UsageError
from strop.methods import METHODS, Statistics, gptq, rtn, search
from strop.methods.base import output_error
from strop.methods.gptq import Order, factor, refit, sweep, target
from strop.methods.search import searched_scale
from strop.numerics import parse_scheme, quantize_tensor
from strop.numerics.qtensor import QuantizedTensor
from tests.methods.inputs import correlated, real_layers, statistics_of, weight
from tests.numerics.schemes import ALL_TEXTS

ORDERS: tuple[Order, ...] = ("pivot", "activation", "group", "none")


def hessian_of(statistics: Statistics) -> Tensor:
    assert statistics.hessian is not None
    return statistics.hessian


def error_of(dense: Tensor, quantized: QuantizedTensor, statistics: Statistics) -> float:
    return output_error(dense, quantized, hessian_of(statistics))


def plain_gptq(dense: Tensor, hessian: Tensor, order: list[int], like: QuantizedTensor) -> Tensor:
    """Algorithm 1 of the paper, a column at a time with the inverse Hessian, in float64; scales are those of `like`.

    Works for groups and channels of integers. Returns the rounded weight.
    """
    scheme = like.scheme
    work = dense.double()[:, order].clone()
    size = scheme.group_size or dense.shape[1]
    scale = like.scales().double()
    zero = torch.zeros_like(scale)
    if like.zero_point is not None:
        zero = like.zero_point.double() + scheme.format.qmin
    moments = hessian.double()[order][:, order]
    moments = moments + 0.01 * moments.diagonal().mean() * torch.eye(len(order), dtype=torch.double)
    inverse_factor = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    rounded = torch.empty_like(work)
    for turn, column in enumerate(order):
        group = column // size
        codes = torch.round(work[:, turn] / scale[:, group]) + zero[:, group]
        codes = codes.clamp(scheme.format.qmin, scheme.format.qmax)
        rounded[:, turn] = (codes - zero[:, group]) * scale[:, group]
        error = (work[:, turn] - rounded[:, turn]) / inverse_factor[turn, turn]
        work[:, turn + 1 :] -= torch.outer(error, inverse_factor[turn, turn + 1 :])
    result = torch.empty_like(rounded)
    result[:, order] = rounded
    return result


@pytest.mark.parametrize("text", ["int4-g32", "int3-g16-asym", "int2-g32-full", "int4", "int8-asym"])
@pytest.mark.parametrize("turns", ["pivot", "backwards"])
@pytest.mark.parametrize("block", [1, 48, 128])
def test_blocked_equals_columnwise_with_the_inverse(text: str, turns: str, block: int) -> None:
    scheme = parse_scheme(text)
    dense, statistics = weight(24, 160), statistics_of(correlated(160))
    order = None if turns == "pivot" else torch.arange(159, -1, -1)
    factored = factor(hessian_of(statistics), 0.01, order)
    assert factored is not None
    scale, zero_point = searched_scale(dense, scheme, factored.importance)
    values = sweep(dense, scheme, scale, zero_point, factored, block=block)
    found = quantize_tensor(values, scheme, scale=scale, zero_point=zero_point)
    expected = plain_gptq(dense, hessian_of(statistics), factored.order.tolist(), found)
    agreeing = (found.dequantize().double() - expected).abs() < 1e-6
    assert agreeing.all(dim=1).float().mean() >= 22 / 24  # float32 may fall on the other side of a tie, in few rows
    error = error_of(dense, found, statistics)
    difference = dense.double() - expected
    assert error == pytest.approx(
        ((difference @ hessian_of(statistics).double()) * difference).sum().item() / 24, rel=0.02
    )


@pytest.mark.parametrize(
    "order", [None, torch.arange(70), torch.randperm(70, generator=torch.Generator().manual_seed(0))]
)
def test_the_factor_is_the_damped_hessian(order: Tensor | None) -> None:
    hessian = hessian_of(statistics_of(correlated(70)))
    factored = factor(hessian, 0.02, order)
    assert factored is not None
    turns = factored.order
    assert sorted(turns.tolist()) == list(range(70))
    if order is not None:
        assert torch.equal(turns, order)
    root = factored.gains.double() * factored.importance[turns].double().sqrt()
    damped = hessian.double() + 0.02 * hessian.diagonal().double().mean() * torch.eye(70)
    assert torch.allclose(root @ root.t(), damped[turns][:, turns], atol=1e-5 * hessian.diagonal().max().item())
    assert torch.equal(factored.gains.triu(), factored.gains)


def test_the_last_columns_in_pivot_order_are_those_of_least_mean_square() -> None:
    hessian = torch.diag(torch.arange(1.0, 97.0).flip(0))
    factored = factor(hessian, 0.0)
    assert factored is not None
    assert factored.order.tolist() == list(range(96))  # nothing goes together: from the largest to the least


@pytest.mark.parametrize("text", ALL_TEXTS)
def test_an_identity_hessian_gives_rounding_to_nearest_bit_for_bit(text: str) -> None:
    scheme, dense = parse_scheme(text), weight(6, 24)
    if text.startswith("uint") and "asym" not in text:
        dense = dense.abs()
    factored = factor(torch.eye(24), 0.01)
    assert factored is not None
    plain = rtn(dense, scheme)
    scale = searched_scale(dense, scheme)
    for scales in (scale, (plain.scale, None) if plain.scale is not None and plain.zero_point is None else scale):
        values = sweep(dense, scheme, *scales, factored, block=5)
        assert torch.equal(values, dense)
        by_column = quantize_tensor(values, scheme, scale=scales[0], zero_point=scales[1])
        expected = quantize_tensor(dense, scheme, scale=scales[0], zero_point=scales[1])
        assert torch.equal(by_column.codes, expected.codes)


@given(st.sampled_from(ALL_TEXTS), st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from(ORDERS))
@settings(deadline=None, max_examples=40)
def test_gptq_output_error_is_never_above_rounding(text: str, seed: int, tokens: int, order: Order) -> None:
    scheme, dense = parse_scheme(text), weight(5, 24, seed=seed)
    statistics = statistics_of(correlated(24, tokens=tokens, seed=seed))
    found = gptq(dense, scheme, statistics, order=order)
    assert found.scheme == scheme
    error = error_of(dense, found, statistics)
    assert error <= error_of(dense, rtn(dense, scheme), statistics)
    assert error <= error_of(dense, search(dense, scheme, statistics), statistics)


@pytest.mark.parametrize(
    "text", ["int4-g32", "int3-g32-asym", "int2-g32", "int4-g64-full", "int4", "int4-tensor", "nf4", "fp8", "nf4-dq"]
)
def test_gptq_errs_clearly_less_where_inputs_go_together(text: str) -> None:
    scheme, dense, statistics = parse_scheme(text), weight(32, 128), statistics_of(correlated(128))
    plain = error_of(dense, search(dense, scheme, statistics), statistics)
    for order in ORDERS:
        assert error_of(dense, gptq(dense, scheme, statistics, order=order), statistics) < 0.8 * plain


@pytest.mark.parametrize(("model", "bits"), [("stories260K", 4), ("stories260K", 3), ("demo", 3)])
def test_output_error_is_below_rounding_on_every_layer_of_real_models(model: str, bits: int, material: Path) -> None:
    for name, (dense, statistics) in real_layers(model, material).items():
        scheme = parse_scheme(f"int{bits}-g{43 if dense.shape[1] == 172 else 32}")
        notes: list[str] = []
        found = gptq(dense, scheme, statistics, where=name, note=notes.append)
        plain = error_of(dense, rtn(dense, scheme), statistics)
        assert error_of(dense, found, statistics) < 0.8 * plain, name
        assert not notes


def test_refitted_scales_err_least_among_all_scales_of_one_group() -> None:
    scheme, dense, statistics = parse_scheme("int4-sf32"), weight(4, 32), statistics_of(correlated(32))
    plain = rtn(dense, scheme)
    fitted = refit(dense, plain, hessian_of(statistics))
    assert torch.equal(fitted.codes, plain.codes)
    least = error_of(dense, fitted, statistics)
    assert least < error_of(dense, plain, statistics)
    for factor_ in (0.99, 0.999, 1.001, 1.01):
        moved = QuantizedTensor(fitted.codes, fitted.scales() * factor_, None, scheme, fitted.shape)
        assert error_of(dense, moved, statistics) > least


def test_an_order_changes_no_group_of_a_column() -> None:
    """Scales stand where the columns do: dequantizing in place gives what the error was measured on."""
    scheme, dense = parse_scheme("int4-g32"), weight(8, 64)
    dense[:, :32] *= 100
    found = gptq(dense, scheme, statistics_of(correlated(64)), order="activation")
    assert (found.scales()[:, 0] > 10 * found.scales()[:, 1]).all()


def test_group_order_takes_whole_groups() -> None:
    statistics = statistics_of(correlated(128))
    by_group = gptq(weight(8, 128), parse_scheme("int3-g32"), statistics, order="group")
    by_column = gptq(weight(8, 128), parse_scheme("int3-g32"), statistics, order="activation")
    per_channel = [
        gptq(weight(8, 128), parse_scheme("int3"), statistics, order=name) for name in ("group", "activation")
    ]
    assert not torch.equal(by_group.codes, by_column.codes)
    assert torch.equal(per_channel[0].codes, per_channel[1].codes)  # a single group


def test_a_second_pass_errs_less_at_two_bits() -> None:
    scheme, dense, statistics = parse_scheme("int2-g32"), weight(32, 128), statistics_of(correlated(128))
    once, twice = (error_of(dense, gptq(dense, scheme, statistics, passes=n), statistics) for n in (1, 2))
    assert twice < once
    assert twice == error_of(dense, gptq(dense, scheme, statistics), statistics)


@pytest.mark.parametrize("columns", [1, 31, 33, 172, 255, 257])
@pytest.mark.parametrize("text", ["int4", "int2-asym", "nf4", "int4-tensor", "fp8"])
def test_odd_widths(columns: int, text: str) -> None:
    scheme, dense, statistics = parse_scheme(text), weight(3, columns), statistics_of(correlated(columns))
    found = gptq(dense, scheme, statistics)
    assert torch.isfinite(found.dequantize()).all()
    assert error_of(dense, found, statistics) <= output_error(dense, rtn(dense, scheme), hessian_of(statistics))


def test_inputs_that_never_fire_are_rounded_to_nearest_and_disturb_nobody() -> None:
    inputs = correlated(64)
    inputs[:, [3, 40]] = 0.0
    alive = [column for column in range(64) if column not in (3, 40)]
    scheme, dense = parse_scheme("int4-sf32"), weight(8, 64)
    statistics = statistics_of(inputs)
    factored = factor(hessian_of(statistics), 0.01)
    assert factored is not None
    scale, _ = searched_scale(dense, scheme, factored.importance)
    values = sweep(dense, scheme, scale, None, factored, block=32)
    assert torch.equal(values[:, [3, 40]], dense[:, [3, 40]])
    other = dense.clone()
    other[:, [3, 40]] = 0.5
    assert torch.equal(sweep(other, scheme, scale, None, factored, block=32)[:, alive], values[:, alive])
    found = gptq(dense, scheme, statistics)
    assert (found.dequantize()[:, [3, 40]] != 0).any()


def test_a_hessian_of_zeros_is_rounding_and_said() -> None:
    notes: list[str] = []
    statistics = Statistics(torch.zeros(64), rows=10, hessian=torch.zeros(64, 64))
    found = gptq(weight(8, 64), parse_scheme("int4-g32"), statistics, where="up_proj", note=notes.append)
    assert torch.equal(found.codes, rtn(weight(8, 64), parse_scheme("int4-g32")).codes)
    assert notes == ["up_proj: every input was zero in calibration; rounded to nearest"]


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_one_line_repeated_gives_a_hessian_of_rank_one_and_works(damping: float) -> None:
    notes: list[str] = []
    statistics = statistics_of(correlated(96, tokens=1).repeat(50, 1))
    dense, scheme = weight(8, 96), parse_scheme("int4-g32")
    found = gptq(dense, scheme, statistics, damping=damping, where="up_proj", note=notes.append)
    assert torch.isfinite(found.dequantize()).all()
    plain = error_of(dense, search(dense, scheme, statistics), statistics)
    assert error_of(dense, found, statistics) < 0.1 * plain
    assert (damping == 0) == any("up_proj: damping 0.001 instead of 0" in note for note in notes)


def test_the_same_inputs_give_the_same_bits() -> None:
    statistics = statistics_of(correlated(128))
    one, two = (gptq(weight(16, 128), parse_scheme("int3-g32-asym"), statistics) for _ in range(2))
    for name, part in one.tensors().items():
        assert torch.equal(part, two.tensors()[name])
    assert torch.equal(METHODS["gptq"](weight(16, 128), parse_scheme("int3-g32-asym"), statistics).codes, one.codes)


def test_a_half_precision_weight_is_worked_on_in_float32() -> None:
    statistics, scheme = statistics_of(correlated(64)), parse_scheme("int4-g32")
    half = weight(8, 64).bfloat16()
    assert torch.equal(gptq(half, scheme, statistics).codes, gptq(half.float(), scheme, statistics).codes)


def broken(change: str) -> Statistics | None:
    hessian = hessian_of(statistics_of(correlated(64))).clone()
    mean_square = hessian.diagonal().clone()
    if change == "none":
        return None
    if change == "diagonal only":
        return Statistics(mean_square, rows=1)
    if change == "width":
        hessian = hessian[:32, :32]
    if change == "nan":
        hessian[3, 5] = float("nan")
    if change == "negative":
        hessian[3, 3] = -1.0
    if change == "indefinite":
        hessian = hessian - 2 * torch.diag(hessian.diagonal()) + 2 * torch.eye(64) * mean_square.min()
        hessian.fill_diagonal_(1e-6)
    return Statistics(mean_square, rows=1, hessian=hessian)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("none", "needs second moments"),
        ("diagonal only", "needs second moments"),
        ("width", r"a Hessian of \[32, 32\] for a weight with 64 inputs"),
        ("nan", "NaN or infinite"),
        ("negative", "negative mean squares"),
        ("indefinite", "negative eigenvalues"),
    ],
)
def test_hessians_that_cannot_be_are_refused(change: str, said: str) -> None:
    with pytest.raises(DataError, match=f"q_proj: .*{said}"):
        gptq(weight(4, 64), parse_scheme("int4"), broken(change), where="q_proj")


def test_weights_and_options_that_cannot_be_are_refused() -> None:
    statistics, scheme = statistics_of(correlated(64)), parse_scheme("int4-g32")
    spoiled = weight(4, 64)
    spoiled[0, 0] = float("nan")
    with pytest.raises(FormatError, match="q_proj: holds NaN"):
        gptq(spoiled, scheme, statistics, where="q_proj")
    with pytest.raises(FormatError, match="not divisible by group size 48"):
        gptq(weight(4, 64), parse_scheme("int4-g48"), statistics)
    with pytest.raises(UsageError, match="did you mean 'activation'"):
        gptq(weight(4, 64), scheme, statistics, order="activations")  # type: ignore[arg-type]  # what is refused
    with pytest.raises(UsageError, match="damping lies from 0 to 1, got 3"):
        gptq(weight(4, 64), scheme, statistics, damping=3)
    with pytest.raises(UsageError, match="at least 1"):
        gptq(weight(4, 64), scheme, statistics, block=0)


# --- inputs that have drifted ----------------------------------------------------------------------------------------


def drifted(columns: int = 64, tokens: int = 4096, share: float = 0.2) -> tuple[Tensor, Tensor, Statistics]:
    """Inputs x' of full precision [tokens, columns], what became of them x, and the statistics of x."""
    exact = correlated(columns, tokens=tokens)
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = exact + share * (exact @ mixing)  # of errors of layers before, which depend on what they were given
    plain = statistics_of(x)
    drift = ((exact - x).double().t() @ x.double() / tokens).float()
    return exact, x, dataclasses.replace(plain, drift=drift)


def test_the_target_is_the_least_squares_weight() -> None:
    exact, x, statistics = drifted()
    dense = weight(16, 64)
    found = target(dense, hessian_of(statistics), statistics.drift, 1e-7)  # type: ignore[arg-type]
    wanted = torch.linalg.lstsq(x.double(), exact.double() @ dense.double().t()).solution.t()
    assert (found - wanted).square().mean().sqrt() < 1e-3 * (wanted - dense).square().mean().sqrt()
    damped = target(dense, hessian_of(statistics), statistics.drift, 0.1)  # type: ignore[arg-type]
    assert 0 < (damped - dense).square().sum() < (found - dense).square().sum()


@pytest.mark.parametrize("text", ["int4-g32", "int3-g32-full", "int2-g32", "int4-g32-asym", "nf4-g32"])
def test_drift_is_made_up_for(text: str) -> None:
    exact, x, statistics = drifted()
    dense, scheme = weight(64, 64), parse_scheme(text)

    def error(quantized: QuantizedTensor) -> float:
        return float((exact @ dense.t() - x @ quantized.dequantize().t()).square().mean())

    without = gptq(dense, scheme, dataclasses.replace(statistics, drift=None))
    assert error(gptq(dense, scheme, statistics)) < 0.8 * error(without)


def test_inputs_that_have_not_moved_give_the_same_bits() -> None:
    dense, scheme = weight(32, 64), parse_scheme("int3-g32")
    plain = statistics_of(correlated(64))
    found = gptq(dense, scheme, dataclasses.replace(plain, drift=torch.zeros(64, 64)))
    wanted = gptq(dense, scheme, plain)
    assert all(torch.equal(part, wanted.tensors()[name]) for name, part in found.tensors().items())

"""AutoRound and block-wise training: never worse than where they start, repeatable, and better where they should be."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from strop.calibrate import CalibrationBlock
from strop.calibrate.stream import BlockError, BlockStream
from strop.data.batches import padded_batch
from strop.data.templates import Sample
from strop.demo import model_path
from strop.demo.task import ROWS, generate
from strop.errors import DataError, FormatError
from strop.layers.surgery import linear_modules
from strop.methods import BLOCK_METHODS, BlockMethod, autoround, blockwise, gptq, rtn, search
from strop.methods.reconstruction import relative_errors
from strop.methods.rounding import round_through, settled
from strop.methods.sequential import layer_by_layer
from strop.models.blocks import BlockwiseModel
from strop.numerics import QuantizedTensor, Scheme, parse_scheme
from tests.methods.toy import DEAD, DOWN, UP, ToyBlock

TRAINED: Mapping[str, Callable] = {"autoround": autoround, "blockwise": blockwise}
every_method = pytest.mark.parametrize("method", TRAINED.values(), ids=TRAINED.keys())


def schemes(text: str, *layers: str) -> dict[str, Scheme]:
    return dict.fromkeys(layers or (UP, DOWN), parse_scheme(text))


def searched(block: ToyBlock, plan: Mapping[str, Scheme]) -> dict[str, Tensor]:
    seen = block.statistics(list(plan), {})
    return {layer: search(block.weights[layer], scheme, seen[layer]).dequantize() for layer, scheme in plan.items()}


def easy_block(batches: int = 16) -> ToyBlock:
    """Inputs without correlations, of which GPTQ leaves something to be gained."""
    return ToyBlock(batches=batches, tokens=128, correlated=False)


def uneven_block(batches: int = 16) -> ToyBlock:
    """One token in 16 is thirty times as long."""
    return ToyBlock(batches=batches, tokens=128, correlated=False, long_tokens=16)


TEXTS = [
    "int2-g16",
    "int2-g16-asym",
    "int3-g32-full",
    "int4-g32-sbf16",
    "int4-tensor-asym",
    "int8",
    "nf4",
    "fp4-dq",
    "fp8",
]


@pytest.mark.parametrize("text", TEXTS)
@every_method
def test_never_worse_than_searched_rounding_where_it_is_measured(method: Callable, text: str) -> None:
    block, plan = ToyBlock(), schemes(text)
    result = method(block, plan, iterations=30)
    trained = {layer: weight.dequantize() for layer, weight in result.weights.items()}
    relative = method is autoround
    limit = block.error([0], searched(block, plan), relative=relative)
    assert block.error([0], trained, relative=relative) <= limit * (1 + 1e-6)
    assert all(weight.scheme == plan[layer] for layer, weight in result.weights.items())


@pytest.mark.parametrize(("text", "share"), [("int2-g16", 0.9), ("int3-g16-asym", 0.99)])
@every_method
def test_errors_on_batches_that_it_did_not_see_are_below_gptq(method: Callable, text: str, share: float) -> None:
    block, plan = easy_block(batches=8), schemes(text)
    fresh, unseen = easy_block(batches=16), range(8, 16)  # the same weights
    start, trained = (
        {layer: weight.dequantize() for layer, weight in result.weights.items()}
        for result in (layer_by_layer(block, plan, gptq, hessian=True), method(block, plan, iterations=100))
    )
    assert fresh.error(unseen, start) < fresh.error(unseen, searched(block, plan))
    assert fresh.error(unseen, trained) < share * fresh.error(unseen, start)


@every_method
def test_the_result_is_bit_for_bit_something_that_was_measured(method: Callable) -> None:
    block = ToyBlock()
    result = method(block, schemes("int3-g16-asym"), iterations=40)
    trained = {layer: weight.dequantize() for layer, weight in result.weights.items()}
    assert any(all(torch.equal(seen[layer], trained[layer]) for layer in trained) for seen in block.measured)


@every_method
def test_what_is_measured_is_what_the_last_step_trained(method: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The differentiable weights and the stored ones agree to the bit, whatever training has done to them."""
    block, module = ToyBlock(), importlib.import_module(method.__module__)
    kept: list[tuple[tuple[Any, ...], QuantizedTensor]] = []

    def spy(*arguments: Any, where: str) -> QuantizedTensor:
        copies = tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments)
        kept.append((copies, settled(*arguments, where=where)))
        return kept[-1][1]

    monkeypatch.setattr(module, "settled", spy)
    method(block, schemes("int2-g16-asym"), iterations=20)
    assert len(kept) == 20  # two layers, ten measurements
    for arguments, found in kept:
        assert torch.equal(round_through(*arguments), found.dequantize())


@every_method
def test_scales_and_rounding_move(method: Callable) -> None:
    block, plan = uneven_block(), schemes("int2-g16-asym")
    start, end = (method(block, plan, iterations=count).weights for count in (0, 150))
    for layer, weight in end.items():
        assert (weight.scales() != start[layer].scales()).float().mean() > 0.5
        assert 0.005 < (weight.stored_codes() != start[layer].stored_codes()).float().mean() < 0.5


def test_a_zero_point_moves_with_the_lower_end_of_its_range() -> None:
    block, plan = ToyBlock(), schemes("int4-g16-asym", UP)
    start = layer_by_layer(block, plan, gptq, hessian=True).weights[UP]
    rounding = importlib.import_module("strop.methods.autoround").Rounding(UP, block.weights[UP], plan[UP], start)
    with torch.no_grad():
        rounding.factors[0] *= 0.75
    settled_, zero_point = rounding.settled(), start.zero_point
    assert settled_.zero_point is not None
    assert zero_point is not None
    assert (settled_.zero_point < zero_point).float().mean() > 0.9
    assert (settled_.scales() < start.scales()).all()
    rounding.rounded().square().sum().backward()
    assert all(factor.grad is not None and factor.grad.count_nonzero() for factor in rounding.factors)


@every_method
def test_the_seed_decides_every_bit(method: Callable) -> None:
    plan = schemes("int2-g16-asym")
    first, again, other = (method(uneven_block(), plan, iterations=50, seed=seed).weights for seed in (1, 1, 2))
    assert all(torch.equal(first[layer].codes, again[layer].codes) for layer in plan)
    assert all(torch.equal(first[layer].scales(), again[layer].scales()) for layer in plan)
    assert any(not torch.equal(first[layer].codes, other[layer].codes) for layer in plan)


@every_method
def test_each_layer_has_its_own_scheme_and_others_stay_out(method: Callable) -> None:
    plan = schemes("int2-g16-asym", UP) | schemes("nf4", DOWN)
    result = method(ToyBlock(), plan, iterations=10)
    assert {layer: weight.scheme for layer, weight in result.weights.items()} == plan
    assert list(method(ToyBlock(), schemes("int4", DOWN), iterations=10).weights) == [DOWN]


@every_method
def test_a_layer_that_no_token_reaches_is_searched_and_named(method: Callable) -> None:
    block = ToyBlock()
    result = method(block, schemes("int3-g16", UP, DOWN, DEAD), iterations=10)
    expected = search(block.weights[DEAD], parse_scheme("int3-g16"))
    assert torch.equal(result.weights[DEAD].dequantize(), expected.dequantize())
    assert [note for note in result.notes if note.startswith(f"{DEAD}: no calibration token reached it")]
    alone = method(block, schemes("int3-g16", DEAD), iterations=10)
    assert torch.equal(alone.weights[DEAD].codes, expected.codes)


@every_method
def test_no_iterations_are_gptq(method: Callable) -> None:
    """AutoRound's makes up for drift."""
    block, plan = ToyBlock(), schemes("int3-g16-asym")
    compensated = layer_by_layer(block, plan, gptq, hessian=True, drift=method is autoround).weights
    for layer, weight in method(block, plan, iterations=0).weights.items():
        assert torch.equal(weight.dequantize(), compensated[layer].dequantize())
    assert not block.trained


@pytest.mark.parametrize("text", ["int2-g16", "int3-g32-full", "int4-g16-asym", "int8"])
def test_offsets_begin_where_gptq_rounds(text: str) -> None:
    block, plan = ToyBlock(), schemes(text, DOWN)
    start = layer_by_layer(block, plan, gptq, hessian=True).weights[DOWN]
    weight = block.weights[DOWN]
    rounding = importlib.import_module("strop.methods.autoround").Rounding(DOWN, weight, plan[DOWN], start)
    assert rounding.offset.count_nonzero() > 0.05 * weight.numel()
    assert torch.equal(rounding.settled().codes, start.codes)


@every_method
def test_one_batch_is_enough(method: Callable) -> None:
    block, plan = ToyBlock(batches=1), schemes("int2-g16")
    result = method(block, plan, iterations=20)
    trained = {layer: weight.dequantize() for layer, weight in result.weights.items()}
    assert block.error([0], trained) < block.error([0], searched(block, plan))
    assert set(block.trained) == {0}
    assert [note for note in result.notes if "too few to hold one out" in note]


@every_method
def test_batches_that_measure_train_nothing(method: Callable) -> None:
    block = ToyBlock(batches=17)
    method(block, schemes("int2-g16"), iterations=60)
    assert set(block.trained) == set(range(17)) - {0, 8}
    assert len(block.measured) == 13 * 2  # two starts, the better again, ten in training


@every_method
def test_values_that_are_not_finite_are_refused_by_name(method: Callable) -> None:
    block = ToyBlock()
    block.weights = dict(block.weights) | {DOWN: torch.full_like(block.weights[DOWN], torch.nan)}
    with pytest.raises(FormatError, match=r"block\.down: holds NaN"):
        method(block, schemes("int4-g16"), iterations=5)
    block = ToyBlock()
    block.target = lambda batch: torch.full_like(block.x[batch], torch.inf)
    with pytest.raises(DataError, match="block: its output is not finite on the calibration rows"):
        method(block, schemes("int4-g16"), iterations=5)


def test_progress_says_where_it_is_and_what_it_gained() -> None:
    said: list[str] = []
    autoround(uneven_block(), schemes("int2-g16-asym"), iterations=50, step=said.append)
    assert len(said) == 10
    assert said[0].startswith("block: AutoRound 5 of 50, error ")
    assert re.fullmatch(r"block: AutoRound 50 of 50, error 0\.\d{3} of the start's", said[-1])


def test_presets_differ_in_how_long_and_how_far_they_go() -> None:
    errors: dict[str, float] = {}
    for name, iterations in {"autoround": 100, "autoround-light": 50}.items():
        block = uneven_block(batches=8)
        weights = BLOCK_METHODS[name](block, schemes("int2-g16-asym")).weights
        assert len(block.trained) == iterations
        dense = {layer: weight.dequantize() for layer, weight in weights.items()}
        errors[name] = block.error([0], dense, relative=True)
    assert errors["autoround"] < errors["autoround-light"]


def test_what_autoround_begins_with_makes_up_for_drift() -> None:
    block, plan = easy_block(), schemes("int2-g16")
    plain, corrected = (
        {layer: weight.dequantize() for layer, weight in result.weights.items()}
        for result in (layer_by_layer(block, plan, gptq, hessian=True), autoround(block, plan, iterations=0))
    )
    assert block.error(range(16), corrected, relative=True) < 0.8 * block.error(range(16), plain, relative=True)


@every_method
def test_what_was_kept_for_its_start_is_let_go_before_it_trains(method: Callable) -> None:
    block, plan = easy_block(), schemes("int2-g16")
    method(block, plan, iterations=0)
    assert not block.lets_go, "what follows the method can still take up where GPTQ's passes ended"
    method(block, plan, iterations=1)
    assert block.lets_go


def test_long_tokens_count_no_more_than_others() -> None:
    """GPTQ fits the one token in 16 that decides the second moments; AutoRound gives the others back what they lost."""
    block, plan = uneven_block(batches=8), schemes("int2-g16-asym")
    fresh, unseen = uneven_block(batches=16), range(8, 16)  # the same weights
    start, end = (
        {layer: weight.dequantize() for layer, weight in autoround(block, plan, iterations=count).weights.items()}
        for count in (0, 100)
    )
    assert fresh.error(unseen, end, relative=True) < 0.8 * fresh.error(unseen, start, relative=True)


def test_relative_errors_divide_by_each_token() -> None:
    target = torch.tensor([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]])
    output = target + torch.tensor([[1.0, 0.0], [0.0, 100.0], [5.0, 0.0]])
    assert relative_errors(output.bfloat16(), target).dtype == torch.float32
    torch.testing.assert_close(relative_errors(output, target), torch.tensor([0.04, 0.04, 0.0]))


def test_the_best_preset_runs_a_thousand_iterations() -> None:
    class Seen(Exception):
        pass

    def step(text: str) -> None:
        raise Seen(text)

    with pytest.raises(Seen, match="AutoRound 100 of 1000"):
        BLOCK_METHODS["autoround-best"](ToyBlock(width=16, tokens=16), schemes("int2-g16"), step=step)


def test_rates_decide_how_far_offsets_can_go() -> None:
    block, plan = uneven_block(batches=8), schemes("int4-g32")
    start = autoround(block, plan, iterations=0).weights
    shares = []
    for rate in (2e-5, 2e-3):
        moved = total = 0
        for layer, weight in autoround(block, plan, iterations=100, rate=rate).weights.items():
            steps = (weight.stored_codes().int() - start[layer].stored_codes().int()).abs()
            assert steps.max() <= 1
            moved += int(steps.sum())
            total += steps.numel()
        shares.append(moved / total)
    assert shares[0] < 0.005 < 0.01 < shares[1] < 0.2


def story_rows(material: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(str(material / "models" / "stories260K"))
    lines = (material / "data" / "tinystories_4M_lowercase.txt").read_text(encoding="utf-8").splitlines()
    ids = [tokenizer(line).input_ids[:64] for line in lines[:400]]
    return [row for row in ids if len(row) >= 32][:96]


def task_rows() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(str(model_path()))
    rows = generate(rows=dict.fromkeys(ROWS, 1) | {"train": 96})["train"]
    return [tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False) for row in rows]


def first_block(
    folder: Path, rows: list[list[int]], work: Callable[[CalibrationBlock], Mapping[str, Tensor]]
) -> BlockError:
    """The error of a model's first block, calibrated on three quarters of the rows."""
    samples = [Sample(row, [1] * len(row)) for row in rows]
    batches = [padded_batch(samples[n : n + 6], list(range(n, n + 6)), pad_id=0) for n in range(0, len(rows), 6)]
    model = BlockwiseModel(folder)
    stream = BlockStream(model, batches, len(batches) * 3 // 4)
    name = next(iter(model.blocks))
    layers = [layer for layer in linear_modules(model.model) if layer.startswith(f"{name}.")]
    return stream.through(name, layers, work)


def plainly(method: Callable, text: str) -> Callable[[CalibrationBlock], Mapping[str, Tensor]]:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        seen = block.statistics(list(block.weights), {})
        return {
            layer: method(weight, parse_scheme(text), seen[layer]).dequantize()
            for layer, weight in block.weights.items()
        }

    return work


def trained(method: BlockMethod, text: str, **options: Any) -> Callable[[CalibrationBlock], Mapping[str, Tensor]]:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        found = method(block, dict.fromkeys(block.weights, parse_scheme(text)), **options)
        return {layer: weight.dequantize() for layer, weight in found.weights.items()}

    return work


def held_out(folder: Path, rows: list[list[int]], text: str) -> list[float]:
    """Held-out errors of a real model's first block: rounding, searched, AutoRound, block-wise training."""
    methods = [plainly(rtn, text), plainly(search, text)]
    methods += [trained(method, text, iterations=120) for method in (autoround, blockwise)]
    return [error for work in methods if (error := first_block(folder, rows, work).held_out) is not None]


def test_the_order_of_the_papers_comes_out_at_two_bits(material: Path) -> None:
    errors = held_out(material / "models" / "stories260K", story_rows(material), "int2-g4")
    assert len(errors) == 4
    assert all(better < 0.95 * worse for worse, better in pairwise(errors)), errors


def test_both_trainings_leave_little_of_what_rounding_leaves_at_two_bits_on_the_bundled_model() -> None:
    """Which of the two is ahead in its first block, by 2%, depends on the processor's arithmetic."""
    rounding, searched, offsets, weights = held_out(model_path(), task_rows(), "int2-g64")
    assert searched < 0.95 * rounding
    assert max(offsets, weights) < 0.06 * searched


def test_both_are_better_than_searched_rounding_at_three_bits(material: Path) -> None:
    rounding, searched, *both = held_out(material / "models" / "stories260K", story_rows(material), "int3")
    assert searched < rounding
    assert max(both) < 0.75 * searched

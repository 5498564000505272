"""AWQ: salient channels are kept, nothing gets worse than rounding, and what cannot be scaled is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from strop.calibrate.block import CalibrationBlock
from strop.methods import BLOCK_METHODS, Statistics, awq, rtn
from strop.methods.base import output_error
from strop.methods.clipping import clip
from strop.models.sources import find_folder
from strop.numerics import choose_scale, parse_scheme, quantize_tensor
from tests.methods.common import alter, changed_by, fitting, through_blocks
from tests.tiny import tiny_folder


def planted(folder: Path) -> Path:
    """A tiny Llama whose attention reads two channels that carry 30 times what the others do."""

    def change(tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            tensors[f"model.layers.{layer}.input_layernorm.weight"][[5, 40]] *= 30

    return alter(tiny_folder(folder, "llama"), change)


def product_errors(block: CalibrationBlock, changed: Mapping[str, Tensor]) -> dict[str, float]:
    """Of every layer: squared error of its product, relative to the product, on the inputs that the block then gives.

    Rows that are scaled for the layer after are taken by the factor that fits them best.
    """
    errors: dict[str, float] = {}
    for layers in block.shared:
        before, after = (block.inputs(layers[0], held, most=10_000) for held in ({}, changed))
        for layer in layers:
            wanted, got = before @ block.weights[layer].t(), after @ changed[layer].t()
            fitted = got * (got * wanted).sum(dim=0) / got.square().sum(dim=0)
            errors[layer] = ((fitted - wanted).square().sum() / wanted.square().sum()).item()
    return errors


def rounded(block: CalibrationBlock, text: str) -> dict[str, Tensor]:
    """Every weight rounded to nearest."""
    return {layer: rtn(block.weights[layer], form).dequantize() for layer, form in fitting(block, text).items()}


@pytest.mark.parametrize("text", ["int3-g32", "int4-g32-asym", "int4"])
def test_planted_salient_channels_survive(tmp_path: Path, text: str) -> None:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        result = awq(block, fitting(block, text))
        plain, ours = product_errors(block, rounded(block, text)), product_errors(block, changed_by(result))
        for layer in block.shared[0]:
            assert ours[layer] < 0.35 * plain[layer]
        return {}

    through_blocks(planted(tmp_path), work, first=1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2", "falcon", "mixtral"])
def test_blocks_err_less_than_rounded_to_nearest(tmp_path: Path, family: str) -> None:
    folder = tiny_folder(tmp_path, family)
    plain = through_blocks(folder, lambda block: rounded(block, "int3-g32"))
    ours = through_blocks(folder, lambda block: changed_by(awq(block, fitting(block, "int3-g32"))))
    for before, after in zip(plain, ours, strict=True):
        assert after.calibration < 0.95 * before.calibration


@pytest.mark.parametrize("text", ["int4-g32", "int3"])
@pytest.mark.parametrize("model", ["stories260K", "demo"])
def test_every_layer_and_block_of_a_real_model_errs_less_than_rounded_to_nearest(
    material: Path, model: str, text: str
) -> None:
    folder = find_folder("demo") if model == "demo" else material / "models" / model

    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        changed = changed_by(awq(block, fitting(block, text)))
        plain, ours = product_errors(block, rounded(block, text)), product_errors(block, changed)
        assert [layer for layer in plain if ours[layer] >= plain[layer]] == []
        return changed

    ours = through_blocks(folder, work)
    plain = through_blocks(folder, lambda block: rounded(block, text))
    for before, after in zip(plain, ours, strict=True):
        assert after.calibration < before.calibration
        assert (after.held_out or 1.0) < (before.held_out or 0.0)


def test_groups_that_cannot_be_scaled_are_named(tmp_path: Path) -> None:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        (note,) = awq(block, fitting(block, "int4-g32")).notes
        assert note == ("transformer.h.0.mlp.c_proj: nothing before takes up scales of the inputs; clipped, not scaled")
        return {}

    through_blocks(tiny_folder(tmp_path, "gpt2"), work, first=1)


def test_layers_without_a_scheme_stay_as_they_are(tmp_path: Path) -> None:
    """Neither quantized nor scaled: v_proj cannot take up o_proj's scales, and q, k and v share their norm."""

    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        schemes = {layer: form for layer, form in fitting(block, "int4-g32").items() if "v_proj" not in layer}
        result = awq(block, schemes)
        assert result.weights.keys() == schemes.keys()
        assert not any("v_proj" in name or "input_layernorm" in name for name in result.others)
        assert [note.partition(":")[0].count("proj") for note in result.notes] == [3, 1]
        return changed_by(result)

    for error in through_blocks(tiny_folder(tmp_path, "llama"), work):
        assert error.calibration < 0.05


def test_a_layer_that_no_token_reaches_is_rounded_and_named(tmp_path: Path) -> None:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        layer = block.shared[-1][0]
        asked = block.statistics
        block.statistics = lambda layers, changed, *, hessian=False: {  # as an expert that is never chosen
            name: seen for name, seen in asked(layers, changed, hessian=hessian).items() if name != layer
        }
        result = awq(block, fitting(block, "int4-g32"))
        assert list(result.notes) == [f"{layer}: no calibration token got there; rounded by the weights alone"]
        assert torch.isfinite(result.weights[layer].dequantize()).all()
        return changed_by(result)

    through_blocks(tiny_folder(tmp_path, "llama"), work, first=1)


def test_inputs_that_are_always_zero_leave_finite_weights(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"].zero_()
        tensors["model.layers.0.post_attention_layernorm.weight"][::2] = 0.0

    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        changed = changed_by(awq(block, fitting(block, "int4-g32")))
        assert all(torch.isfinite(tensor).all() for tensor in changed.values())
        return changed

    (error,) = through_blocks(alter(tiny_folder(tmp_path, "llama"), change), work, first=1)
    assert error.calibration < 0.05


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        first, second = (changed_by(BLOCK_METHODS["awq"](block, fitting(block, "int4-g32"), seed=3)) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        said: list[str] = []
        awq(block, fitting(block, "int4-g32"), step=said.append)
        assert [line.split()[0] for line in said] == ["scaling"] * 4 + ["rounding"] * 4
        return first

    through_blocks(tiny_folder(tmp_path, "llama"), work, first=1)


def layer(columns: int = 64) -> tuple[Tensor, Statistics]:
    """A weight [6, columns] and the statistics of inputs that move together."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(6, columns, generator=generator)
    return weight, Statistics(mixed.square().mean(0), 400, hessian=mixed.t() @ mixed / 400)


@pytest.mark.parametrize("text", ["int2-g32", "int3", "int4-g32-asym", "int4-g32-full", "int4-tensor", "nf4-dq"])
def test_clipping_is_never_worse_than_rounding(text: str) -> None:
    weight, statistics = layer()
    assert statistics.hessian is not None
    scheme = parse_scheme(text)
    plain = output_error(weight, rtn(weight, scheme), statistics.hessian)
    ours = output_error(weight, clip(weight, scheme, statistics), statistics.hessian)
    assert ours <= plain
    if scheme.bits < 4:
        assert ours < 0.9 * plain


def test_each_group_has_the_best_of_the_ranges_tried() -> None:
    """A slow search, one group at a time in float64."""
    weight, statistics = layer()
    assert statistics.hessian is not None
    scheme = parse_scheme("int3-g32")
    found = clip(weight, scheme, statistics).dequantize().double()
    for row in range(6):
        for start in (0, 32):
            group = weight[row : row + 1, start : start + 32]
            moments = statistics.hessian[start : start + 32, start : start + 32].double()
            errors: list[float] = []
            for percent in range(40, 106, 5):
                low, high = group.min() * percent / 100, group.max() * percent / 100
                scale, _ = choose_scale(low, high, scheme.format, scheme.mode, scale_dtype=torch.float16)
                lost = quantize_tensor(group, scheme, scale=scale.view(1, 1)).dequantize().double() - group
                errors.append((lost @ moments @ lost.t()).item())
            lost = found[row : row + 1, start : start + 32] - group
            assert (lost @ moments @ lost.t()).item() <= min(errors) * 1.001

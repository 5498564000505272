"""SmoothQuant: planted outliers are named and smoothed away, and nothing but rounding changes the output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from strop.calibrate.block import CalibrationBlock
from strop.calibrate.input_scales import fix_input_scales
from strop.errors import ConfigError
from strop.methods import BLOCK_METHODS
from strop.methods.base import BlockResult
from strop.methods.smoothquant import smoothquant
from strop.numerics import fake_quantize, parse_scheme
from strop.numerics.activation_observers import MinMax
from tests.methods.common import PLANTED, alter, changed_by, fitting, planted, through_blocks
from tests.tiny import tiny_folder


def product_error(
    block: CalibrationBlock, layer: str, weight: Tensor, others: Mapping[str, Tensor], form: str
) -> float:
    """Squared error of a layer's product with int8 inputs and the weight as it was rounded, relative to the product."""
    wanted = block.inputs(layer, {}, most=512) @ block.weights[layer].t()
    x = fake_quantize(block.inputs(layer, others, most=512), parse_scheme(form))
    return ((x @ weight.t() - wanted).square().sum() / wanted.square().sum()).item()


@pytest.mark.parametrize("form", ["int8", "int8-tensor"])
def test_planted_outliers_cost_a_hundredth_once_smoothed(tmp_path: Path, form: str) -> None:
    """Inputs rounded by token, and by one scale for all."""

    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        result = smoothquant(block, fitting(block, "int8"))
        for layer in block.shared[0][:2]:  # the rows of v_proj are scaled too, for o_proj
            rounded = fake_quantize(block.weights[layer], parse_scheme("int8"))
            plain = product_error(block, layer, rounded, {}, form)
            smooth = product_error(block, layer, result.weights[layer].dequantize(), result.others, form)
            assert smooth < 0.01 * plain
        return {}

    through_blocks(planted(tmp_path), work)


def test_planted_outliers_are_named_by_their_channels(tmp_path: Path) -> None:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        (note,) = smoothquant(block, fitting(block, "int8")).notes
        layers = ", ".join(block.shared[0])
        assert note.startswith(f"{layers}: input channels 5, 40 reach up to ")
        assert note.endswith(f"times the median channel's largest; smoothed into {block.name}.input_layernorm")
        return {}

    through_blocks(planted(tmp_path), work)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "falcon", "mixtral"])
def test_the_block_keeps_its_output_but_for_8_bit_rounding(tmp_path: Path, family: str) -> None:

    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        result = smoothquant(block, fitting(block, "int8"))
        for layer, weight in result.weights.items():
            assert weight.scheme == parse_scheme("int8")
            assert weight.shape == tuple(block.weights[layer].shape)
        return changed_by(result)

    for error in through_blocks(tiny_folder(tmp_path, family), work):
        assert error.calibration < 3e-3
        assert (error.held_out or 1.0) < 3e-3


def test_the_static_scale_covers_the_smoothed_inputs(tmp_path: Path) -> None:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        result = fix_input_scales(block, smoothquant(block, fitting(block, "int8-a8-static")), MinMax)
        assert all(weight.activation_scale is not None for weight in result.weights.values())
        largest = {layer: 127.5 * float(weight.activation_scale or 0) for layer, weight in result.weights.items()}
        assert largest.keys() == block.weights.keys()
        for layers in block.shared:
            x = block.inputs(layers[0], changed_by(result), most=10_000)
            assert largest[layers[-1]] == pytest.approx(x.abs().max().item())
        before = block.inputs(block.shared[0][0], {}, most=10_000).abs().max().item()
        assert largest[block.shared[0][0]] < 0.2 * before
        return {}

    through_blocks(planted(tmp_path), work, first=1)


def test_alpha_moves_the_difficulty_from_inputs_to_weights(tmp_path: Path) -> None:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        def unevenness(alpha: float) -> float:
            result = smoothquant(block, fitting(block, "int8"), alpha=alpha)
            layer = block.shared[0][0]
            largest = block.statistics([layer], result.others)[layer].largest
            assert largest is not None
            return (largest.max() / largest.min()).item()

        assert unevenness(0.3) > 1.5 * unevenness(0.7) > 1.5
        return {}

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][list(PLANTED)] *= 8

    through_blocks(alter(tiny_folder(tmp_path, "llama"), change), work, first=1)


def test_a_searched_alpha_errs_no_more_than_the_usual_one(tmp_path: Path) -> None:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        usual, searched = (BLOCK_METHODS[name](block, fitting(block, "int8")) for name in ("smooth", "smooth-search"))

        def error(result: BlockResult) -> float:
            layers = block.shared[2]  # gate_proj and up_proj; the rows of the second are scaled for down_proj
            others = {name: tensor for name, tensor in result.others.items() if "post_attention" in name}
            return product_error(block, layers[0], result.weights[layers[0]].dequantize(), others, "int8")

        assert error(searched) < error(usual)
        return {}

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.post_attention_layernorm.weight"].mul_(torch.linspace(0, 8, 64).exp2())
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.0.mlp.{name}.weight"] /= torch.linspace(0, 6, 64).exp2()

    through_blocks(alter(tiny_folder(tmp_path, "llama"), change), work, first=1)


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        results: list[BlockResult] = [BLOCK_METHODS["smooth"](block, fitting(block, "int8"), seed=3) for _ in range(2)]
        first, second = (changed_by(result) for result in results)
        assert all(torch.equal(first[name], second[name]) for name in first)
        return first

    through_blocks(planted(tmp_path), work, first=1)


def test_inputs_that_are_always_zero_leave_finite_weights(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"].zero_()
        tensors["model.layers.0.post_attention_layernorm.weight"][::2] = 0.0

    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        changed = changed_by(smoothquant(block, fitting(block, "int8")))
        assert all(torch.isfinite(tensor).all() for tensor in changed.values())
        return changed

    through_blocks(alter(tiny_folder(tmp_path, "llama"), change), work, first=1)


def test_an_alpha_outside_its_range_is_refused(tmp_path: Path) -> None:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        with pytest.raises(ConfigError, match=r"alpha is 1\.5; give 0"):
            smoothquant(block, fitting(block, "int8"), alpha=1.5)
        return {}

    through_blocks(tiny_folder(tmp_path, "llama"), work, first=1)

"""Scales of inputs fixed from a block's rows, and blocks that compute with rounded inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from strop.calibrate import BlockStream, CalibrationBlock
from strop.calibrate.input_scales import fix_input_scales, input_rounding, observe_inputs
from strop.data.batches import eval_batches
from strop.errors import DataError
from strop.layers.quantized import quantized_linear
from strop.layers.surgery import linear_modules
from strop.methods import BlockResult
from strop.models import load
from strop.models.blocks import BlockwiseModel
from strop.numerics.activation_observers import ACTIVATION_OBSERVERS, MinMax
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from tests.calibrate.test_block import layers_of, samples
from tests.methods.common import alter, through_blocks
from tests.tiny import tiny_folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral"])
def test_the_observed_range_is_that_of_the_real_tokens_alone(tmp_path: Path, family: str) -> None:
    folder, rows = tiny_folder(tmp_path, family), samples([12, 5, 9, 3])
    whole = load(folder, dtype="float32").model
    ranges: dict[str, tuple[float, float]] = {}

    def look(name: str, x: Tensor) -> None:
        low, high = ranges.get(name, (0.0, 0.0))
        ranges[name] = (min(low, x.min().item()), max(high, x.max().item()))

    for name, module in linear_modules(whole).items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs[0]))
    for row in rows:  # one at a time: no padding
        with torch.no_grad():
            whole(torch.tensor([row.input_ids]))
    streamed = BlockwiseModel(folder)
    stream = BlockStream(streamed, list(eval_batches(rows, 2)), 2)
    found: dict[str, tuple[float, float]] = {}

    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        found.update(observe_inputs(block, list(block.weights), {}, MinMax))
        return {}

    for name in streamed.blocks:
        stream.through(name, layers_of(streamed, name), work)
    assert found.keys() >= ranges.keys()  # experts too, which are no modules of the whole model
    for name, ends in ranges.items():
        assert found[name] == pytest.approx(ends, rel=1e-3, abs=1e-6)


def test_inputs_that_overflow_fix_no_scale(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"].fill_(float("inf"))

    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        for observer in ACTIVATION_OBSERVERS.values():
            with pytest.raises(DataError, match=r"layers\.0\.self_attn\.q_proj: .*NaN or infinite"):
                observe_inputs(block, list(block.weights), {}, observer)
        return {}

    through_blocks(alter(tiny_folder(tmp_path, "llama"), change), work, first=1)


@pytest.mark.parametrize("text", ["int8-a8", "int8-a8-asym", "int8-a8-static", "int8-a8-over2"])
def test_a_block_with_rounded_inputs_is_the_block_of_the_layers_that_multiply_integers(
    tmp_path: Path, text: str
) -> None:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        weights = {layer: quantize_tensor(weight, parse_scheme(text)) for layer, weight in block.weights.items()}
        result = fix_input_scales(block, BlockResult(weights), MinMax)
        rounding = input_rounding(result)
        assert rounding.keys() == weights.keys()
        for layer, weight in result.weights.items():
            x = block.inputs(layer, {}, most=32)
            product = rounding[layer](x) @ weight.dequantize().t()
            torch.testing.assert_close(product, quantized_linear(weight)(x), rtol=1e-4, atol=1e-5)
        changed = {layer: weight.dequantize() for layer, weight in result.weights.items()}
        before = block.run(0, changed)
        block.round_inputs(rounding)
        assert 0 < (block.run(0, changed) - before).square().sum() / before.square().sum() < 1e-2
        return changed

    through_blocks(tiny_folder(tmp_path, "llama"), work, first=1)

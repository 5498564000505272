"""Folding: found by trying in every family of blocks, and refused wherever the output would change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from strop.calibrate.block import CalibrationBlock
from strop.methods.folding import Fold, find_fold
from tests.methods.common import alter, through_blocks
from tests.tiny import tiny_folder


def folds_of(block: CalibrationBlock) -> dict[str, Fold | None]:
    """The fold of each group by the last part of its first layer's name."""
    generator = torch.Generator().manual_seed(1)
    return {
        ".".join(layers[0].split(".")[-2:]): find_fold(block, layers, movable=block.weights, generator=generator)
        for layers in block.shared
    }


def sources(folder: Path) -> dict[str, str | None]:
    """Group to the last part of what takes up its scales, in the model's first block."""
    found: dict[str, str | None] = {}

    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        for group, fold in folds_of(block).items():
            found[group] = None if fold is None else fold.source.rpartition(".")[2]
        return {}

    through_blocks(folder, work, first=1)
    return found


LLAMA = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.o_proj": "v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "up_proj",
}
FOUND = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gpt2": {"attn.c_attn": "ln_1", "attn.c_proj": "c_attn", "mlp.c_fc": "ln_2", "mlp.c_proj": None},
    "falcon": {
        "self_attention.query_key_value": "ln_attn",
        "self_attention.dense": None,
        "mlp.dense_h_to_4h": "ln_mlp",
        "mlp.dense_4h_to_h": None,
    },
    "mixtral": {"self_attn.q_proj": "input_layernorm", "self_attn.o_proj": "v_proj"},
    "qwen3_moe": {"self_attn.q_proj": "input_layernorm", "self_attn.o_proj": "v_proj"},
}


@pytest.mark.parametrize("family", list(FOUND))
def test_each_family_folds_where_it_can_and_nowhere_else(tmp_path: Path, family: str) -> None:
    assert sources(tiny_folder(tmp_path, family)) == FOUND[family]


@pytest.mark.parametrize("family", list(FOUND))
def test_all_folds_together_leave_the_block_as_it_was(tmp_path: Path, family: str) -> None:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        tensors = {**block.others, **block.weights}
        generator = torch.Generator().manual_seed(2)
        changed: dict[str, Tensor] = {}
        for fold in folds_of(block).values():
            if fold is not None:
                scale = torch.exp2(4 * torch.rand(fold.channels, generator=generator) - 2)
                changed |= fold.apply(scale, tensors | changed)
        before, after = block.run(0, {}), block.run(0, changed)
        assert (after - before).abs().max() < 3e-5 * before.abs().max()
        assert not torch.equal(changed[block.shared[0][0]], block.weights[block.shared[0][0]])
        return changed

    for error in through_blocks(tiny_folder(tmp_path, family), work):
        assert error.calibration < 1e-9
        assert (error.held_out or 1.0) < 1e-9


def test_a_norm_of_parallel_attention_serves_both_groups_at_once(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "falcon", new_decoder_architecture=False, parallel_attn=True, multi_query=True)
    assert sources(folder) == {
        "self_attention.query_key_value": "input_layernorm",  # with dense_h_to_4h, which gets the same tensor
        "self_attention.dense": "query_key_value",  # the last rows, the one head of values
        "mlp.dense_4h_to_h": None,
    }


def test_a_norm_that_feeds_more_than_the_group_is_refused(tmp_path: Path) -> None:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        (queries, keys, values), *_ = block.shared
        generator = torch.Generator().manual_seed(0)
        assert find_fold(block, (queries, keys), movable=block.weights, generator=generator) is None
        assert find_fold(block, (queries, keys, values), movable=block.weights, generator=generator) is not None
        return {}

    through_blocks(tiny_folder(tmp_path, "llama"), work, first=1)


def test_scales_are_equal_over_the_heads_that_share_one(tmp_path: Path) -> None:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        fold = folds_of(block)["self_attn.o_proj"]
        assert fold is not None
        heads = [fold.channel[start : start + 16].tolist() for start in range(0, 64, 16)]
        assert heads == [list(range(16)), list(range(16)), list(range(16, 32)), list(range(16, 32))]
        assert fold.per_channel(torch.arange(64.0))[:2].tolist() == [8.0, 9.0]
        assert fold.largest(torch.arange(64.0))[:2].tolist() == [16.0, 17.0]
        return {}

    through_blocks(tiny_folder(tmp_path, "llama"), work, first=1)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_folded_gains_are_exact_in_a_file_of_16_bits(tmp_path: Path, family: str) -> None:
    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        tensors = {**block.others, **block.weights}
        fold = next(fold for fold in folds_of(block).values() if fold is not None)
        assert fold.gain is not None
        changed = fold.apply(torch.linspace(0.3, 3.0, fold.channels), tensors)
        gain = changed[fold.gain]
        assert torch.equal(gain.bfloat16().float(), gain)
        before, after = block.run(0, {}), block.run(0, changed)
        assert (after - before).abs().max() < 3e-5 * before.abs().max()
        return {}

    through_blocks(tiny_folder(tmp_path, family), work, first=1)


def test_a_gain_of_zero_does_not_spoil_the_fold(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][3] = 0.0

    def work(block: CalibrationBlock) -> Mapping[str, Tensor]:
        fold = folds_of(block)["self_attn.q_proj"]
        assert fold is not None
        changed = fold.apply(torch.full((64,), 1.7), {**block.others, **block.weights})
        assert all(torch.isfinite(tensor).all() for tensor in changed.values())
        return {}

    through_blocks(alter(tiny_folder(tmp_path, "llama"), change), work, first=1)


def test_nothing_is_folded_where_the_output_could_not_tell(tmp_path: Path) -> None:
    """With o_proj all zero any fold of q, k and v leaves the output as it is: that proves nothing."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.o_proj.weight"].zero_()

    found = sources(alter(tiny_folder(tmp_path, "llama"), change))
    assert found["self_attn.q_proj"] is None
    assert found["mlp.gate_proj"] == "post_attention_layernorm"

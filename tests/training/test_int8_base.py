"""The frozen base in int8: what passes, what a planted outlier keeps out, and what training comes to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from strop import kernels
from strop.config import Steps, TuneConfig
from strop.errors import ConfigError
from strop.files.folders import read_json
from strop.layers.fused_block import FusedBlock
from strop.layers.int8_products import Int8Weight
from strop.layers.surgery import attach_lora, block_lists, linear_modules, quantize_linears
from strop.models import load
from strop.numerics.scheme import parse_scheme
from strop.recipes.tune import tune
from strop.training.fusing import fused_blocks
from strop.training.int8_base import LEAST_COSINE, int8_base, require_int8
from strop.training.objective import LABELS
from strop.training.settings import TrainSettings
from tests.tiny import tiny_chat_file, tiny_folder, tiny_model
from tests.training.helpers import Notes, exported, ragged_samples, run_loop, stream_of

pytestmark = pytest.mark.skipif(kernels.in_use().name == "reference", reason=kernels.in_use().reason)

SETTINGS = TrainSettings(length=Steps(max_steps=6), learning_rate=1e-2, int8=True)


def adapted(*, method: str = "lora", outlier: float = 1.0) -> nn.Module:
    """A tiny model with adapters; one channel of the last block's feed-forward input is larger, at the same outputs."""
    model = tiny_model("llama")
    block = model.model.layers[-1]
    with torch.no_grad():
        block.post_attention_layernorm.weight[3] *= outlier
        for layer in (block.mlp.gate_proj, block.mlp.up_proj):
            layer.weight[:, 3] /= outlier
    if method == "qlora":
        quantize_linears(model, parse_scheme("nf4"))
    model.requires_grad_(requires_grad=False)
    attach_lora(model, "all-linear", rank=4, alpha=8.0, generator=torch.Generator().manual_seed(0))
    return model


def pieces(model: nn.Module) -> list[FusedBlock]:
    given = (vars(block).get("forward") for blocks in block_lists(model) for block in blocks)
    return [one for one in given if isinstance(one, FusedBlock)]


def gate(model: nn.Module) -> tuple[dict[str, Any], list[list[bool]], Notes]:
    notes, stream = Notes(), stream_of(ragged_samples())
    with fused_blocks(model, stream), int8_base(model, stream, SETTINGS, LABELS, notes) as found:
        return found, [[isinstance(one, Int8Weight) for one in block.int8] for block in pieces(model)], notes


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_products_of_an_ordinary_base_pass(method):
    found, used, notes = gate(adapted(method=method))
    assert found["products"] == found["of"] == 4 * len(used) > 0
    assert all(all(block) for block in used)
    assert found["kept"] == {}
    assert LEAST_COSINE <= found["cosine"] < 1.0
    assert LEAST_COSINE <= found["gradient_cosine"] < 1.0
    assert any("computed in int8" in note for note in notes.notes)


def test_a_planted_outlier_keeps_its_layers_out_and_names_them():
    found, used, notes = gate(adapted(outlier=100.0))
    assert set(found["kept"]) == {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"}
    assert all(seen < LEAST_COSINE for seen in found["kept"].values())
    assert used == [[True] * 4, [True, True, False, True]]
    assert any("model.layers.1.mlp.gate_proj: stays in float32" in note for note in notes.notes)


def test_what_is_not_finite_does_not_pass():
    model = adapted()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.base.weight[0, 0] = float("nan")
    found, used, _ = gate(model)
    assert found["products"] == 0
    assert not any(any(block) for block in used)


def test_the_stream_the_gradients_and_the_blocks_are_left_as_they_were():
    model, stream = adapted(), stream_of(ragged_samples())
    before = stream.state_dict()
    with fused_blocks(model, stream), int8_base(model, stream, SETTINGS, LABELS, Notes()):
        assert stream.state_dict() == before
        assert all(parameter.grad is None for parameter in model.parameters())
        blocks = pieces(model)
    assert all(one is None for block in blocks for one in block.int8)


def test_evaluation_is_in_the_bases_own_precision():
    model, stream = adapted(), stream_of(ragged_samples())
    ids = torch.arange(5, 25)[None]
    with fused_blocks(model, stream):
        own = {mode: model.train(mode)(ids, use_cache=False).logits for mode in (False, True)}
        with int8_base(model, stream, SETTINGS, LABELS, Notes()):
            ours = {mode: model.train(mode)(ids, use_cache=False).logits for mode in (False, True)}
    assert torch.equal(own[False], ours[False])
    assert not torch.equal(own[True], ours[True])


def test_training_comes_near_to_that_without_and_says_what_it_computed(tmp_path):
    results = {int8: run_loop(adapted(), tmp_path / str(int8), int8=int8) for int8 in (False, True)}
    assert results[False].int8 is None
    assert results[True].int8 is not None
    assert results[True].int8["products"] == 8
    own, ours = (exported(tmp_path / str(int8) / "last") for int8 in (False, True))
    moved = torch.cat([(ours[name] - own[name]).flatten() for name in own]).norm()
    assert 0 < moved < 0.2 * torch.cat([own[name].flatten() for name in own]).norm()


def test_a_resumed_run_and_another_number_of_threads_give_the_same_bits(tmp_path):
    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    run_loop(adapted(), tmp_path / "whole", int8=True)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        run_loop(adapted(), tmp_path / "parts", int8=True, reporter=Notes(stop), save_steps=1)
    try:
        torch.set_num_threads(3 - min(threads, 2))
        run_loop(adapted(), tmp_path / "parts", int8=True, resume=True, save_steps=1)
    finally:
        torch.set_num_threads(threads)
    whole, parts = (exported(tmp_path / name / "last") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_recomputed_blocks_give_the_same_bits(tmp_path):
    for checkpointing in ("none", "all"):
        run_loop(adapted(), tmp_path / checkpointing, int8=True, checkpointing=checkpointing)
    none, every = (exported(tmp_path / name / "last") for name in ("none", "all"))
    assert all(torch.equal(none[name], every[name]) for name in none)


@pytest.mark.parametrize("method", ["full", "qat", "qat-lora", "auto"])
def test_a_method_without_a_frozen_base_is_refused(method):
    settings = {"model": "m", "data": "d", "method": method, "compute": "int8"}
    with pytest.raises(ConfigError, match=f"compute: int8 .* {method} trains it"):
        TuneConfig.from_flat(settings | ({"format": "int4-g32"} if method != "full" else {}))


def test_a_model_that_has_no_block_in_one_piece_is_refused():
    with pytest.raises(ConfigError, match="none of this model's does"):
        require_int8(0)


def test_without_native_kernels_it_is_refused():
    with kernels.forced("reference"), pytest.raises(ConfigError, match="native kernels"):
        require_int8(2)


def test_a_tune_says_what_was_computed_in_int8_and_foresees_its_bytes(tmp_path):
    base, data = tiny_folder(tmp_path, "llama"), tiny_chat_file(tmp_path / "chats.jsonl", rows=16)
    settings = {"method": "lora", "dtype": "float32", "max_steps": 2, "batch_size": 2}
    plain, short = (
        tune(base, data, output=tmp_path / compute, compute=compute, **settings) for compute in ("bf16", "int8")
    )
    told = read_json(short.path / "run.json")["result"]["int8"]
    assert told["gradient_cosine"] >= LEAST_COSINE
    assert read_json(plain.path / "run.json")["result"]["int8"] is None
    foreseen = [read_json(run.path / "manifest.json")["memory"]["predicted_bytes"] for run in (plain, short)]
    weights = sum(module.weight.numel() for module in linear_modules(load(base).model).values())
    assert foreseen[1] - foreseen[0] == weights

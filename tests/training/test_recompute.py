"""Recomputed blocks: the same gradients, less memory, as many as a budget asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from strop.data.batches import padded_batch
from strop.data.templates import Sample
from strop.errors import TrainingError
from strop.layers.surgery import attach_fake_quant, attach_lora, quantize_linears
from strop.memory import PeakMemory, steady_allocation
from strop.numerics.scheme import parse_scheme
from strop.training.losses import find_head, token_loss_sum
from strop.training.optimizers import state_bytes, trained_parameters
from strop.training.recompute import blocks_for_budget, probe_bytes, recomputed, repeated_blocks
from tests.fresh import in_fresh_process
from tests.tiny import FAMILIES, tiny_config, tiny_model
from tests.training.helpers import Notes, ragged_samples, run_loop

METHODS = ("full", "lora", "qlora", "qat")


def prepared(family: str, method: str) -> nn.Module:
    model = tiny_model(family)
    if method in ("full", "qat"):
        model.requires_grad_(requires_grad=True)
    if method == "qat":
        attach_fake_quant(model, parse_scheme("int4-g32"))
    if method == "qlora":
        quantize_linears(model, parse_scheme("int4-g32"))
    if method in ("lora", "qlora"):
        attach_lora(model, rank=4, alpha=8, dropout=0.1, generator=torch.Generator().manual_seed(0))
    return model.train()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_blocks_give_every_trained_tensor_the_same_gradient(family, method):
    model, samples = prepared(family, method), ragged_samples(4)
    batch, results = padded_batch(samples, range(4), pad_id=0), []
    for count in (0, 1, None):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        with recomputed(model, count):
            token_loss_sum(model, batch)[0].backward()
        results.append({name: value.grad for name, value in trained_parameters(model).items()})
    assert all(value is not None for value in results[-1].values())
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])


def test_blocks_are_their_own_again_afterwards():
    model = tiny_model("llama")
    with recomputed(model, 1):
        assert ["forward" in vars(block) for block in repeated_blocks(model)] == [True, False]
    assert not any("forward" in vars(block) for block in repeated_blocks(model))


def test_a_model_without_blocks_is_refused_by_name():
    with pytest.raises(TrainingError, match="Linear has no list of blocks"), recomputed(nn.Linear(2, 2)):
        pass


def moderate() -> nn.Module:
    """8 layers, hidden 256, its weights frozen but for an adapter, as most runs have it."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}
    config = tiny_config("llama", **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    attach_lora(model, rank=4, alpha=8, generator=torch.Generator().manual_seed(0))
    return model.train()


def budget_figures() -> dict[str, Any]:
    """Peaks by blocks recomputed, what a budget between two of them chooses, and what too small a one is told."""
    model, length = moderate(), 128
    ids = [[(7 * row + place) % 300 for place in range(length)] for row in range(4)]
    samples = [Sample(row, [-100] * (length - 32) + row[-32:], index, ()) for index, row in enumerate(ids)]
    batch = padded_batch(samples, range(len(samples)), pad_id=0)
    head = find_head(model, batch)
    with steady_allocation(), PeakMemory() as memory:

        def probe(count: int) -> int:
            return probe_bytes(model, batch, count, head=head, compute_dtype=torch.float32, memory=memory)

        peaks = {count: probe(count) for count in (0, 3, 8)}
        each = (peaks[0] - peaks[3]) / 3
        coming = state_bytes("adamw", trained_parameters(model))

        def choose(budget: int) -> int:
            return blocks_for_budget(
                model, batch, budget, optimizer="adamw", compute_dtype=torch.float32, memory=memory
            )

        budget = int(peaks[3] + 0.5 * each) + coming
        count = choose(budget)
        with pytest.raises(TrainingError) as error:
            choose(coming + 10**6)
        held = probe(count) + coming
    return {
        "peaks": peaks, "each": each, "coming": coming, "budget": budget, "count": count, "held": held,
        "error": str(error.value),
    }  # fmt: skip


def test_the_peak_falls_with_every_block_and_a_budget_is_kept_with_no_block_more():
    found = in_fresh_process(budget_figures)
    peaks = found["peaks"]
    assert peaks[0] > peaks[3] > peaks[8]
    assert found["count"] in (3, 4)
    assert found["held"] <= found["budget"] + 0.25 * found["each"]
    assert "with all 8 blocks recomputed; it takes" in found["error"]
    least = int(found["error"].split("it takes ")[1].split()[0].replace(",", ""))
    assert least == pytest.approx(peaks[8] + found["coming"], rel=0.15)


def test_a_run_with_room_recomputes_nothing_and_ends_in_the_same_bits(tmp_path):
    notes, ends = Notes(), []
    for name, changes in (("none", {}), ("auto", {"checkpointing": "auto", "max_memory": 10**11})):
        model = prepared("llama", "lora")
        run_loop(model, tmp_path / name, reporter=notes, **changes)
        ends.append({key: value.detach().clone() for key, value in trained_parameters(model).items()})
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert "0 of 2 blocks are recomputed, to stay within max_memory" in notes.notes


def test_a_run_that_cannot_fit_is_refused_before_its_first_step(tmp_path):
    with pytest.raises(TrainingError, match=r"max_memory: 1,000 bytes are not enough .* Allow [\d,]+ or more"):
        run_loop(prepared("llama", "lora"), tmp_path, checkpointing="auto", max_memory=1000)
    assert not (tmp_path / "last").exists()

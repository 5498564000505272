"""The plan of a calibration's memory: an upper bound for whatever the layers become and what trains their scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from strop.calibrate import memory as planned
from strop.calibrate.memory import DIVERGENCE_TENSORS, plan_memory
from strop.layers.surgery import linear_modules
from strop.memory import PeakMemory, release_unused_memory, steady_allocation
from strop.models.blocks import BlockwiseModel
from strop.numerics.scheme import Scheme, parse_scheme
from strop.training.losses import CHUNK_LOGITS, Head, divergence_sum
from tests.fresh import in_fresh_process
from tests.tiny import tiny_folder
from tests.training.helpers import ragged_samples


def needed(model: BlockwiseModel, whole: Mapping[str, Sequence[Scheme]] | None) -> int:
    samples = ragged_samples(8, longest=24)
    return plan_memory(model, samples, max_memory=None, hessian=False, trains=False, whole=whole).least_bytes


@pytest.fixture
def model(tmp_path: Path) -> BlockwiseModel:
    return BlockwiseModel(tiny_folder(tmp_path, "llama", hidden_size=256, intermediate_size=1024))


def test_a_layer_that_may_become_several_formats_is_held_as_the_one_that_takes_most(model: BlockwiseModel) -> None:
    """int2-g4 has fewer bits than int8, and a scale with its gradient and moments for every fourth weight."""
    names = list(linear_modules(model.model))
    fine, coarse = parse_scheme("int2-g4"), parse_scheme("int8")
    alone = [needed(model, {name: [own] for name in names}) for own in (fine, coarse)]
    assert alone[0] > alone[1]
    assert needed(model, {name: [coarse, fine] for name in names}) == alone[0]


def test_layers_that_keep_their_dtype_are_held_in_float32(model: BlockwiseModel) -> None:
    modules = linear_modules(model.model)
    packed = {name: [parse_scheme("int4-g32")] for name in modules}
    kept = [name for name in modules if name.endswith("down_proj")]
    some = {name: schemes for name, schemes in packed.items() if name not in kept}
    dense = len(kept) * 256 * 1024
    assert needed(model, some) - needed(model, packed) == pytest.approx(dense * (4 - 4.5 / 8 - 28 / 32))


def peak_of_the_divergence(cap: bool) -> int:
    vocabulary = 150_000
    projection = nn.Linear(16, vocabulary, bias=False)
    head = Head(nn.Identity(), projection, (lambda x: torch.tanh(x / 30) * 30) if cap else (lambda x: x))
    hidden, wanted = torch.randn(2, 2 * CHUNK_LOGITS // vocabulary, 16)
    hidden.requires_grad_()
    with steady_allocation():
        release_unused_memory()
        with PeakMemory() as memory:
            divergence_sum(head, hidden, wanted).backward()
    return memory.peak_bytes


@pytest.mark.parametrize("cap", [False, True], ids=["plain", "cap"])
def test_the_divergence_of_a_large_vocabulary_stays_within_what_is_planned(cap: bool) -> None:
    assert planned.CHUNK_LOGITS == CHUNK_LOGITS
    peak = in_fresh_process(peak_of_the_divergence, cap)
    assert peak <= DIVERGENCE_TENSORS * 4 * CHUNK_LOGITS * 1.05, f"{peak / (4 * CHUNK_LOGITS):.2f} tensors of logits"

"""Common widths: few of them, never far above, and nothing of a batch is changed but its padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strop.data.batches import packed_batch, padded_batch
from strop.data.packing import packed_attention
from strop.training.losses import token_loss_sum
from strop.training.shapes import at_common_width, round_up
from tests.tiny import tiny_model
from tests.training.helpers import ragged_samples

SEED = 1  # its longest row has no common width


@given(st.integers(1, 10**6))
def test_a_size_is_rounded_up_by_a_sixteenth_at_most(count):
    rounded = round_up(count)
    assert count <= rounded <= max(count + 7, count * 17 / 16)
    assert round_up(rounded) == rounded


def test_there_are_few_sizes():
    assert len({round_up(count) for count in range(1, 1025)}) <= 64


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_added_padding_changes_no_loss(family, packing):
    model, samples = tiny_model(family), ragged_samples(6, seed=SEED)
    if packing:
        batch = packed_batch([[0, 1, 2], [3, 4, 5]], samples, pad_id=0, attention=packed_attention(model, 64))
    else:
        batch = padded_batch(samples, range(6), pad_id=0)
    wide = at_common_width(batch, limit=None)
    assert wide.input_ids.shape[1] == round_up(batch.input_ids.shape[1]) > batch.input_ids.shape[1]
    assert (wide.tokens, wide.supervised_tokens) == (batch.tokens, batch.supervised_tokens)
    sums = [token_loss_sum(model, each)[0].item() for each in (batch, wide)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)


def test_the_models_positions_are_not_passed():
    batch = padded_batch(ragged_samples(6, seed=SEED), range(6), pad_id=0)
    width = batch.input_ids.shape[1]
    assert at_common_width(batch, limit=width + 1).input_ids.shape[1] == width + 1
    assert at_common_width(batch, limit=width).input_ids is batch.input_ids
    model = tiny_model("gpt2", max_position_embeddings=width)
    token_loss_sum(model, at_common_width(batch, limit=width))[0].backward()
    assert torch.isfinite(model.transformer.wpe.weight.grad).all()

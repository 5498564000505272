"""Keys and values rounded in training as the served cache rounds them token by token, packed or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from strop.data.batches import Batch, packed_batch, padded_batch
from strop.data.packing import packed_attention
from strop.data.templates import Sample
from strop.errors import TrainingError
from strop.evaluation.kv_cache import STRIDE, KVFormat, new_cache
from strop.evaluation.kv_rounding import KVRounding
from strop.training.losses import find_head
from strop.training.objective import LABELS, Objective
from strop.training.recompute import recomputed
from tests.tiny import FAMILIES, tiny_input, tiny_model

INT8, INT4 = KVFormat("int8"), KVFormat("int4")
FORMS = pytest.mark.parametrize("form", [INT8, INT4], ids=["int8", "int4"])


def samples(*lengths: int) -> list[Sample]:
    rows = [tiny_input(rows=1, length=length, seed=length)[0].tolist() for length in lengths]
    return [Sample(row, [-100, *row[1:]]) for row in rows]


def rounding(model: Any, form: KVFormat) -> KVRounding:
    return KVRounding(model, form, 256)


@torch.no_grad()
def served(model: Any, row: list[int], form: KVFormat, step: int) -> Tensor:
    """Logits [tokens, vocabulary] of a text that is read `step` tokens at a time with the serving cache."""
    cache, ids, parts = new_cache(model, form), torch.tensor([row]), []
    for begin in range(0, len(row), step):
        parts.append(model(input_ids=ids[:, begin : begin + step], past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(parts)


@torch.no_grad()
def trained(model: Any, batch: Batch, form: KVFormat) -> Tensor:
    return model(**rounding(model, form).of(batch).inputs()).logits


@FORMS
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_training_forward_is_what_the_served_cache_computes(family, attention, form):
    """Within fp32 noise of the logits' size; without rounding they differ more than twenty times as much.

    In float64: in float32 a processor's order of summation may move a value over the edge between two codes.
    """
    model = tiny_model(family).double()
    model.set_attn_implementation(attention)
    model.set_experts_implementation("eager")  # the grouped product has no float64
    (row,) = samples(2 * STRIDE + STRIDE + 45)
    batch = padded_batch([row], [0], pad_id=0)
    expected = served(model, row.input_ids, form, STRIDE if form is INT4 else 1)
    got, plain = trained(model, batch, form)[0], model(**batch.inputs()).logits[0].detach()
    noise = float((got - expected).norm() / expected.norm())
    assert noise < 1e-6
    assert float((plain - expected).norm() / expected.norm()) > 20 * noise
    assert float((got - expected).abs().max()) < 1e-2 * float(expected.abs().max())


def test_the_last_tokens_see_what_single_steps_of_the_served_cache_see():
    model = tiny_model("llama")
    (row,) = samples(140)
    single = served(model, row.input_ids, INT4, 1)
    torch.testing.assert_close(trained(model, padded_batch([row], [0], pad_id=0), INT4)[0], single, rtol=0, atol=1e-4)


@FORMS
def test_padding_and_packing_change_nothing(form):
    model = tiny_model("llama")
    rows = samples(100, 37, 70)
    alone = [trained(model, padded_batch([row], [0], pad_id=0), form)[0] for row in rows]
    padded = trained(model, padded_batch(rows, range(3), pad_id=0), form)
    packed = packed_batch([[1, 0, 2]], rows, pad_id=0, attention=packed_attention(model, 256))
    together = trained(model, packed, form)[0]
    spans = {1: slice(0, 37), 0: slice(37, 137), 2: slice(137, 207)}
    for number, row in enumerate(rows):
        torch.testing.assert_close(padded[number, : len(row)], alone[number], rtol=0, atol=1e-4)
        torch.testing.assert_close(together[spans[number]], alone[number], rtol=0, atol=1e-4)


@FORMS
def test_the_gradient_is_passed_through_and_the_same_when_recomputed(form):
    model = tiny_model("llama").requires_grad_(True)
    batch = padded_batch(samples(100, 70), range(2), pad_id=0)
    objective, results = Objective(rounding=rounding(model, form)), []
    for count in (0, None):
        with recomputed(model, count):
            objective.loss_sum(model, batch, head=find_head(model, batch)).backward()
        results.append({name: value.grad.clone() for name, value in model.named_parameters()})
        model.zero_grad()
    assert all(results[1][name].equal(gradient) for name, gradient in results[0].items())
    LABELS.loss_sum(model, batch, head=find_head(model, batch)).backward()
    for name, value in model.named_parameters():  # near the gradient without rounding, and not it
        apart = float((results[0][name] - value.grad).norm() / value.grad.norm())
        assert apart < (0.2 if form is INT8 else 0.6), name
    assert not results[0]["model.layers.0.self_attn.k_proj.weight"].equal(
        model.get_parameter("model.layers.0.self_attn.k_proj.weight").grad
    )


def test_short_rows_are_not_rounded_in_four_bits():
    model = tiny_model("llama")
    batch = padded_batch(samples(STRIDE + 20), [0], pad_id=0)
    with torch.no_grad():
        torch.testing.assert_close(trained(model, batch, INT4), model(**batch.inputs()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_reached(family):
    model = tiny_model(family)
    rounding(model, INT8).check_reach(padded_batch(samples(9), [0], pad_id=0))


@pytest.mark.parametrize("what", ["never asks", "looks away"])
def test_a_layer_that_goes_another_way_is_refused_by_name(what):
    model = tiny_model("llama")
    attention = model.get_submodule("model.layers.1.self_attn")
    forward = attention.forward

    def another(*args: Any, **kwargs: Any) -> Any:
        if what == "looks away":
            forward(*args, **kwargs)
        return forward(*args, **(kwargs | {"past_key_values": None}))

    attention.forward = another  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="LlamaForCausalLM a change planted in the keys of layer 1"):
        rounding(model, INT8).check_reach(padded_batch(samples(9), [0], pad_id=0))


def test_what_is_no_number_makes_the_loss_no_number():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.k_proj.weight")[0, 0] = torch.nan
    batch = padded_batch(samples(100), [0], pad_id=0)
    loss = Objective(rounding=rounding(model, INT4)).loss_sum(model, batch, head=None)
    assert not torch.isfinite(loss)

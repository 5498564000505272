"""The summed loss: against the plain formula, in pieces, without the rows that nobody learns from."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from strop.data.batches import packed_batch, padded_batch
from strop.data.packing import packed_attention
from strop.data.templates import IGNORED, Sample
from strop.layers.surgery import attach_lora
from strop.training import losses
from strop.training.losses import find_head, token_loss_sum
from strop.training.shapes import round_up
from tests.tiny import FAMILIES, tiny_model
from tests.training.helpers import ragged_samples


def batch_of(samples: list[Sample]):
    return padded_batch(samples, range(len(samples)), pad_id=0)


def by_hand(model: nn.Module, samples: list[Sample]) -> tuple[torch.Tensor, int]:
    """One row at a time, one token at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        logits = model(input_ids=torch.tensor([sample.input_ids]), use_cache=False).logits[0]
        for place in range(1, len(sample)):
            if sample.labels[place] != IGNORED:
                total = total - torch.log_softmax(logits[place - 1].double(), dim=-1)[sample.labels[place]]
                count += 1
    return total, count


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_is_that_of_the_formula_with_and_without_the_head_apart(family):
    model, samples = tiny_model(family), ragged_samples(5)
    expected, count = by_hand(model, samples)
    head = find_head(model, batch_of(samples))
    assert head is not None
    for way in (None, head):
        loss_sum, tokens = token_loss_sum(model, batch_of(samples), head=way)
        assert tokens == count == batch_of(samples).supervised_tokens
        assert loss_sum.dtype == torch.float32
        assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 304 * 3, 304 * 7 + 5])
def test_pieces_of_the_head_give_the_same_loss_and_gradient(monkeypatch, chunk):
    samples, results = ragged_samples(6), []
    for limit in (losses.CHUNK_LOGITS, chunk):
        monkeypatch.setattr(losses, "CHUNK_LOGITS", limit)
        model = tiny_model("gpt2", dtype=torch.float64)
        head = find_head(model, batch_of(samples))
        loss_sum, _ = token_loss_sum(model, batch_of(samples), head=head)
        loss_sum.backward()
        results.append((loss_sum.detach(), [parameter.grad for parameter in model.parameters()]))
    (whole, whole_gradients), (pieces, piece_gradients) = results
    assert torch.allclose(pieces, whole, rtol=1e-12)
    for left, right in zip(piece_gradients, whole_gradients, strict=True):
        assert torch.allclose(left, right, rtol=1e-9, atol=1e-12)


def test_pieces_keep_no_logits_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 304 * 2)
    model, batch = tiny_model("llama"), batch_of(ragged_samples(6))
    head, kept = find_head(model, batch), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = token_loss_sum(model, batch, head=head)
    vocabulary, held = len(model.get_output_embeddings().weight), [one() for one in kept if one() is not None]
    assert loss.requires_grad
    assert held
    assert not [one.shape for one in held if one.dim() == 2 and one.shape[1] == vocabulary]


def test_the_head_sees_supervised_rows_only():
    model, samples = tiny_model("llama"), ragged_samples(4)
    batch, rows = batch_of(samples), []
    head = find_head(model, batch)
    model.get_output_embeddings().register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape))
    token_loss_sum(model, batch, head=head)
    assert rows == [(round_up(batch.supervised_tokens, smallest_step=16), 64)]
    assert rows[0][0] < 0.7 * batch.input_ids.numel()


def small(config) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


COMMON = {
    "vocab_size": 304, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**COMMON, head_dim=16, final_logit_softcapping=5.0, initializer_range=0.2),
        Gemma2Config(**COMMON, head_dim=16, final_logit_softcapping=1000.0, initializer_range=1e-4),
        CohereConfig(**COMMON, logit_scale=0.25),
        GraniteConfig(**COMMON, logits_scaling=3.0),
    ],
    ids=["soft cap", "soft cap far from the logits", "logit scale", "logit divisor"],
)
def test_what_a_model_does_to_its_logits_after_the_head_is_found_and_done(config):
    model, samples = small(config), ragged_samples(4)
    head = find_head(model, batch_of(samples))
    assert head is not None
    loss_sum, _ = token_loss_sum(model, batch_of(samples), head=head)
    assert loss_sum.item() == pytest.approx(by_hand(model, samples)[0].item(), rel=1e-5)


def test_a_model_without_a_head_of_its_own_goes_through_its_forward():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model("llama")

        def forward(self, **inputs):
            return self.inner(**inputs)

    model, samples = Plain(), ragged_samples(3)
    assert find_head(model, batch_of(samples)) is None
    assert token_loss_sum(model, batch_of(samples))[0].item() == pytest.approx(by_hand(model.inner, samples)[0].item())


def test_finding_the_head_leaves_mode_gradients_and_generators_alone():
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    state = torch.get_rng_state()
    find_head(model, batch_of(ragged_samples(2)))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_packed_rows_lose_what_their_documents_lose_alone():
    model, samples = tiny_model("llama"), ragged_samples(6)
    batch = packed_batch([[0, 1, 2], [3, 4, 5]], samples, pad_id=0, attention=packed_attention(model, 64))
    loss_sum, tokens = token_loss_sum(model, batch, head=find_head(model, batch))
    expected, count = by_hand(model, samples)
    assert tokens == count
    assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_padding_holds_changes_nothing():
    model, samples = tiny_model("llama"), ragged_samples(5)
    sums = [token_loss_sum(model, padded_batch(samples, range(5), pad_id=pad))[0].item() for pad in (0, 2, 17)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6) == pytest.approx(sums[2], rel=1e-6)


def test_without_a_supervised_token_the_sum_is_zero():
    model = tiny_model("llama")
    batch = batch_of([Sample([5, 6, 7], [IGNORED] * 3, 0, ())])
    for head in (None, find_head(model, batch)):
        loss_sum, tokens = token_loss_sum(model, batch, head=head)
        assert (loss_sum.item(), tokens) == (0.0, 0)


def test_under_autocast_the_sum_is_fp32_and_near_that_in_fp32():
    model, samples = tiny_model("llama"), ragged_samples(5)
    attach_lora(model, rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    exact, _ = token_loss_sum(model, batch_of(samples))
    with torch.autocast("cpu", torch.bfloat16):
        near, _ = token_loss_sum(model, batch_of(samples))
    assert near.dtype == torch.float32
    assert near.item() == pytest.approx(exact.item(), rel=0.03)


def test_torch_agrees_with_the_sum_over_all_tokens():
    model, samples = tiny_model("llama"), ragged_samples(3)
    whole = [Sample(sample.input_ids, [IGNORED, *sample.input_ids[1:]], 0, ()) for sample in samples]
    batch = batch_of(whole)
    logits = model(**batch.inputs()).logits[:, :-1]
    expected = functional.cross_entropy(logits.reshape(-1, 304), batch.labels[:, 1:].reshape(-1), reduction="sum")
    assert token_loss_sum(model, batch)[0].item() == pytest.approx(expected.item(), rel=1e-6)

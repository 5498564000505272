"""The loss in chunks against the plain way: value, gradients and memory; trained and frozen heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from strop.data.batches import padded_batch
from strop.memory import PeakMemory, release_unused_memory, steady_allocation
from strop.training import losses
from strop.training.losses import Head, find_head, token_loss_sum
from tests.tiny import tiny_config
from tests.training.helpers import ragged_samples

COMMON = {
    "vocab_size": 304, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "plain": tiny_config("llama"),
    "soft cap": Gemma2Config(**COMMON, head_dim=16, final_logit_softcapping=5.0, initializer_range=0.2),
    "scale": CohereConfig(**COMMON, logit_scale=0.25),
    "divisor": GraniteConfig(**COMMON, logits_scaling=3.0),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_give_the_loss_and_gradients_of_the_plain_way(name, trained, dtype, monkeypatch):
    """Loss within 1e-12 (fp64), 1e-6 (fp32), 5e-3 (bf16), relative; gradients within ten times that of their length."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 304 * 7)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").to(dtype).eval()
    model.get_output_embeddings().requires_grad_(requires_grad=trained)
    samples = ragged_samples(6)
    batch = padded_batch(samples, range(6), pad_id=0)
    head, results = find_head(model, batch), []
    assert head is not None
    for way in (None, head):
        model.zero_grad()
        loss, count = token_loss_sum(model, batch, head=way)
        (loss / count).backward()
        gradients = [parameter.grad.double() for parameter in model.parameters() if parameter.grad is not None]
        results.append((loss.item(), gradients))
    (plain, expected), (chunked, got) = results
    assert chunked == pytest.approx(plain, rel=TOLERANCE[dtype])
    for one, other in zip(expected, got, strict=True):
        assert float((one - other).norm()) <= 10 * TOLERANCE[dtype] * float(one.norm()) + 1e-14


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_without_a_label_the_loss_is_zero_and_so_are_gradients(trained):
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    batch = padded_batch(ragged_samples(2), range(2), pad_id=0)
    head = find_head(model, batch)
    assert head is not None
    head.projection.requires_grad_(requires_grad=trained)
    loss, count = token_loss_sum(model, replace(batch, labels=torch.full_like(batch.labels, -100)), head=head)
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def head_and_hidden() -> tuple[Head, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    projection = nn.Linear(32, 64, bias=False, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    with torch.no_grad():
        projection.weight.normal_(generator=generator)
    hidden = torch.randn(40, 32, generator=generator).bfloat16().requires_grad_()
    return (
        Head(nn.Identity(), projection, losses.unchanged),
        hidden,
        torch.randn(40, 32, generator=generator).bfloat16(),
    )


def test_the_factor_of_a_gradient_in_bfloat16_is_not_rounded_itself():
    head, hidden, wanted = head_and_hidden()
    loss = losses.divergence_sum(head, hidden, wanted)
    (whole,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (part,) = torch.autograd.grad(loss / 510, hidden)
    assert torch.equal(part, (whole.float() * torch.tensor(1 / 510)).bfloat16())


def test_a_second_derivative_is_refused():
    head, hidden, wanted = head_and_hidden()
    loss = losses.divergence_sum(head, hidden, wanted)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss * hidden.sum(), hidden, create_graph=True)


@dataclass
class Rows:
    """A batch for `Wide`."""

    labels: Tensor

    def inputs(self) -> dict[str, Any]:
        return {"input_ids": self.labels.clamp(min=0)}


@dataclass
class Output:
    last_hidden_state: Tensor


class Base(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 32)

    def forward(self, input_ids: Tensor) -> Output:
        return Output(self.embedding(input_ids))


class Wide(nn.Module):
    """An embedding and a head of 100,000 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = Base(100_000), nn.Linear(32, 100_000, bias=False)


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_the_memory_of_the_loss_is_that_of_a_few_chunks(trained):
    """2,000 supervised rows of 4,000: logits alone would take 800 MB; three to four tensors of a chunk's 64 MiB do."""
    torch.manual_seed(0)
    model = Wide()
    model.head.requires_grad_(requires_grad=trained)
    labels = torch.randint(0, 100_000, (2, 2001))
    labels[:, 1001:] = losses.IGNORED
    head, batch = Head(model.base, model.head, lambda logits: logits), Rows(labels)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with steady_allocation():
        release_unused_memory()
        with PeakMemory() as memory:
            loss, count = token_loss_sum(model, batch, head=head)  # type: ignore[arg-type]  # as much as is needed
            loss.backward()
    assert count == 2000
    hidden = model.base.embedding(labels[:, :1000].clamp(min=0)).flatten(0, 1)
    with torch.no_grad():
        expected = sum(
            functional.cross_entropy(model.head(hidden[start : start + 100]), part, reduction="sum")
            for start, part in zip(range(0, 2000, 100), labels[:, 1:1001].flatten().split(100), strict=True)
        )
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    assert memory.peak_bytes < 4 * 4 * losses.CHUNK_LOGITS + 32e6  # two gradients of 12.8 MB beside the chunks

"""Scales trained end to end: the loss is the divergence, codes stay, what is kept is what was measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from strop.data.batches import eval_batches
from strop.errors import UsageError
from strop.layers.surgery import quantize_linears
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import parse_scheme
from strop.training import losses
from strop.training.losses import Head, divergence_sum, find_head
from strop.training.scales import train_scales
from tests.tiny import tiny_model
from tests.training.helpers import ragged_samples

BATCHES = list(eval_batches(ragged_samples(32, longest=24), 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_divergence_in_chunks_is_that_of_the_definition_and_so_is_its_gradient(dtype, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 50 * 3)  # three tokens at a time
    torch.manual_seed(0)
    projection = nn.Linear(8, 50, bias=False, dtype=dtype)
    head = Head(nn.Identity(), projection, lambda logits: 3 * torch.tanh(logits / 3))
    wanted, hidden = torch.randn(2, 11, 8, dtype=dtype)
    hidden.requires_grad_()
    p, q = (head.logits(states).softmax(-1) for states in (wanted, hidden))
    plain = (p * (p / q).log()).sum()
    (expected,) = torch.autograd.grad(plain, hidden)
    found = divergence_sum(head, hidden, wanted)
    (gradient,) = torch.autograd.grad(2 * found, hidden)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert found.item() == pytest.approx(plain.item(), rel=tolerance)
    assert torch.allclose(gradient, 2 * expected, rtol=tolerance, atol=tolerance)
    assert divergence_sum(head, wanted, wanted).item() == pytest.approx(0, abs=1e-5)


def divergence(model, whole, batches):
    nats, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            p, q = (one(**batch.inputs()).logits.log_softmax(-1) for one in (whole, model))
        real = torch.arange(batch.input_ids.shape[1])[None, :] < batch.lengths[:, None]
        nats += float((p.exp() * (p - q)).sum(-1)[real].sum())
        count += int(real.sum())
    return nats / count


def trained(family: str, grid: str, *, steps: int, dtype: torch.dtype = torch.float32, batches=BATCHES):
    whole, model = tiny_model(family).eval(), tiny_model(family).eval()
    quantize_linears(model, parse_scheme(grid))
    head = find_head(whole, BATCHES[0])
    assert head is not None

    def teacher(number: int) -> torch.Tensor:
        with torch.no_grad():
            return whole.base_model(**BATCHES[number].inputs()).last_hidden_state

    return whole, model, train_scales(model, batches, teacher, head, steps=steps, dtype=dtype)


@pytest.mark.parametrize(
    ("family", "grid"),
    [("llama", "int2-g32"), ("qwen3", "int3-g32-asym"), ("gpt2", "nf4"), ("mixtral", "int3")],
)
def test_the_model_comes_nearer_and_is_what_was_measured(family: str, grid: str) -> None:
    few = BATCHES[:3]  # all of them train and measure: random weights have nothing to generalise
    whole, model, found = trained(family, grid, steps=40, batches=few)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert divergence(model, whole, few) == pytest.approx(found.before, rel=1e-4)
    assert found.after < 0.9 * found.before
    for name, weight in found.weights.items():
        module = model.get_submodule(name)
        assert weight.codes.equal(module.qtensor.codes)
        assert weight.scale.dtype == module.qtensor.scale.dtype
        assert not weight.scale.equal(module.qtensor.scale)
        module.load_state_dict({**module.state_dict(), "scale": weight.scale})
    for name, tensor in found.others.items():
        model.get_parameter(name).data.copy_(tensor)
    assert divergence(model, whole, few) == pytest.approx(found.after, rel=1e-4)
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {f"{name}.scale" for name in found.weights} | set(found.others)


def test_the_model_is_left_as_it_came_and_the_same_seed_gives_the_same_bits() -> None:
    _, model, first = trained("llama", "int3-g32", steps=12)
    fresh = tiny_model("llama").eval()
    quantize_linears(fresh, parse_scheme("int3-g32"))
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]
    state = fresh.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    _, _, again = trained("llama", "int3-g32", steps=12)
    assert all(weight.scale.equal(again.weights[name].scale) for name, weight in first.weights.items())


def test_gains_are_numbers_that_the_models_files_hold() -> None:
    _, _, found = trained("llama", "int2-g32", steps=12, dtype=torch.bfloat16)
    assert found.others
    assert all(tensor.equal(tensor.bfloat16().float()) for tensor in found.others.values())


def test_where_nothing_is_nearer_the_start_is_kept() -> None:
    """At 8 bits per channel a single step at the full rate leaves the optimum."""
    _, _, found = trained("llama", "int8", steps=1)
    assert found.after <= found.before
    if found.after == found.before:
        assert not found.weights
        assert not found.others


def test_scales_that_are_codes_themselves_are_not_trained() -> None:
    with pytest.raises(UsageError, match="no layer has a scale to train"):
        trained("llama", "nf4-dq", steps=2)


def test_scales_that_the_rows_say_next_to_nothing_of_hardly_move() -> None:
    """A gradient whose square is no float32 number is no reason for a jump to the bounds."""
    whole, model = tiny_model("llama").eval(), tiny_model("llama").eval()
    for one in (whole, model):
        one.model.layers[0].mlp.up_proj.weight.data *= 1e-20
    quantize_linears(model, parse_scheme("int3"))
    head = find_head(whole, BATCHES[0])
    assert head is not None

    def teacher(number: int) -> torch.Tensor:
        with torch.no_grad():
            return whole.base_model(**BATCHES[number].inputs()).last_hidden_state

    found = train_scales(model, BATCHES, teacher, head, steps=10, dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj"
    factor = found.weights[name].scale / model.get_submodule(name).qtensor.scale
    assert 0.9 < factor.min() <= factor.max() < 1.1


def test_a_scale_never_vanishes_or_changes_its_sign() -> None:
    _, model, found = trained("llama", "int2-g32", steps=30)
    for name, weight in found.weights.items():
        assert isinstance(weight, QuantizedTensor)
        before = model.get_submodule(name).qtensor.scale
        assert (weight.scale.sign() == before.sign()).all()

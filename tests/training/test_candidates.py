"""Adapters that take turns on one model: each is what the training loop makes of the same steps."""

from __future__ import annotations

import pytest
import torch

from strop.config import Steps
from strop.layers.surgery import attach_lora, lora_modules
from strop.training.candidates import AdapterShape, Candidate
from strop.training.losses import find_head
from strop.training.settings import TrainSettings
from tests.tiny import tiny_input, tiny_model
from tests.training.helpers import ragged_samples, run_loop, stream_of

SETTINGS = TrainSettings(length=Steps(max_steps=6), learning_rate=1e-2, warmup_ratio=0.2, seed=5)


def adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": value.detach().clone()
        for name, module in lora_modules(model).items()
        for part, value in module.named_parameters(recurse=False)
    }


def nothing() -> None:
    pass


@pytest.mark.parametrize("alpha", [None, 3.0], ids=["alpha is twice the rank", "alpha was given"])
def test_taking_turns_gives_bit_for_bit_what_the_loop_gives(tmp_path, alpha):
    model, samples = tiny_model("llama"), ragged_samples()
    before = model(tiny_input()).logits
    shape = AdapterShape("all-linear", alpha, dropout=0.3, rank_stabilised=False)
    head = find_head(model, stream_of(samples).next_step()[0])
    racers = [Candidate(model, rank, shape, stream_of(samples), SETTINGS, steps=6, head=head) for rank in (2, 4)]
    for until in (1, 4, 6):
        for racer in racers:
            racer.train(until, after_step=nothing)
    assert not lora_modules(model)
    assert torch.equal(model(tiny_input()).logits, before)
    for racer in racers:
        with racer.attached():
            raced = adapter(model)
        alone = tiny_model("llama")
        generator = torch.Generator().manual_seed(5)
        scale = 2.0 * racer.rank if alpha is None else alpha
        attach_lora(alone, rank=racer.rank, alpha=scale, dropout=0.3, generator=generator)
        run_loop(
            alone,
            tmp_path / str(racer.rank),
            samples=samples,
            valid=[],
            learning_rate=1e-2,
            warmup_ratio=0.2,
            seed=5,
        )
        looped = adapter(alone)
        assert raced.keys() == looped.keys()
        assert all(torch.equal(raced[name], looped[name]) for name in raced)


def test_a_candidate_whose_loss_is_no_number_stops_and_says_where():
    model = tiny_model("llama")
    shape = AdapterShape("all-linear", None, dropout=0.0, rank_stabilised=False)
    racer = Candidate(model, 2, shape, stream_of(ragged_samples()), SETTINGS, steps=6, head=None)
    racer.train(2, after_step=nothing)
    with racer.attached(), torch.no_grad():
        next(iter(lora_modules(model).values())).lora_B.fill_(float("nan"))
    racer.train(6, after_step=nothing)
    assert racer.step == 2
    assert racer.broken is not None
    assert racer.broken.startswith("step 3: the loss is nan")

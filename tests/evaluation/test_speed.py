"""Speed: what is run and how it is counted. No test says how fast."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from strop.evaluation import speed
from strop.evaluation.decoding import decodes
from strop.evaluation.speed import measure_speed
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_rates_come_with_their_spread(family: str):
    measured = measure_speed(tiny_model(family), prompt_tokens=16, new_tokens=4, repeats=3)
    for rate, tokens in ((measured.prefill, 16), (measured.decode, 4)):
        assert 0 < rate.slowest <= rate.median <= rate.fastest
        assert (rate.tokens, rate.repeats) == (tokens, 3)
    json.dumps(measured.to_dict(), allow_nan=False)


def test_each_run_reads_the_prompt_once_and_writes_token_by_token_from_the_cache():
    model = tiny_model("llama")
    assert decodes(model, 12)  # tried before, so that its passes are not among those that are seen
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (
                kwargs["input_ids"].shape[1],
                kwargs["past_key_values"].get_seq_length() if "past_key_values" in kwargs else 0,
            )
        ),
        with_kwargs=True,
    )
    measure_speed(model, prompt_tokens=9, new_tokens=3, repeats=2)
    assert seen == [(9, 0), (1, 9), (1, 10), (1, 11)] * 3  # one run to warm up and two that count


def test_rates_are_tokens_over_seconds_and_the_first_run_does_not_count(monkeypatch: pytest.MonkeyPatch):
    # seconds of (prefill, decode) for the warm-up and three runs
    spans = [100.0, 100.0, 0.5, 2.0, 0.25, 1.0, 1.0, 4.0]
    clock = itertools.chain.from_iterable((10.0 * i, 10.0 * i + span) for i, span in enumerate(spans))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    measured = measure_speed(tiny_model("llama"), prompt_tokens=8, new_tokens=4, repeats=3)
    assert (measured.prefill.slowest, measured.prefill.median, measured.prefill.fastest) == (8.0, 16.0, 32.0)
    assert (measured.decode.slowest, measured.decode.median, measured.decode.fastest) == (1.0, 2.0, 4.0)


def test_a_short_context_shortens_the_run_and_the_mode_is_kept():
    model = tiny_model("gpt2", max_position_embeddings=16).train()
    measured = measure_speed(model, prompt_tokens=500, new_tokens=500, repeats=1)
    assert (measured.prefill.tokens, measured.decode.tokens) == (8, 8)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_prompt_is_the_same_for_the_same_seed():
    model, prompts = tiny_model("llama"), []
    assert decodes(model, 9)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: prompts.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    measure_speed(model, prompt_tokens=8, new_tokens=1, repeats=1, seed=4)
    measure_speed(model, prompt_tokens=8, new_tokens=1, repeats=1, seed=4)
    assert torch.equal(prompts[0], prompts[4])

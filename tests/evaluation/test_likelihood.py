"""Likelihood: against transformers' own loss, and against every way of cutting the pass into batches and pieces."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from strop.data.records import read_records
from strop.data.samples import prepare
from strop.data.templates import Sample
from strop.errors import DataError, ModelError
from strop.evaluation import scoring
from strop.evaluation.likelihood import Likelihood, likelihood, perplexity_of
from strop.evaluation.scoring import score
from strop.models import load
from tests.evaluation.common import random_samples
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_nll_and_perplexity_are_those_of_transformers_own_loss(family: str):
    model = tiny_model(family)
    samples = random_samples([7, 19, 12], answer=5) + random_samples([9], seed=3)
    measured = likelihood(model, samples, batch_size=4)
    total = 0.0
    for row, sample in enumerate(samples):
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels])).loss
        expected = float(loss) * sample.supervised
        assert float(measured.nll_sums[row]) == pytest.approx(expected, rel=2e-5)
        assert int(measured.tokens[row]) == sample.supervised
        total += expected
    tokens = sum(sample.supervised for sample in samples)
    assert measured.mean_nll == pytest.approx(total / tokens, rel=2e-5)
    assert measured.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_batches_and_pieces_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("llama").double()
    samples = random_samples([5, 31, 12, 12, 8, 20], answer=4)
    whole = likelihood(model, samples, batch_size=6)
    for batch_size, numbers in [(1, 2_000_000), (4, 1), (3, 304 * 3)]:
        monkeypatch.setattr(scoring, "PIECE_NUMBERS", numbers)
        parts = likelihood(model, samples, batch_size=batch_size)
        torch.testing.assert_close(parts.nll_sums, whole.nll_sums, rtol=1e-5, atol=1e-5)
        assert torch.equal(parts.tokens, whole.tokens)


def test_only_the_supervised_tokens_count():
    model = tiny_model("qwen3")
    ids = random_samples([10])[0].input_ids
    labels = [-100] * 10
    labels[4], labels[9] = ids[4], ids[9]
    measured = likelihood(model, [Sample(ids, labels)])
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
    assert int(measured.tokens[0]) == 2
    assert float(measured.nll_sums[0]) == pytest.approx(-float(log_p[3, ids[4]] + log_p[8, ids[9]]), rel=1e-5)


def test_a_model_that_cannot_leave_positions_out_scores_the_same():
    model, samples = tiny_model("llama"), random_samples([6, 14], answer=3)
    expected = likelihood(model, samples)
    whole = model.forward

    def forward(input_ids=None, attention_mask=None, use_cache=None):  # no logits_to_keep
        return whole(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model.forward = forward
    assert torch.allclose(likelihood(model, samples).nll_sums, expected.nll_sums, rtol=1e-6)


def test_the_model_is_left_in_its_mode_and_without_gradients():
    model, samples = tiny_model("llama"), random_samples([6])
    for training in (True, False):
        model.train(training)
        likelihood(model, samples)
        assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off_while_scoring():
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train()
    samples = random_samples([20])
    assert likelihood(model, samples).mean_nll == likelihood(model, samples).mean_nll


def test_rows_without_an_answer_are_named():
    samples = random_samples([6, 6, 6], answer=2)
    samples[1] = Sample(samples[1].input_ids, [-100] * 6)
    samples[2] = Sample(samples[2].input_ids, samples[2].input_ids[:1] + [-100] * 5)  # nothing predicts a first token
    with pytest.raises(DataError, match="rows 1, 2"):
        likelihood(tiny_model("llama"), samples)


def test_broken_weights_are_said_to_be_broken():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match="NaN or infinity"):
        likelihood(model, random_samples([6]))


def test_the_reporter_hears_of_every_row():
    told = []

    class Listener:
        def note(self, text): ...
        def start(self, title, total, unit): ...
        def advance(self, done, **fields):
            told.append(done)

        def finish(self): ...

    score(tiny_model("llama"), random_samples([4] * 7), [Likelihood(7)], batch_size=3, reporter=Listener())
    assert told == [3, 6, 7]


def test_a_loss_too_large_for_a_float_is_an_infinite_perplexity():
    assert perplexity_of(800.0) == math.inf
    assert perplexity_of(math.log(7)) == pytest.approx(7)


@pytest.mark.parametrize(("name", "published"), [("tinystories_4M_lowercase", 2.73), ("tinyshakespeare", 4.97)])
def test_a_real_model_has_about_the_loss_that_is_known_of_it(material: Path, name: str, published: float):
    opened = load(material / "models" / "stories260K")
    records = read_records(material / "data" / f"{name}.txt")
    chosen = records[:: len(records) // 8]
    samples = list(prepare(chosen, opened.require_tokenizer(), max_length=512))
    # The known figures are over whole files with other windows; eight pieces come close and tell the texts apart.
    assert likelihood(opened.model, samples).mean_nll == pytest.approx(published, abs=0.3)

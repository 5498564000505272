"""KL and agreement: against the formula worked by hand, zero for the same model, bounded on the disk."""

from __future__ import annotations

import pytest
import torch

from strop.errors import ModelError
from strop.evaluation.divergence import Divergence, ReferenceLogits, percentile_99
from strop.evaluation.scoring import score
from strop.scratch import Scratch
from tests.evaluation.common import random_samples
from tests.tiny import tiny_model


def diverge(reference, model, samples, *, scratch: Scratch | None = None, batch_size: int = 4) -> Divergence:
    with scratch or Scratch() as file:
        kept = ReferenceLogits(len(samples), file)
        score(reference, samples, [kept], batch_size=batch_size)
        measure = Divergence(kept, name="small", reference_name="large")
        score(model, samples, [measure], batch_size=batch_size)
    return measure


def by_hand(reference, model, samples) -> list[list[tuple[float, bool]]]:
    """Per sample and supervised token: sum p (log p - log q) in float64, and whether both choose the same."""
    result = []
    for sample in samples:
        with torch.no_grad():
            ids = torch.tensor([sample.input_ids])
            ours, theirs = model(input_ids=ids).logits[0].double(), reference(input_ids=ids).logits[0].double()
        p, q = torch.softmax(theirs, dim=-1), torch.softmax(ours, dim=-1)
        tokens = []
        for position, label in enumerate(sample.labels):
            if position and label != -100:
                kl = sum(
                    float(a) * (float(a.log()) - float(b.log()))
                    for a, b in zip(p[position - 1], q[position - 1], strict=True)
                )
                tokens.append((kl, int(ours[position - 1].argmax()) == int(theirs[position - 1].argmax())))
        result.append(tokens)
    return result


def nearby(family: str, *, spread: float, seed: int = 1):
    """The same tiny model with noise on its weights."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_kl_mean_percentile_and_agreement_are_those_worked_by_hand(family: str):
    reference, model = tiny_model(family), nearby(family, spread=0.01)
    samples = random_samples([30, 11, 18], answer=8) + random_samples([15], seed=5)
    measured = diverge(reference, model, samples)
    expected = by_hand(reference, model, samples)
    for row, tokens in enumerate(expected):
        assert int(measured.tokens[row]) == len(tokens)
        assert float(measured.kl_sums[row]) == pytest.approx(sum(kl for kl, _ in tokens), rel=1e-3, abs=1e-5)
        assert int(measured.agreements[row]) == sum(same for _, same in tokens)
    flat = sorted(kl for tokens in expected for kl, _ in tokens)
    assert measured.mean_kl == pytest.approx(sum(flat) / len(flat), rel=1e-3)
    assert measured.top1_agreement == pytest.approx(sum(same for row in expected for _, same in row) / len(flat))
    assert measured.top1_agreement < 1
    assert measured.kl_99th == pytest.approx(flat[-1], rel=1e-3)  # 38 tokens: 99% of them means all


def test_the_99th_percentile_is_the_smallest_value_that_99_of_100_stay_below():
    shuffled = torch.arange(1.0, 101.0)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    assert percentile_99(shuffled) == 99.0
    assert percentile_99(torch.arange(1.0, 201.0)) == 198.0
    assert percentile_99(torch.arange(1.0, 102.0)) == 100.0
    assert percentile_99(torch.tensor([3.0])) == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_against_itself_is_exactly_zero_in_its_own_dtype(dtype: torch.dtype):
    model = tiny_model("llama", dtype=dtype)
    measured = diverge(model, model, random_samples([20, 9, 14]))
    assert measured.mean_kl == 0.0
    assert measured.kl_99th == 0.0
    assert measured.top1_agreement == 1.0


def test_more_noise_diverges_more():
    samples = random_samples([24, 24])
    kls = [
        diverge(tiny_model("llama"), nearby("llama", spread=spread), samples).mean_kl for spread in (1e-4, 1e-3, 1e-2)
    ]
    assert 0 < kls[0] < kls[1] < kls[2]


def test_where_the_file_is_full_only_whole_rows_count_and_are_said():
    reference, model = tiny_model("llama"), nearby("llama", spread=0.01)
    samples = random_samples([20, 10, 30, 12])
    whole = diverge(reference, model, samples, batch_size=1)
    limit = (29 + 19) * 304 * 4 + 100  # the two longest, which come first, and a little
    part = diverge(reference, model, samples, scratch=Scratch(limit), batch_size=1)
    assert part.tokens.tolist() == [19, 0, 29, 0]
    assert part.kl_sums[[0, 2]].tolist() == whole.kl_sums[[0, 2]].tolist()
    assert part.kl_sums[[1, 3]].tolist() == [0, 0]
    assert len(part.token_kl) == 48


def test_a_row_cut_in_two_by_the_limit_does_not_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("strop.evaluation.scoring.PIECE_NUMBERS", 304 * 7)
    samples = random_samples([20, 10])
    part = diverge(tiny_model("llama"), nearby("llama", spread=0.01), samples, scratch=Scratch(304 * 4 * 22))
    assert part.tokens.tolist() == [19, 0]


def test_different_vocabularies_are_refused_by_both_names():
    reference, model = tiny_model("llama"), tiny_model("llama", vocab_size=320)
    with pytest.raises(ModelError, match=r"small predicts over 320 tokens, large over 304.*same vocabulary"):
        diverge(reference, model, random_samples([8]))


def test_other_tokens_than_the_references_are_refused():
    with Scratch() as file:
        kept = ReferenceLogits(2, file)
        score(tiny_model("llama"), random_samples([8, 8]), [kept])
        with pytest.raises(ModelError, match="other tokens"):
            score(tiny_model("llama"), random_samples([8, 8], seed=4), [Divergence(kept)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_scratch_returns_every_bit_and_stops_at_its_limit(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    first = (torch.randn(5, 3, generator=generator) * 100).abs().to(dtype)
    second = (torch.randn(4, 2, generator=generator) * 100).abs().to(dtype).t()  # not contiguous
    with Scratch(limit_bytes=first.nbytes + second.nbytes) as scratch:
        places = [scratch.put(first), scratch.put(second)]
        assert scratch.put(torch.zeros(1, dtype=dtype)) is None
        assert scratch.put(torch.zeros(0, 7, dtype=dtype)) is not None
        assert scratch.used_bytes == first.nbytes + second.nbytes
        for place, tensor in zip(places, (first, second), strict=True):
            assert place is not None
            assert torch.equal(scratch.get(place).view(torch.uint8), tensor.contiguous().view(torch.uint8))
            assert scratch.get(place).dtype == dtype

"""Rounded caches of keys and values: an oracle that rounds outside, bytes, generation, scoring, rows that move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from strop.data.templates import Sample
from strop.errors import ModelError, UsageError
from strop.evaluation.divergence import Divergence, ReferenceLogits
from strop.evaluation.generation import generate_answers
from strop.evaluation.kv_cache import STRIDE, KVFormat, RoundedLayer, kv_bytes_per_token, new_cache
from strop.evaluation.scoring import score
from strop.evaluation.speed import measure_speed
from strop.scratch import Scratch
from tests.tiny import FAMILIES, tiny_input, tiny_model, tiny_tokenizer

INT8, INT4 = KVFormat("int8"), KVFormat("int4")
FORMS = pytest.mark.parametrize("form", [INT8, INT4], ids=["int8", "int4"])


def rounded(x: Tensor, bits: int, dim: int, group: int) -> Tensor:
    """Groups along `dim` rounded to a grid from their smallest to their largest value, float16 scales; slow."""
    result = x.clone()
    for start in range(0, x.shape[dim], group):
        piece = x.narrow(dim, start, group)
        low = piece.amin(dim, keepdim=True).half().float()
        step = ((piece.amax(dim, keepdim=True) - piece.amin(dim, keepdim=True)) / (2**bits - 1)).half().float()
        codes = torch.round((piece - low) / step).clamp(0, 2**bits - 1)
        result.narrow(dim, start, group).copy_(codes * step + low)
    return result


def states(tokens: int, *, batch: int = 2, heads: int = 3, size: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, tokens, size, generator=generator)
    keys[..., 5] += 20  # a channel far from zero, as keys have
    return keys, torch.randn(batch, heads, tokens, size, generator=generator)


def oracle(keys: Tensor, values: Tensor, form: KVFormat, old: int) -> tuple[Tensor, Tensor]:
    """What attention must see: of int8 all tokens rounded, of int4 the first `old`."""
    if form.name == "int8":
        return rounded(keys, 8, 3, keys.shape[3]), rounded(values, 8, 3, values.shape[3])
    seen_keys = torch.cat([rounded(keys[:, :, :old], 4, 2, STRIDE), keys[:, :, old:]], 2)
    return seen_keys, torch.cat([rounded(values[:, :, :old], 4, 3, 32), values[:, :, old:]], 2)


@FORMS
def test_attention_sees_what_an_oracle_rounds_token_by_token(form: KVFormat) -> None:
    layer = RoundedLayer(form)
    keys, values = states(101)
    for end in range(1, 102):
        seen = layer.update(keys[:, :, end - 1 : end], values[:, :, end - 1 : end])
        if end in (1, 32, 63, 64, 65, 95, 96, 97, 101):
            expected = oracle(keys[:, :, :end], values[:, :, :end], form, max(0, (end - 1 - STRIDE) // STRIDE * STRIDE))
            for one, other in zip(seen, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert layer.get_seq_length() == 101


@FORMS
def test_strides_see_what_single_tokens_see(form: KVFormat) -> None:
    single, strided = RoundedLayer(form), RoundedLayer(form)
    keys, values = states(3 * STRIDE + 7)
    for start in range(0, keys.shape[2], STRIDE):
        part = slice(start, start + STRIDE)
        together = strided.update(keys[:, :, part], values[:, :, part])
        for place in range(start, min(start + STRIDE, keys.shape[2])):
            alone = single.update(keys[:, :, place : place + 1], values[:, :, place : place + 1])
            assert all(one[:, :, : place + 1].equal(other) for one, other in zip(together, alone, strict=True))


@FORMS
def test_rounding_four_bits_by_channel_spares_the_other_channels(form: KVFormat) -> None:
    keys, values = states(96, seed=3)
    layer = RoundedLayer(form)
    layer.update(keys, values)
    seen, _ = layer.update(keys[:, :, :1], values[:, :, :1])
    error = (seen[:, :, :32] - keys[:, :, :32])[..., :5].norm() / keys[:, :, :32, :5].norm()
    assert error < (0.05 if form is INT8 else 0.1)


@FORMS
def test_the_bytes_held_are_those_predicted(form: KVFormat) -> None:
    layer = RoundedLayer(form)
    keys, values = (x.half() for x in states(160))
    layer.update(keys, values)
    held = [layer.nbytes]
    for start in (0, 32):
        layer.update(keys[:, :, start : start + STRIDE], values[:, :, start : start + STRIDE])
        held.append(layer.nbytes)
    per_token = 2 * form.bytes_per_token(3, 64, 64)  # two rows
    unrounded = form.window * 2 * 3 * 2 * 64 * 2
    assert held == [int((tokens - form.window) * per_token + unrounded) for tokens in (160, 192, 224)]
    assert form.bytes_per_token(3, 64, 64) == 3 * (136 if form is INT8 else 80)  # 256 in float16


@FORMS
def test_rows_move_together_and_reset_forgets(form: KVFormat) -> None:
    keys, values = states(70, batch=3)
    more = states(1, batch=3, seed=9)
    layer, moved = RoundedLayer(form), RoundedLayer(form)
    layer.reorder_cache(torch.tensor([0]))  # nothing is held yet
    layer.update(keys, values)
    order = torch.tensor([2, 0, 0, 1])
    moved.update(keys[order], values[order])
    layer.reorder_cache(order)
    assert all(
        a.equal(b)
        for a, b in zip(layer.update(*(x[order] for x in more)), moved.update(*(x[order] for x in more)), strict=True)
    )
    layer.batch_select_indices(torch.tensor([1]))
    layer.batch_repeat_interleave(2)
    assert layer.update(more[0][:2], more[1][:2])[0].shape[0] == 2
    layer.reset()
    assert (layer.get_seq_length(), layer.nbytes) == (0, 0)
    fresh = RoundedLayer(form)
    assert all(a.equal(b) for a, b in zip(layer.update(keys, values), fresh.update(keys, values), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_cannot_be_rounded_is_an_error(value: float) -> None:
    keys, values = states(4)
    keys[0, 0, 0, 0] = value
    with pytest.raises(ModelError, match="no --kv-cache"):
        RoundedLayer(INT8).update(keys, values)


def test_an_unknown_cache_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'int9'.*int8 and int4"):
        KVFormat("int9")


# --- models


def samples(rows: int = 3, length: int = 90) -> list[Sample]:
    ids = tiny_input(rows=rows, length=length).tolist()
    return [Sample(row[: length - 9 * place], row[: length - 9 * place], index=place) for place, row in enumerate(ids)]


def kl(model: PreTrainedModel, form: KVFormat | None, *, batch_size: int = 2) -> float:
    with Scratch() as scratch:
        reference = ReferenceLogits(3, scratch)
        score(model, samples(), [reference], batch_size=batch_size)
        divergence = Divergence(reference)
        score(model, samples(), [divergence], batch_size=batch_size, kv_cache=form)
        return divergence.mean_kl


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_sees_rounded_keys_and_values_and_8_bits_cost_less_than_4(family: str, attention: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    with torch.inference_mode():
        eight, four = kl(model, INT8), kl(model, INT4)
    if family == "mixtral":  # one token whose router chooses another expert outweighs what rounding costs
        assert 0 < eight < 5e-3
        assert 0 < four < 0.05
        return
    assert 0 < eight < 1e-4
    assert eight < four < 0.05


@FORMS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scored_logits_are_those_of_writing_token_by_token(family: str, form: KVFormat) -> None:
    model = tiny_model(family)
    (row,) = samples(rows=1, length=75)
    written = []
    with torch.inference_mode():
        cache = new_cache(model, form)
        for token in row.input_ids:
            output = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            written.append(output.logits[0, -1])
    with Scratch() as scratch:
        reference = ReferenceLogits(1, scratch)

        class Taken:
            def add(self, piece: Any) -> None:
                expected = torch.stack(written[:-1])
                torch.testing.assert_close(piece.logits, expected, rtol=1e-3, atol=1e-3)

        score(model, [row], [Taken(), reference], kv_cache=form)


def test_a_windowed_layer_keeps_its_mask() -> None:
    model = tiny_model("mixtral", sliding_window=16)
    whole = tiny_model("mixtral")
    assert kl(model, INT8) < 5e-3
    ids = tiny_input(length=60)
    with torch.inference_mode():
        assert (model(ids).logits - whole(ids).logits).abs().max() > 0.05


def prompts(count: int = 4) -> list[list[int]]:
    return [row[: 40 + 7 * place] for place, row in enumerate(tiny_input(rows=count, length=80).tolist())]


@pytest.mark.parametrize("family", ["llama", "falcon", "gpt2"])
def test_greedy_answers_of_8_bits_are_mostly_those_of_full_precision(family: str) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    options: dict[str, Any] = {"stop_ids": [2], "max_new_tokens": 8}
    plain = generate_answers(model, tokenizer, prompts(), **options)
    same = generate_answers(model, tokenizer, prompts(), kv_cache=INT8, **options)
    assert sum(one == other for one, other in zip(plain, same, strict=True)) >= 3
    again = generate_answers(model, tokenizer, prompts(), kv_cache=INT8, batch_size=1, **options)
    assert sum(one == other for one, other in zip(again, same, strict=True)) >= 3  # padding does not matter


def test_generation_uses_the_cache_anew_for_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny_model("llama"), []

    def counting(*arguments: Any) -> Any:
        made.append(new_cache(*arguments))
        return made[-1]

    monkeypatch.setattr("strop.evaluation.by_transformers.new_cache", counting)
    generate_answers(model, tiny_tokenizer(), prompts(), stop_ids=[], max_new_tokens=70, batch_size=2, kv_cache=INT4)
    assert len(made) == 2
    assert [cache.get_seq_length() for cache in made] == [47 + 69, 61 + 69]
    assert all(layer.rounded == 64 for layer in made[0].layers)


def test_the_speed_is_that_of_the_rounded_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr("strop.evaluation.speed.new_cache", lambda *given: used.append(given[1]) or new_cache(*given))
    measure_speed(tiny_model("llama"), prompt_tokens=8, new_tokens=2, repeats=1, kv_cache=INT4)
    assert used == [INT4, INT4]


def test_bytes_per_token_are_counted_over_all_layers() -> None:
    model = tiny_model("llama")  # two layers, two heads of 16
    assert kv_bytes_per_token(model, None) == 2 * 2 * 2 * 16 * 4
    assert kv_bytes_per_token(model, INT8) == 2 * 2 * 2 * (16 + 4)
    assert kv_bytes_per_token(model, INT4) == 2 * 2 * (16 * (16 + 4) / 32 + 8 + 4)

"""Generation: the same words whatever the batch, settings said and not inherited, streams that add up."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from strop.data.templates import prompt_ids, stop_ids
from strop.errors import UsageError
from strop.evaluation.generation import context_length, generate_answers
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

QUESTIONS = ["what is the time", "wake me", "the lazy dog and the quick brown fox", "a", "set the alarm for six"]


def prompts() -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    return [prompt_ids([{"role": "user", "content": text}], tokenizer) for text in QUESTIONS]


def ask(model, asked: list[list[int]], **options) -> list[str]:
    tokenizer = tiny_tokenizer()
    return generate_answers(model, tokenizer, asked, stop_ids=stop_ids(tokenizer), max_new_tokens=8, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_one_forward_pass_per_token_whatever_the_batch(family: str):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    stops = stop_ids(tokenizer)
    expected = []
    for prompt in prompts():
        ids = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in stops:
                break
            ids.append(token)
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert ask(model, prompts(), batch_size=1) == expected
    assert ask(model, prompts(), batch_size=3) == expected


def test_settings_that_the_model_brings_along_do_not_apply_and_come_back():
    model = tiny_model("llama")
    expected = ask(model, prompts())
    brought = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[7],
        max_length=9,
    )
    model.generation_config = brought
    assert ask(model, prompts()) == expected
    assert model.generation_config is brought


def test_temperature_draws_by_its_seed_and_leaves_the_global_generator_alone():
    model = tiny_model("llama")
    torch.manual_seed(5)
    untouched = torch.rand(1)
    torch.manual_seed(5)
    first = ask(model, prompts(), temperature=1.5, seed=1)
    assert torch.rand(1) == untouched
    assert ask(model, prompts(), temperature=1.5, seed=1) == first
    assert ask(model, prompts(), temperature=1.5, seed=2) != first
    assert ask(model, prompts(), temperature=0.0, seed=1) == ask(model, prompts(), temperature=0.0, seed=2)


def test_an_answer_ends_before_its_stop_token():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompt = prompts()[0]
    with torch.no_grad():
        ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0].tolist()
    third = ids[len(prompt) + 2]
    written = generate_answers(model, tokenizer, [prompt], stop_ids=[third], max_new_tokens=8)
    first = ids[len(prompt) :].index(third)
    assert written == [tokenizer.decode(ids[len(prompt) : len(prompt) + first], skip_special_tokens=True)]


def test_streamed_pieces_add_up_to_the_answer_in_whole_characters():
    model = tiny_model("llama", seed=3)
    for temperature in (0.0, 2.0):
        pieces: list[str] = []
        (answer,) = ask(model, prompts()[:1], temperature=temperature, stream=pieces.append)
        assert "".join(pieces) == answer
        assert all(pieces)


def test_only_one_answer_can_be_streamed():
    with pytest.raises(UsageError, match="got 5 prompts"):
        ask(tiny_model("llama"), prompts(), stream=lambda piece: None)


def test_answers_stay_within_the_context_and_full_prompts_are_refused_together():
    model = tiny_model("gpt2", max_position_embeddings=40)
    assert context_length(model) == 40
    long = [5] * 39
    (answer,) = generate_answers(model, tiny_tokenizer(), [long], stop_ids=[], max_new_tokens=50)
    assert len(answer) >= 1
    with pytest.raises(UsageError, match=r"prompt 1 has 40 tokens.*context of 40.*prompt 2 has no token"):
        ask(model, [[5], [5] * 40, []])


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"batch_size": 0}])
def test_options_that_make_no_sense_are_refused(wrong: dict):
    with pytest.raises(UsageError, match="needed"):
        ask(tiny_model("llama"), prompts(), **wrong)


def test_progress_counts_every_prompt_once():
    done: list[int] = []
    ask(tiny_model("llama"), prompts(), batch_size=2, on_batch=done.append)
    assert done == [2, 4, 5]

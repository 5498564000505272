"""The loop of our own: the logits of a plain pass whatever happens to the slots, and the fallback where it cannot."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, MambaConfig, MistralConfig, PreTrainedModel

from strop.data.templates import prompt_ids, stop_ids
from strop.evaluation.by_transformers import write_batches
from strop.evaluation.decoding import MOST_READ, Decoder, decodes
from strop.evaluation.generation import context_length, generate_answers, stream_tokens
from strop.evaluation.writing import Manner, shared_length, write_texts
from strop.models import load
from tests.tiny import COMMON, FAMILIES, tiny_input, tiny_model, tiny_tokenizer

SIZE: dict[str, Any] = {"vocab_size": 304, "hidden_size": 64}


def plain_logits(model: PreTrainedModel, text: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]


def plain_answer(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    text = list(prompt)
    for _ in range(tokens):
        text.append(int(plain_logits(model, text).argmax()))
    return text[len(prompt) :]


def random_model(config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe"])
def test_the_loop_runs_every_family_of_blocks(family: str, attention: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    assert decodes(model, 200)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("shared", [0, 5])
def test_logits_are_those_of_a_plain_pass_while_texts_come_grow_and_go(family: str, shared: int) -> None:
    model, choice = tiny_model(family), random.Random(shared)
    beginning = tiny_input(rows=1, length=9, seed=9)[0].tolist()[:shared]
    decoder = Decoder(model, slots=3)
    if shared:
        decoder.share(beginning)
    texts: list[list[int]] = []
    for turn in range(90):
        free = 3 - len(texts)
        if free and (not texts or choice.random() < 0.2):
            new = [
                beginning + [choice.randrange(5, 304) for _ in range(choice.randrange(1, 12))]
                for _ in range(choice.randrange(1, free + 1))
            ]
            found = decoder.read(new)
            texts += new
            expected = [plain_logits(model, text) for text in new]
        else:
            tokens = [choice.randrange(5, 304) for _ in texts]
            found = decoder.write(torch.tensor(tokens))
            texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
            expected = [plain_logits(model, text) for text in texts]
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
        if len(texts) > 1 and choice.random() < 0.05 and turn < 60:
            row = choice.randrange(len(texts))
            decoder.drop(row)
            texts[row] = texts[-1]
            texts.pop()
        assert decoder.lengths == [len(text) for text in texts]
    assert max(decoder.lengths) > 64  # past the room that there is at first


@pytest.mark.parametrize(
    "config",
    [BloomConfig(n_layer=2, n_head=4, **SIZE), MambaConfig(num_hidden_layers=2, **SIZE)],
    ids=["positions from the mask", "states that are no keys"],
)
def test_a_model_that_the_loop_cannot_run_is_written_by_transformers(config: Any) -> None:
    model, tokenizer = random_model(config), tiny_tokenizer()
    assert not decodes(model, 10)
    prompts = tiny_input(rows=3, length=6).tolist()
    expected = [tokenizer.decode(plain_answer(model, prompt, 5), skip_special_tokens=True) for prompt in prompts]
    assert generate_answers(model, tokenizer, prompts, stop_ids=[], max_new_tokens=5, batch_size=2) == expected
    assert list(stream_tokens(model, prompts[0], stop_ids=[], max_new_tokens=5)) == plain_answer(model, prompts[0], 5)


def test_a_text_that_would_turn_those_beside_it_otherwise_is_written_by_transformers() -> None:
    """Beyond its length, LongRoPE takes other frequencies for all texts of a pass, which a few tokens do not show."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    model = random_model(LlamaConfig(**SIZE, **sizes, max_position_embeddings=64, rope_parameters=rope))
    assert decodes(model, 16)
    assert not decodes(model, 17)


def test_a_text_that_outgrows_a_window_is_written_by_transformers() -> None:
    model = random_model(MistralConfig(**(COMMON | SIZE), sliding_window=8))
    assert decodes(model, 7)
    assert not decodes(model, 8)
    prompt = tiny_input(rows=1, length=5)[0].tolist()
    for tokens in (2, 12):
        written = list(stream_tokens(model, prompt, stop_ids=[], max_new_tokens=tokens))
        assert written == plain_answer(model, prompt, tokens)


@pytest.mark.parametrize("ignored", ["position_ids", "attention_mask"])
def test_a_model_that_passes_over_what_it_is_told_is_found_out(ignored: str) -> None:
    model = tiny_model("llama")
    forward = model.forward

    def deaf(**given: Any) -> Any:
        return forward(**{name: value for name, value in given.items() if name != ignored})

    model.forward = deaf
    assert not decodes(model, 10)


def test_a_beginning_that_prompts_have_alike_is_read_once() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    beginning = tiny_input(rows=1, length=50)[0].tolist()
    prompts = [[*beginning, *rest] for rest in tiny_input(rows=6, length=3, seed=2).tolist()]
    assert decodes(model, 60)
    read: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, output: read.append(given[0].numel()))
    answers = generate_answers(model, tokenizer, prompts, stop_ids=[], max_new_tokens=2, batch_size=3)
    assert sum(read) == 50 + 6 * 3 + 6  # the beginning, the rests, and one token of each to go on from
    expected = [tokenizer.decode(plain_answer(model, prompt, 2), skip_special_tokens=True) for prompt in prompts]
    assert answers == expected


def test_many_prompts_of_many_lengths_are_read_in_parts() -> None:
    model = tiny_model("llama")
    prompts = [tiny_input(rows=1, length=3 + at, seed=at)[0].tolist() for at in range(2 * MOST_READ + 3)]
    expected = torch.stack([plain_logits(model, prompt) for prompt in prompts])
    rows: list[int] = []
    head = model.get_output_embeddings()
    assert head is not None
    head.register_forward_hook(lambda module, given, output: rows.append(output[..., 0].numel()))
    decoder = Decoder(model, slots=len(prompts))
    torch.testing.assert_close(decoder.read(prompts), expected, rtol=1e-4, atol=1e-4)
    assert max(rows) <= MOST_READ**2
    assert decoder.lengths == [len(prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2], [1, 2]], 1),
        ([[1, 2, 3], [1, 2]], 1),
        ([[5], [5, 6]], 0),
        ([[1, 9], [2, 9], [1, 9]], 0),
        ([[7, 7, 7, 1], [7, 7, 7, 7, 7], [7, 7, 7, 2, 2]], 3),
    ],
)
def test_what_is_alike_leaves_a_token_of_each(prompts: list[list[int]], length: int) -> None:
    assert shared_length(prompts) == length


def test_a_text_that_ends_makes_room_for_the_next() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = tiny_input(rows=16, length=4, seed=3).tolist()
    answers = [plain_answer(model, prompt, 40) for prompt in prompts]
    stop = max(range(304), key=lambda token: sum(token in answer for answer in answers))
    ends = [answer.index(stop) if stop in answer else 40 for answer in answers]
    assert min(ends) < 10 < 40 == max(ends)
    assert decodes(model, 50)
    passes: list[int] = []
    model.register_forward_hook(lambda module, given, output: passes.append(1))
    told: list[int] = []
    found = generate_answers(
        model, tokenizer, prompts, stop_ids=[stop], max_new_tokens=40, batch_size=4, on_batch=told.append
    )
    expected = [answer[:end] for answer, end in zip(answers, ends, strict=True)]
    assert found == [tokenizer.decode(answer, skip_special_tokens=True) for answer in expected]
    assert told[-1] == 16
    assert told == sorted(set(told))
    waiting_for_the_longest = sum(min(max(ends[start : start + 4]) + 1, 40) for start in range(0, 16, 4))
    assert len(passes) < waiting_for_the_longest


def test_drawn_answers_do_not_depend_on_the_batch() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = tiny_input(rows=7, length=5, seed=4).tolist()
    options: dict[str, Any] = {"stop_ids": stop_ids(tokenizer), "max_new_tokens": 9, "temperature": 1.5, "seed": 3}
    alone = generate_answers(model, tokenizer, prompts, batch_size=1, **options)
    assert len(set(alone)) > 1
    for size in (2, 3, 7):
        assert generate_answers(model, tokenizer, prompts, batch_size=size, **options) == alone


def test_an_iterator_that_is_closed_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama").train()
    stream = stream_tokens(model, [5, 6], stop_ids=[], max_new_tokens=20)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]  a generator
    assert model.training
    assert model(input_ids=tiny_input()).logits.requires_grad


def test_the_bundled_model_writes_token_for_token_what_transformers_writes() -> None:
    opened = load("demo")
    model, tokenizer = opened.model.float(), opened.require_tokenizer()
    asked = ["wake me at seven", "what is the time", "turn the lights off in the kitchen", "call anna", "stop"]
    system = {"role": "system", "content": "answer with the action that the request asks for and with nothing else"}
    prompts = [prompt_ids([system, {"role": "user", "content": text}], tokenizer) for text in asked]
    manner = Manner(tuple(stop_ids(tokenizer)), 24, context_length(model), batch_size=3)
    assert decodes(model, 100)
    assert shared_length(prompts) * (len(prompts) - 1) >= 64  # what they begin with is read once
    ours: dict[int, list[int]] = {}
    for step in write_texts(model, prompts, manner):
        for written in step:
            ours.setdefault(written.place, []).append(written.token)
    for batch in write_batches(model, prompts, manner, None, pad_id=0):
        for place, tokens in batch:
            assert ours[place] == tokens[: len(ours[place])]
            assert ours[place][-1] in manner.stop_ids or len(ours[place]) == 24

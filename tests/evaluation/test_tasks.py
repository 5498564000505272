"""Exact match by one pass: the same verdict as greedy generation, on random and on trained models."""

from __future__ import annotations

import pytest
import torch

from strop.data.records import Message, Record
from strop.data.samples import prepare
from strop.data.templates import Sample, prompt_ids, stop_ids
from strop.errors import DataError
from strop.evaluation.generation import generate_answers
from strop.evaluation.tasks import exact_match
from tests.evaluation.common import learned_by_heart
from tests.tiny import tiny_model, tiny_tokenizer


def chats(pairs: list[tuple[str, str]]) -> list[Record]:
    return [
        Record("rows", row, messages=(Message("user", question), Message("assistant", answer)))
        for row, (question, answer) in enumerate(pairs, start=1)
    ]


COLOURS = ["red", "green", "blue", "brown", "black", "white", "pink", "grey"]


@pytest.fixture(scope="module")
def learned() -> tuple[torch.nn.Module, list[Record], list[Sample]]:
    """A tiny model that learned the first half of eight rows by heart."""
    records = chats([(f"say {colour} {row}", f"{colour} {row}") for row, colour in enumerate(COLOURS)])
    samples = list(prepare(records, tiny_tokenizer(), max_length=64))
    return learned_by_heart(samples[:4]), records, samples


def test_exact_match_is_what_greedy_generation_would_write_on_a_model_that_learned_half(learned):
    model, records, samples = learned
    tokenizer = tiny_tokenizer()
    right = exact_match(model, samples, batch_size=3)
    prompts = [prompt_ids(record.messages[:1], tokenizer) for record in records]
    answers = generate_answers(model, tokenizer, prompts, stop_ids=stop_ids(tokenizer), max_new_tokens=24, batch_size=3)
    assert right.tolist() == [
        answer == record.messages[1].content for answer, record in zip(answers, records, strict=True)
    ]
    assert right[:4].all()
    assert not right[4:].all()


def test_exact_match_is_what_greedy_generation_would_write_on_random_models():
    tokenizer = tiny_tokenizer()
    stops = stop_ids(tokenizer)
    for seed in range(3):
        model = tiny_model("llama", seed=seed)
        prompts = [prompt_ids([{"role": "user", "content": f"{colour} {seed}"}], tokenizer) for colour in COLOURS]
        samples, expected = [], []
        for row, prompt in enumerate(prompts):
            with torch.no_grad():
                output = model.generate(
                    input_ids=torch.tensor([prompt]),
                    max_new_tokens=6,
                    do_sample=False,
                    eos_token_id=stops,
                    pad_token_id=0,
                )
            written = output[0, len(prompt) :].tolist()
            if row % 2:  # one token off: at the first, a middle or the last place
                place = (row // 2) % len(written)
                written[place] = 5 + (written[place] - 4) % 200
            samples.append(Sample(prompt + written, [-100] * len(prompt) + written, index=row))
            expected.append(row % 2 == 0)
        assert exact_match(model, samples, batch_size=4).tolist() == expected


def test_an_answer_that_does_not_stop_is_wrong(learned):
    model, _, samples = learned
    tokenizer, first = tiny_tokenizer(), samples[0]
    assert exact_match(model, [first]).tolist() == [True]
    end = first.answers[0][1]
    assert first.input_ids[end - 1] in stop_ids(tokenizer)
    other = [*first.input_ids[: end - 1], tokenizer.eos_token_id]
    assert exact_match(model, [Sample(other, [*first.labels[: end - 1], other[-1]])]).tolist() == [False]


def test_a_row_without_an_answer_is_refused():
    with pytest.raises(DataError, match="rows 0"):
        exact_match(tiny_model("llama"), [Sample([5, 6, 7], [-100, -100, -100])])

"""Answers in words, many at once, with the settings said here and no others.

A model folder can bring sampling settings along (temperature, repetition penalty, forced tokens). They do not apply
here: temperature 0 is plain greedy decoding, so that what is measured is the model. An answer ends at the first stop
token, which is not part of its text.

Models that `decoding` can run are written with its loop: a text that ends makes room for the next prompt, and what all
prompts begin with is read once. For the others, and with a rounded cache, transformers' own generation does the work,
a batch after the other. Greedy answers are the same either way, but for what rounding swaps in 16 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strop.errors import UsageError
from strop.evaluation import by_transformers
from strop.evaluation.decoding import decodes
from strop.evaluation.few_rows import few_rows
from strop.evaluation.flow import TextFlow
from strop.evaluation.kv_cache import KVFormat
from strop.evaluation.steps import in_steps
from strop.evaluation.writing import Manner, evaluating, write_texts

Stream = Callable[[str], object]
"""Called with each piece of an answer as it comes."""


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that the model's positions reach; None where its configuration names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int = 256,
    batch_size: int = 16,
    kv_cache: KVFormat | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stream: Stream | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> list[str]:
    """Answer every prompt.

    Args:
        model: A causal language model.
        tokenizer: Turns the answer's tokens into text, without special tokens.
        prompts: Token ids of each prompt, at least one each.
        stop_ids: Tokens that end an answer.
        max_new_tokens: Longest answer in tokens, its stop token included; shortened to what the context leaves.
        batch_size: Prompts answered at once. Prompts of similar length share a batch.
        kv_cache: How the cache of keys and values is rounded; None leaves it in full precision.
        temperature: 0 takes the likeliest token always; above 0, tokens are drawn from softmax(logits / temperature).
        seed: Of the drawing.
        stream: Called with each new piece of text; one prompt only.
        on_batch: Called with the number of prompts answered so far.

    Returns:
        The answers in the prompts' order.

    Raises:
        UsageError: A prompt is empty or fills the model's context, or the options contradict each other.
    """
    if temperature < 0 or max_new_tokens < 1 or batch_size < 1:
        raise UsageError(
            f"temperature {temperature:g}, max_new_tokens {max_new_tokens}, batch_size {batch_size}: needed a "
            "temperature of 0 or above and at least 1 of the others"
        )
    if stream is not None and len(prompts) != 1:
        raise UsageError(f"only one answer can be streamed at a time; got {len(prompts)} prompts")
    _check_lengths(model, prompts)
    manner = Manner(tuple(stop_ids), max_new_tokens, context_length(model), batch_size, temperature, seed=seed)
    answers = [""] * len(prompts)
    done = 0
    if stream is not None:
        with contextlib.closing(_one_text(model, prompts[0], manner, kv_cache)) as tokens:
            answers[0] = _streamed(tokenizer, tokens, stop_ids, stream)
        if on_batch is not None:
            on_batch(1)
        return answers
    with contextlib.closing(_texts(model, prompts, manner, kv_cache, _pad_id(tokenizer))) as turns:
        for ended in turns:
            for place, tokens in ended:
                answers[place] = _text(tokenizer, _until_stop(tokens, stop_ids))
            done += len(ended)
            if on_batch is not None:
                on_batch(done)
    return answers


def stream_tokens(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Answer one prompt token by token; a stop token ends the answer and is handed out last.

    Closing the iterator ends it. One at a time: the model is in evaluation mode meanwhile, and where transformers
    writes, it does so in a thread of its own with the process's seed.

    Args:
        model: A causal language model.
        prompt: Its token ids.
        stop_ids: Tokens that end an answer.
        max_new_tokens: The most new tokens; shortened to what the context leaves.
        temperature: 0 takes the likeliest token always.
        top_p: Draw from the likeliest tokens that hold this share of the probability together.
        seed: Of the drawing.

    Raises:
        UsageError: The prompt is empty or fills the context, or an option makes no sense.
    """
    if temperature < 0 or max_new_tokens < 1 or not 0 < top_p <= 1:
        raise UsageError(
            f"temperature {temperature:g}, max_new_tokens {max_new_tokens}, top_p {top_p:g}: needed a temperature of "
            "0 or above, at least 1 token, and a share above 0 and at most 1"
        )
    _check_lengths(model, [prompt])
    limit = context_length(model)
    manner = Manner(tuple(stop_ids), max_new_tokens, limit, 1, temperature, top_p=top_p, seed=seed)
    yield from _one_text(model, prompt, manner, None)


def _texts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    manner: Manner,
    kv_cache: KVFormat | None,
    pad_id: int,
) -> Generator[list[tuple[int, list[int]]]]:
    """The new tokens of the prompts that ended since the last time, each with its prompt's place."""
    with evaluating(model), few_rows(model), in_steps(model):
        if not _lean(model, prompts, manner, kv_cache):
            yield from by_transformers.write_batches(model, prompts, manner, kv_cache, pad_id)
            return
        found: list[list[int]] = [[] for _ in prompts]
        for step in write_texts(model, prompts, manner):
            for written in step:
                found[written.place].append(written.token)
            if ended := [(written.place, found[written.place]) for written in step if written.ends]:
                yield ended


def _one_text(
    model: PreTrainedModel, prompt: Sequence[int], manner: Manner, kv_cache: KVFormat | None
) -> Generator[int]:
    """The new tokens of one prompt as they come."""
    with evaluating(model), few_rows(model), in_steps(model):
        if not _lean(model, [prompt], manner, kv_cache):
            yield from by_transformers.stream_one(model, prompt, manner, kv_cache)
            return
        for step in write_texts(model, [prompt], manner):
            yield from (written.token for written in step)


def _lean(model: PreTrainedModel, prompts: Sequence[Sequence[int]], manner: Manner, kv_cache: KVFormat | None) -> bool:
    """Whether our own loop writes these."""
    longest = max((len(prompt) + manner.room(len(prompt)) for prompt in prompts), default=0)
    return kv_cache is None and decodes(model, longest)


def _streamed(
    tokenizer: PreTrainedTokenizerBase, tokens: Iterator[int], stop_ids: Sequence[int], stream: Stream
) -> str:
    """Hand text on as soon as it is sure, and return the whole."""
    flow, found = TextFlow(tokenizer), []
    for token in tokens:
        if token in stop_ids:
            break
        found.append(token)
        if piece := flow.add(token):
            stream(piece)
    if piece := flow.end():
        stream(piece)
    return _text(tokenizer, found)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill up with; it is masked, so any will do."""
    known = tokenizer.pad_token_id
    return known if isinstance(known, int) else 0


def _check_lengths(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
    limit = context_length(model)
    problems = []
    for index, prompt in enumerate(prompts):
        if not prompt:
            problems.append(f"prompt {index} has no token")
        elif limit is not None and len(prompt) >= limit:
            problems.append(f"prompt {index} has {len(prompt)} tokens, and the model's context of {limit} leaves none")
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise UsageError(f"cannot answer: {shown}; shorten these prompts or leave them out")


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    stops = set(stop_ids)
    end = next((index for index, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


def _text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)

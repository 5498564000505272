"""Answers in words: transformers' own generation, batched, with the settings said here and no others.

A model folder can bring sampling settings along (temperature, repetition penalty, forced tokens). They do not apply
here: temperature 0 is plain greedy decoding, so that what is measured is the model. Prompts of different lengths are
padded on the left, and an answer ends at the first stop token, which is not part of its text.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from strop.errors import UsageError
from strop.evaluation.kv_cache import KVFormat, new_cache

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
    pad_id = _pad_id(tokenizer)
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with _plain_settings(model), torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            streamer = _Streamer(tokenizer, stop_ids, stream) if stream is not None else None
            new = _generate(
                model,
                [prompts[index] for index in chosen],
                settings=_settings(model, max_new_tokens, temperature, stop_ids, pad_id, prompts[chosen[-1]]),
                pad_id=pad_id,
                kv_cache=kv_cache,
                streamer=streamer,
            )
            for index, tokens in zip(chosen, new, strict=True):
                answers[index] = _text(tokenizer, _until_stop(tokens.tolist(), stop_ids))
            if on_batch is not None:
                on_batch(start + len(chosen))
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

    The model writes in a thread of its own; closing the iterator ends it. One at a time: the seed is the process's.

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
    written: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
    ended = threading.Event()

    def write() -> None:
        try:
            with _plain_settings(model), torch.inference_mode(), torch.random.fork_rng():
                torch.manual_seed(seed)
                _generate(
                    model,
                    [prompt],
                    settings=_settings(model, max_new_tokens, temperature, stop_ids, 0, prompt, top_p=top_p),
                    pad_id=0,
                    kv_cache=None,
                    streamer=_TokenQueue(written),
                    ended=ended,
                )
            written.put(None)
        except BaseException as error:  # handed to the thread that reads
            written.put(error)

    thread = threading.Thread(target=write, name="strop-generate", daemon=True)
    thread.start()
    try:
        while (token := written.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            yield token
    finally:
        ended.set()
        thread.join()


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


def _settings(
    model: PreTrainedModel,
    max_new_tokens: int,
    temperature: float,
    stop_ids: Sequence[int],
    pad_id: int,
    longest_prompt: Sequence[int],
    *,
    top_p: float = 1.0,
) -> GenerationConfig:
    limit = context_length(model)
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(longest_prompt))
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
    return GenerationConfig(
        max_new_tokens=room,
        num_beams=1,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        **(drawn if temperature > 0 else {"do_sample": False}),
    )


@contextlib.contextmanager
def _plain_settings(model: PreTrainedModel) -> Iterator[None]:
    """Put the settings that the model's folder brought along aside, and evaluation mode on, for the block."""
    brought, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = brought
        model.train(training)


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    settings: GenerationConfig,
    pad_id: int,
    kv_cache: KVFormat | None,
    streamer: BaseStreamer | None,
    ended: threading.Event | None = None,
) -> Tensor:
    """New tokens of each prompt [prompts, at most max_new_tokens]."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad_id)
    mask = torch.zeros((len(prompts), length), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    generating: Any = model  # the mixin's signature is not one that a type checker follows
    output = generating.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=settings,
        past_key_values=None if kv_cache is None else new_cache(model, kv_cache),
        streamer=streamer,
        stopping_criteria=None if ended is None else [_Ended(ended)],
    )
    return output[:, length:].cpu()


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    stops = set(stop_ids)
    end = next((index for index, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


def _text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)


class _Streamer(BaseStreamer):
    """Hands on text as soon as it is sure: bytes that do not make a character yet wait for the rest of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], stream: Stream) -> None:
        self._tokenizer, self._stop_ids, self._stream = tokenizer, stop_ids, stream
        self._tokens: list[int] = []
        self._told = ""
        self._prompt_passed = False

    def put(self, value: Tensor) -> None:
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        self._tokens += value.flatten().tolist()
        text = _text(self._tokenizer, _until_stop(self._tokens, self._stop_ids))
        if not text.endswith("\ufffd"):
            self._tell(text)

    def end(self) -> None:
        self._tell(_text(self._tokenizer, _until_stop(self._tokens, self._stop_ids)))

    def _tell(self, text: str) -> None:
        if text.startswith(self._told) and len(text) > len(self._told):
            self._stream(text[len(self._told) :])
            self._told = text


class _TokenQueue(BaseStreamer):
    """Hands on the tokens themselves."""

    def __init__(self, written: queue.SimpleQueue[int | BaseException | None]) -> None:
        self._written, self._prompt_passed = written, False

    def put(self, value: Tensor) -> None:
        if self._prompt_passed:
            for token in value.flatten().tolist():
                self._written.put(token)
        self._prompt_passed = True

    def end(self) -> None:
        """Nothing is held back."""


class _Ended(StoppingCriteria):
    """Ends generation when nobody reads any more."""

    def __init__(self, ended: threading.Event) -> None:
        self._ended = ended

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._ended.is_set(), device=input_ids.device)

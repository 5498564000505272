"""Answers by transformers' own generation: for models and caches that our own loop does not run.

Prompts of similar length share a batch, padded on the left, and a batch lasts as long as its longest answer. Drawing
uses the process's generator, which is set to the seed and put back.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from strop.evaluation.kv_cache import KVFormat, new_cache
from strop.evaluation.writing import Manner


def write_batches(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    manner: Manner,
    kv_cache: KVFormat | None,
    pad_id: int,
) -> Iterator[list[tuple[int, list[int]]]]:
    """The new tokens of each prompt with its place, a batch after the other.

    Args:
        model: A causal language model in evaluation mode.
        prompts: Token ids.
        manner: How to write.
        kv_cache: How the cache is rounded; None leaves it in full precision.
        pad_id: What prompts are filled up with; it is masked, and stands after the end of an answer.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    state: Tensor | None = None
    for start in range(0, len(order), manner.batch_size):
        chosen = order[start : start + manner.batch_size]
        with _plain_settings(model), torch.inference_mode(), torch.random.fork_rng():
            if state is None:
                torch.manual_seed(manner.seed)
            else:
                torch.set_rng_state(state)
            new = _generate(
                model,
                [prompts[index] for index in chosen],
                settings=_settings(manner, pad_id, prompts[chosen[-1]]),
                pad_id=pad_id,
                kv_cache=kv_cache,
                streamer=None,
            )
            state = torch.get_rng_state()
        yield [(index, tokens.tolist()) for index, tokens in zip(chosen, new, strict=True)]


def stream_one(
    model: PreTrainedModel, prompt: Sequence[int], manner: Manner, kv_cache: KVFormat | None
) -> Iterator[int]:
    """The new tokens of one prompt as they come, written in a thread of its own."""
    written: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
    ended = threading.Event()

    def write() -> None:
        try:
            with _plain_settings(model), torch.inference_mode(), torch.random.fork_rng():
                torch.manual_seed(manner.seed)
                _generate(
                    model,
                    [prompt],
                    settings=_settings(manner, 0, prompt),
                    pad_id=0,
                    kv_cache=kv_cache,
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


def _settings(manner: Manner, pad_id: int, longest_prompt: Sequence[int]) -> GenerationConfig:
    drawn: dict[str, Any] = {"do_sample": True, "temperature": manner.temperature, "top_k": 0, "top_p": manner.top_p}
    return GenerationConfig(
        max_new_tokens=manner.room(len(longest_prompt)),
        num_beams=1,
        eos_token_id=list(manner.stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        **(drawn if manner.temperature > 0 else {"do_sample": False}),
    )


@contextlib.contextmanager
def _plain_settings(model: PreTrainedModel) -> Iterator[None]:
    """Put the settings that the model's folder brought along aside for the block."""
    brought = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = brought


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

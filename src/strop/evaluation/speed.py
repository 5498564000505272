"""Tokens per second: reading a prompt (prefill) and writing greedily, one sequence, the way that answers are written:
by the loop of `decoding`, or through transformers' own cache or a rounded one where that loop does not run.

Prefill is one forward pass over `prompt_tokens` random tokens with the last position's logits; decoding feeds one
token at a time, each the likeliest after the one before, until `new_tokens` are written. Both are run once to warm up
and then `repeats` times; the median is given with the slowest and the fastest run beside it. It is wall-clock time on
this machine as it is loaded now: rates of one run compare, rates of two days do not. Neither tokenization nor
generation's own bookkeeping counts.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from strop.evaluation.decoding import Decoder, decodes
from strop.evaluation.few_rows import few_rows
from strop.evaluation.generation import context_length
from strop.evaluation.kv_cache import KVFormat, new_cache
from strop.evaluation.probes import settle
from strop.evaluation.steps import in_steps


@dataclass(frozen=True)
class Rate:
    """Tokens per second over several runs.

    Attributes:
        median: The middle run.
        slowest: The slowest run.
        fastest: The fastest run.
        tokens: Tokens in each run.
        repeats: Runs that counted.
    """

    median: float
    slowest: float
    fastest: float
    tokens: int
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Speed:
    """Both rates of one model, in tokens per second."""

    prefill: Rate
    decode: Rate

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure_speed(
    model: PreTrainedModel,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 3,
    kv_cache: KVFormat | None = None,
    seed: int = 0,
) -> Speed:
    """Time reading and writing with one sequence.

    Args:
        model: A causal language model.
        prompt_tokens: Tokens to read; shortened, with `new_tokens`, to half of the model's context.
        new_tokens: Tokens to write.
        repeats: Runs that count, after one that does not.
        kv_cache: How the cache of keys and values is rounded; None leaves it in full precision.
        seed: Of the random prompt.

    Returns:
        The rates. The decoding rate leaves the prefill out.
    """
    limit = context_length(model)
    if limit is not None:
        prompt_tokens, new_tokens = min(prompt_tokens, limit // 2), min(new_tokens, limit // 2)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(model.config.get_text_config().vocab_size)
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(model.device)
    one_logit = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    training = model.training
    model.eval()

    def begin() -> Any:
        decoder = Decoder(model, 1)
        return decoder, decoder.read(prompt.tolist())

    def go_on(begun: Any) -> None:
        decoder, logits = begun
        for _ in range(new_tokens):
            logits = decoder.write(logits.argmax(dim=-1))
        settle(model.device)

    def read_by_transformers() -> Any:
        cache = {} if kv_cache is None else {"past_key_values": new_cache(model, kv_cache)}
        return model(input_ids=prompt, use_cache=True, **one_logit, **cache)

    def write_by_transformers(output: Any) -> None:
        for _ in range(new_tokens):
            token: Tensor = output.logits[:, -1:].argmax(dim=-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        settle(model.device)

    try:
        with torch.inference_mode(), few_rows(model), in_steps(model):
            prefill, decode = [], []
            if kv_cache is None and decodes(model, prompt_tokens + new_tokens):
                read, write = begin, go_on
            else:
                read, write = read_by_transformers, write_by_transformers
            for run in range(repeats + 1):
                seconds, output = _timed(model, read)
                writing, _ = _timed(model, lambda output=output: write(output))
                if run:
                    prefill.append(prompt_tokens / seconds)
                    decode.append(new_tokens / writing)
    finally:
        model.train(training)
    return Speed(_rate(prefill, prompt_tokens), _rate(decode, new_tokens))


def _rate(rates: list[float], tokens: int) -> Rate:
    return Rate(statistics.median(rates), min(rates), max(rates), tokens, len(rates))


def _timed(model: PreTrainedModel, work: Callable[[], Any]) -> tuple[float, Any]:
    settle(model.device)
    start = time.perf_counter()
    result = work()
    settle(model.device)
    return time.perf_counter() - start, result

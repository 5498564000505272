"""What runs a model: transformers for folders and hub ids, llama.cpp for GGUF files, behind the same few calls.

`open_engine` takes a path and chooses by its ending; everything that asks for answers, scores or speed takes an
`Engine` and need not know which it is.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from strop.data.batches import eval_batches
from strop.data.templates import IGNORED, Sample, stop_ids
from strop.errors import DataError, UsageError
from strop.evaluation.flow import TextFlow
from strop.evaluation.generation import Stream, context_length, generate_answers, stream_tokens
from strop.evaluation.kv_cache import KVFormat, kv_bytes_per_token
from strop.evaluation.scoring import PIECE_NUMBERS, Measure, Piece, score
from strop.evaluation.speed import Rate, Speed, measure_speed
from strop.files.gguf import is_gguf
from strop.models import OpenedModel, load
from strop.runtime.llama_cpp import GgufModel


class Engine(Protocol):
    """A model that is open and can be asked."""

    @property
    def source(self) -> str:
        """Where it came from."""
        ...

    @property
    def format(self) -> str:
        """The number format of its weights, or their dtype."""
        ...

    @property
    def network(self) -> PreTrainedModel | None:
        """Transformers' model, where there is one whose weights can be looked at."""
        ...

    @property
    def context(self) -> int | None:
        """Tokens that fit, prompt and answer together; None where no limit is named."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know of how it was opened."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Transformers' tokenizer, or one with the same names; None without one."""
        ...

    def require_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ModelError: there is none.
        """
        ...

    def stop_ids(self, chat_template: str | Path | None = None) -> list[int]:
        """Tokens at which an answer ends."""
        ...

    def answers(
        self,
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
        """Answer every prompt; see `generate_answers`."""
        ...

    def stream(
        self,
        prompt: Sequence[int],
        *,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Answer one prompt token by token; see `stream_tokens`."""
        ...

    def score(
        self,
        samples: Sequence[Sample],
        measures: Sequence[Measure],
        *,
        batch_size: int = 8,
        kv_cache: KVFormat | None = None,
    ) -> None:
        """Hand every measure the logits of all supervised tokens; see `strop.evaluation.scoring`."""
        ...

    def speed(self, kv_cache: KVFormat | None = None) -> Speed:
        """Time reading and writing."""
        ...

    def cache_bytes(self, kv_cache: KVFormat | None) -> float:
        """Bytes that a token takes in the cache of keys and values."""
        ...


def open_engine(path: str | os.PathLike[str], *, device: str = "cpu") -> Engine:
    """Open a GGUF file in llama.cpp, or anything that `strop.load` opens in transformers.

    Raises:
        UsageError: llama-cpp-python is not installed, or a GGUF file is to run on another device than the CPU.
        As `strop.load` and `GgufModel.open`.
    """
    if not is_gguf(path):
        return FolderEngine(load(path, device=device))
    if device != "cpu":
        raise UsageError(f"{path}: GGUF files run on the CPU here, not on {device!r}; leave the device out")
    return GgufEngine(GgufModel.open(path))


def as_engine(model: str | os.PathLike[str] | OpenedModel | GgufModel | Engine, *, device: str = "cpu") -> Engine:
    """The engine of a model that is open already, or of a path."""
    if isinstance(model, str | os.PathLike):
        return open_engine(model, device=device)
    if isinstance(model, OpenedModel):
        return FolderEngine(model)
    return GgufEngine(model) if isinstance(model, GgufModel) else model


class FolderEngine:
    """transformers, over what `strop.load` opens."""

    def __init__(self, opened: OpenedModel) -> None:
        self._opened = opened
        self.source, self.network, self.tokenizer = opened.source, opened.model, opened.tokenizer
        self.notes: Sequence[str] = [*opened.notes, *(f"warning: {warning}" for warning in opened.warnings)]
        self.context = context_length(opened.model)
        self.format = f"{opened.format} + lora r{opened.adapter.rank}" if opened.adapter else opened.format

    def require_tokenizer(self) -> Any:
        """As `OpenedModel.require_tokenizer`."""
        return self._opened.require_tokenizer()

    def stop_ids(self, chat_template: str | Path | None = None) -> list[int]:
        """The end token, and those that the chat template closes an answer with."""
        return stop_ids(self.require_tokenizer(), chat_template=chat_template)

    def answers(self, prompts: Sequence[Sequence[int]], *, stop_ids: Sequence[int], **options: Any) -> list[str]:
        """As `generate_answers`."""
        return generate_answers(self.network, self.require_tokenizer(), prompts, stop_ids=stop_ids, **options)

    def stream(self, prompt: Sequence[int], **options: Any) -> Iterator[int]:
        """As `stream_tokens`."""
        return stream_tokens(self.network, prompt, **options)

    def score(self, samples: Sequence[Sample], measures: Sequence[Measure], **options: Any) -> None:
        """As `strop.evaluation.scoring.score`."""
        score(self.network, samples, measures, **options)

    def speed(self, kv_cache: KVFormat | None = None) -> Speed:
        """As `measure_speed`."""
        return measure_speed(self.network, kv_cache=kv_cache)

    def cache_bytes(self, kv_cache: KVFormat | None) -> float:
        """As `kv_bytes_per_token`."""
        return kv_bytes_per_token(self.network, kv_cache)


class GgufEngine:
    """llama.cpp, over an open GGUF file. Prompts are answered one after another; the cache is kept in float32."""

    network = None
    notes: Sequence[str] = ()

    def __init__(self, model: GgufModel) -> None:
        self.model, self.tokenizer = model, model.tokenizer
        self.source, self.format, self.context = str(model.path), model.format, model.context

    def require_tokenizer(self) -> Any:
        """The file's own."""
        return self.model.tokenizer

    def stop_ids(self, chat_template: str | Path | None = None) -> list[int]:
        """Where the runtime itself stops, and where the chat template closes an answer."""
        return list(dict.fromkeys([*stop_ids(self.model.tokenizer, chat_template=chat_template), *self.model.stop_ids]))

    def answers(
        self,
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
        """Answer one prompt after another; all lengths are checked first.

        Raises:
            UsageError: A rounded cache is asked for, a prompt does not fit, an option makes no sense.
        """
        _refuse_rounded(kv_cache)
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size}: needed at least 1")
        if stream is not None and len(prompts) != 1:
            raise UsageError(f"only one answer can be streamed at a time; got {len(prompts)} prompts")
        long = [f"prompt {at} has {len(ids)} tokens" for at, ids in enumerate(prompts) if len(ids) >= self.context]
        if long:
            raise UsageError(
                f"cannot answer: {'; '.join(long[:10])}, and the context of {self.context} leaves none; shorten these "
                "prompts or leave them out"
            )
        stops, found = set(stop_ids), []
        for done, prompt in enumerate(prompts, start=1):
            flow, pieces = TextFlow(self.model.tokenizer), []
            for token in self.stream(
                prompt, stop_ids=stop_ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            ):
                if token in stops:
                    break
                pieces.append(flow.add(token))
                if stream is not None and pieces[-1]:
                    stream(pieces[-1])
            pieces.append(flow.end())
            if stream is not None and pieces[-1]:
                stream(pieces[-1])
            found.append("".join(pieces))
            if on_batch is not None:
                on_batch(done)
        return found

    def stream(
        self,
        prompt: Sequence[int],
        *,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """As `GgufModel.stream`."""
        return self.model.stream(
            prompt, max_tokens=max_new_tokens, stop_ids=stop_ids, temperature=temperature, top_p=top_p, seed=seed
        )

    def score(
        self,
        samples: Sequence[Sample],
        measures: Sequence[Measure],
        *,
        batch_size: int = 8,
        kv_cache: KVFormat | None = None,
    ) -> None:
        """Pieces in the same order and of the same sizes as `strop.evaluation.scoring.score` gives them."""
        _refuse_rounded(kv_cache)
        for batch in eval_batches(samples, batch_size):
            for piece in self._pieces(samples, [places[0] for places in batch.rows]):
                for measure in measures:
                    measure.add(piece)

    def _pieces(self, samples: Sequence[Sample], rows: Sequence[int]) -> Iterator[Piece]:
        size = max(1, PIECE_NUMBERS // self.model.vocabulary)
        held: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for row in rows:
            sample, at = samples[row], 0
            wanted = [place - 1 for place in range(1, len(sample)) if sample.labels[place] != IGNORED]
            if not wanted:
                raise DataError(f"row {row} has no token to score")
            targets = torch.tensor([sample.labels[place + 1] for place in wanted])
            for logits in self.model.logit_pieces(sample.input_ids, wanted):
                found = torch.from_numpy(logits)
                held.append((found, targets[at : at + len(found)], torch.full((len(found),), row)))
                at += len(found)
                while sum(len(part[0]) for part in held) >= size:
                    piece, held = _cut(held, size)
                    yield piece
        if held:
            yield _cut(held, size)[0]

    def speed(self, kv_cache: KVFormat | None = None, *, prompt_tokens: int = 128, new_tokens: int = 32) -> Speed:
        """Time reading and writing one sequence, as `measure_speed` does: the median of three runs after one."""
        _refuse_rounded(kv_cache)
        prompt_tokens, new_tokens = min(prompt_tokens, self.context // 2), min(new_tokens, self.context // 2)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(self.model.vocabulary, (prompt_tokens,), generator=generator).tolist()
        reading, writing = [], []
        for run in range(4):
            start = read = time.perf_counter()
            for count, _ in enumerate(self.model.stream(prompt, max_tokens=new_tokens + 1, stop_ids=[])):
                if not count:
                    read = time.perf_counter()
            if run:
                reading.append(prompt_tokens / (read - start))
                writing.append(new_tokens / (time.perf_counter() - read))
        rates = [
            Rate(statistics.median(found), min(found), max(found), tokens, len(found))
            for found, tokens in ((reading, prompt_tokens), (writing, new_tokens))
        ]
        return Speed(*rates)

    def cache_bytes(self, kv_cache: KVFormat | None) -> float:
        """Bytes that a token takes in the cache, kept in float32."""
        _refuse_rounded(kv_cache)
        return self.model.cache_bytes_per_token


def _cut(held: Sequence[tuple[torch.Tensor, ...]], size: int) -> tuple[Piece, list[Any]]:
    """The first `size` tokens of what is held as a piece, and the rest."""
    whole = [torch.cat(parts) for parts in zip(*held, strict=True)]
    rest = [part[size:] for part in whole]
    return Piece(*(part[:size] for part in whole)), [tuple(rest)] if len(rest[0]) else []


def _refuse_rounded(kv_cache: KVFormat | None) -> None:
    if kv_cache is not None:
        raise UsageError(
            f"--kv-cache {kv_cache.name} rounds the cache of models that transformers runs; a GGUF file's is kept in "
            "float32 here, so leave it out"
        )

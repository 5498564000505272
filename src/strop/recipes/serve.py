"""What `strop serve` answers with: one open model, asked by several at once, one answer being written at a time.

A GGUF file runs in llama.cpp, anything else in transformers. Conversations are written with the model's chat template
in the same sandbox, and end at the same tokens, as in `chat`; without a temperature an answer is greedy, the one that
was compared and proved. Nothing is kept of a request. The web is `strop.app.server`'s part.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from strop.data.records import Message
from strop.data.templates import prompt_ids
from strop.errors import StropError, UsageError
from strop.evaluation.engines import Engine
from strop.evaluation.flow import TextFlow

MOST_WAITING: Final = 16
"""Requests that may wait for their turn; the next is told to come again."""

Finish = Literal["stop", "length"]


class BusyError(StropError):
    """Too many requests are waiting."""


class TooLongError(UsageError):
    """A prompt fills the model's context."""


class StoppedError(StropError):
    """The server is stopping."""


@dataclass(frozen=True)
class Wish:
    """How an answer is to be written.

    Attributes:
        max_tokens: the most new tokens; None for what the context leaves.
        temperature: 0 takes the likeliest token always.
        top_p: draw from the likeliest tokens that hold this share of the probability together.
        seed: of the drawing.
        stop: texts that end the answer and are no part of it.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A piece of an answer: new text, the tokens written so far, and why it ended, where it did."""

    text: str
    tokens: int
    finish: Finish | None = None


class Service:
    """A model that answers requests.

    Args:
        engine: the open model.
        name: what it is called.
        chat_template: for models that have none.
    """

    def __init__(self, engine: Engine, name: str, *, chat_template: str | Path | None = None) -> None:
        self.engine, self.name = engine, name
        self._template = chat_template
        self._tokenizer: Any = engine.require_tokenizer()
        self._stops = engine.stop_ids(chat_template)
        self._turn = threading.Lock()
        self._count = threading.Lock()
        self._waiting = 0
        self._stopping = threading.Event()

    @property
    def has_template(self) -> bool:
        """Whether conversations can be answered."""
        return bool(self._template or self._tokenizer.chat_template)

    def chat_prompt(self, turns: Sequence[Message]) -> list[int]:
        """Tokens of a conversation that asks for an answer.

        Raises:
            DataError: there is no chat template, or it refuses the turns.
            TooLongError: it fills the context.
        """
        return self._fitting(prompt_ids(turns, self._tokenizer, chat_template=self._template))

    def text_prompt(self, text: str | Sequence[int]) -> list[int]:
        """Tokens of a text to go on from; tokens are taken as they are.

        Raises:
            UsageError: there is no token.
            TooLongError: it fills the context.
        """
        return self._fitting(list(self._tokenizer(text)["input_ids"]) if isinstance(text, str) else list(text))

    def _fitting(self, ids: list[int]) -> list[int]:
        if not ids:
            raise UsageError("the prompt has no token; write something to go on from")
        known = len(self._tokenizer)
        if wrong := [token for token in ids if not 0 <= token < known]:
            raise UsageError(f"the prompt holds token {wrong[0]}; this model has {known} tokens, from 0 on")
        limit = self.engine.context
        if limit is not None and len(ids) >= limit:
            raise TooLongError(
                f"the prompt has {len(ids)} tokens and this model's context {limit}, which leaves none for an answer; "
                "shorten it"
            )
        return ids

    def parts(self, prompt: Sequence[int], wish: Wish, *, goes_on: bool = False) -> Iterator[Part]:
        """Write an answer; closing the iterator ends it. The last part says why it ended.

        Args:
            prompt: what `chat_prompt` or `text_prompt` gave.
            wish: how.
            goes_on: the answer is the same text going on, so that a space in front of its first word is kept.

        Raises:
            BusyError: too many are waiting; at once, before the iterator is asked for anything.
        """
        with self._count:
            if self._waiting >= MOST_WAITING:
                raise BusyError(f"{self._waiting} requests are waiting already; come again in a moment")
            self._waiting += 1
        return _Parts(self._written(prompt, wish, after=prompt if goes_on else ()), self._leave)

    def _leave(self) -> None:
        with self._count:
            self._waiting -= 1

    def _written(self, prompt: Sequence[int], wish: Wish, *, after: Sequence[int]) -> Iterator[Part]:
        with self._turn:
            yield from self._in_turn(prompt, wish, after)

    def _in_turn(self, prompt: Sequence[int], wish: Wish, after: Sequence[int]) -> Iterator[Part]:
        limit = self.engine.context
        room = wish.max_tokens or (1 << 20) if limit is None else min(wish.max_tokens or limit, limit - len(prompt))
        flow, count, finish = TextFlow(self._tokenizer, stop=wish.stop, after=after), 0, "length"
        stream = self.engine.stream(
            prompt,
            stop_ids=self._stops,
            max_new_tokens=room,
            temperature=wish.temperature,
            top_p=wish.top_p,
            seed=wish.seed,
        )
        try:
            for token in stream:
                if self._stopping.is_set():
                    raise StoppedError("the server is stopping")
                if token in self._stops:
                    finish = "stop"
                    break
                count += 1
                if text := flow.add(token):
                    yield Part(text, count)
                if flow.stopped:
                    finish = "stop"
                    break
        finally:
            closing: Any = stream
            closing.close()
        yield Part(flow.end(), count, "stop" if flow.stopped else finish)

    def stop(self) -> None:
        """End the answers that are being written, and write no other."""
        self._stopping.set()


class _Parts(Iterator[Part]):
    """Parts of an answer that leave the queue once, however they end: read to the end, closed, or never asked for."""

    def __init__(self, parts: Iterator[Part], leave: Callable[[], object]) -> None:
        self._parts: Any = parts
        self._leave: Callable[[], object] | None = leave

    def __next__(self) -> Part:
        try:
            return next(self._parts)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the answer."""
        self._parts.close()
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()

    def __del__(self) -> None:
        self.close()


def check_address(host: str, token: str | None) -> bool:
    """Whether an address is this machine's own alone; a public one needs a token.

    Raises:
        UsageError: it is public and there is no token.
    """
    own = is_loopback(host)
    if not own and not token:
        raise UsageError(
            f"--host {host} can be reached from other machines, and without a token anybody there can use the model; "
            "set one in the environment (STROP_API_KEY) or with --api-key, or leave --host out"
        )
    return own


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine and is reached from nowhere else."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

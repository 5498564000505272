"""The loop that writes many texts with a `Decoder`: which prompt goes in when, and which token comes next."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from strop.evaluation.choosing import choose_tokens, text_generator
from strop.evaluation.decoding import Decoder

_WORTH_SHARING = 64
"""Tokens that a shared beginning must save: to read it is a pass of its own."""


@dataclass(frozen=True)
class Manner:
    """How answers are written.

    Attributes:
        stop_ids: Tokens that end an answer.
        max_new_tokens: The longest answer, its stop token included.
        context: Tokens that the model's positions reach; None where there is no limit.
        batch_size: Texts written at once.
        temperature: 0 takes the likeliest token.
        top_p: Share of the probability that is drawn from.
        seed: Of the drawing.
    """

    stop_ids: tuple[int, ...]
    max_new_tokens: int
    context: int | None
    batch_size: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def room(self, prompt_tokens: int) -> int:
        """The most tokens that can follow a prompt of this length."""
        return self.max_new_tokens if self.context is None else min(self.max_new_tokens, self.context - prompt_tokens)


@dataclass(frozen=True)
class Written:
    """A new token of the prompt at `place`; `ends` with the last."""

    place: int
    token: int
    ends: bool


@dataclass
class _Text:
    """A text that is being written."""

    place: int
    left: int
    generator: torch.Generator


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode for the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def write_texts(model: PreTrainedModel, prompts: Sequence[Sequence[int]], manner: Manner) -> Iterator[list[Written]]:
    """Answer prompts, the shortest first; each turn hands out one new token for some or all of those being written.

    A free slot is not filled at once: reading a prompt is a pass of its own, so prompts wait until a quarter of the
    slots is free. Greedy texts and drawn ones depend on neither the batch nor the order, but for what rounding does.

    Args:
        model: A causal language model in evaluation mode that `decodes`.
        prompts: Token ids, at least one each, shorter than the context.
        manner: How to write.
    """
    if not prompts:
        return
    slots = min(manner.batch_size, len(prompts))
    waiting = deque(sorted(range(len(prompts)), key=lambda place: len(prompts[place])))
    decoder, texts, stops = Decoder(model, slots), list[_Text](), frozenset(manner.stop_ids)
    if (alike := shared_length(prompts)) * (len(prompts) - 1) >= _WORTH_SHARING:
        decoder.share(prompts[0][:alike])

    def next_tokens(logits: Tensor, among: Sequence[_Text]) -> Tensor:
        generators = [text.generator for text in among]
        return choose_tokens(logits, generators, temperature=manner.temperature, top_p=manner.top_p)

    tokens: list[int] = []  # the last of each text
    while waiting or texts:
        free = slots - len(texts)
        if waiting and 4 * free >= slots:
            taken = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            new = [
                _Text(place, manner.room(len(prompts[place])), text_generator(manner.seed, place)) for place in taken
            ]
            logits = decoder.read([prompts[place] for place in taken])
            told, texts = new, [*texts, *new]
            fresh = next_tokens(logits, new).tolist()
            tokens += fresh
        else:
            logits = decoder.write(torch.tensor(tokens, device=model.device))
            told = texts
            fresh = tokens = next_tokens(logits, texts).tolist()
        written = []
        for text, token in zip(told, fresh, strict=True):
            text.left -= 1
            written.append(Written(text.place, token, token in stops or text.left == 0))
        ended = {each.place for each in written if each.ends}
        for row in reversed(range(len(texts))):
            if texts[row].place in ended:
                decoder.drop(row)
                last, token = texts.pop(), tokens.pop()
                if row < len(texts):
                    texts[row], tokens[row] = last, token
        yield written


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with alike, leaving at least one of each."""
    lists = [list(prompt) for prompt in prompts]
    first, last = min(lists), max(lists)  # in order of their tokens, the two that differ soonest
    most = min(len(prompt) for prompt in prompts) - 1
    return next((at for at in range(most) if first[at] != last[at]), most)

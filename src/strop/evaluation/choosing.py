"""The next token of each text from its logits: the likeliest, or one that is drawn.

Each text draws with a generator of its own, made of the seed and the text's place: what it draws does not depend on
the texts beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_APART = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: multiples of it lie far apart modulo 2^63."""


def text_generator(seed: int, place: int) -> torch.Generator:
    """What the text at `place` draws with; place 0 has the seed itself."""
    return torch.Generator().manual_seed((seed + _APART * place) % 2**63)


def choose_tokens(
    logits: Tensor, generators: Sequence[torch.Generator], *, temperature: float = 0.0, top_p: float = 1.0
) -> Tensor:
    """A token for each row.

    Args:
        logits: [rows, vocabulary], any float dtype; computed with in float32.
        generators: One for each row, on the CPU; none is used at temperature 0.
        temperature: 0 takes the likeliest token (the first of equals); above, tokens are drawn from
            softmax(logits / temperature).
        top_p: Draw from the likeliest tokens that hold this share of the probability together, the one that reaches
            it included.

    Returns:
        Tokens [rows], int64.
    """
    logits = logits.float()
    if temperature <= 0:
        return logits.argmax(dim=-1)
    chances = torch.softmax(logits / temperature, dim=-1)
    order = None
    if top_p < 1:
        chances, order = chances.sort(dim=-1, descending=True, stable=True)
        chances = chances.masked_fill(chances.cumsum(dim=-1) - chances >= top_p, 0)
    ends = chances.cumsum(dim=-1, dtype=torch.float64)
    draws = torch.cat([torch.rand(1, generator=each, dtype=torch.float64) for each in generators]).to(ends.device)
    # The first token whose end lies above the draw; one without a chance ends where the one before it does.
    places = torch.searchsorted(ends, draws[:, None] * ends[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    return (places if order is None else order.gather(-1, places))[:, 0]

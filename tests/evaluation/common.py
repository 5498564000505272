"""Samples that the evaluation tests share."""

from __future__ import annotations

import torch

from strop.data.templates import Sample
from tests.tiny import tiny_tokenizer


def random_samples(lengths: list[int], *, answer: int | None = None, seed: int = 0) -> list[Sample]:
    """Random token ids; all but the first token supervised, or only the last `answer` of them."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index, length in enumerate(lengths):
        ids = torch.randint(5, len(tiny_tokenizer()), (length,), generator=generator).tolist()
        start = 1 if answer is None else length - answer
        samples.append(Sample(ids, [-100] * start + ids[start:], index=index, answers=((start, length),)))
    return samples

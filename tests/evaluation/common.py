"""Samples and a model that learned some of them by heart, shared by the tests of evaluation and its recipes."""

from __future__ import annotations

import torch
from torch import nn

from strop.data.batches import padded_batch
from strop.data.templates import Sample
from tests.tiny import tiny_model, tiny_tokenizer


def random_samples(lengths: list[int], *, answer: int | None = None, seed: int = 0) -> list[Sample]:
    """Random token ids; all but the first token supervised, or only the last `answer` of them."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index, length in enumerate(lengths):
        ids = torch.randint(5, len(tiny_tokenizer()), (length,), generator=generator).tolist()
        start = 1 if answer is None else length - answer
        samples.append(Sample(ids, [-100] * start + ids[start:], index=index, answers=((start, length),)))
    return samples


def learned_by_heart(samples: list[Sample], *, steps: int = 50) -> nn.Module:
    """A tiny Llama that answers these samples exactly, and hardly any others."""
    torch.set_num_threads(1)
    batch = padded_batch(samples, range(len(samples)), pad_id=0)
    model = tiny_model("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        model(**batch.inputs(), labels=batch.labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()

"""Held-out rows in training: how often they are looked at, and their loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import nn

from strop.data.batches import BatchStream, eval_batches
from strop.data.templates import Sample
from strop.precision import autocast
from strop.training.losses import Head
from strop.training.objective import Objective
from strop.training.shapes import at_common_width, positions_of

EVALUATIONS: Final = 10
"""Evaluations of a run where no number of steps is asked for, if they cost little beside the training."""


def evaluation_interval(total_steps: int, stream: BatchStream, samples: Sequence[Sample]) -> int:
    """Steps between evaluations so that all of them cost at most about a tenth of the run."""
    train_tokens = total_steps / stream.steps_per_epoch * sum(stream.lengths)
    valid_tokens = sum(len(sample) for sample in samples)
    times = 0.1 * train_tokens / (valid_tokens / 3)  # a forward pass costs a third of a training step
    return math.ceil(total_steps / max(1, min(EVALUATIONS, int(times))))


@torch.no_grad()
def mean_losses(
    model: nn.Module,
    samples: Sequence[Sample],
    objective: Objective,
    *,
    batch_size: int,
    pad_id: int,
    head: Head | None,
    compute_dtype: torch.dtype,
) -> dict[str, float]:
    """Mean nats per supervised token over the rows, without dropout; the model is left in the mode of training.

    Returns `valid_loss`, which is what `objective` minimises; beside a teacher also `valid_label_loss` and
    `valid_divergence`.

    Args:
        model: A causal language model on its device.
        samples: The rows.
        objective: What the run minimises.
        batch_size: Rows computed at once.
        pad_id: Any valid token id.
        head: The model's pieces from `find_head`.
        compute_dtype: Of the products.
    """
    device, limit = next(model.parameters()).device, positions_of(model)
    sums: dict[str, float] = {}
    tokens = 0
    model.eval()
    try:
        for batch in eval_batches(samples, batch_size, pad_id=pad_id):
            with autocast(device, compute_dtype):
                found = objective.measured(model, at_common_width(batch, limit=limit), head=head)
            sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
            tokens += batch.supervised_tokens
    finally:
        model.train()
    return {f"valid_{name}": value / tokens for name, value in sums.items()}

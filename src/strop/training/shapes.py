"""Batches brought to a few widths, so that a CPU's kernels are made once and used again.

oneDNN compiles a kernel for every shape of product that it meets and keeps a thousand of them. Rows of ragged lengths
give a new shape at every step: memory grows by hundreds of megabytes over a run, and compiling takes time. Widths are
therefore rounded up to a sixteenth of their power of two (at least to a multiple of 8), which costs at most one token
in sixteen. The added places are padding like any other: masked, without labels, no part of any sum.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from strop.data.batches import Batch
from strop.data.templates import IGNORED

SMALLEST_STEP = 8


def round_up(count: int, *, smallest_step: int = SMALLEST_STEP) -> int:
    """The next of the few sizes at or above `count`: at most a sixteenth larger, or the next multiple of the step.

    >>> [round_up(count) for count in (1, 8, 9, 100, 129, 700, 1000)]
    [8, 8, 16, 104, 136, 704, 1024]
    """
    step = max(smallest_step, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


def common_width(width: int, *, limit: int | None) -> int:
    """The width at which a batch of `width` tokens is trained: one of the few, where the model has positions for it.

    Args:
        width: Tokens of the longest row.
        limit: The model's positions; None where there is no limit.
    """
    wanted = round_up(width)
    return wanted if limit is None else min(wanted, max(limit, width))


def at_common_width(batch: Batch, *, limit: int | None) -> Batch:
    """The same batch, padded on the right to one of the few widths, where the model has positions for it.

    Args:
        batch: [B, T].
        limit: The model's positions; None where there is no limit.
    """
    width = batch.input_ids.shape[1]
    added = common_width(width, limit=limit) - width
    if added == 0:
        return batch

    def padded(tensor: Tensor | None, value: int) -> Tensor | None:
        return None if tensor is None else functional.pad(tensor, (0, added), value=value)

    return replace(
        batch,
        input_ids=functional.pad(batch.input_ids, (0, added)),
        labels=functional.pad(batch.labels, (0, added), value=IGNORED),
        documents=padded(batch.documents, -1),
        position_ids=padded(batch.position_ids, 0),
    )


def positions_of(model: Any) -> int | None:
    """The positions that a model, or its configuration, has; None where it names no limit."""
    config = model if hasattr(model, "get_text_config") else getattr(model, "config", None)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    return limit if isinstance(limit, int) and limit > 0 else None

"""What calibrating block by block needs in memory, before it begins, and how to stay within a budget.

    always           embeddings, final norm and head in float32
    one block        its weights, what they become (dequantized; experts once more, in one tensor), and what the method
                     works with
    one batch        tokens x (12 hidden + 4 widest + 2 vocabulary) float32: activations of a block, logits at the end
    hidden states    2 models x all tokens x hidden float32: in memory as far as the budget goes, else on the disk;
                     up to half of that budget goes to `replay`

Where scales are trained end to end afterwards, the quantized model is there in place of the block, what stays dense in
float32, with 28 bytes for each scale that is trained (factor, gradient, two moments, and copies), one of its blocks
dense, a batch's hidden states between its blocks, and a chunk of logits.

The batch is made smaller before anything is refused. The figures are upper estimates by these terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from strop.calibrate.block import HESSIAN_BYTES
from strop.data.templates import Sample
from strop.errors import UsageError
from strop.layers.base import linear_shape
from strop.layers.quant_experts import expert_weights
from strop.layers.surgery import linear_modules
from strop.models.blocks import BlockwiseModel
from strop.numerics.scheme import Scheme

BATCH_SIZES: Final = (8, 4, 2, 1)
OWN_BYTES: Final = 24 << 20
"""The interpreter's and torch's own: code pages touched, pools, small tensors."""

DIVERGENCE_TENSORS: Final = 6
"""Of a chunk's logits, those that their divergence and its gradient hold at a time; 5 where nothing caps logits."""

CHUNK_LOGITS: Final = 2**24
"""As `strop.training.losses` has it."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a budget is spent.

    Attributes:
        batch_size: Rows of a batch.
        least_bytes: Needed with all hidden states on the disk.
        hidden_bytes: Of hidden states that may stay in memory; None: all.
    """

    batch_size: int
    least_bytes: int
    hidden_bytes: int | None


def plan_memory(
    model: BlockwiseModel,
    samples: Sequence[Sample],
    *,
    max_memory: int | None,
    hessian: bool,
    trains: bool,
    whole: Mapping[str, Sequence[Scheme]] | None = None,
) -> MemoryPlan:
    """Choose the batch size and where hidden states go.

    Args:
        model: The model.
        samples: All rows.
        max_memory: The budget in bytes; None: none.
        hessian: Whether the method needs second moments.
        trains: Whether the method runs gradients through a block.
        whole: Where the scales of the whole model are trained afterwards: layer or expert to what it may become; the
            others stay dense.

    Raises:
        UsageError: the budget is below what is needed at a batch size of 1; the message says how much would do.
    """
    experts = list(expert_weights(model.model).values())
    linears = {name: linear_shape(module) for name, module in linear_modules(model.model).items()}
    shapes = [*linears.values(), *(weights.shape for weights in experts)]
    widest = max((max(shape) for shape in shapes), default=0)
    inputs = max((columns for _, columns in shapes), default=0)
    largest = max((rows * columns for rows, columns in shapes), default=0)
    config = model.model.config.get_text_config()
    hidden, vocabulary = int(config.hidden_size), int(config.vocab_size)
    block = max(model.block_bytes(name) for name in model.blocks)
    longest = max((len(sample) for sample in samples), default=0)
    fixed = OWN_BYTES + model.outside_bytes + block * (8 if trains else 2) + 4 * 4 * largest
    fixed += 4 * 6 * inputs * inputs if hessian else 0  # moments, their drift, factors
    if experts:
        fixed += max(model.block_bytes(name) for name in model.blocks) + (HESSIAN_BYTES if hessian else 0)
    held = 0
    if whole is not None:
        known = linears | {name: weights.shape for weights in experts for name in weights.names}
        dense = sum(model.block_bytes(name) for name in model.blocks)
        dense += sum(_packed(known[name], own, trained=name in linears) for name, own in whole.items() if own)
        held = dense + OWN_BYTES + 2 * model.outside_bytes + 3 * block
    need = 0
    for size in BATCH_SIZES:
        tokens = size * longest
        need = fixed + 4 * tokens * ((40 if trains else 12) * hidden + (12 if trains else 4) * widest + 2 * vocabulary)
        if whole is not None:
            logits = DIVERGENCE_TENSORS * min(tokens * vocabulary, CHUNK_LOGITS)
            need = max(need, held + 4 * (tokens * ((40 + len(model.blocks)) * hidden + 12 * widest) + logits))
        if max_memory is None:
            return MemoryPlan(size, need, None)
        if need <= max_memory:
            return MemoryPlan(size, need, max_memory - need)
    what = "one block" if whole is None else "the quantized model, whose scales are trained (--scale-steps),"
    raise UsageError(
        f"max-memory: {_megabytes(max_memory or 0)} are given, and {_megabytes(need)} are needed for {what} and one "
        f"row of {longest} tokens; allow that much, or shorten the rows (--max-length)"
    )


def _packed(shape: tuple[int, int], schemes: Sequence[Scheme], *, trained: bool) -> int:
    """Most bytes that a weight takes in one of the formats, with what trains its scales, less those in float32."""
    weights = math.prod(shape)
    return max(
        math.ceil(scheme.bits_per_weight(shape) / 8 * weights)
        + (28 * math.prod(scheme.scale_shape(shape)) if trained and scheme.has_real_scales else 0)
        - 4 * weights
        for scheme in schemes
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"

"""What calibrating block by block needs in memory, before it begins, and how to stay within a budget.

    always           embeddings, final norm and head in float32
    one block        its weights, what they become (dequantized; experts once more, in one tensor), and what the method
                     works with
    one batch        tokens x (12 hidden + 4 widest + 2 vocabulary) float32: activations of a block, logits at the end
    hidden states    2 models x all tokens x hidden float32: in memory as far as the budget goes, else on the disk;
                     up to half of that budget goes to `replay`

The batch is made smaller before anything is refused. The figures are upper estimates by these terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from strop.calibrate.block import HESSIAN_BYTES
from strop.data.templates import Sample
from strop.errors import UsageError
from strop.layers.base import linear_shape
from strop.layers.quant_experts import expert_weights
from strop.layers.surgery import linear_modules
from strop.models.blocks import BlockwiseModel

BATCH_SIZES: Final = (8, 4, 2, 1)
OWN_BYTES: Final = 24 << 20
"""The interpreter's and torch's own: code pages touched, pools, small tensors."""


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
) -> MemoryPlan:
    """Choose the batch size and where hidden states go.

    Args:
        model: The model.
        samples: All rows.
        max_memory: The budget in bytes; None: none.
        hessian: Whether the method needs second moments.
        trains: Whether the method runs gradients through a block.

    Raises:
        UsageError: the budget is below what is needed at a batch size of 1; the message says how much would do.
    """
    experts = list(expert_weights(model.model).values())
    shapes = [linear_shape(module) for module in linear_modules(model.model).values()]
    shapes += [weights.shape for weights in experts]
    widest = max((max(shape) for shape in shapes), default=0)
    inputs = max((columns for _, columns in shapes), default=0)
    largest = max((rows * columns for rows, columns in shapes), default=0)
    config = model.model.config.get_text_config()
    hidden, vocabulary = int(config.hidden_size), int(config.vocab_size)
    block = max(model.block_bytes(name) for name in model.blocks)
    longest = max((len(sample) for sample in samples), default=0)
    fixed = OWN_BYTES + model.outside_bytes + block * (8 if trains else 2) + 4 * 4 * largest
    fixed += 4 * 4 * inputs * inputs if hessian else 0
    if experts:
        fixed += max(model.block_bytes(name) for name in model.blocks) + (HESSIAN_BYTES if hessian else 0)
    need = 0
    for size in BATCH_SIZES:
        tokens = size * longest
        need = fixed + 4 * tokens * ((40 if trains else 12) * hidden + (12 if trains else 4) * widest + 2 * vocabulary)
        if max_memory is None:
            return MemoryPlan(size, need, None)
        if need <= max_memory:
            return MemoryPlan(size, need, max_memory - need)
    raise UsageError(
        f"max-memory: {_megabytes(max_memory or 0)} are given, and {_megabytes(need)} are needed for one block and one "
        f"row of {longest} tokens; allow that much, or shorten the rows (--max-length)"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"

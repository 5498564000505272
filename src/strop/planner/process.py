"""What a process on a CPU holds beside the tensors of a step. On an accelerator none of it counts: its own memory is
what is planned there, and its allocator's rounding is left out.

| part | bytes |
|---|---|
| session | `SESSION_BYTES`: tokenizer, the rows' tables, Python's objects of an open model |
| products | `PRODUCT_BYTES` for every shape of product in bf16: oneDNN compiles it, and keeps `PRODUCTS_KEPT` |
| allocator | `POOLED_SHARE` of activations and logits (with adapters `ADAPTERS_POOLED_SHARE`): freed, but kept |
| trial | 4 a trained parameter, where the run begins with steps that are undone: the weights to return to |

A batch of another width, or of another number of rows, has products of other shapes. A linear layer has one product
in the forward pass and one for each gradient that it gives: of its input, and of its weight where that is trained.
Plain attention has two, and two more in the backward pass: the gradients of the scores and of the queries are
products of the same shapes and layouts as the two. A block in one piece multiplies with the adapters of four stacks of
layers (queries, keys and values together; what attention ends in; gate and up; the last), and its attention has one
more in the backward pass: 291 products were compiled in a run of the bundled model where 252 are counted here. An
evaluation has the forward ones. What glibc keeps are pieces that do not fit what comes next, of tensors below 32 MiB:
larger ones are mapped one by one and given back at once, and so are all within `strop.memory.steady_allocation`.

Measured on an AMD EPYC (avx512_bf16), torch 2.13, one thread: 96 products of 4 layers at 8 widths hold 56.9 MB in bf16,
2.6 MB in fp32. The shares are fitted to runs of the bundled model (full and lora, bf16 and fp32, 4 and 16 rows), whose
peaks were then foreseen to 0.83 to 1.19 of the measured ones. They are the least certain figure here: which pieces fit
depends on the order of the widths, and runs of another small model were foreseen to 0.65 and 0.77.
"""

from __future__ import annotations

from typing import Final

from strop.planner.activations import Attention
from strop.planner.parameters import LinearShape, ModelShape

SESSION_BYTES: Final = 10 * 10**6
PRODUCT_BYTES: Final = 600_000
PRODUCTS_KEPT: Final = 1024
POOLED_SHARE: Final = 0.25
ADAPTERS_POOLED_SHARE: Final = 0.55
LARGEST_POOLED_BYTES: Final = 32 << 20


def products_bytes(
    shape: ModelShape,
    adapted: tuple[LinearShape, ...],
    *,
    rank: int,
    trained: bool,
    attention: Attention,
    shapes: int,
    eval_shapes: int,
) -> int:
    """Return the bytes of the compiled products of a run in bf16.

    Args:
        shape: the model.
        adapted: the layers that carry adapters.
        rank: of the adapters.
        trained: whether the linear layers' own weights are trained.
        attention: how attention is computed.
        shapes: how many shapes of batches are trained on.
        eval_shapes: how many shapes of batches are evaluated.
    """
    layers = {(linear.in_features, linear.out_features) for linear in shape.linears}
    layers |= {expert.shape[1:] for expert in shape.experts}
    layers.add((shape.hidden_size, shape.vocabulary))
    halves = {(linear.in_features, rank) for linear in adapted} | {(rank, linear.out_features) for linear in adapted}
    forward, backward = len(layers), (1 + trained) * len(layers)
    if attention == "block":
        stacks = 4 if adapted else 0
        forward += 2 * stacks + 2
        backward += 4 * stacks + 1
    else:
        plain = 2 if attention == "plain" else 0
        forward += len(halves) + plain
        backward += 2 * len(halves) + plain
    return PRODUCT_BYTES * min(shapes * (forward + backward) + eval_shapes * forward, PRODUCTS_KEPT)


def pooled_bytes(total_bytes: int, largest_bytes: int, *, adapters: bool) -> int:
    """Return what the allocator holds on top of `total_bytes` in tensors of up to `largest_bytes`."""
    share = ADAPTERS_POOLED_SHARE if adapters else POOLED_SHARE
    return int(share * total_bytes) if largest_bytes < LARGEST_POOLED_BYTES else 0

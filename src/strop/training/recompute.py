"""Which blocks compute their activations again in the backward pass, and how many a memory budget asks for.

A block whose forward pass runs inside `torch.utils.checkpoint` keeps its input only. Random states are kept, so that
gradients are the same bits (in fp32) with dropout too. Blocks are the members of the decoder's longest outermost
`ModuleList`, found by type and position; the first `count` of them are wrapped, and unwrapped afterwards.

Memory is that of `strop.memory.PeakMemory`: anonymous and shared, above the baseline of the measurement handed in; on
CUDA, what torch has allocated there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from strop.data.batches import Batch, BatchStream, padded_batch
from strop.errors import TrainingError
from strop.layers.surgery import block_lists
from strop.memory import PeakMemory, release_unused_memory
from strop.precision import autocast
from strop.progress import Reporter
from strop.training.losses import Head, find_head
from strop.training.objective import LABELS, Objective
from strop.training.optimizers import OptimizerName, state_bytes, trained_parameters
from strop.training.settings import TrainSettings
from strop.training.shapes import at_common_width, positions_of


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder's blocks in their order: the members of its longest outermost `ModuleList`.

    Raises:
        TrainingError: there is no such list.
    """
    lists = [list(found) for found in block_lists(model)]
    if not lists:
        raise TrainingError(f"{type(model).__name__} has no list of blocks to recompute; set checkpointing to none")
    return max(lists, key=len)


@contextlib.contextmanager
def recomputed(model: nn.Module, count: int | None = None) -> Iterator[None]:
    """Recompute the first `count` blocks (None: all) while the context lasts.

    Raises:
        TrainingError: the model has no list of blocks.
    """
    chosen = repeated_blocks(model)[:count] if count != 0 else []
    with contextlib.ExitStack() as stack:
        for block in chosen:
            stack.enter_context(forward_as(block, _recomputing(block.forward)))
        yield


@contextlib.contextmanager
def forward_as(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a block another forward while the context lasts; then it has the one again that it had."""
    before = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward  # the class's own again
        if before is not None:
            block.forward = before


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    return run


def blocks_to_recompute(
    model: nn.Module,
    stream: BatchStream,
    settings: TrainSettings,
    memory: PeakMemory,
    reporter: Reporter,
    objective: Objective = LABELS,
) -> int | None:
    """The number of blocks that a run's settings ask for; None: all of them.

    Raises:
        TrainingError: as `blocks_for_budget`.
    """
    if isinstance(settings.checkpointing, int):
        return settings.checkpointing
    if settings.checkpointing != "auto":
        return 0 if settings.checkpointing == "none" else None
    assert settings.max_memory is not None
    count = blocks_for_budget(
        model,
        at_common_width(_largest_batch(stream), limit=positions_of(model)),
        settings.max_memory,
        optimizer=settings.optimizer,
        compute_dtype=settings.compute_dtype,
        memory=memory,
        objective=objective,
    )
    reporter.note(f"{count} of {len(repeated_blocks(model))} blocks are recomputed, to stay within max_memory")
    return count


def _largest_batch(stream: BatchStream) -> Batch:
    """As many of the longest rows as a micro-batch holds; packed sequences are all of one length."""
    if stream.packing:
        state = stream.state_dict()
        batch = stream.next_step()[0]
        stream.load_state_dict(state)
        return batch
    longest = sorted(range(len(stream.samples)), key=lambda row: -stream.lengths[row])[: stream.batch_size]
    return padded_batch(stream.samples, longest, pad_id=stream.pad_id)


def blocks_for_budget(
    model: nn.Module,
    batch: Batch,
    budget_bytes: int,
    *,
    optimizer: OptimizerName,
    compute_dtype: torch.dtype,
    memory: PeakMemory,
    objective: Objective = LABELS,
) -> int:
    """How many blocks to recompute so that a step fits: as many as the budget demands, and no more.

    One forward and backward pass with all of them gives the least that will do. The bytes that the last block keeps,
    counted by autograd, give the number that the rest of the budget has room for; it is measured by another pass, and
    raised by one block at a time where it does not fit. What the optimizer will hold is added to what is measured.
    Gradients are dropped and random states put back.

    Args:
        model: on its device, its trained parameters in fp32.
        batch: as large as any of the run.
        budget_bytes: the most that may be held.
        optimizer: which; none of its state is there yet.
        compute_dtype: of the products.
        memory: a running measurement; its baseline counts as zero.
        objective: what is minimised; a teacher counts in.

    Raises:
        TrainingError: not even all blocks recomputed fit; names the least that would do.
    """
    blocks = repeated_blocks(model)
    total = len(blocks)
    head = find_head(model, batch)
    objective.check(batch)
    coming = state_bytes(optimizer, trained_parameters(model))

    def measure(count: int) -> int:
        held = probe_bytes(
            model, batch, count, head=head, compute_dtype=compute_dtype, memory=memory, objective=objective
        )
        return held + coming

    least = measure(total)
    if least > budget_bytes:
        raise TrainingError(
            f"max_memory: {budget_bytes:,} bytes are not enough for a step even with all {total} blocks recomputed; it "
            f"takes {least:,} bytes. Allow {least:,} or more, or take a smaller batch_size or max_length, the method "
            "qlora, or the optimizer adamw-8bit"
        )
    each = max(1, _kept_bytes(model, blocks[-1], batch, head, compute_dtype, objective))
    count = max(0, total - 1 - (budget_bytes - least) // each)  # the least has one block's activations in it
    while count < total and measure(count) > budget_bytes:
        count += 1
    return count


def probe_bytes(
    model: nn.Module,
    batch: Batch,
    count: int,
    *,
    head: Head | None,
    compute_dtype: torch.dtype,
    memory: PeakMemory,
    objective: Objective = LABELS,
) -> int:
    """The most bytes held during one forward and backward pass with `count` blocks recomputed."""
    device = next(model.parameters()).device
    release_unused_memory()
    training = model.training
    try:
        with _random_states_kept(device), recomputed(model, count):
            model.train()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with PeakMemory(memory.baseline_bytes) as probe:
                with autocast(device, compute_dtype):
                    loss = objective.loss_sum(model, batch, head=head)
                loss.backward()
            return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else probe.peak_bytes
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)
        release_unused_memory()


def _kept_bytes(
    model: nn.Module,
    block: nn.Module,
    batch: Batch,
    head: Head | None,
    compute_dtype: torch.dtype,
    objective: Objective,
) -> int:
    """Bytes that autograd saves for the backward pass of one block, parameters left out, each storage once."""
    device = next(model.parameters()).device
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that keeps itself would never be freed

    forward, training = block.forward, model.training

    def counted(*inputs: Any, **options: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return forward(*inputs, **options)

    try:
        with (
            forward_as(block, counted),
            _random_states_kept(device),
            recomputed(model, len(repeated_blocks(model)) - 1),
        ):
            model.train()
            with autocast(device, compute_dtype):
                objective.loss_sum(model, batch, head=head)
    finally:
        model.train(training)
    return sum(saved.values())


@contextlib.contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield

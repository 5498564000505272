"""A few real steps of a run that has not begun, looked at and undone.

`trial` opens the loop of `loop.py` itself, not a copy of it: what is measured here is what training will do. When the
context ends, weights, buffers, the position in the data, torch's generators and the model's mode are, bit for bit, what
they were, so that a run is the same with and without a trial before it. Nothing is written.

Steps are taken at the peak learning rate, without warm-up: the first steps of a warm-up would move nothing worth
looking at.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from strop.data.batches import Batch, BatchStream, packed_batch, padded_batch
from strop.memory import PeakMemory
from strop.progress import SILENT
from strop.training.interrupts import InterruptGuard
from strop.training.loop import Loop
from strop.training.objective import LABELS, Objective
from strop.training.recompute import blocks_to_recompute, recomputed
from strop.training.settings import TrainSettings

GRADIENT_TOLERANCE: Final = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""How far two sums of the same gradient may differ, relative to its norm, by the dtype of the products."""


@dataclass(frozen=True)
class Steps:
    """What a trial's steps showed.

    Attributes:
        seconds: of each step.
        tokens: of each step, without padding.
        losses: of each step, nats per supervised token.
        peak_bytes: the most memory that the process (on a GPU: torch) held, without the trial's copy of the weights.
        tensors: how many tensors are trained.
        silent: trained tensors whose gradient was exactly zero in every step.
        unmoved: trained tensors that had a gradient and that the optimizer never touched.
        too_small: trained tensors that the optimizer updated, and that are the same bits as before.
        vanished: share of the weights with a gradient that the first update left unchanged.
        vanished_in_bfloat16: the same share, had the weights been kept in bf16.
    """

    seconds: list[float]
    tokens: list[int]
    losses: list[float]
    peak_bytes: int
    tensors: int
    silent: list[str]
    unmoved: list[str]
    too_small: list[str]
    vanished: float
    vanished_in_bfloat16: float


class Trial(Loop):
    """The loop of a run, for a few steps that are undone; made by `trial`."""

    kept: dict[str, Tensor]
    """Copies of what a step may change, by name."""

    def gradient_difference(self, rows: Sequence[Sequence[int]]) -> float:
        """How far the gradient of rows taken one at a time is from that of all at once, over the latter's norm.

        Without dropout. `rows` are lists of sample indices, as in `Batch.rows`.
        """
        self.model.eval()
        try:
            self._backward([self._collated(rows)])
            norm = self._gradient_norm()
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.neg_()
            self._backward([self._collated([row]) for row in rows])
            difference = self._gradient_norm()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return difference / norm if norm > 0 else difference

    def take_steps(self, places: Sequence[int]) -> Steps:
        """Take the optimizer steps that stand at these places of the first epoch, and see what they do.

        Raises:
            TrainingError: a trained tensor gets no gradient, or loss or gradient are not finite.
        """
        copied = sum(tensor.nbytes for tensor in self.kept.values())
        moved = _Movements(self.parameters, self.kept)
        self.progress.total_steps = len(places)
        self.model.train()
        hooks = [
            self.optimizer.register_step_pre_hook(lambda *_: moved.note_gradients()),
            self.optimizer.register_step_post_hook(lambda *_: moved.note_changes()),
        ]
        seconds: list[float] = []
        tokens: list[int] = []
        losses: list[float] = []
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            with PeakMemory(baseline_bytes=0) as memory:
                for place in places:
                    self.stream.load_state_dict({**self.stream.state_dict(), "epoch": 0, "step": place})
                    start, held = time.perf_counter(), self.progress.tokens
                    self._train_step()
                    seconds.append(time.perf_counter() - start)
                    tokens.append(self.progress.tokens - held)
                    losses.append(self.progress.loss or 0.0)
            peak = torch.cuda.max_memory_allocated(self.device) if cuda else memory.peak_bytes
        finally:
            for hook in hooks:
                hook.remove()
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
        unmoved = [name for name, value in self.parameters.items() if torch.equal(value, self.kept[name])]
        return Steps(
            seconds,
            tokens,
            losses,
            peak - copied,
            len(self.parameters),
            [name for name in self.parameters if name not in moved.reached],
            [name for name in unmoved if name in moved.reached and self.parameters[name] not in self.optimizer.state],
            [name for name in unmoved if name in moved.reached and self.parameters[name] in self.optimizer.state],
            moved.share(moved.vanished),
            moved.share(moved.vanished_in_bfloat16),
        )

    def _collated(self, rows: Sequence[Sequence[int]]) -> Batch:
        stream = self.stream
        if stream.packing:
            return packed_batch(rows, stream.samples, pad_id=stream.pad_id, attention=stream.attention)
        indices = [row[0] for row in rows]
        return padded_batch([stream.samples[index] for index in indices], indices, pad_id=stream.pad_id)

    def _gradient_norm(self) -> float:
        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        return sum(float(grad.double().square().sum()) for grad in grads) ** 0.5


class _Movements:
    """Which tensors the gradient reached, and which of their weights the first update after that left unchanged."""

    def __init__(self, parameters: dict[str, nn.Parameter], before: dict[str, Tensor]) -> None:
        self._parameters, self._before = parameters, before
        self._new: dict[str, Tensor] = {}
        self.reached: set[str] = set()
        self.weights = self.vanished = self.vanished_in_bfloat16 = 0

    def note_gradients(self) -> None:
        for name, parameter in self._parameters.items():
            if name not in self.reached and parameter.grad is not None:
                reached = parameter.grad != 0
                if bool(reached.any()):
                    self._new[name] = reached

    def note_changes(self) -> None:
        for name, reached in self._new.items():
            before, after = self._before[name], self._parameters[name].detach()
            update = (after.float() - before.float())[reached]
            narrow = before[reached].bfloat16()
            self.weights += int(reached.sum())
            self.vanished += int((after == before)[reached].sum())
            self.vanished_in_bfloat16 += int(((narrow.float() + update).bfloat16() == narrow).sum())
        self.reached.update(self._new)
        self._new = {}

    def share(self, count: int) -> float:
        return count / self.weights if self.weights else 0.0


@contextlib.contextmanager
def trial(
    model: nn.Module, stream: BatchStream, settings: TrainSettings, objective: Objective = LABELS
) -> Iterator[Trial]:
    """Open the loop for a few steps, and undo all of them in the end.

    Args:
        model: as for `train`.
        stream: the training data.
        settings: the run's.
        objective: what is minimised.

    Raises:
        TrainingError: as the loop's beginning raises it.
    """
    device = next(model.parameters()).device
    place, rows_at_once = stream.state_dict(), stream.micro_batch
    kept = {name: tensor.detach().clone() for name, tensor in _changeable(model).items()}
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            guard = stack.enter_context(InterruptGuard())
            memory = stack.enter_context(PeakMemory())
            torch.manual_seed(settings.seed)
            blocks = blocks_to_recompute(model, stream, settings, memory, SILENT, objective)
            stack.enter_context(recomputed(model, blocks))
            stack.callback(model.train, model.training)
            bare = replace(settings, schedule="constant", warmup_ratio=0.0)
            one = Trial(model, stream, [], bare, Path("trial"), _export_nothing, objective, memory, guard, SILENT)
            one.kept = kept
            stack.callback(one.close)
            yield one
            guard.check()
    finally:
        with torch.no_grad():
            for name, tensor in _changeable(model).items():
                if not torch.equal(tensor, kept[name]):
                    tensor.copy_(kept[name])
        stream.load_state_dict(place)
        stream.micro_batch = rows_at_once


def _changeable(model: nn.Module) -> dict[str, Any]:
    """What a step may change: trained parameters and buffers."""
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    return trained | {name: tensor for name, tensor in model.named_buffers() if tensor.is_floating_point()}


def _export_nothing(folder: Path) -> None:
    """A trial ends in nothing."""

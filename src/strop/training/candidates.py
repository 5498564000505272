"""Adapters of several ranks over one open model, trained in turns on the same batches.

The model is held once. A candidate keeps its adapter (`LoraLinear`s that are put into the model while it is its turn),
its optimizer, its place in the data and its generators, so that taking turns changes nothing: each is, bit for bit,
what the training loop makes of the same steps. A candidate whose loss or gradient stops being finite is out of the
race; the others go on.

Not here: measuring and choosing (`strop.recipes.rank`), and what a run needs beside its steps (`loop.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from strop.data.batches import Batch, BatchStream
from strop.layers.surgery import attach_lora, detach_lora, replace
from strop.precision import autocast
from strop.training.checkpoints import generator_states, set_generator_states
from strop.training.fusing import fused_blocks
from strop.training.losses import Head, token_loss_sum
from strop.training.optimizers import gradient_norm, make_optimizer
from strop.training.recompute import recomputed
from strop.training.schedules import rate_share
from strop.training.settings import TrainSettings
from strop.training.shapes import at_common_width, positions_of


@dataclass(frozen=True)
class AdapterShape:
    """What an adapter is beside its rank.

    Attributes:
        targets: As `attach_lora` takes them.
        alpha: Numerator of the scaling; None: twice the rank.
        dropout: On the adapter's input.
        rank_stabilised: Whether the scaling divides by the root of the rank.
    """

    targets: str | tuple[str, ...]
    alpha: float | None
    dropout: float
    rank_stabilised: bool


class Candidate:
    """One rank's adapter in training.

    Args:
        model: The base without adapters; it is left as it is found after every call.
        rank: Of the adapter.
        shape: The rest of the adapter.
        stream: Training data at their beginning; each candidate has its own.
        settings: The learning rate, its schedule, clipping, precision and seed.
        steps: Optimizer steps of the whole race, for the schedule.
        head: The model's two pieces, or None (`find_head`).

    Attributes:
        rank: Of the adapter.
        step: Optimizer steps done.
        broken: Why it cannot go on; None while it can.
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int,
        shape: AdapterShape,
        stream: BatchStream,
        settings: TrainSettings,
        *,
        steps: int,
        head: Head | None,
    ) -> None:
        self.rank, self.step, self.broken = rank, 0, None
        self._model, self._stream, self._settings, self._steps, self._head = model, stream, settings, steps, head
        self._device, self._positions = next(model.parameters()).device, positions_of(model)
        attach_lora(
            model,
            shape.targets,
            rank=rank,
            alpha=2.0 * rank if shape.alpha is None else shape.alpha,
            dropout=shape.dropout,
            rank_stabilised=shape.rank_stabilised,
            generator=torch.Generator().manual_seed(settings.seed),
        )
        self._adapters = detach_lora(model)
        self._parameters = {
            f"{name}.{part}": parameter
            for name, module in self._adapters.items()
            for part, parameter in module.named_parameters(recurse=False)
        }
        self._optimizer = make_optimizer(
            settings.optimizer,
            self._parameters,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        with torch.random.fork_rng(devices=self._cuda()):
            torch.manual_seed(settings.seed)
            self._generators = generator_states(self._device)

    broken: str | None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Its adapter is on the model while the context lasts."""
        for name, module in self._adapters.items():
            replace(self._model, name, module)
        try:
            yield
        finally:
            detach_lora(self._model)

    def train(self, until: int, *, after_step: Callable[[], None]) -> None:
        """Train to step `until`, or until it breaks.

        Args:
            until: Optimizer steps in all.
            after_step: Called after each.
        """
        training = self._model.training
        blocks = 0 if self._settings.checkpointing == "none" else None
        with (
            torch.random.fork_rng(devices=self._cuda()),
            self.attached(),
            fused_blocks(self._model, self._stream),
            recomputed(self._model, blocks),
        ):
            set_generator_states(self._generators, self._device)
            self._model.train()
            try:
                while self.step < until and self.broken is None:
                    self._train_step()
                    after_step()
            finally:
                self._optimizer.zero_grad(set_to_none=True)
                self._model.train(training)
            self._generators = generator_states(self._device)

    def _train_step(self) -> None:
        settings = self._settings
        loss = self._backward(self._stream.next_step())
        norm = gradient_norm(self._parameters)
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            self.broken = f"step {self.step + 1}: the loss is {loss:.4g}, the gradient's norm {float(norm):.4g}"
            return
        share = rate_share(settings.schedule, self.step, self._steps, warmup_ratio=settings.warmup_ratio)
        if settings.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(list(self._parameters.values()), settings.clip_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _backward(self, batches: Sequence[Batch]) -> float:
        """Leave the step's gradient in the adapter; returns nats per supervised token."""
        supervised = sum(batch.supervised_tokens for batch in batches)
        total = 0.0
        for batch in batches:
            with autocast(self._device, self._settings.compute_dtype):
                loss_sum, _ = token_loss_sum(
                    self._model, at_common_width(batch, limit=self._positions), head=self._head
                )
            (loss_sum / supervised).backward()
            total += float(loss_sum.detach())
        return total / supervised

    def _cuda(self) -> list[Any]:
        return [self._device] if self._device.type == "cuda" else []

"""What the training loop is given, what it counts, and what it gives back."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from strop.config import Epochs, Minutes, Steps
from strop.progress import Reporter
from strop.training.optimizers import OptimizerName
from strop.training.schedules import Schedule


@dataclass(frozen=True)
class TrainSettings:
    """What decides a run beside its model and data.

    Attributes:
        length: How long.
        learning_rate: Peak.
        optimizer: AdamW with fp32 or with 8-bit moments.
        schedule: How the rate falls.
        warmup_ratio: Share of the steps that warms up.
        weight_decay: Of matrices.
        clip_norm: Largest gradient norm; 0 does not clip.
        compute_dtype: Of the products.
        int8: Whether the frozen base's products are approximated in int8 where they pass (`int8_base`).
        checkpointing: Which blocks' activations are computed again in the backward pass; a number: so many, the first.
        max_memory: Bytes that a step may hold, for `auto`.
        eval_steps: Steps between evaluations; None: about a tenth of the run.
        eval_batch_size: Rows of an evaluation batch.
        save_steps: Steps between checkpoints; None: every ten minutes.
        patience: Evaluations without a better one after which the run stops; None: never.
        tensorboard: Whether the metrics are written as event files too.
        delay: Share of the steps before rounding begins, where layers train through it.
        freeze: Share of the steps at the end in which the scales stay.
        scale_rate: Peak rate of learned scales, as a share of their start.
        seed: Of dropout.
        identity: JSON values that must be the same when the run is resumed.
    """

    length: Steps | Epochs | Minutes
    learning_rate: float
    optimizer: OptimizerName = "adamw"
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    compute_dtype: torch.dtype = torch.float32
    int8: bool = False
    checkpointing: Literal["none", "all", "auto"] | int = "none"
    max_memory: int | None = None
    eval_steps: int | None = None
    eval_batch_size: int = 8
    save_steps: int | None = None
    patience: int | None = None
    tensorboard: bool = False
    delay: float = 0.0
    freeze: float = 0.0
    scale_rate: float = 1e-3
    seed: int = 0
    identity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run came to. Losses are nats per supervised token; None where nothing was evaluated.

    `events` are what the run had to do to go on: data skipped, states returned to, micro-batches made smaller. `int8`
    says which of the base's products were computed in int8; None where none was asked for.
    """

    steps: int
    total_steps: int
    tokens: int
    supervised_tokens: int
    train_seconds: float
    loss: float | None
    valid_loss: float | None
    best_valid_loss: float | None
    best_step: int | None
    ended: str
    events: list[dict[str, Any]] = field(default_factory=list)
    int8: dict[str, Any] | None = None

    @classmethod
    def of(cls, progress: Progress, steps: int, int8: dict[str, Any] | None) -> TrainResult:
        """What a run came to whose counters stand so after its last step."""
        own = {"steps": steps, "ended": progress.ended or "all steps done", "events": [*progress.events], "int8": int8}
        return cls(**own, **{f.name: getattr(progress, f.name) for f in fields(cls) if f.name not in own})


@dataclass
class Progress:
    """The loop's own counters; they travel in `state.json`.

    Attributes not named in `TrainResult`: evaluations in a row without a better one; why the run ended early; the
    metrics of a step that is not written yet; the step of the last planned checkpoint; rows computed at once, in
    training and in evaluations, where memory made them fewer than asked; the watchdog's window of losses, and of steps
    above it in a row.
    """

    total_steps: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    train_seconds: float = 0.0
    loss: float | None = None
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    best_step: int | None = None
    worse_evaluations: int = 0
    ended: str | None = None
    pending: dict[str, Any] | None = None
    good_step: int | None = None
    micro_batch: int | None = None
    eval_batch: int | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    high: int = 0
    still: int = 0


def count_steps(length: Steps | Epochs | Minutes, steps_per_epoch: int) -> int | None:
    """Optimizer steps of a run; None where only the time they take can tell."""
    if isinstance(length, Steps):
        return length.max_steps
    if isinstance(length, Epochs):
        return max(1, math.ceil(length.epochs * steps_per_epoch - 1e-9))
    return None


def steps_in(seconds: float, once: Callable[[], None], reporter: Reporter) -> int:
    """Steps that fit into nine tenths of `seconds`, from up to three timed ones; the rest is for evaluations.

    Args:
        seconds: the time there is.
        once: a step that changes nothing.
        reporter: told of the figure.
    """
    times: list[float] = []
    while len(times) < 3 and sum(times) < 0.05 * seconds:
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    steps = max(1, int(0.9 * (seconds - sum(times)) / statistics.median(times)))
    reporter.note(f"{seconds / 60:g} minutes are about {steps} steps of {min(times):.2g} s")
    return steps

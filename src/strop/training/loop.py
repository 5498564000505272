"""The training loop: optimizer steps over a data stream, evaluated, saved, resumed bit for bit.

A step is what `BatchStream.next_step` gives: one or more micro-batches. Their summed losses are divided by the
supervised tokens of the whole step, so that the update is that of one large batch. Loss and gradient are looked at
before the update: NaN or infinity stops the run with the state before the step saved. After each step the position in
the data and torch's generators are noted; a checkpoint is always of such a moment, so that an interrupted step is done
again from its beginning.

    RUN/checkpoints/    training states (`checkpoints.py`)     RUN/metrics.jsonl    one line a step (`metrics.py`)
    RUN/best, RUN/last  the model, written by `export`

What decides the result is in the arguments: on one machine with one number of threads, the same arguments give the
same bits, resumed or not. The exception is a run measured in minutes: its number of steps is estimated from a few timed
ones, then fixed and kept in the checkpoints.

Not here: opening models, preparing data, attaching adapters, file formats of models (`strop.recipes.tune`).
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from strop.config import Minutes
from strop.data.batches import Batch, BatchStream, eval_batches
from strop.data.packing import check_isolation
from strop.data.templates import Sample
from strop.errors import TrainingError
from strop.memory import PeakMemory
from strop.progress import SILENT, Reporter
from strop.training.checkpoints import (
    Checkpoint,
    differences,
    generator_states,
    newest_checkpoint,
    save_checkpoint,
    set_generator_states,
)
from strop.training.interrupts import InterruptGuard
from strop.training.losses import find_head, token_loss_sum
from strop.training.metrics import NAME as METRICS_NAME
from strop.training.metrics import MetricsFile
from strop.training.optimizers import (
    gradient_norm,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    trained_parameters,
)
from strop.training.precision import autocast
from strop.training.recompute import blocks_to_recompute, recomputed
from strop.training.schedules import rate_share
from strop.training.settings import Progress, TrainResult, TrainSettings, count_steps
from strop.training.shapes import at_common_width, positions_of

SAVE_SECONDS: Final = 600.0
"""Between checkpoints where no number of steps is asked for."""

EVALUATIONS: Final = 10
"""Evaluations of a run where no number of steps is asked for, if they cost little beside the training."""

Export: TypeAlias = Callable[[Path], None]
"""Writes the model as it stands, in its final form, to a folder, replacing what is there."""


def train(
    model: nn.Module,
    stream: BatchStream,
    valid_samples: Sequence[Sample],
    settings: TrainSettings,
    run_dir: Path,
    *,
    export: Export,
    resume: bool = False,
    memory: PeakMemory | None = None,
    reporter: Reporter = SILENT,
) -> TrainResult:
    """Train the parameters of `model` that require gradient.

    Args:
        model: A causal language model on its device, trained parameters in fp32 (or fp64).
        stream: Training data.
        valid_samples: Held-out data; empty: no evaluation, and no RUN/best.
        settings: Everything else that decides the run.
        run_dir: The run's folder.
        export: Called with RUN/best and RUN/last.
        resume: Go on from the newest whole checkpoint; from the beginning where there is none.
        memory: A running measurement whose peak goes into the metrics; None starts one.
        reporter: Told of progress, skipped checkpoints and early ends.

    Raises:
        TrainingError: a trained parameter gets no gradient, loss or gradient is not finite, packed documents see each
            other, or the checkpoint belongs to a run with other settings.
        KeyboardInterrupt: after the last step's state was saved.
    """
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        guard = stack.enter_context(InterruptGuard())
        memory = memory or stack.enter_context(PeakMemory())
        torch.manual_seed(settings.seed)
        stack.enter_context(recomputed(model, blocks_to_recompute(model, stream, settings, memory, reporter)))
        was_training = model.training
        stack.callback(model.train, was_training)
        run = _Run(model, stream, list(valid_samples), settings, run_dir, export, memory, guard, reporter)
        stack.callback(run.close)
        return run.go(resume=resume)


class _Run:
    """One call of `train`."""

    def __init__(
        self,
        model: nn.Module,
        stream: BatchStream,
        valid: list[Sample],
        settings: TrainSettings,
        run_dir: Path,
        export: Export,
        memory: PeakMemory,
        guard: InterruptGuard,
        reporter: Reporter,
    ) -> None:
        self.model, self.stream, self.valid, self.settings = model, stream, valid, settings
        self.run_dir, self.export, self.memory, self.guard, self.reporter = run_dir, export, memory, guard, reporter
        self.checkpoints = run_dir / "checkpoints"
        self.parameters = trained_parameters(model)
        if not self.parameters:
            raise TrainingError(
                f"{type(model).__name__} has no parameter that is trained; attach an adapter, or unfreeze"
            )
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(
            settings.optimizer,
            self.parameters,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.positions = positions_of(model)
        self.step = 0
        self.progress = Progress()
        self.first_step_done = False
        self.whole = True  # the parameters are those of a completed step
        self.saved_step = 0
        self.saved_time = time.monotonic()
        self.metrics: MetricsFile | None = None
        batch = self._peek()
        if batch.documents is not None:
            check_isolation(model, batch.to(self.device))
        self.head = find_head(model, batch)
        self.boundary = self._note_boundary()

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()
        self.optimizer.zero_grad(set_to_none=True)

    # --- the run ------------------------------------------------------------------------------------------------------

    def go(self, *, resume: bool) -> TrainResult:
        checkpoint = self._newest() if resume else None
        if checkpoint is not None:
            self._restore(checkpoint)
        else:
            self.progress.total_steps = self._count_steps()
        self.metrics = MetricsFile(self.run_dir / METRICS_NAME, after_step=self._written_step())
        total = self.progress.total_steps
        self.reporter.start("training", total, "steps")
        try:
            self.model.train()
            if self.progress.pending is not None:
                self._after_step()
            while self.step < total and self.progress.ended is None:
                self.guard.check()
                self._train_step()
                self._after_step()
            self.guard.check()
            self.export(self.run_dir / "last")
        except KeyboardInterrupt:
            self._keep_state("interrupted")
            raise
        except TrainingError as error:
            kept = self._keep_state("stopped")
            if kept is None:
                raise
            self.export(self.run_dir / "last")
            raise TrainingError(f"{error} The state after step {self.step} is kept in {kept}.") from error
        except Exception:
            with contextlib.suppress(Exception):  # the first failure is the one to tell
                self._keep_state("stopped")
            raise
        finally:
            self.reporter.finish()
        return self._result()

    def _result(self) -> TrainResult:
        progress = self.progress
        return TrainResult(
            steps=self.step,
            total_steps=progress.total_steps,
            tokens=progress.tokens,
            supervised_tokens=progress.supervised_tokens,
            train_seconds=progress.train_seconds,
            loss=progress.loss,
            valid_loss=progress.valid_loss,
            best_valid_loss=progress.best_valid_loss,
            best_step=progress.best_step,
            ended=progress.ended or "all steps done",
        )

    # --- one step -----------------------------------------------------------------------------------------------------

    def _train_step(self) -> None:
        settings, start = self.settings, time.perf_counter()
        batches = self.stream.next_step()
        loss, supervised = self._backward(batches)
        if not self.first_step_done:
            self._check_every_gradient()
            self.first_step_done = True
        norm = gradient_norm(self.parameters)
        norm_value = float(norm)
        if not math.isfinite(norm_value):
            raise TrainingError(
                f"step {self.step + 1}: the gradient's norm is {norm_value} (the loss is {loss:.4g}); nothing was "
                f"updated. {self._advice()}"
            )
        share = rate_share(settings.schedule, self.step, self.progress.total_steps, warmup_ratio=settings.warmup_ratio)
        rate = settings.learning_rate * share
        self.whole = False
        if settings.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), settings.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - start
        tokens = sum(batch.tokens for batch in batches)
        progress = self.progress
        progress.tokens += tokens
        progress.supervised_tokens += supervised
        progress.train_seconds += seconds
        progress.loss = loss
        progress.pending = {
            "step": self.step,
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm_value,
            "tokens": tokens,
            "supervised_tokens": supervised,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
        }
        self.boundary = self._note_boundary()
        self.whole = True

    def _backward(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Leave the step's gradient in the parameters; returns nats per supervised token, and those tokens."""
        supervised = sum(batch.supervised_tokens for batch in batches)
        total = 0.0
        for batch in batches:
            self.guard.check()
            with autocast(self.device, self.settings.compute_dtype):
                loss_sum, _ = token_loss_sum(self.model, at_common_width(batch, limit=self.positions), head=self.head)
            value = float(loss_sum.detach())
            if not math.isfinite(value):
                rows = [index for row in batch.rows for index in row]
                shown = ", ".join(map(str, rows[:8])) + (" ..." if len(rows) > 8 else "")
                raise TrainingError(
                    f"step {self.step + 1}: the loss is {value} in the micro-batch of samples {shown}; nothing was "
                    f"updated. {self._advice()}"
                )
            (loss_sum / supervised).backward()
            total += value
        return total / supervised, supervised

    def _check_every_gradient(self) -> None:
        without = [name for name, parameter in self.parameters.items() if parameter.grad is None]
        if without:
            shown = "\n  ".join(without[:10]) + (f"\n  and {len(without) - 10} more" if len(without) > 10 else "")
            raise TrainingError(
                f"step {self.step + 1}: {len(without)} of {len(self.parameters)} trained parameters got no gradient, "
                f"so they would never change:\n  {shown}\nLeave them out of the targets, or choose another method."
            )

    def _advice(self) -> str:
        return (
            f"The learning rate's peak is {self.settings.learning_rate:.3g}: lower it, or set dtype to float32, and "
            "start again."
        )

    # --- after a step -------------------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        """Evaluate, note, save: what is due after the step whose metrics are pending."""
        progress, settings = self.progress, self.settings
        row = dict(progress.pending or {})
        last = self.step == progress.total_steps
        row["peak_bytes"] = self._peak_bytes()
        if self.valid and (last or self.step % self._eval_steps() == 0):
            row["valid_loss"] = self._evaluate_and_keep_best()
        if isinstance(settings.length, Minutes) and not last and self._overtime(settings.length):
            progress.ended = "the time was up"
            self.reporter.note(f"the machine became slower than at the start: stopped after {self.step} steps")
        progress.pending = None
        assert self.metrics is not None
        self.metrics.write(row)
        shown = ("loss", "valid_loss", "tokens_per_second", "peak_bytes")
        self.reporter.advance(self.step, **{name: row[name] for name in shown if name in row})
        due = time.monotonic() - self.saved_time >= SAVE_SECONDS
        if settings.save_steps is not None:
            due = self.step % settings.save_steps == 0
        if due:
            self._save()

    def _evaluate_and_keep_best(self) -> float:
        progress = self.progress
        loss = self.evaluate()
        if not math.isfinite(loss):
            self.whole = False  # a state whose loss is not a number is not worth keeping
            raise TrainingError(f"step {self.step}: the loss on the validation rows is {loss}. {self._advice()}")
        progress.valid_loss = loss
        if progress.best_valid_loss is None or loss < progress.best_valid_loss:
            self.export(self.run_dir / "best")
            progress.best_valid_loss, progress.best_step, progress.worse_evaluations = loss, self.step, 0
            return loss
        progress.worse_evaluations += 1
        if self.settings.patience is not None and progress.worse_evaluations >= self.settings.patience:
            progress.ended = f"no better evaluation for {progress.worse_evaluations} times"
            self.reporter.note(
                f"stopped early after {self.step} steps: {progress.ended}; the best was step {progress.best_step}"
            )
        return loss

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean nats per supervised token over the validation rows, without dropout."""
        total, tokens = 0.0, 0
        self.model.eval()
        try:
            for batch in eval_batches(self.valid, self.settings.eval_batch_size, pad_id=self.stream.pad_id):
                with autocast(self.device, self.settings.compute_dtype):
                    batch = at_common_width(batch, limit=self.positions)
                    loss_sum, count = token_loss_sum(self.model, batch, head=self.head)
                total += float(loss_sum)
                tokens += count
        finally:
            self.model.train()
        return total / tokens

    def _eval_steps(self) -> int:
        """Steps between evaluations: as asked, else so that all evaluations cost at most about a tenth of the run."""
        if self.settings.eval_steps is not None:
            return self.settings.eval_steps
        total = self.progress.total_steps
        train_tokens = total / self.stream.steps_per_epoch * sum(len(sample) for sample in self.stream.samples)
        valid_tokens = sum(len(sample) for sample in self.valid)
        times = 0.1 * train_tokens / (valid_tokens / 3)  # a forward pass costs a third of a training step
        return math.ceil(total / max(1, min(EVALUATIONS, int(times))))

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self.memory.peak_bytes

    # --- how long -----------------------------------------------------------------------------------------------------

    def _count_steps(self) -> int:
        steps = count_steps(self.settings.length, self.stream.steps_per_epoch)
        if steps is not None:
            return steps
        assert isinstance(self.settings.length, Minutes)
        return self._estimate_steps(60 * self.settings.length.minutes)

    def _estimate_steps(self, seconds: float) -> int:
        """Steps that fit into nine tenths of `seconds`, from up to three timed ones; the rest is for evaluations.

        The timed steps change nothing: their gradients are dropped, and data and generators are set back.
        """
        times: list[float] = []
        self.model.train()
        while len(times) < 3 and sum(times) < 0.05 * seconds:
            start = time.perf_counter()
            self._backward(self.stream.next_step())
            self.optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - start)
        self._return_to_boundary()
        steps = max(1, int(0.9 * (seconds - sum(times)) / statistics.median(times)))
        self.reporter.note(f"{seconds / 60:g} minutes are about {steps} steps of {min(times):.2g} s")
        return steps

    def _overtime(self, length: Minutes) -> bool:
        return self.progress.train_seconds > 1.25 * 60 * length.minutes

    # --- states -------------------------------------------------------------------------------------------------------

    def _peek(self) -> Batch:
        state = self.stream.state_dict()
        batch = self.stream.next_step()[0]
        self.stream.load_state_dict(state)
        return batch

    def _note_boundary(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return self.stream.state_dict(), generator_states(self.device)

    def _return_to_boundary(self) -> None:
        stream_state, generators = self.boundary
        self.stream.load_state_dict(stream_state)
        set_generator_states(generators, self.device)

    def _save(self) -> Path:
        stream_state, generators = self.boundary
        state = {
            "progress": vars(self.progress),
            "stream": stream_state,
            "identity": dict(self.settings.identity),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        optimizer = optimizer_tensors(self.optimizer, self.parameters)
        path = save_checkpoint(self.checkpoints, Checkpoint(self.step, weights, optimizer, generators, state))
        self.saved_step, self.saved_time = self.step, time.monotonic()
        return path

    def _keep_state(self, why: str) -> Path | None:
        """Save the last completed step before the run ends early; None where there is nothing new to keep."""
        if not self.whole or self.step == 0:
            return None
        path = self.checkpoints / f"step-{self.step:06d}"
        if self.saved_step != self.step:
            path = self._save()
        self.reporter.note(f"{why} after step {self.step}; its state is in {path}; --resume goes on from there")
        return path

    def _newest(self) -> Checkpoint | None:
        checkpoint, skipped = newest_checkpoint(self.checkpoints)
        for line in skipped:
            self.reporter.note(line)
        if checkpoint is None:
            self.reporter.note(f"no whole checkpoint in {self.checkpoints}: the run starts from the beginning")
        return checkpoint

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        wrong = differences(state["identity"], self.settings.identity)
        shapes = {name: list(tensor.shape) for name, tensor in checkpoint.weights.items()}
        wrong += differences(shapes, {name: list(tensor.shape) for name, tensor in self.parameters.items()})[:10]
        if wrong:
            raise TrainingError(
                f"{self.checkpoints}: the run cannot go on exactly, since it began otherwise:\n  "
                + "\n  ".join(wrong)
                + "\nResume with the settings of the run (RUN/config.yaml), or start a new one elsewhere."
            )
        for key, now in (("threads", torch.get_num_threads()), ("torch", torch.__version__)):
            if state.get(key) != now:
                self.reporter.note(f"{key} was {state.get(key)} and is {now}: the run goes on, but not bit for bit")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(checkpoint.weights[name])
        load_optimizer_tensors(self.optimizer, self.parameters, dict(checkpoint.optimizer))
        self.progress = Progress(**state["progress"])
        self.step = self.saved_step = checkpoint.step
        self.boundary = (dict(state["stream"]), dict(checkpoint.random))
        self._return_to_boundary()
        self.reporter.note(f"resumed after step {self.step} of {self.progress.total_steps}")

    def _written_step(self) -> int:
        """The last step whose metrics line is certain to be complete."""
        return self.step - 1 if self.progress.pending is not None else self.step

"""The training loop: optimizer steps over a data stream, evaluated, saved, resumed bit for bit.

A step is what `BatchStream.next_step` gives: one or more micro-batches. Their summed losses are divided by the
supervised tokens of the whole step, so that the update is that of one large batch. Loss and gradient are looked at
before the update (`watchdog.py`): what is not a number is not applied, what diverges returns to an earlier state, and a
run that cannot be helped stops with its last good state saved. Where memory runs out, the step is done again in smaller
parts. A checkpoint is always of the moment between two steps (`states.py`).

    RUN/checkpoints/    training states (`checkpoints.py`)     RUN/metrics.jsonl    one line a step (`metrics.py`)
    RUN/best, RUN/last  the model, written by `export`

What decides the result is in the arguments: on one machine with one number of threads, the same arguments give the
same bits, resumed or not. Exceptions: a run in minutes estimates its number of steps from a few timed ones, then keeps
it; a return after divergence goes to the last planned checkpoint, whose place the clock decides without `save_steps`.

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
from torch import nn

from strop.config import Minutes
from strop.data.batches import Batch, BatchStream
from strop.data.packing import check_isolation
from strop.data.templates import Sample
from strop.errors import DiskFullError, TrainingError
from strop.memory import PeakMemory, steady_allocation
from strop.precision import autocast, empty_cache
from strop.progress import SILENT, Reporter
from strop.training import watchdog
from strop.training.events import NAME as EVENTS_NAME
from strop.training.fusing import fused_blocks
from strop.training.held_out import evaluation_interval, mean_losses
from strop.training.int8_base import int8_base
from strop.training.interrupts import InterruptGuard
from strop.training.losses import find_head
from strop.training.metrics import NAME as METRICS_NAME
from strop.training.metrics import MetricsFile
from strop.training.objective import LABELS, Objective
from strop.training.optimizers import gradient_norm, make_optimizer, trained_parameters
from strop.training.recompute import blocks_to_recompute, recomputed
from strop.training.rounding_schedule import RoundingSchedule
from strop.training.schedules import rate_share
from strop.training.settings import Progress, TrainResult, TrainSettings, count_steps, steps_in
from strop.training.shapes import at_common_width, positions_of
from strop.training.states import TrainState
from strop.training.watchdog import ROLLED_BACK, SKIPPED, NotFiniteError, UpdateProbe

SAVE_SECONDS: Final = 600.0
"""Between checkpoints where no number of steps is asked for."""

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
    objective: Objective = LABELS,
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
        objective: What is minimised.
        resume: Go on from the newest whole checkpoint; from the beginning where there is none.
        memory: A running measurement whose peak goes into the metrics; None starts one.
        reporter: Told of progress, skipped checkpoints and early ends.

    Raises:
        TrainingError: a trained parameter gets no gradient, loss or gradient is not finite, packed documents see each
            other, or the checkpoint belongs to a run with other settings.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP, after the last step's state was saved.
    """
    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        guard = stack.enter_context(InterruptGuard())
        memory = memory or stack.enter_context(PeakMemory())
        torch.manual_seed(settings.seed)
        if settings.max_memory is not None:
            stack.enter_context(steady_allocation())  # what is freed must not count against the budget
        stack.enter_context(fused_blocks(model, stream))
        int8 = stack.enter_context(int8_base(model, stream, settings, objective, reporter)) if settings.int8 else None
        count = blocks_to_recompute(model, stream, settings, memory, reporter, objective)
        stack.enter_context(recomputed(model, count))
        stack.callback(model.train, model.training)
        run = Loop(model, stream, list(valid_samples), settings, run_dir, export, objective, memory, guard, reporter)
        stack.callback(run.close)
        return run.go(resume=resume, int8=int8)


class Loop:
    """One call of `train`."""

    def __init__(
        self,
        model: nn.Module,
        stream: BatchStream,
        valid: list[Sample],
        settings: TrainSettings,
        run_dir: Path,
        export: Export,
        objective: Objective,
        memory: PeakMemory,
        guard: InterruptGuard,
        reporter: Reporter,
    ) -> None:
        self.model, self.stream, self.valid, self.settings, self.objective = model, stream, valid, settings, objective
        self.run_dir, self.export, self.memory, self.guard, self.reporter = run_dir, export, memory, guard, reporter
        self.parameters = trained_parameters(model)
        if not self.parameters:
            raise TrainingError(
                f"{type(model).__name__} has no parameter that is trained; attach an adapter, or unfreeze"
            )
        self.device = next(model.parameters()).device
        self.rounding = RoundingSchedule(
            model, delay=settings.delay, freeze=settings.freeze, scale_rate=settings.scale_rate
        )
        self.optimizer = make_optimizer(
            settings.optimizer,
            self.parameters,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            rates=self.rounding.rates(),
        )
        self.positions, self.first_step_done = positions_of(model), False
        self.state = TrainState(
            self.parameters, self.optimizer, self.rounding, stream, settings, run_dir / "checkpoints", reporter
        )
        self.metrics: MetricsFile | None = None
        batch = self.state.peek()
        if batch.documents is not None:
            check_isolation(model, batch.to(self.device))
        self.head = find_head(model, batch)
        objective.check(batch)
        self.state.note_boundary()

    @property
    def step(self) -> int:
        """Optimizer steps completed."""
        return self.state.step

    @property
    def progress(self) -> Progress:
        """The loop's counters."""
        return self.state.progress

    def close(self) -> None:
        """Let go of gradients and the metrics file."""
        if self.metrics is not None:
            self.metrics.close()
        self.optimizer.zero_grad(set_to_none=True)

    # --- the run ------------------------------------------------------------------------------------------------------

    def go(self, *, resume: bool, int8: dict[str, Any] | None) -> TrainResult:
        """Run to the end, from the newest checkpoint where `resume` says so; `int8` goes into the result."""
        if not (resume and self.state.resume()):
            self.progress.total_steps = self._count_steps()
        events = self.run_dir / EVENTS_NAME if self.settings.tensorboard else None
        self.metrics = MetricsFile(self.run_dir / METRICS_NAME, after_step=self._written_step(), events=events)
        total = self.progress.total_steps
        self.reporter.start("training", total, "steps")
        try:
            self.model.train()
            if self.progress.pending is not None:
                self._after_step()
            while self.step < total and self.progress.ended is None:
                self.guard.check()
                try:
                    applied = self._train_step()
                except NotFiniteError as error:
                    self._skip(error)
                    continue
                if applied:
                    self._after_step()
            self.guard.check()
            self.export(self.run_dir / "last")
        except KeyboardInterrupt:
            self.state.keep("interrupted")
            raise
        except DiskFullError:
            raise  # another try would fail alike; what was kept before stands
        except TrainingError as error:
            kept = self.state.keep("stopped")
            if kept is None:
                raise
            self.export(self.run_dir / "last")
            raise TrainingError(f"{error} The state after step {self.step} is kept in {kept}.") from error
        except Exception:
            with contextlib.suppress(Exception):  # the first failure is the one to tell
                self.state.keep("stopped")
            raise
        finally:
            self.reporter.finish()
        return TrainResult.of(self.progress, self.step, int8)

    # --- one step -----------------------------------------------------------------------------------------------------

    def _train_step(self) -> bool:
        """Do one step; False where the watchdog returned to an earlier one instead.

        Raises:
            NotFiniteError: loss or gradient is no number; nothing was updated.
        """
        settings, start = self.settings, time.perf_counter()
        total = self.progress.total_steps
        if self.rounding.before_step(self.step, total):
            watchdog.forget(self.progress)
        batches, loss, supervised = self._gradient()
        if not self.first_step_done:
            watchdog.check_every_gradient(self.rounding.used(self.parameters, self.step, total), self.step + 1)
            self.first_step_done = True
        norm = gradient_norm(self.parameters)
        norm_value = float(norm)
        if not math.isfinite(norm_value):
            raise NotFiniteError(
                f"step {self.step + 1}: the gradient's norm is {norm_value} (the loss is {loss:.4g}); nothing was "
                f"updated. {self._advice()}"
            )
        if watchdog.diverges(self.progress, loss):
            self._roll_back(loss)
            return False
        if watchdog.stands_still(self.progress, norm_value):
            steps = f"{watchdog.STILL_STEPS} steps, up to step {self.step + 1}"
            self.reporter.note(f"the gradient has been exactly zero for {steps}: nothing is learned any more")
        share = rate_share(settings.schedule, self.step, total, warmup_ratio=settings.warmup_ratio)
        rate = settings.learning_rate * share
        self.state.whole = False
        if settings.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), settings.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        probe = UpdateProbe(self.parameters) if self.step % watchdog.LOOK_STEPS == 1 else None
        self._update()
        lost = probe.lost_share() if probe is not None else None
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
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
            **self._marks(lost),
        }
        self.state.note_boundary()
        self.state.whole = True
        return True

    def _update(self) -> None:
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            why = watchdog.why_out_of_memory(error)
            raise TrainingError(
                f"step {self.step + 1}: memory ran out in the optimizer's step ({why}). It cannot be done in parts, "
                "and some weights may have moved, so nothing of it is kept; the checkpoints before it stand. Start "
                "again with the optimizer adamw-8bit, a smaller method (lora, qlora), or a lower rank."
            ) from error
        self.rounding.after_update(self.step, self.reporter)

    def _gradient(self) -> tuple[list[Batch], float, int]:
        """The next step's batches with their gradient, in smaller parts where memory runs out."""
        while True:
            batches = self.stream.next_step()
            try:
                return batches, *self._backward(batches)
            except (RuntimeError, MemoryError) as error:
                why = watchdog.why_out_of_memory(error)
            self._halve(batches, why)  # out here the exception and the tensors that it held are gone

    def _halve(self, batches: Sequence[Batch], why: str) -> None:
        """Set the step back to its beginning, and compute half as many rows at once from now on."""
        self.state.return_to_boundary()
        empty_cache(self.device)
        before, width = self.stream.micro_batch, max(batch.input_ids.shape[1] for batch in batches)
        if before == 1:
            raise TrainingError(
                f"step {self.step + 1}: memory ran out with 1 row of {width:,} tokens, the smallest micro-batch "
                f"({why}). Set a lower max_length, checkpointing to all, or a smaller method (lora, qlora)."
            )
        after = (before + 1) // 2
        self.stream.micro_batch = self.progress.micro_batch = after
        self.progress.events.append({"kind": "micro_batch", "step": self.step + 1, "value": after, "why": why})
        self.reporter.note(
            f"memory ran out at step {self.step + 1} with micro-batches of {before} rows of up to {width:,} tokens: "
            f"they are {after} from now on, in as many more parts; the rows of a step stay the same"
        )

    def _skip(self, error: NotFiniteError) -> None:
        """Go on behind the data of a step that cannot be applied, if that has not been tried too often."""
        if not watchdog.may_try_again(self.progress, self.step + 1):
            raise error
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.events.append({"kind": SKIPPED, "step": self.step + 1, "value": 1, "why": str(error)})
        self.reporter.note(f"{error} The step's rows are skipped.")
        self.state.note_boundary()

    def _roll_back(self, loss: float) -> None:
        """Return to the last planned checkpoint, and stop where that has been tried too often."""
        step, middle = self.step + 1, statistics.median(self.progress.losses)
        why = (
            f"step {step}: the loss was far above its recent median of {middle:.4g} for {watchdog.HIGH_STEPS} steps in "
            f"a row, at last {loss:.4g}"
        )
        again, to = watchdog.may_try_again(self.progress, step), self.progress.good_step
        if again:
            self.progress.events.append({"kind": ROLLED_BACK, "step": step, "value": step, "to": to, "why": why})
        self.state.roll_back()
        assert self.metrics is not None
        self.metrics.close()
        self.metrics = MetricsFile(self.run_dir / METRICS_NAME, after_step=self.step)
        if not again:
            raise TrainingError(
                f"{why}; returning to step {to} did not help {watchdog.ATTEMPTS} times. {self._advice()}"
            )
        self.reporter.note(f"{why}; weights and optimizer are back at step {to}, the rows since then are skipped")

    def _marks(self, lost: float | None) -> dict[str, float]:
        """What the watchdog has to say about the step just done, for its line of the metrics."""
        marks: dict[str, float] = {}
        for event in self.progress.events:
            if event.get("to", event["step"] - 1) + 1 == self.step:
                marks[event["kind"]] = event["value"]
        if lost is not None:
            marks["lost_update_share"] = lost
            if watchdog.loses_updates(lost):
                self.reporter.note(
                    f"step {self.step}: {lost:.0%} of the weights looked at kept their bits through the update; the "
                    "learning rate is too low for them"
                )
        return marks

    def _backward(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Leave the step's gradient in the parameters; returns nats per supervised token, and those tokens."""
        supervised = sum(batch.supervised_tokens for batch in batches)
        total = 0.0
        for batch in batches:
            self.guard.check()
            with autocast(self.device, self.settings.compute_dtype):
                common = at_common_width(batch, limit=self.positions)
                loss_sum = self.objective.loss_sum(self.model, common, head=self.head)
            value = float(loss_sum.detach())
            if not math.isfinite(value):
                rows = [index for row in batch.rows for index in row]
                shown = ", ".join(map(str, rows[:8])) + (" ..." if len(rows) > 8 else "")
                raise NotFiniteError(
                    f"step {self.step + 1}: the loss is {value} in the micro-batch of samples {shown}; nothing was "
                    f"updated. {self._advice()}"
                )
            (loss_sum / supervised).backward()
            total += value
        return total / supervised, supervised

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
            row |= self._evaluate_and_keep_best()
            row |= self._marks(None)
        if isinstance(settings.length, Minutes) and not last and self._overtime(settings.length):
            progress.ended = "the time was up"
            self.reporter.note(f"the machine became slower than at the start: stopped after {self.step} steps")
        progress.pending = None
        assert self.metrics is not None
        self.metrics.write(row)
        shown = ("loss", "valid_loss", "tokens_per_second", "peak_bytes")
        self.reporter.advance(self.step, **{name: row[name] for name in shown if name in row})
        armed = len(self.progress.losses) == watchdog.WINDOW
        due = time.monotonic() - self.state.saved_time >= SAVE_SECONDS
        if settings.save_steps is not None:
            due = self.step % settings.save_steps == 0
        if due or (armed and progress.good_step is None):  # the watchdog needs a state to return to
            self.state.save(scheduled=progress.high == 0)

    def _evaluate_and_keep_best(self) -> dict[str, float]:
        progress, losses = self.progress, self.evaluate()
        loss = losses["valid_loss"]
        if not math.isfinite(loss):
            self.state.whole = False  # a state whose loss is not a number is not worth keeping
            raise TrainingError(f"step {self.step}: the loss on the validation rows is {loss}. {self._advice()}")
        progress.valid_loss = loss
        if progress.best_valid_loss is None or loss < progress.best_valid_loss:
            self.export(self.run_dir / "best")
            progress.best_valid_loss, progress.best_step, progress.worse_evaluations = loss, self.step, 0
            return losses
        progress.worse_evaluations += 1
        if self.settings.patience is not None and progress.worse_evaluations >= self.settings.patience:
            progress.ended = f"no better evaluation for {progress.worse_evaluations} times"
            self.reporter.note(
                f"stopped early after {self.step} steps: {progress.ended}; the best was step {progress.best_step}"
            )
        return losses

    def evaluate(self) -> dict[str, float]:
        """`mean_losses` of the validation rows, in smaller batches where memory runs out."""
        while True:
            rows = self.progress.eval_batch or self.settings.eval_batch_size
            try:
                with self.rounding.rounding():
                    return mean_losses(
                        self.model, self.valid, self.objective, batch_size=rows, pad_id=self.stream.pad_id,
                        head=self.head, compute_dtype=self.settings.compute_dtype,
                    )  # fmt: skip
            except (RuntimeError, MemoryError) as error:
                why = watchdog.why_out_of_memory(error)
            self._halve_evaluation(rows, why)  # out here the exception and the tensors that it held are gone

    def _halve_evaluation(self, before: int, why: str) -> None:
        """Compute half as many validation rows at once from now on."""
        empty_cache(self.device)
        if before == 1:
            raise TrainingError(
                f"step {self.step}: memory ran out in the evaluation with 1 row at once ({why}). Set a lower "
                "max_length, a smaller method (lora, qlora), or valid_fraction to 0, which leaves evaluations out."
            )
        after = self.progress.eval_batch = (before + 1) // 2
        self.progress.events.append({"kind": "eval_batch", "step": self.step, "value": after, "why": why})
        self.reporter.note(
            f"memory ran out in the evaluation after step {self.step} with {before} rows at once: they are {after} "
            "from now on; the loss is over the same rows"
        )

    def _eval_steps(self) -> int:
        if self.settings.eval_steps is not None:
            return self.settings.eval_steps
        return evaluation_interval(self.progress.total_steps, self.stream, self.valid)

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self.memory.peak_bytes

    # --- how long -----------------------------------------------------------------------------------------------------

    def _count_steps(self) -> int:
        length = self.settings.length
        if not isinstance(length, Minutes):
            return count_steps(length, self.stream.steps_per_epoch) or 1
        self.model.train()
        steps = steps_in(60 * length.minutes, self._step_undone, self.reporter)
        self.state.return_to_boundary()
        return steps

    def _step_undone(self) -> None:
        self._gradient()
        self.optimizer.zero_grad(set_to_none=True)

    def _overtime(self, length: Minutes) -> bool:
        return self.progress.train_seconds > 1.25 * 60 * length.minutes

    def _written_step(self) -> int:
        """The last step whose metrics line is certain to be complete."""
        return self.step - 1 if self.progress.pending is not None else self.step

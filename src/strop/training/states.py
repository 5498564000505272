"""The training state between two steps: weights, optimizer, data position, generators, counters; saved and restored.

After each step the position in the data and torch's generators are noted as the boundary. What is saved is always of
such a moment, so that a step that was interrupted is done again from its beginning, bit for bit.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strop.data.batches import Batch, BatchStream
from strop.errors import StropError, TrainingError
from strop.files.folders import clear_leftovers
from strop.progress import Reporter
from strop.training.checkpoints import (
    Checkpoint,
    differences,
    generator_states,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    set_generator_states,
)
from strop.training.optimizers import load_optimizer_tensors, optimizer_tensors
from strop.training.rounding_schedule import RoundingSchedule
from strop.training.settings import Progress, TrainSettings


class TrainState:
    """What decides how a run goes on.

    Attributes:
        parameters: The trained parameters by name.
        optimizer: Over those parameters.
        rounding: The phases of layers that train through their rounding.
        step: Optimizer steps completed.
        progress: The loop's counters.
        whole: The parameters are those of a completed step.
        saved_step: The step of the newest checkpoint that this process wrote or read.
        saved_time: When that was, on the monotonic clock.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        rounding: RoundingSchedule,
        stream: BatchStream,
        settings: TrainSettings,
        root: Path,
        reporter: Reporter,
    ) -> None:
        self.parameters, self.optimizer, self.rounding, self.stream = parameters, optimizer, rounding, stream
        self.settings, self.root, self.reporter = settings, root, reporter
        self.device = next(iter(parameters.values())).device
        self.step = 0
        self.progress = Progress()
        self.whole = True
        self.saved_step = 0
        self.saved_time = time.monotonic()
        self._boundary: tuple[dict[str, Any], dict[str, Tensor]] = ({}, {})
        self.note_boundary()

    def peek(self) -> Batch:
        """The first micro-batch of the next step, which stays the next."""
        state = self.stream.state_dict()
        batch = self.stream.next_step()[0]
        self.stream.load_state_dict(state)
        return batch

    def note_boundary(self) -> None:
        """Take this moment as the one to go on from."""
        self._boundary = (self.stream.state_dict(), generator_states(self.device))

    def return_to_boundary(self) -> None:
        """Set data and generators back to the boundary and drop what gradients there are."""
        self.optimizer.zero_grad(set_to_none=True)
        stream_state, generators = self._boundary
        self.stream.load_state_dict(stream_state)
        set_generator_states(generators, self.device)

    def save(self, *, scheduled: bool = True) -> Path:
        """Write a checkpoint of the boundary; returns its folder.

        Args:
            scheduled: It came by the run's own plan, not by an interruption: `roll_back` may return to it.
        """
        if scheduled:
            self.progress.good_step = self.step
        stream_state, generators = self._boundary
        state = {
            "progress": vars(self.progress),
            "stream": stream_state,
            "identity": dict(self.settings.identity),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        weights = {name: tensor.detach() for name, tensor in self._tensors().items()}
        optimizer = optimizer_tensors(self.optimizer, self.parameters)
        checkpoint = Checkpoint(self.step, weights, optimizer, generators, state)
        path = save_checkpoint(self.root, checkpoint, spare=self.progress.good_step)
        self.saved_step, self.saved_time = self.step, time.monotonic()
        return path

    def keep(self, why: str) -> Path | None:
        """Save the last completed step before the run ends early; None where there is nothing to keep."""
        if not self.whole or self.step == 0:
            return None
        path = self.root / f"step-{self.step:06d}"
        if self.saved_step != self.step:
            path = self.save(scheduled=False)
        self.reporter.note(f"{why} after step {self.step}; its state is in {path}; --resume goes on from there")
        return path

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint; False where there is none.

        Raises:
            TrainingError: it belongs to a run with other settings.
        """
        clear_leftovers(self.root)
        checkpoint, skipped = newest_checkpoint(self.root)
        for line in skipped:
            self.reporter.note(line)
        if checkpoint is None:
            self.reporter.note(f"no whole checkpoint in {self.root}: the run starts from the beginning")
            return False
        self._check(checkpoint)
        self.restore(checkpoint)
        self.reporter.note(f"resumed after step {self.step} of {self.progress.total_steps}")
        return True

    def roll_back(self) -> None:
        """Return weights and optimizer to the last checkpoint that the run planned; the data go on from where they are.

        What was counted in time, and the best evaluation, whose model stands in RUN/best, are kept. The checkpoint is
        written again with the new position in the data, so that a run that is killed goes on alike.

        Raises:
            TrainingError: the checkpoint is gone or damaged.
        """
        now, stream_state = self.progress, self.stream.state_dict()
        assert now.good_step is not None
        try:
            checkpoint = load_checkpoint(self.root / f"step-{now.good_step:06d}")
        except (StropError, OSError) as error:
            self.whole = False
            raise TrainingError(f"there is no good state to return to: {error}") from error
        self.restore(checkpoint)
        self.stream.load_state_dict(stream_state)
        self.note_boundary()
        for name in ("train_seconds", "best_valid_loss", "best_step", "events", "micro_batch", "eval_batch"):
            setattr(self.progress, name, getattr(now, name))
        self.save()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become the state that `checkpoint` holds."""
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(checkpoint.weights[name])
        load_optimizer_tensors(self.optimizer, self.parameters, dict(checkpoint.optimizer))
        self.progress = Progress(**checkpoint.state["progress"])
        self.step = self.saved_step = checkpoint.step
        self.rounding.restored(self.step, self.progress.total_steps)
        self._boundary = (dict(checkpoint.state["stream"]), dict(checkpoint.random))
        self.stream.micro_batch = self.progress.micro_batch or self.stream.batch_size
        self.return_to_boundary()

    def _tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model: trained parameters, and scales that were held."""
        return {**self.parameters, **self.rounding.buffers()}

    def _check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint from which this run cannot go on exactly."""
        state = checkpoint.state
        wrong = differences(state["identity"], self.settings.identity)
        shapes = {name: list(tensor.shape) for name, tensor in checkpoint.weights.items()}
        wrong += differences(shapes, {name: list(tensor.shape) for name, tensor in self._tensors().items()})[:10]
        if wrong:
            raise TrainingError(
                f"{self.root}: the run cannot go on exactly, since it began otherwise:\n  "
                + "\n  ".join(wrong)
                + "\nResume with the settings of the run (RUN/config.yaml), or start a new one elsewhere."
            )
        for key, now in (("threads", torch.get_num_threads()), ("torch", torch.__version__)):
            if state.get(key) != now:
                self.reporter.note(f"{key} was {state.get(key)} and is {now}: the run goes on, but not bit for bit")

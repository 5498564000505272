"""What a run minimises: the loss on labels, the divergence from a teacher, or both.

    (1 - d) * cross-entropy + d * KL(teacher || student)        each summed over supervised tokens (`losses.py`)

Validation reports this sum per supervised token as its loss, so that what is chosen by it is what was trained; beside a
teacher its two parts are told as well, as `valid_label_loss` and `valid_divergence`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from strop.data.batches import Batch
from strop.training.losses import Head, TokenBatch, measured_sums, token_loss_sum
from strop.training.teachers import Teacher


class Rounding(Protocol):
    """What is rounded in the student's forward pass beside its weights; `strop.evaluation.kv_rounding` offers it."""

    def of(self, batch: Batch) -> TokenBatch:
        """The same batch, whose forward pass rounds."""
        ...

    def check_reach(self, batch: Batch) -> None:
        """Refuse a model that what is rounded does not reach."""
        ...


@dataclass(frozen=True)
class Objective:
    """The loss of a run.

    Attributes:
        teacher: Whose answers the student is held against; None: the labels' alone.
        share: d, from 0 (labels alone; the divergence is still measured on the validation rows) to 1 (no labels).
        rounding: What is rounded in the student's forward pass, in validation too; the teacher's is left alone.
    """

    teacher: Teacher | None = None
    share: float = 0.0
    rounding: Rounding | None = None

    def check(self, batch: Batch) -> None:
        """Refuse what cannot be computed for batches like this one, the first of the run.

        Raises:
            TrainingError: the teacher cannot keep packed documents apart, or what is rounded does not reach the logits.
        """
        if self.rounding is not None:
            self.rounding.check_reach(batch)
        if self.teacher is not None:
            self.teacher.check(batch)

    def loss_sum(self, model: nn.Module, batch: Batch, *, head: Head | None) -> Tensor:
        """The loss of one micro-batch, summed over its supervised tokens, with gradient.

        Args:
            model: The student.
            batch: The micro-batch.
            head: The student's pieces from `find_head`.
        """
        wanted = self.teacher.wanted(batch) if self.teacher is not None and self.share > 0.0 else None
        return token_loss_sum(model, self._read(batch), head=head, wanted=wanted, share=self.share)[0]

    @torch.no_grad()
    def measured(self, model: nn.Module, batch: Batch, *, head: Head | None) -> dict[str, float]:
        """The loss of one micro-batch without gradient, as sums by name: `loss`, and beside a teacher its parts."""
        if self.teacher is None:
            return {"loss": float(token_loss_sum(model, self._read(batch), head=head)[0])}
        entropy, divergence, _ = measured_sums(model, self._read(batch), self.teacher.wanted(batch), head=head)
        parts = {"label_loss": float(entropy), "divergence": float(divergence)}
        return {"loss": self.mixed(**parts)} | parts

    def _read(self, batch: Batch) -> TokenBatch:
        """The batch as the student reads it."""
        return batch if self.rounding is None else self.rounding.of(batch)

    def mixed(self, label_loss: float, divergence: float) -> float:
        """The loss that its two parts come to; a part that has no share counts for nothing, whatever it is."""
        kept = [(1.0 - self.share, label_loss), (self.share, divergence)]
        return sum(weight * part for weight, part in kept if weight > 0.0)


LABELS: Final = Objective()
"""The labels' cross-entropy alone."""

"""Teachers: what another model says at the supervised tokens of a batch, for the student to be held against.

    beside        a model of its own beside the student, in evaluation mode and without gradient
    switched off  the student itself with its adapters switched off: the base that they lie on, and no second copy

Both give final hidden states [tokens, hidden]; logits are made from them a chunk at a time, by the teacher's own head,
and made again in the backward pass where the student's are. A teacher reads the very rows that the student reads,
packed ones with the mask that isolates their documents. `teacher_cache.py` keeps on the disk what was said before.

Divergences are sums over tokens, in nats, in fp32, or fp64 where the logits are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from strop.data.batches import Batch
from strop.data.packing import PackedAttention, check_isolation
from strop.errors import TrainingError
from strop.layers.surgery import lora_modules
from strop.training.losses import Head, Kept, Wanted, find_head, logits_divergence_sum, on_device, wide


class Teacher(Protocol):
    """Whoever knows what the supervised tokens of a batch should be answered with."""

    def check(self, batch: Batch) -> None:
        """Refuse a teacher that cannot read such batches; `batch` is the first of the run."""
        ...

    def wanted(self, batch: Batch) -> Wanted:
        """What it says at the batch's supervised tokens, in the order of `losses.Kept`."""
        ...


@dataclass(frozen=True)
class HiddenWanted:
    """Final hidden states of a teacher, and what makes logits of them.

    Attributes:
        logits_of: Hidden states [tokens, hidden] to logits [tokens, vocabulary]; the identity where logits are held.
        hidden: [tokens, hidden], tokens added behind to a common number.
        supervised: How many of them count.
    """

    logits_of: Callable[[Tensor], Tensor]
    hidden: Tensor
    supervised: int

    def __getitem__(self, part: slice) -> HiddenWanted:
        """The states of some of the tokens."""
        begin, end, _ = part.indices(len(self.hidden))
        return HiddenWanted(self.logits_of, self.hidden[part], max(0, min(self.supervised, end) - begin))

    def divergence_sum(self, logits: Tensor) -> Tensor:
        """KL(teacher || student), summed over the tokens that count."""
        with torch.no_grad():
            expected = wide(self.logits_of(self.hidden))
        return logits_divergence_sum(expected[: self.supervised].to(logits.dtype), logits[: self.supervised])


class ModelTeacher:
    """A model of its own beside the student.

    Args:
        model: A causal language model on the student's device; it is put into evaluation mode, without gradient.
        attention: What `packed_attention` says of it; None where rows are not packed.
    """

    def __init__(self, model: nn.Module, attention: PackedAttention | None = None) -> None:
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.attention = attention
        self._head: Head | None = None

    def check(self, batch: Batch) -> None:
        """Measure that packed documents are apart in the teacher too.

        Raises:
            TrainingError: they are not.
        """
        batch = self._own(batch)
        if batch.documents is not None:
            try:
                check_isolation(self.model, batch.to(next(self.model.parameters()).device))
            except TrainingError as error:
                raise TrainingError(f"the teacher: {error}") from error
        self._head = find_head(self.model, batch)

    @torch.no_grad()
    def wanted(self, batch: Batch) -> HiddenWanted:
        """One forward pass of the teacher over the batch."""
        return _read(self.model, self._own(batch), self._head, None if self._head is None else self._head.logits)

    def _own(self, batch: Batch) -> Batch:
        return batch if self.attention is None else replace(batch, attention=self.attention)


class SwitchedOffTeacher:
    """The student's own base: its adapters do nothing while the teacher reads.

    Args:
        student: A model with adapters over a base that is not changed.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self._adapters = list(lora_modules(student).values())
        self._head: Head | None = None

    def check(self, batch: Batch) -> None:
        """Nothing to refuse: the student is checked itself."""
        with self._off():
            self._head = find_head(self.student, batch)

    @torch.no_grad()
    def wanted(self, batch: Batch) -> HiddenWanted:
        """One forward pass of the base over the batch."""
        head = self._head

        def logits_of(hidden: Tensor) -> Tensor:
            assert head is not None
            with self._off():
                return head.logits(hidden)

        with self._off():
            return _read(self.student, batch, head, None if head is None else logits_of)

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        """The student in evaluation mode with its adapters switched off."""
        training = self.student.training
        self.student.eval()
        for adapter in self._adapters:
            adapter.switched_off = True
        try:
            yield
        finally:
            for adapter in self._adapters:
                adapter.switched_off = False
            self.student.train(training)


def _read(
    model: nn.Module, batch: Batch, head: Head | None, logits_of: Callable[[Tensor], Tensor] | None
) -> HiddenWanted:
    """What a model says at the supervised tokens: hidden states, or all their logits where it has no head apart."""
    device = next(model.parameters()).device
    inputs, kept = on_device(batch.inputs(), device), Kept.of(batch, device)
    if head is None or logits_of is None:
        return HiddenWanted(_as_they_are, kept.rows(model(**inputs).logits), kept.supervised)
    return HiddenWanted(logits_of, kept.rows(head.base(**inputs).last_hidden_state), kept.supervised)


def _as_they_are(logits: Tensor) -> Tensor:
    return logits

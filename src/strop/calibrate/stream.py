"""`BlockStream`: hidden states of the full-precision and of the quantized model, flowing from block to block.

    full        batch -> embedding -> block 0 -> block 1 -> ...          in full precision
    quantized   batch -> embedding -> block 0' -> block 1' -> ...        through what was made of the blocks

One block is in memory at a time. Batches that calibrate nothing (held out) flow along, so that both models' logits on
them are there at the end without either model ever being whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from strop.calibrate.activations import Activations
from strop.calibrate.block import CalibrationBlock, Feed
from strop.calibrate.replay import REPLAY_BYTES
from strop.data.batches import Batch
from strop.models.blocks import BlockwiseModel
from strop.scratch import Scratch

KEPT_BYTES: Final = 256 << 20
"""Of what layers are given in full precision, kept in memory; none of it under a budget. The rest is on the disk."""
KEPT_DISK_BYTES: Final = 64 << 30


@dataclass(frozen=True)
class BlockError:
    """How far a block's output is from full precision: sum |quantized - full|^2 / sum |full|^2 over the real tokens.

    Attributes:
        calibration: On the rows that calibrated.
        held_out: On those that did not; None where there are none.
    """

    calibration: float
    held_out: float | None


class BlockStream:
    """Batches on their way through a model.

    Args:
        model: The model.
        batches: All of them, those that calibrate first.
        calibrating: How many calibrate; the rest is held out.
        memory_bytes: Of hidden states kept in memory, and of inputs that shorten a block's later passes; the rest goes
            to `scratch`. None: all in memory.
        scratch: Where they go.
        ends: The embedding's and the head's weights in the quantized model, by full name, where they differ; what is
            put there later counts from then on.
        drift: Whether what layers are given in full precision is kept while a block is worked on.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        batches: Sequence[Batch],
        calibrating: int,
        *,
        memory_bytes: int | None = None,
        scratch: Scratch | None = None,
        ends: Mapping[str, Tensor] = MappingProxyType({}),
        drift: bool = False,
    ) -> None:
        self.ends, self._drift = dict(ends), drift
        self.model, self.batches, self.calibrating = model, batches, calibrating
        half, self._replay_bytes, self._kept_bytes = None, REPLAY_BYTES, KEPT_BYTES
        if memory_bytes is not None:
            self._kept_bytes = 0
            self._replay_bytes = min(REPLAY_BYTES, memory_bytes // 4)
            half = memory_bytes // 2 - self._replay_bytes  # twice what is kept, since the allocator leaves gaps
        self._full, self._quantized = Activations(half, scratch), Activations(half, scratch)
        self.rewind()

    def rewind(self) -> None:
        """Put every batch in front of the first block, in the place of what it had become."""
        for number, batch in enumerate(self.batches):
            hidden = self.model.embedded(batch.inputs())
            self._full.put(number, hidden)
            if self.ends:
                with self.model.holding(self.ends):
                    hidden = self.model.embedded(batch.inputs())
            self._quantized.put(number, hidden)

    def through(
        self,
        name: str,
        layers: Sequence[str],
        work: Callable[[CalibrationBlock], Mapping[str, Tensor]],
        *,
        drift: bool = True,
    ) -> BlockError:
        """Take every batch through a block.

        Args:
            name: The block.
            layers: The layers in it that are to be quantized.
            work: Given the block, returns what takes the place of its weights and other parameters from now on.
            drift: Whether it may ask for the drift of the layers' inputs, if the stream keeps what that takes.
        """
        with self.model.brought(name) as module, ExitStack() as stack:
            block = CalibrationBlock(name, module, self._feed(name), layers, replay_bytes=self._replay_bytes)
            kept = None
            if self._drift and drift and layers:
                kept = Activations(self._kept_bytes, stack.enter_context(Scratch(KEPT_DISK_BYTES)))
            with torch.no_grad():
                for number in range(len(self.batches)):
                    inputs = kept if number < self.calibrating else None
                    self._full.put(number, block.exact(number, self._full.get(number), inputs))
            changed = work(block)
            usable = block.usable(changed)
            errors = [[0.0, 0.0], [0.0, 0.0]]
            with torch.no_grad():
                for number in range(len(self.batches)):
                    made = block.again(number, changed, usable)
                    mask = self.tokens(number)
                    wanted = self._full.get(number)[mask].double()
                    sums = errors[number >= self.calibrating]
                    sums[0] += float((made[mask].double() - wanted).square_().sum())
                    sums[1] += float(wanted.square_().sum())
                    self._quantized.put(number, made)
        (lost, whole), (held_lost, held_whole) = errors
        return BlockError(lost / whole if whole else 0.0, held_lost / held_whole if held_whole else None)

    def after(self, number: int, *, quantized: bool) -> Callable[..., Any]:
        """The model's call for a batch that has gone through every block: same arguments, same output."""
        hidden = self.given(number, quantized=quantized)

        def call(**inputs: Any) -> Any:
            with self.model.holding(self.ends if quantized else {}):
                return self.model.after_blocks(inputs, hidden)

        return call

    def given(self, number: int, *, quantized: bool) -> Tensor:
        """Hidden states [rows, length, hidden] of a batch, as far as it has gone."""
        return (self._quantized if quantized else self._full).get(number)

    def _feed(self, name: str) -> Feed:
        return Feed(
            call=lambda number, hidden: self.model.call_of(name, self.batches[number].inputs(), hidden),
            returned=lambda returned: self.model.returns_tuple(name, returned),
            hidden=self._quantized.get,
            target=self._full.get,
            tokens=self.tokens,
            numbers=range(self.calibrating),
        )

    def tokens(self, number: int) -> Tensor:
        """Where a batch has real tokens, bool [rows, length]."""
        batch = self.batches[number]
        return torch.arange(batch.input_ids.shape[1])[None, :] < batch.lengths[:, None]

"""Samples into batches: padding by length, steps that can be replayed, packing.

Shapes: `input_ids`, `labels` [B, T] int64. Padding stands on the right and is told apart by its place, never by its id,
so that a tokenizer whose pad token is its end token learns to stop all the same. Labels are not shifted.

`BatchStream` is endless: each epoch takes every sample exactly once, in an order that the seed and the epoch alone
decide, so its whole state is two numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from strop.data.packing import PackedAttention, block_mask, pack
from strop.data.store import sample_lengths, samples_digest
from strop.data.templates import IGNORED, Sample
from strop.errors import ConfigError, DataError, TrainingError

GROUPED_STEPS: Final = 50
"""Steps whose rows are sorted together, so that a step's rows are like in length and still drawn from many."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        input_ids: Token ids [B, T], padded on the right.
        labels: Ids where they are learned, else -100 [B, T]; not shifted, and -100 at every document's first token.
        lengths: Tokens of each row before its padding [B].
        rows: The indices of the samples in each row.
        documents: Packed: the number of each token's document in its row, -1 in the padding [B, T]; else None.
        position_ids: Packed: positions that restart with each document [B, T]; else None (they count from 0).
        attention: Packed: what the model's mask must hold.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: Tensor
    rows: tuple[tuple[int, ...], ...]
    documents: Tensor | None = None
    position_ids: Tensor | None = None
    attention: PackedAttention = PackedAttention()  # noqa: RUF009  frozen

    @property
    def supervised_tokens(self) -> int:
        """How many predictions the loss sums over (a label at t is predicted from t - 1)."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """Tokens without the padding."""
        return int(self.lengths.sum())

    @property
    def attention_mask(self) -> Tensor | dict[str, Tensor]:
        """Padded: 1 at tokens, 0 at padding [B, T] int64. Packed: what `block_mask` gives, added to the scores."""
        if self.documents is not None:
            return block_mask(self.documents, self.attention)
        positions = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return (positions[None, :] < self.lengths[:, None]).long()

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for `model(**batch.inputs())`; the loss is not the model's part, so labels are left out."""
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "use_cache": False,
        }
        if self.position_ids is not None:
            inputs["position_ids"] = self.position_ids
        return inputs

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        moved = {
            name: value.to(device)
            for name in ("input_ids", "labels", "lengths", "documents", "position_ids")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def with_ids(self, input_ids: Tensor) -> Batch:
        """The same layout over other token ids [B, T]."""
        return replace(self, input_ids=input_ids)

    def select(self, row: int) -> Batch:
        """One row of the batch, still [1, T]."""
        chosen = slice(row, row + 1)
        return replace(
            self,
            input_ids=self.input_ids[chosen],
            labels=self.labels[chosen],
            lengths=self.lengths[chosen],
            rows=self.rows[chosen],
            documents=None if self.documents is None else self.documents[chosen],
            position_ids=None if self.position_ids is None else self.position_ids[chosen],
        )

    def document_count(self, row: int) -> int:
        """How many documents a row holds."""
        return len(self.rows[row])


def padded_batch(samples: Sequence[Sample], rows: Sequence[int], *, pad_id: int) -> Batch:
    """A batch with one sample a row, padded on the right to the longest."""
    lengths = torch.tensor([len(sample) for sample in samples])
    width = int(lengths.max())
    input_ids = torch.full((len(samples), width), pad_id)
    labels = torch.full((len(samples), width), IGNORED)
    for place, sample in enumerate(samples):
        input_ids[place, : len(sample)] = torch.tensor(sample.input_ids)
        labels[place, : len(sample)] = torch.tensor(sample.labels)
    labels[:, 0] = IGNORED
    return Batch(input_ids, labels, lengths, tuple((row,) for row in rows))


def packed_batch(
    rows: Sequence[Sequence[int]], samples: Sequence[Sample], *, pad_id: int, attention: PackedAttention
) -> Batch:
    """A batch whose rows hold several samples each, isolated by the block mask and restarted positions."""
    totals = torch.tensor([sum(len(samples[index]) for index in row) for row in rows])
    shape = (len(rows), int(totals.max()))
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORED)
    documents, positions = torch.full(shape, -1), torch.zeros(shape, dtype=torch.int64)
    for place, row in enumerate(rows):
        begin = 0
        for number, index in enumerate(row):
            sample = samples[index]
            span = slice(begin, begin + len(sample))
            input_ids[place, span] = torch.tensor(sample.input_ids)
            labels[place, span] = torch.tensor(sample.labels)
            labels[place, begin] = IGNORED  # nothing of its own document predicts a first token
            documents[place, span] = number
            positions[place, span] = torch.arange(len(sample))
            begin += len(sample)
        positions[place, begin:] = torch.arange(shape[1] - begin)
    return Batch(input_ids, labels, totals, tuple(map(tuple, rows)), documents, positions, attention)


class BatchStream:
    """An endless, replayable stream of optimizer steps.

    An epoch's rows are dealt evenly over its steps: sizes differ by at most one, none is above
    `batch_size * accumulation`, and no remnant is dropped or makes a step of its own. Within a step rows are sorted by
    length before they are cut into micro-batches, which changes no sum and saves padding.

    With packing, a row is a pack of samples of at most `max_length` tokens. The packs' lengths are worked out once;
    each epoch deals samples of equal length anew, so that every epoch has the same number of steps.

    With `group_by_length`, rows of like length share a step: the shuffled rows are cut into parts of `GROUPED_STEPS`
    steps (of a quarter of the epoch, if that is less), each part is sorted by length and cut into steps, and the
    epoch's steps are shuffled. With packing the same is done with the packs, so that those which nothing fills up do
    not stand beside full ones.

    Args:
        samples: What `prepare` gives, or a list of samples.
        batch_size: Rows of a micro-batch.
        accumulation: Micro-batches of a step, at most.
        packing: Whether rows are packs.
        group_by_length: Whether rows of like length share a step; packs do in any case.
        max_length: Most tokens of a row.
        seed: Decides the order, with the epoch.
        pad_id: Any valid token id; padding is masked by its place.
        attention: With packing, what `packed_attention(model, max_length)` gives.

    Raises:
        DataError: If there is no sample, or one is longer than `max_length`.
        ConfigError: If a size is below 1, or `group_by_length` is asked for beside packing.
    """

    def __init__(
        self,
        samples: Sequence[Sample] | Any,
        *,
        batch_size: int,
        accumulation: int = 1,
        packing: bool = False,
        group_by_length: bool = False,
        max_length: int,
        seed: int = 0,
        pad_id: int = 0,
        attention: PackedAttention | None = None,
    ) -> None:
        self.samples: Sequence[Sample] = samples if isinstance(samples, Sequence) else list(samples)
        for name, value in (("batch_size", batch_size), ("accumulation", accumulation), ("max_length", max_length)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if packing and group_by_length:
            raise ConfigError("packing and group_by_length both save padding, each in its own way; set one of them")
        if not self.samples:
            raise DataError("there is no sample to train on")
        self.lengths = sample_lengths(self.samples)
        longest = max(self.lengths)
        if longest > max_length:
            raise DataError(
                f"a sample has {longest} tokens, above max_length {max_length}; prepare with this max_length"
            )
        self.batch_size, self.accumulation = batch_size, accumulation
        self.packing, self.group_by_length = packing, group_by_length
        self.max_length, self.seed, self.pad_id = max_length, seed, pad_id
        self.micro_batch = batch_size  # rows computed at once; fewer where memory runs out, in as many more parts
        self.attention = attention or PackedAttention()
        self._packs = pack(self.lengths, max_length) if packing else None
        self._digest = samples_digest(self.samples)
        self._epoch, self._step = 0, 0
        self._steps = self._epoch_steps(0)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, the same for all."""
        return math.ceil(self.rows_per_epoch / (self.batch_size * self.accumulation))

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to, from 0."""
        return self._epoch

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch: samples, or packs."""
        return len(self.samples if self._packs is None else self._packs)

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next optimizer step, at most `accumulation`."""
        parts = self._micro_batches(self._steps[self._step])
        self._step += 1
        if self._step == self.steps_per_epoch:
            self._epoch, self._step = self._epoch + 1, 0
            self._steps = self._epoch_steps(self._epoch)
        return [self._batch(part) for part in parts]

    def used_positions(self, width: Callable[[int], int] = int) -> float:
        """The share of an epoch's positions that hold tokens: those of the epoch that the stream stands in.

        Args:
            width: The width at which a batch of so many tokens is trained; as it is, if nothing is said.
        """
        used = positions = 0
        for step in self._steps:
            for part in self._micro_batches(step):
                lengths = [self._row_length(row) for row in part]
                used += sum(lengths)
                positions += len(lengths) * width(max(lengths))
        return used / positions

    def shapes(self, steps: int | None = None) -> list[tuple[int, int]]:
        """Rows and width of the micro-batches of the epoch that the stream stands in, or of its first `steps` steps."""
        parts = [part for step in self._steps[:steps] for part in self._micro_batches(step)]
        return [(len(part), max(self._row_length(row) for row in part)) for part in parts]

    def _row_length(self, row: Sequence[int]) -> int:
        return sum(self.lengths[index] for index in row)

    def _micro_batches(self, rows: Sequence[list[int]]) -> list[Sequence[list[int]]]:
        rows = sorted(rows, key=self._row_length)
        return list(_deal(rows, math.ceil(len(rows) / self.micro_batch)))

    def _batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        if self._packs is None:
            indices = [row[0] for row in rows]
            return padded_batch([self.samples[index] for index in indices], indices, pad_id=self.pad_id)
        return packed_batch(rows, self.samples, pad_id=self.pad_id, attention=self.attention)

    def _epoch_steps(self, epoch: int) -> list[Sequence[list[int]]]:
        """The steps of an epoch in order: for each its rows, each a list of sample indices."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))

        def shuffled(count: int) -> list[int]:
            return torch.randperm(count, generator=generator).tolist()

        samples = shuffled(len(self.samples))
        if self._packs is None:
            rows = [[index] for index in samples]
        else:
            by_length: dict[int, list[int]] = {}
            for index in samples:
                by_length.setdefault(self.lengths[index], []).append(index)
            packs = [[by_length[self.lengths[index]].pop() for index in row] for row in self._packs]
            rows = [packs[place] for place in shuffled(len(packs))]
        count = self.steps_per_epoch
        if not (self.packing or self.group_by_length):
            return list(_deal(rows, count))
        grouped: list[Sequence[list[int]]] = []
        parts = max(math.ceil(count / GROUPED_STEPS), min(4, count))
        for steps in _deal(list(_deal(rows, count)), parts):
            longest_last = sorted((row for step in steps for row in step), key=self._row_length)
            begin = 0
            for step in steps:  # as many rows as the step had
                grouped.append(longest_last[begin : begin + len(step)])
                begin += len(step)
        return [grouped[place] for place in shuffled(count)]

    def _settings(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "accumulation": self.accumulation,
            "packing": self.packing,
            "group_by_length": self.group_by_length,
            "max_length": self.max_length,
            "samples": len(self.samples),
            "samples_sha256": self._digest,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON values: the next step, and what decides the order."""
        return {"epoch": self._epoch, "step": self._step, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken; the next step is the one that would have come then, bit for bit.

        Raises:
            TrainingError: If the samples or a setting differ, so that another order would follow.
        """
        wrong = [
            f"{name} was {state.get(name)!r} and is {value!r}"
            for name, value in self._settings().items()
            if state.get(name) != value
        ]
        if wrong:
            raise TrainingError(
                "the data stream cannot go on exactly: "
                + "; ".join(wrong)
                + "; resume with the settings and data of the run"
            )
        for name, limit in (("epoch", None), ("step", self.steps_per_epoch)):
            value = state.get(name)
            if not isinstance(value, int) or value < 0 or (limit is not None and value >= limit):
                raise TrainingError(
                    f"the data stream's {name} is {value!r}, which is no place in it; the state is damaged"
                )
        self._epoch, self._step = state["epoch"], state["step"]
        self._steps = self._epoch_steps(self._epoch)


def _deal(rows: Sequence[Any], count: int) -> Iterator[Sequence[Any]]:
    """Cut a list into `count` parts whose sizes differ by at most one."""
    for part in range(count):
        yield rows[part * len(rows) // count : (part + 1) * len(rows) // count]


def eval_batches(samples: Sequence[Sample] | Any, batch_size: int, *, pad_id: int = 0) -> Iterator[Batch]:
    """Every sample once, longest first, padded on the right; `Batch.rows` gives the places in the given order.

    Batches of like lengths save padding, and the longest first shows at once whether memory suffices.
    """
    listed: Sequence[Sample] = samples if isinstance(samples, Sequence) else list(samples)
    lengths = sample_lengths(listed)
    order = sorted(range(len(listed)), key=lambda index: -lengths[index])
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        yield padded_batch([listed[index] for index in rows], rows, pad_id=pad_id)

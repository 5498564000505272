"""Several data sets as one, each with a weight.

A weight says how often an epoch takes a set's training rows: 1 (the default) each once, 2 each twice, 0.5 one half of
them, drawn once by the seed, the same in every epoch. So sets without weights are simply one after the other, and the
rows of an epoch are the sum of weight * rows. Each set brings its own validation rows, or has its own held out; those
are never weighted. What is drawn depends on the data, the weights and the seed alone, and the stream's place stays two
numbers.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Final, overload

import torch

from strop.config.settings import DataPart
from strop.data.records import OpenedData, Record, open_data
from strop.data.store import sample_lengths, sample_records, samples_digest
from strop.data.templates import Sample

_SEED_STEP: Final = 1_000_003


class Joined(Sequence[Record]):
    """Sequences of records one after another, none of them copied."""

    def __init__(self, parts: Sequence[Sequence[Record]]) -> None:
        self._parts = tuple(parts)
        self._length = sum(map(len, parts))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Record]:
        return chain.from_iterable(self._parts)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[place] for place in range(self._length)[index]]
        place = range(self._length)[index]
        for part in self._parts:
            if place < len(part):
                return part[place]
            place -= len(part)
        raise IndexError(index)


class Drawn(Sequence[Sample]):
    """Samples taken from others by position, some more than once."""

    def __init__(self, samples: Sequence[Sample], positions: array[int]) -> None:
        self._samples, self._positions = samples, positions
        lengths = sample_lengths(samples)
        self.lengths = array("i", (lengths[position] for position in positions))
        self.records = sample_records(samples)[positions]
        self.digest = hashlib.sha256(samples_digest(samples).encode() + positions.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._samples[position] for position in self._positions[index]]
        return self._samples[self._positions[index]]


@dataclass(frozen=True)
class Mixture:
    """Opened data sets with their weights; one set is a mixture of one.

    Attributes:
        sets: The data sets, in their order.
        weights: How often an epoch takes their training rows.
        seed: Draws the rows of broken weights.
        train: All records to train on, each once.
        valid: All records to choose by.
        test: All records to judge by.
    """

    sets: tuple[OpenedData, ...]
    weights: tuple[float, ...]
    seed: int
    train: Sequence[Record]
    valid: Sequence[Record]
    test: Sequence[Record]

    @property
    def sha256(self) -> str:
        """Of the bytes of all sets, with how their validation rows were drawn; the weights are not in it."""
        return hashlib.sha256(" ".join(one.sha256 for one in self.sets).encode()).hexdigest()

    @property
    def held(self) -> bool:
        """Whether the records are in memory anyway."""
        return all(getattr(part, "held", True) for one in self.sets for part in (one.train, one.valid, one.test))

    def draw(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """An epoch's samples: those of `train`, each as often as its set's weight says.

        Args:
            samples: What was rendered from `train`, in its order.
        """
        if set(self.weights) == {1.0}:
            return samples
        positions = array("q")
        for number, (rows, weight) in enumerate(zip(self._rows_of_sets(samples), self.weights, strict=True)):
            whole = math.floor(weight)
            generator = torch.Generator().manual_seed((self.seed * _SEED_STEP + number) % (1 << 63))
            some = torch.randperm(len(rows), generator=generator)[: round((weight - whole) * len(rows))]
            drawn = torch.cat([torch.arange(len(rows)).repeat_interleave(whole), some]).sort().values
            positions.extend(rows[place] for place in drawn.tolist())
        return Drawn(samples, positions)

    def _rows_of_sets(self, samples: Sequence[Sample]) -> list[range]:
        """Which samples come from which set."""
        records = torch.as_tensor(sample_records(samples))
        ends = torch.tensor([len(one.train) for one in self.sets]).cumsum(0)
        places = [0, *torch.searchsorted(records.contiguous(), ends).tolist()]
        return [range(begin, end) for begin, end in pairwise(places)]

    def lines(self, samples: Sequence[Sample]) -> list[str]:
        """What each set brings, where there are several; `samples` are those of `draw`'s argument."""
        if len(self.sets) == 1:
            return []
        counts = [len(rows) for rows in self._rows_of_sets(samples)]
        drawn = [
            math.floor(weight) * count + round((weight - math.floor(weight)) * count)
            for weight, count in zip(self.weights, counts, strict=True)
        ]
        total = sum(drawn)
        return [
            f"{one.name}: {count:,} samples, {len(one.valid):,} rows to choose by; weight {weight:g}: {number:,} "
            f"samples an epoch, {number / total:.1%} of it"
            for one, weight, count, number in zip(self.sets, self.weights, counts, drawn, strict=True)
        ]


def open_mixture(data: str | Sequence[DataPart], *, seed: int = 0, valid_fraction: float = 0.05) -> Mixture:
    """Open and check what a run's `data` names.

    Raises:
        MissingInputError, DataError: As `open_data`.
    """
    parts = (DataPart(path=data, weight=1.0),) if isinstance(data, str) else tuple(data)
    sets = tuple(open_data(part.path, seed=seed, valid_fraction=valid_fraction) for part in parts)
    splits = {
        name: getattr(sets[0], name) if len(sets) == 1 else Joined([getattr(one, name) for one in sets])
        for name in ("train", "valid", "test")
    }
    return Mixture(sets, tuple(float(part.weight) for part in parts), seed, **splits)

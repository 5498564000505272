"""A cache of keys and values with a slot for each answer that is being written, in room that is there beforehand.

Every layer keeps keys and values as [slots, columns, heads, size]: column t of a slot holds token t of its text, so
that texts of any length stand beside each other without padding on the left, and a slot can be given to another text
while the others are being written. A forward pass is told what it is about before it begins:

    reading(first, rows, start)   rows texts in the slots first, first + 1, .. go on at column `start`, all of them
    writing(lengths)              one token for each of the first slots, each in its own column

Columns past a text's end hold zeros or what an earlier text left: they must be masked, and are overwritten in time.
Attention gets views, so that nothing is copied; the room doubles when it is too small.

Not here: states that are no keys and values, and windows: layers that attend to a window keep the whole text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Slots:
    """What all layers have alike: how much room there is, and what the present forward pass is about.

    Args:
        slots: Texts that stand beside each other.
        columns: Tokens that each of them has room for at first.
    """

    def __init__(self, slots: int, columns: int) -> None:
        self.slots, self.columns = slots, columns
        self.first = self.rows = self.start = 0
        self.index: Tensor | None = None
        """Where the tokens being written go, [rows], counted in columns over all slots; None while reading."""
        self.seen = 0
        """Columns that attention sees while writing."""


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values."""

    is_sliding = False
    is_croppable = False

    def __init__(self, shared: Slots) -> None:
        super().__init__()
        self.shared = shared

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room of the right sizes."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._room(key_states), self._room(value_states)
        self.is_initialized = True

    def _room(self, states: Tensor) -> Tensor:
        # Zeros, not whatever memory holds: a masked column counts 0 times its value, and 0 times NaN is NaN.
        _, heads, _, size = states.shape
        return states.new_zeros((self.shared.slots, self.shared.columns, heads, size))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens [rows, heads, tokens, size]; returns all that attention may look at, [rows, heads, ..]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        return self._put(self.keys, key_states), self._put(self.values, value_states)

    def _put(self, room: Tensor, states: Tensor) -> Tensor:
        at = self.shared
        if at.index is not None:
            room.view(-1, *room.shape[2:]).index_copy_(0, at.index, states[:, :, 0])
            return room[: at.rows, : at.seen].transpose(1, 2)
        end = at.start + states.shape[2]
        rows = room[at.first : at.first + at.rows, :end]
        rows[:, at.start :] = states.transpose(1, 2)
        return rows.transpose(1, 2)

    def grow(self) -> None:
        """Take the room that `shared` says now, and keep what is held."""
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._room(old.transpose(1, 2))
            new[:, : old.shape[1]] = old
            setattr(self, name, new)

    def copy(self, source: int, target: int, rows: int, length: int) -> None:
        """Put the first `length` tokens of one slot into `rows` others, from `target` on."""
        for room in (self.keys, self.values):
            if room is not None:
                room[target : target + rows, :length] = room[source, :length]

    def get_seq_length(self) -> int:
        """Tokens that the texts being read hold before the present pass."""
        return self.shared.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that attention sees, and the place of the first."""
        return self.shared.start + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False


class SlotCache(Cache):
    """The layers of a model together.

    Args:
        layers: How many.
        slots: Texts that stand beside each other.
        columns: Tokens that each has room for at first.
    """

    def __init__(self, layers: int, slots: int, columns: int) -> None:
        self.shared = Slots(slots, columns)
        self.kept = [SlotLayer(self.shared) for _ in range(layers)]
        super().__init__(layers=list(self.kept))

    def need(self, columns: int) -> bool:
        """Make room for texts of so many tokens; returns whether it had to grow."""
        if columns <= self.shared.columns:
            return False
        self.shared.columns = max(columns, 2 * self.shared.columns)
        for layer in self.kept:
            layer.grow()
        return True

    def reading(self, first: int, rows: int, start: int) -> None:
        """The next pass goes on with the texts in `rows` slots, all at column `start`."""
        at = self.shared
        at.first, at.rows, at.start, at.index = first, rows, start, None

    def writing(self, index: Tensor, seen: int) -> None:
        """The next pass writes one token into each of the first slots.

        Args:
            index: Where, [rows]: slot * columns + column.
            seen: Columns that attention is shown.
        """
        at = self.shared
        at.first, at.rows, at.start, at.index, at.seen = 0, len(index), seen - 1, index, seen

    def copy(self, source: int, target: int, *, rows: int = 1, length: int) -> None:
        """Put the first `length` tokens of one slot into `rows` others, from `target` on."""
        for layer in self.kept:
            layer.copy(source, target, rows, length)


def no_columns(slots: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A mask that lets no column be seen, [slots, 1, 1, columns]: what is added to attention's scores."""
    return torch.full((slots, 1, 1, columns), torch.finfo(dtype).min, dtype=dtype, device=device)

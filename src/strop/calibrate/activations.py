"""`Activations`: the hidden states between two blocks, in memory up to a budget and in a temporary file above it.

One tensor per batch, [rows, length, hidden] float32. A batch's tensor keeps its size from block to block, so that it is
written over its predecessor, and the file never grows past one set of them.
"""

from __future__ import annotations

from torch import Tensor

from strop.errors import DataError
from strop.scratch import Scratch, Stored


class Activations:
    """Tensors by number; those that the budget does not hold are on the disk.

    Args:
        memory_bytes: Most bytes kept in memory; None: all of them.
        disk_bytes: Most bytes written to the disk, to be had from `Scratch`.
    """

    def __init__(self, memory_bytes: int | None = None, scratch: Scratch | None = None) -> None:
        self._left = memory_bytes
        self._scratch = scratch
        self._held: dict[int, Tensor | Stored] = {}

    def put(self, number: int, tensor: Tensor) -> None:
        """Keep a tensor under its number, in place of the one before.

        Raises:
            DataError: it must go to the disk, and the disk has no room.
        """
        before = self._held.get(number)
        if isinstance(before, Stored):
            assert self._scratch is not None
            self._held[number] = self._scratch.put(tensor, over=before) or before
            return
        nbytes = tensor.numel() * tensor.element_size()
        if isinstance(before, Tensor) or self._left is None or self._scratch is None or nbytes <= self._left:
            if self._left is not None and before is None:
                self._left -= nbytes
            self._held[number] = tensor
            return
        stored = self._scratch.put(tensor)
        if stored is None:
            raise DataError(
                f"calibration: {nbytes:,} more bytes of activations do not fit on the disk beside "
                f"{self._scratch.used_bytes:,} that are there; free some space, or use fewer rows (--max-rows)"
            )
        self._held[number] = stored

    def get(self, number: int) -> Tensor:
        """The tensor kept under a number, bit for bit."""
        held = self._held[number]
        if isinstance(held, Tensor):
            return held
        assert self._scratch is not None
        return self._scratch.get(held)

    def drop(self, number: int) -> None:
        """Let go of what is kept under a number, if anything is; its place in memory is free for others."""
        held = self._held.pop(number, None)
        if self._left is not None and isinstance(held, Tensor):
            self._left += held.numel() * held.element_size()

    def __contains__(self, number: int) -> bool:
        return number in self._held

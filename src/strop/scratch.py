"""Tensors set aside on the disk, bit for bit, so that two models need not be in memory at once.

One temporary file without a name, gone when it is closed or the process ends. It is read and written, not mapped, so
that its pages never count as the process's memory. Never more than `limit_bytes`, nor than half of the free space
there.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Final

import torch
from torch import Tensor

DEFAULT_LIMIT_BYTES: Final = 4 << 30


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the file, and what it was."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Scratch:
    """A bounded temporary file of tensors; a context manager.

    Args:
        limit_bytes: The most it may hold.

    Attributes:
        used_bytes: What it holds.
    """

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.limit_bytes = min(limit_bytes, shutil.disk_usage(tempfile.gettempdir()).free // 2)
        self.used_bytes = 0
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="strop-")  # noqa: SIM115  closed by `close`

    def put(self, tensor: Tensor, over: Stored | None = None) -> Stored | None:
        """Append a copy of `tensor`, or write it over another of its size; None where the limit does not allow it."""
        stored = Stored(self.used_bytes if over is None else over.offset, tuple(tensor.shape), tensor.dtype)
        if over is not None and stored.nbytes != over.nbytes:
            raise ValueError(f"{stored.nbytes} bytes cannot be written over {over.nbytes}")
        if over is None and self.used_bytes + stored.nbytes > self.limit_bytes:
            return None
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        self._file.seek(stored.offset)
        self._file.write(content.data)
        self.used_bytes = max(self.used_bytes, stored.offset + stored.nbytes)
        return stored

    def get(self, stored: Stored) -> Tensor:
        """Read a tensor back, bit for bit."""
        if not stored.nbytes:
            return torch.empty(stored.shape, dtype=stored.dtype)
        self._file.seek(stored.offset)
        content = bytearray(self._file.read(stored.nbytes))
        if len(content) != stored.nbytes:
            raise OSError(f"a temporary file lost {stored.nbytes} bytes at {stored.offset}; is the disk full?")
        return torch.frombuffer(content, dtype=stored.dtype).reshape(stored.shape)

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

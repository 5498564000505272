"""The container: keys and tensors written one after the other, into a file that gets its name once it is whole.

    "GGUF", version 3, number of tensors, number of keys           u32, u64, u64, little endian
    key, type, value        for each key                           texts as u64 length and UTF-8
    name, dimensions, type, offset   for each tensor               the row first; offsets from the start of the data
    padding to 32 bytes, then each tensor padded to 32 bytes

A tensor is made when its turn comes, in pieces if it likes, so that memory holds a piece; the bytes that it will take
are known from its shape, and the disk is asked for them before anything is written.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from strop.errors import DiskFullError, UsageError
from strop.files.folders import sync
from strop.files.gguf.types import type_named

if TYPE_CHECKING:
    from strop.files.gguf.rope import Value  # loads torch

ALIGNMENT: Final = 32
_MAGIC: Final = b"GGUF"
_VERSION: Final = 3
_U8, _U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64, _I64 = 0, 4, 5, 6, 7, 8, 9, 10, 11
_MARGIN_BYTES: Final = 1 << 20
"""Left free on the disk, for the texts that stand beside the file."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor whose turn comes.

    Attributes:
        name: its name in the file.
        type: its type's name.
        shape: the row last, as torch has it.
        make: its bytes, in pieces, in order.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    make: Callable[[], Iterable[Bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes of it, without padding."""
        return type_named(self.type).nbytes(self.shape, where=self.name)


def header_bytes(metadata: Mapping[str, Value], tensors: Sequence[TensorToWrite]) -> bytes:
    """Everything that stands before the data, padded.

    Raises:
        ValueError: a name comes twice, or is longer than llama.cpp reads (63 bytes).
    """
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        raise ValueError(f"the tensor {next(n for n in names if names.count(n) > 1)!r} is to be written twice")
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(value)]
    offset = 0
    for tensor in tensors:
        if len(tensor.name.encode()) > 63:
            raise ValueError(f"the name {tensor.name!r} is longer than the 63 bytes that llama.cpp reads")
        sizes = tuple(reversed(tensor.shape))
        parts.append(_text(tensor.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        parts.append(struct.pack("<IQ", type_named(tensor.type).number, offset))
        offset += _padded(tensor.nbytes)
    head = b"".join(parts)
    return head + bytes(-len(head) % ALIGNMENT)


def file_bytes(metadata: Mapping[str, Value], tensors: Sequence[TensorToWrite]) -> int:
    """Bytes of the whole file."""
    return len(header_bytes(metadata, tensors)) + sum(_padded(tensor.nbytes) for tensor in tensors)


def write_gguf(
    file: BinaryIO,
    metadata: Mapping[str, Value],
    tensors: Sequence[TensorToWrite],
    *,
    told: Callable[[int, str], None] = lambda done, name: None,
) -> None:
    """Write a file, one piece of a tensor in memory at a time.

    Args:
        file: where to, from its present place.
        metadata: the keys; a bool, int, float, text, bytes, or a list of one kind of them.
        tensors: in the order of the file.
        told: called after each tensor with how many are done and its name.

    Raises:
        ValueError: a tensor makes another number of bytes than its shape and type take.
    """
    file.write(header_bytes(metadata, tensors))
    for done, tensor in enumerate(tensors, start=1):
        written = 0
        for piece in tensor.make():
            flat = np.ascontiguousarray(piece).reshape(-1)
            file.write(flat.data)
            written += flat.nbytes
        if written != tensor.nbytes:
            raise ValueError(f"{tensor.name}: {written:,} bytes were made, {tensor.nbytes:,} announced")
        file.write(bytes(-written % ALIGNMENT))
        told(done, tensor.name)


def check_file_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Where a file is to stand, refused before any work where it cannot.

    Raises:
        UsageError: something stands there that may not be replaced, a folder or a link, or a name that is none.
    """
    text = os.fspath(path)
    target = Path(os.path.abspath(text))
    if "\0" in text or not target.name or text.endswith(("/", os.sep)):
        raise UsageError(f"{text!r}: is no name of a file; name one, such as model.gguf")
    if target.is_symlink():
        raise UsageError(f"{path}: is a link, and a file cannot replace it; name the file that it points to")
    if target.is_dir():
        raise UsageError(f"{path}: is a folder; name a file in it")
    if target.exists() and not overwrite:
        raise UsageError(f"{path}: stands there already; choose another output, or replace it (--overwrite)")
    if target.parent.exists() and not target.parent.is_dir():
        raise UsageError(f"{target.parent}: is a file, and the output needs a folder there")
    return target


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        DiskFullError: how much is needed, how much there is.
    """
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed_bytes + _MARGIN_BYTES > free:
        raise DiskFullError(
            f"{folder}: the file takes {needed_bytes:,} bytes, and {free:,} are free; free "
            f"{needed_bytes + _MARGIN_BYTES - free:,} more, or choose an output on another disk"
        )


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give the path of a temporary file, which takes the name `path` when the block ends without an exception.

    It is flushed before the rename, and its folder after it. When the block raises, Ctrl-C included, it is removed, and
    what stood at `path` is untouched.

    Raises:
        UsageError: as `check_file_target`.
    """
    target = check_file_target(path, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes it private
        yield temporary
        sync(temporary)
        check_file_target(target, overwrite=overwrite)  # another process may have been there meanwhile
        os.replace(temporary, target)
        sync(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _padded(nbytes: int) -> int:
    return math.ceil(nbytes / ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    """A key's type and value."""
    kind = _kind(value)
    if isinstance(value, bytes):
        return struct.pack("<IIQ", _ARRAY, _U8, len(value)) + value
    if not isinstance(value, list):
        return struct.pack("<I", kind) + _bare(kind, value)
    kind = _I32 if kind == _U32 else kind
    if kind in (_I32, _F32):
        items = np.asarray(value, dtype=np.int32 if kind == _I32 else np.float32).tobytes()
    else:
        items = b"".join(_bare(kind, item) for item in value)
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + items


def _kind(value: Value) -> int:
    """The type of a value; of a list, that of its items."""
    if isinstance(value, bytes):
        return _ARRAY
    one = value[0] if isinstance(value, list) and value else value
    if isinstance(one, list):
        return _STRING
    if isinstance(one, bool):
        return _BOOL
    if isinstance(one, int):
        if 0 <= one < 1 << 32:
            return _U32
        return _U64 if one >= 0 else _I64
    return _F32 if isinstance(one, float) else _STRING


def _bare(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _text(value)
    return struct.pack({_BOOL: "<?", _U32: "<I", _U64: "<Q", _I64: "<q", _F32: "<f"}[kind], value)

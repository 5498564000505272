"""The reader of GGUF files: everything a file says of itself is checked before anything is allocated.

    "GGUF"  version u32  tensors u64  keys u64
    keys    of each: name (u64 length, UTF-8), kind u32, value
    tensors of each: name, dimensions u32, sizes u64 (the row first), type u32, offset u64
    data    from the next multiple of `general.alignment` (32 unless given); offsets count from there

Versions 2 and 3, little endian. A file is mapped, not read: opening one takes memory for the names of its tensors
alone; `metadata` gives a long list when it is asked for, `raw` a view of the file, `tensor` the values.

Nothing in a file is trusted. Lengths and counts are held against the bytes that are there; names are unique, printable
and short; lists are nested four deep at the most; offsets are aligned, within the file, and overlap nowhere. A file
that breaks a rule is refused with its name, the place, what was found and what is needed. No path in it is followed.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from strop.errors import FileFormatError, FormatError, MissingInputError
from strop.files.gguf.types import BY_NUMBER, TYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_HEADER_BYTES = 32 << 20
"""Bytes of keys and tensor descriptions; three times what the largest vocabularies of today take."""

MAX_ITEMS = 1 << 20
"""Items of one list, those of lists within it included."""

MAX_ENTRIES = 1 << 16
"""Keys of a file, and tensors of a file."""

DEFAULT_ALIGNMENT = 32
"""Where a tensor's data may begin, unless `general.alignment` says otherwise."""

_MAX_DEPTH = 4
_MAX_DIMENSIONS = 4
_MAX_KEY = 65_535
_MAX_NAME = 256
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: Mapping[int, np.dtype[Any]] = {
    kind: np.dtype(name)
    for kind, name in enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "", "", "<u8", "<i8", "<f8"))
    if name
}
_OLD_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg", b"ggml", b"ggmf", b"ggjt", b"ggla")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its name, type, shape in torch's order ([out, in]), and its bytes from `start` on."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GgufFile:
    """A GGUF file whose header has been checked.

    Attributes:
        path: The file.
        version: Of the format, 2 or 3.
        metadata: Every key's value: numbers, texts, bools, and lists of them. A list is made anew at each look.
        tensors: Every tensor's description by its name, in the file's order.
        alignment: What offsets of tensors are multiples of, bytes.
    """

    def __init__(
        self, path: Path, version: int, metadata: Mapping[str, object], tensors: Mapping[str, TensorInfo], data: Any
    ) -> None:
        self.path = path
        self.version = version
        self.metadata = metadata
        self.tensors = tensors
        self._data = data

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GgufFile:
        """Map a file and check its header.

        Raises:
            MissingInputError: There is no such file.
            FileFormatError: It is not a GGUF file, a truncated one, one of another version or byte order, or breaks a
                rule of the format.
        """
        data = _mapped(path)
        cursor = _Cursor(data, path)
        version, tensor_count, key_count = _preamble(cursor)
        values: dict[str, object] = {}
        for place in range(key_count):
            key = cursor.name(f"the name of key {place + 1}", _MAX_KEY)
            if key in values:
                raise cursor.error(f"key {key!r} comes twice")
            values[key] = _value(cursor, key)
        metadata = Metadata(values)
        _check_whole(metadata, path)
        found = [_description(cursor, place) for place in range(tensor_count)]
        alignment = _alignment(metadata, cursor)
        data_start = -(-cursor.place // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for info in found:
            if info.name in tensors:
                raise FileFormatError(f"{path}: tensor {info.name!r} comes twice")
            if info.start % alignment:
                raise FileFormatError(
                    f"{path}: tensor {info.name!r}: offset {info.start:,} is not a multiple of the alignment, "
                    f"{alignment}"
                )
            start = data_start + info.start
            tensors[info.name] = TensorInfo(info.name, info.type, info.shape, start, info.nbytes)
        _check_extent(path, tensors.values(), len(data))
        return cls(Path(path), version, metadata, tensors, data)

    @property
    def alignment(self) -> int:
        """What offsets of tensors are multiples of, bytes."""
        given = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        assert isinstance(given, int)
        return given

    def raw(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A tensor's bytes, uint8 [bytes], a view of the mapped file that cannot be written to.

        Raises:
            FileFormatError: The file holds no tensor of that name.
        """
        info = self._info(name)
        return np.frombuffer(self._data, np.uint8, info.nbytes, info.start)

    def span(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Bytes `start` to `stop` of the file, uint8, whatever they belong to; a view as `raw`'s."""
        return np.frombuffer(self._data, np.uint8, stop - start, start)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self._data)

    def sha256(self) -> str:
        """The SHA-256 of the whole file, as 64 hexadecimal digits."""
        return hashlib.sha256(self._data).hexdigest()

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor decoded, in torch's shape; computed in float32 and rounded once to `dtype` (float32 unless given).

        Raises:
            FileFormatError: The file holds no tensor of that name, or one with NaN or infinite values.
            FormatError: It has a type that strop does not decode.
        """
        import torch  # here, for headers and bytes are read in a tenth of the time that it takes to load

        from strop.files.gguf.blocks import decode

        dtype = dtype or torch.float32
        info, where = self._info(name), f"{self.path}: {name}"
        values = decode(self.raw(name), info.type, info.shape, dtype=dtype, where=where)
        if not torch.isfinite(values).all():
            raise FileFormatError(
                f"{where}: holds NaN or infinite values (as {info.type}, read in {str(dtype).removeprefix('torch.')}); "
                "the file is damaged, or a scale overflowed when it was made"
            )
        return values

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise FileFormatError(f"{self.path}: holds no tensor {name!r}")
        return self.tensors[name]


class Metadata(Mapping[str, object]):
    """The keys of a file; lists stay in the file until they are looked at, and are decoded at each look."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> object:
        value = self._values[key]
        return value.items() if isinstance(value, _List) else value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class _List:
    """A list in the file that has been checked: its place and what its items are."""

    data: Any
    start: int
    kind: int
    count: int

    def items(self) -> list[object]:
        return _items(self.data, self.start, self.kind, self.count)[0]


def _items(data: Any, start: int, kind: int, count: int) -> tuple[list[object], int]:
    """The items of a checked list, and where it ends."""
    if kind in _SCALARS:
        numbers = np.frombuffer(data, _SCALARS[kind], count, start) if count else np.empty(0, _SCALARS[kind])
        return numbers.tolist(), start + count * _SCALARS[kind].itemsize
    found: list[object] = []
    for _ in range(count):
        if kind == _STRING:
            (length,) = _U64.unpack_from(data, start)
            start += 8 + length
            found.append(str(data[start - length : start], "utf-8"))
        else:
            inner_kind, inner_count = _LIST_HEAD.unpack_from(data, start)
            inner, start = _items(data, start + _LIST_HEAD.size, inner_kind, inner_count)
            found.append(inner)
    return found, start


_U32, _U64, _LIST_HEAD = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<IQ")


class _Cursor:
    """A place in the header, moved on by what is read; nothing is read past the end of the file or of the limit."""

    def __init__(self, data: Any, path: str | os.PathLike[str]) -> None:
        self.data = data
        self.path = path
        self.place = 0
        self.end = min(len(data), MAX_HEADER_BYTES)

    def error(self, text: str) -> FileFormatError:
        return FileFormatError(f"{self.path}: at byte {self.place:,}: {text}")

    def skip(self, count: int, what: str) -> int:
        """Move on by `count` bytes that must be there; the place before."""
        start = self.place
        if count > self.end - start:
            if self.end < len(self.data):
                raise self.error(
                    f"{what} takes the header past {MAX_HEADER_BYTES:,} bytes, the most that is read; no model of "
                    "today has half as much"
                )
            raise self.error(
                f"{what} takes {count:,} bytes, and the file holds {self.end - start:,} more. It is truncated or "
                "damaged"
            )
        self.place = start + count
        return start

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self.data, self.skip(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self.data, self.skip(8, what))[0]

    def text(self, what: str) -> str:
        length = self.u64(f"the length of {what}")
        start = self.skip(length, what)
        try:
            return str(self.data[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 ({error.reason}, byte {error.start})") from None

    def name(self, what: str, limit: int) -> str:
        """A text that a person may see: not empty, printable, at most `limit` bytes."""
        (length,) = _U64.unpack_from(self.data, self.skip(8, f"the length of {what}"))
        if not 0 < length <= limit:
            raise self.error(f"{what} has {length:,} bytes; 1 to {limit:,} are allowed")
        self.place -= 8
        name = self.text(what)
        if not name.isprintable():
            raise self.error(f"{what} is {name[:40]!r}; a name holds no control characters")
        return name


def _mapped(path: str | os.PathLike[str]) -> Any:
    """The bytes of a regular file."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise MissingInputError(f"{path}: is a folder; name the GGUF file in it")
        if not stat.S_ISREG(mode):  # a pipe would be waited for without end
            raise FileFormatError(f"{path}: is not a regular file; copy what it gives into one first")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise FileFormatError(f"{path}: {size} bytes; a GGUF file has at least 24")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file") from None


def _preamble(cursor: _Cursor) -> tuple[int, int, int]:
    """Version and the counts of tensors and keys."""
    magic = bytes(cursor.data[:4])
    cursor.skip(4, "the magic")
    if magic != b"GGUF":
        if magic in _OLD_MAGICS:
            kind = "a file of llama.cpp from before GGUF; convert the original model again"
        elif bytes(cursor.data[:20]).startswith(b"version https://git"):
            kind = "a Git LFS pointer in the place of a file; fetch the file itself (git lfs pull)"
        else:
            kind = "no GGUF file, whose first bytes are 'GGUF'"
        raise FileFormatError(f"{cursor.path}: begins with {magic!r}: {kind}")
    version = cursor.u32("the version")
    if version and version & 0xFFFF == 0:
        raise FileFormatError(
            f"{cursor.path}: is a big-endian GGUF file (version {version >> 24}); only little-endian ones are read. "
            "Convert it with gguf-convert-endian of the gguf package"
        )
    if version not in (2, 3):
        raise FileFormatError(f"{cursor.path}: is version {version:,} of GGUF; versions 2 and 3 are read")
    counts: list[int] = []
    for what, least in (("tensors", 24), ("keys", 13)):
        count = cursor.u64(f"the number of {what}")
        most = min(MAX_ENTRIES, (len(cursor.data) - cursor.place) // least)
        if count > most:
            raise cursor.error(f"the number of {what} is {count:,}; at most {most:,} can be in this file")
        counts.append(count)
    return version, counts[0], counts[1]


def _value(cursor: _Cursor, key: str) -> object:
    """The value of a key: a number, a bool, a text, or the place of a list whose items have been checked."""
    kind = cursor.u32(f"the kind of {key!r}")
    if kind == _STRING:
        return cursor.text(f"the text of {key!r}")
    if kind == _ARRAY:
        inner, count = cursor.u32(f"the kind of {key!r}"), cursor.u64(f"the length of {key!r}")
        start = cursor.place
        _check_list(cursor, key, inner, count, depth=1, left=MAX_ITEMS)
        return _List(cursor.data, start, inner, count)
    if kind not in _SCALARS:
        raise cursor.error(f"the kind of {key!r} is {kind:,}; kinds 0 to 12 are known")
    start = cursor.skip(_SCALARS[kind].itemsize, f"the value of {key!r}")
    if kind == _BOOL and cursor.data[start] > 1:
        raise cursor.error(f"{key!r} is a bool of {cursor.data[start]}; 0 and 1 are allowed")
    return np.frombuffer(cursor.data, _SCALARS[kind], 1, start)[0].item()


def _check_list(cursor: _Cursor, key: str, kind: int, count: int, *, depth: int, left: int) -> int:
    """Move past a list, every item checked; how many items may still come."""
    if count > left:
        raise cursor.error(f"the list {key!r} has more than {MAX_ITEMS:,} items (here {count:,})")
    left -= count
    if kind in _SCALARS:
        start = cursor.skip(count * _SCALARS[kind].itemsize, f"the list {key!r}")
        if kind == _BOOL and count and np.frombuffer(cursor.data, np.uint8, count, start).max() > 1:
            raise cursor.error(f"the list {key!r} holds a bool that is neither 0 nor 1")
    elif kind == _STRING:
        _check_texts(cursor, key, count)
    elif kind != _ARRAY:
        raise cursor.error(f"the kind of the items of {key!r} is {kind:,}; kinds 0 to 12 are known")
    elif depth == _MAX_DEPTH:
        raise cursor.error(f"{key!r} nests lists more than {_MAX_DEPTH} deep")
    else:
        for _ in range(count):
            inner, size = cursor.u32(f"the kind of {key!r}"), cursor.u64(f"the length of {key!r}")
            left = _check_list(cursor, key, inner, size, depth=depth + 1, left=left)
    return left


def _check_texts(cursor: _Cursor, key: str, count: int) -> None:
    """Move past texts; a loop of its own, for vocabularies have hundreds of thousands."""
    data, place, end = cursor.data, cursor.place, cursor.end
    for _ in range(count):
        start = place + 8
        stop = start + _U64.unpack_from(data, place)[0] if start <= end else end + 1
        try:
            if stop > end:
                break
            str(data[start:stop], "utf-8")
        except UnicodeDecodeError:
            break
        place = stop
    else:
        cursor.place = place
        return
    cursor.place = place
    cursor.text(f"a text of {key!r}")  # says what is wrong with it


def _description(cursor: _Cursor, place: int) -> TensorInfo:
    """A tensor as the header has it: `start` counts from the start of the data."""
    name = cursor.name(f"the name of tensor {place + 1}", _MAX_NAME)
    what = f"tensor {name!r}"
    dimensions = cursor.u32(f"{what}: the number of dimensions")
    if dimensions > _MAX_DIMENSIONS:
        raise cursor.error(f"{what} has {dimensions:,} dimensions; at most {_MAX_DIMENSIONS} are allowed")
    sizes = [cursor.u64(f"{what}: a size") for _ in range(dimensions)]
    number = cursor.u32(f"{what}: the type")
    offset = cursor.u64(f"{what}: the offset")
    total = 1
    for size in sizes:
        total *= size
    if not 0 < total < 1 << 63:
        raise cursor.error(f"{what} has sizes {sizes}; each is at least 1, and their product below 2^63")
    if number not in BY_NUMBER:
        known = ", ".join(TYPES)
        raise cursor.error(f"{what} has type {number:,}, which no GGUF type has (known: {known})")
    shape = tuple(reversed(sizes))
    try:
        nbytes = BY_NUMBER[number].nbytes(shape, where=what)
    except FormatError as error:
        raise cursor.error(str(error)) from None
    return TensorInfo(name, BY_NUMBER[number].name, shape, offset, nbytes)


def _check_whole(metadata: Mapping[str, object], path: str | os.PathLike[str]) -> None:
    """Refuse one part of a model that was split: what is told of it would not be true of the model."""
    parts = metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise FileFormatError(
            f"{path}: is one of {parts:,} parts of a model; join them first: llama-gguf-split --merge FIRST_PART WHOLE"
        )


def _alignment(metadata: Mapping[str, object], cursor: _Cursor) -> int:
    given = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(given) is not int or given < 1 or given & (given - 1) or given > MAX_HEADER_BYTES:
        raise FileFormatError(
            f"{cursor.path}: general.alignment is {str(given)[:40]!r}; a power of two up to {MAX_HEADER_BYTES:,} is "
            "needed"
        )
    return given


def _check_extent(path: str | os.PathLike[str], tensors: Any, size: int) -> None:
    """Tensors lie within the file and overlap nowhere."""
    end, before = 0, ""
    for info in sorted(tensors, key=lambda one: one.start):
        if info.start < end:
            raise FileFormatError(
                f"{path}: tensor {info.name!r} begins at byte {info.start:,}, within tensor {before!r} (to {end:,})"
            )
        end, before = info.start + info.nbytes, info.name
        if end > size:
            raise FileFormatError(
                f"{path}: tensor {info.name!r} ends at byte {end:,}, the file at {size:,}. It is truncated or damaged"
            )

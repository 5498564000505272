"""Tensors in safetensors files: checked before anything is allocated, read one at a time, written one at a time.

A safetensors file is ``[8 bytes: header length, little endian] [header: JSON] [data]``; the header gives each tensor's
dtype, shape and byte range in the data, and the ranges fill the data without a gap. A model is one such file
(`model.safetensors`) or several with `model.safetensors.index.json`, which says which tensor is where.

`read_header` trusts nothing in the file: every length, offset and name is checked against the file's true size first,
and an error names the file and the field. `iter_tensors` holds one tensor in memory; `write_shards` holds what one
`Part` makes. Only little-endian machines are served, as torch's own CPU tensors are written as they lie in memory.
Pickle files (`pytorch_model.bin`) are refused by name: opening one runs whatever code is in it.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from strop.errors import FileFormatError, MissingInputError, ModelError
from strop.files.folders import inside, read_json, write_json

MAX_HEADER_BYTES = 8 << 20
"""The longest header that is read: that of some 70,000 tensors. The format allows 100 MB, whose JSON could take GBs."""

MAX_HEADER_MARKS = 600_000
"""Commas and opening brackets of a header that is read; each may become an object of its own."""

MAX_SHARD_BYTES = 5_000_000_000
"""The size at which a model is split, as transformers splits it."""

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The format's names of the dtypes that torch has."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its dtype, its shape, and its bytes [start, end) counted from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: its tensors, the offset of the data in the file, and its metadata."""

    entries: Mapping[str, Entry]
    data_start: int
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Part:
    """Tensors that are made together when their turn to be written comes.

    Attributes:
        specs: name to (dtype, shape) of each tensor that `make` will return, in the order of writing.
        make: returns the tensors themselves; they are dropped once written.
    """

    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    make: Callable[[], Mapping[str, Tensor]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Part:
        """Return the part of tensors that exist already."""
        return cls({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, lambda: tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.specs.values())


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        MissingInputError: there is no such file.
        FileFormatError: the length, the JSON, a dtype, a shape or an offset is not what the format demands, tensors
            overlap or leave a gap, or the data end before or after the last tensor.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe would be waited for without end
            raise FileFormatError(f"{path}: is not a regular file; copy what it gives into one first")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise FileFormatError(f"{path}: {size} bytes; a safetensors file has at least 8 (the header's length)")
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise FileFormatError(
                    f"{path}: header length {length:,}; the file holds {size - 8:,} bytes after it. The file is "
                    "truncated, or no safetensors file"
                )
            if length > MAX_HEADER_BYTES:
                raise FileFormatError(
                    f"{path}: header length {length:,}; headers of up to {MAX_HEADER_BYTES:,} bytes are read, and a "
                    "thousand tensors take a hundred thousand"
                )
            raw = file.read(length)
    except (FileNotFoundError, IsADirectoryError):
        raise MissingInputError(f"{path}: no such file") from None
    marks = sum(raw.count(mark) for mark in (b",", b"[", b"{"))
    if marks > MAX_HEADER_MARKS:
        raise FileFormatError(
            f"{path}: header: {marks:,} commas and opening brackets; up to {MAX_HEADER_MARKS:,} are read, and a tensor "
            "has eight"
        )
    try:
        text = raw.decode("utf-8")
        if not text.startswith("{"):
            raise ValueError("it does not begin with '{'")
        fields = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: header: is not the JSON that the format demands ({error})") from None
    if not isinstance(fields, dict):
        raise FileFormatError(f"{path}: header: a JSON {type(fields).__name__}, an object is needed")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileFormatError(f"{path}: header: __metadata__ must map texts to texts")
    entries = {name: _entry(f"{path}: {_label(name)}", field) for name, field in fields.items()}
    _check_extent(path, entries, size - 8 - length)
    return Header(entries, 8 + length, metadata)


def read_tensor(path: str | os.PathLike[str], name: str, *, header: Header | None = None) -> Tensor:
    """Read one tensor of a safetensors file.

    Raises:
        FileFormatError: as `read_header`, or the file holds no tensor of that name.
    """
    header = header or read_header(path)
    if name not in header.entries:
        raise FileFormatError(f"{path}: holds no tensor {name!r}")
    with open(path, "rb") as file:
        return _read(file, header, header.entries[name])


def read_rows(path: str | os.PathLike[str], name: str, start: int, stop: int, *, header: Header) -> Tensor:
    """Read rows [start, stop) of one tensor, so that a large one need never be whole in memory.

    Raises:
        FileFormatError: the file holds no tensor of that name, or ended meanwhile.
    """
    if name not in header.entries:
        raise FileFormatError(f"{path}: holds no tensor {name!r}")
    entry = header.entries[name]
    row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    part = Entry(entry.dtype, (stop - start, *entry.shape[1:]), entry.start + start * row, entry.start + stop * row)
    with open(path, "rb") as file:
        return _read(file, header, part)


def read_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read all tensors of one safetensors file."""
    header = read_header(path)
    with open(path, "rb") as file:
        return {name: _read(file, header, entry) for name, entry in header.entries.items()}


def weight_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes of all files that hold a model's weights; of a GGUF file, its own.

    Raises:
        As `tensor_files`.
    """
    if os.path.isfile(folder):
        return os.path.getsize(folder)
    return sum(path.stat().st_size for path in set(tensor_files(folder).values()))


def tensor_files(folder: str | os.PathLike[str], *, stem: str = "model") -> dict[str, Path]:
    """Return which file of a model's folder holds each tensor, every header checked.

    Args:
        folder: holds `<stem>.safetensors`, or `<stem>.safetensors.index.json` with the files it names.
        stem: what the files' names begin with.

    Raises:
        MissingInputError: there is no such folder.
        ModelError: the folder holds no weights, or only pickled ones, or it is a (GGUF) file.
        FileFormatError: a header is wrong, or index and files disagree; all disagreements are named.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ModelError(
            f"{folder}: is a file, and weights are read one at a time from a folder's safetensors here; make a folder "
            "of it first (strop.files.saving.save_model of what strop.load opens)"
        )
    if not folder.is_dir():
        raise MissingInputError(f"{folder}: no such folder")
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise ModelError(_no_weights(folder, stem))
        return dict.fromkeys(read_header(single).entries, single)
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(value, str) for value in listed.values()):
        raise FileFormatError(f"{index}: 'weight_map' must map the names of tensors to the names of files")
    files = {name: inside(folder, name, where=str(index)) for name in sorted(set(listed.values()))}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        raise ModelError(f"{folder}: the index names {len(missing)} file(s) that are not there: {', '.join(missing)}")
    problems = []
    for name, path in files.items():
        held = read_header(path).entries.keys()
        here = {tensor for tensor, file in listed.items() if file == name}
        problems += [f"{name}: {tensor} is in the index and not in the file" for tensor in sorted(here - held)]
        problems += [f"{name}: {tensor} is in the file and not in the index" for tensor in sorted(held - here)]
    if problems:
        raise FileFormatError(f"{index}: index and files disagree:\n  " + "\n  ".join(problems))
    return {tensor: files[name] for tensor, name in listed.items()}


def iter_tensors(folder: str | os.PathLike[str], *, stem: str = "model") -> Iterator[tuple[str, Tensor]]:
    """Read a model's tensors one at a time, in the order in which they lie in its files.

    Yields:
        (name, tensor); the tensor owns its memory, and nothing else is held.

    Raises:
        ModelError, FileFormatError: as `tensor_files`, before the first tensor.
    """
    for path in sorted(set(tensor_files(folder, stem=stem).values())):
        header = read_header(path)
        with open(path, "rb") as file:
            for name, entry in sorted(header.entries.items(), key=lambda item: item[1].start):
                yield name, _read(file, header, entry)


def write_file(path: Path, parts: Iterable[Part], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, part by part; the data begin at a multiple of 8 bytes.

    Raises:
        ValueError: a name comes twice, or a part makes tensors other than its `specs` say.
    """
    parts = list(parts)
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for part in parts:
        for name, (dtype, shape) in part.specs.items():
            if name in fields:
                raise ValueError(f"{path}: the tensor {name!r} is to be written twice")
            nbytes = dtype.itemsize * math.prod(shape)
            fields[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
    raw = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for part in parts:
            tensors = part.make()
            for name, (dtype, shape) in part.specs.items():
                tensor = tensors[name]
                if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                    raise ValueError(
                        f"{name}: {tensor.dtype} {tuple(tensor.shape)} was made, {dtype} {shape} announced"
                    )
                _write(file, tensor)


def write_shards(
    folder: Path, parts: Iterable[Part], *, max_shard_bytes: int = MAX_SHARD_BYTES, stem: str = "model"
) -> list[Path]:
    """Write a model's tensors: one file, or several with an index where they pass `max_shard_bytes`.

    A part is never split, so that the tensors of one layer lie in one file.

    Args:
        folder: an existing folder, usually that of `atomic_folder`.
        parts: what to write, in order.
        max_shard_bytes: bytes of tensors in a file; a part larger than that stands alone.
        stem: what the files' names begin with.

    Returns:
        The files of tensors, in order.
    """
    shards: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        if shards[-1] and filled + part.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += part.nbytes
    metadata = {"format": "pt"}
    if len(shards) == 1:
        path = folder / f"{stem}.safetensors"
        write_file(path, shards[0], metadata=metadata)
        return [path]
    paths = []
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        path = folder / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(path, shard, metadata=metadata)
        paths.append(path)
        where |= {name: path.name for part in shard for name in part.specs}
    total = sum(part.nbytes for shard in shards for part in shard)
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return paths


def _entry(where: str, field: object) -> Entry:
    """Check one tensor's line of the header; offsets against the file come later."""
    if not isinstance(field, dict) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileFormatError(
            f"{where}: header entry {_short(field)}; an object of dtype, shape and data_offsets is needed"
        )
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileFormatError(f"{where}: dtype {_short(dtype)} is not one of {', '.join(DTYPES)}")
    if (
        not isinstance(shape, list)
        or not all(type(size) is int and 0 <= size < 2**63 for size in shape)
        or len(shape) > 16
    ):
        raise FileFormatError(f"{where}: shape {_short(shape)}; a list of at most 16 sizes of zero or more is needed")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int for offset in offsets)
        or not 0 <= offsets[0] <= offsets[1] < 2**63
    ):
        raise FileFormatError(f"{where}: data_offsets {_short(offsets)}; two ascending byte offsets are needed")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise FileFormatError(
            f"{where}: data_offsets span {offsets[1] - offsets[0]:,} bytes, {dtype} {_short(shape)} takes "
            f"{_short(needed)}"
        )
    return Entry(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _check_extent(path: str | os.PathLike[str], entries: Mapping[str, Entry], data_bytes: int) -> None:
    """The tensors must fill the data from the first byte to the last, without a gap and without overlap."""
    end, before = 0, "the start of the data"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            how = "overlaps" if entry.start < end else "leaves a gap after"
            raise FileFormatError(
                f"{path}: {_label(name)}: data_offsets begin at {entry.start:,}, which {how} {before} (byte {end:,})"
            )
        end, before = entry.end, _label(name)
    if end != data_bytes:
        what = "is truncated" if end > data_bytes else "holds bytes that belong to no tensor"
        raise FileFormatError(
            f"{path}: the tensors end at byte {end:,}, the file's data at {data_bytes:,}; the file {what}"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the name {_short(name)} comes twice")
        fields[name] = value
    return fields


def _label(name: str) -> str:
    """A tensor's name as messages have it: as it is, unless it is long or would move a terminal's cursor."""
    return name if 0 < len(name) <= 200 and name.isprintable() else _short(name)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _read(file: BinaryIO, header: Header, entry: Entry) -> Tensor:
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    buffer = bytearray(entry.end - entry.start)
    file.seek(header.data_start + entry.start)
    if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise FileFormatError(f"{file.name}: ended while a tensor was read; the file changed meanwhile")
    return torch.frombuffer(buffer, dtype=entry.dtype).reshape(entry.shape)


def _write(file: BinaryIO, tensor: Tensor) -> None:
    if tensor.numel():
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        file.write(plain.view(torch.uint8).numpy().data)


def _no_weights(folder: Path, stem: str) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: holds no {stem}.safetensors, only pickled weights ({', '.join(pickles[:3])}). Opening a pickle "
            "runs the "
            "code in it, so strop does not; convert them to safetensors on a machine that trusts them"
        )
    return f"{folder}: holds no weights ({stem}.safetensors, or {stem}.safetensors.index.json with the files it names)"

"""A GGUF file read back: by the `gguf` package, which llama.cpp's own tools use, and by strop's reader.

Keys, names, types, shapes and the SHA-256 of every tensor must be those that were written, and the values that the two
readers decode must agree (to the last bits of float32: the package adds in another order).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from strop.errors import FileFormatError
from strop.files.gguf.blocks import decode
from strop.files.gguf.reader import GgufFile
from strop.files.gguf.rope import Value
from strop.files.gguf.types import TYPES
from strop.recipes.export_tensors import TensorRecord

_MOST_VALUES = 1 << 22
"""Values of a tensor that are decoded by both readers, from its start; the SHA-256 covers the rest."""


def read_back(
    path: Path,
    metadata: Mapping[str, Value],
    records: Mapping[str, TensorRecord],
    *,
    told: Callable[[int], None] = lambda done: None,
) -> None:
    """Compare a file with what was meant to be written.

    Raises:
        FileFormatError: every difference.
    """
    import gguf

    ours = GgufFile.open(path)
    theirs = gguf.GGUFReader(path)
    problems = [
        f"the key {key} reads {_short(found)}, {_short(value)} was written"
        for key, value in metadata.items()
        if not _same(value, found := ours.metadata.get(key))
    ]
    problems += [f"the key {key} is missing for the gguf package" for key in metadata if key not in theirs.fields]
    there = {tensor.name: tensor for tensor in theirs.tensors}
    for done, (name, record) in enumerate(records.items(), start=1):
        problems += _tensor_problems(ours, there.get(name), name, record, gguf)
        told(done)
    extra = sorted((ours.tensors.keys() | there.keys()) - records.keys())
    problems += [f"{name}: was not to be written" for name in extra]
    if problems:
        raise FileFormatError(f"{path}: is not what was to be written:\n  " + "\n  ".join(problems[:20]))


def _tensor_problems(ours: GgufFile, theirs: Any, name: str, record: TensorRecord, gguf: Any) -> list[str]:
    info = ours.tensors.get(name)
    if info is None or theirs is None:
        return [f"{name}: missing"]
    if (info.type, tuple(info.shape)) != (record.type, record.shape):
        return [f"{name}: {info.type} {info.shape}, {record.type} {record.shape} was written"]
    if theirs.tensor_type.name.lower() != record.type or tuple(reversed(theirs.shape.tolist())) != record.shape:
        return [f"{name}: the gguf package reads {theirs.tensor_type.name} {tuple(reversed(theirs.shape.tolist()))}"]
    raw = ours.raw(name)
    if hashlib.sha256(np.ascontiguousarray(raw).data).hexdigest() != record.sha256:
        return [f"{name}: its bytes changed between writing and reading"]
    row = record.shape[-1]
    rows = max(1, _MOST_VALUES // row)
    their_rows = theirs.data.reshape(-1, theirs.data.shape[-1])[:rows]
    decoded = gguf.quants.dequantize(their_rows, theirs.tensor_type).astype(np.float32)
    taken = decoded.shape[0] * TYPES[record.type].row_bytes(row)
    own = decode(raw.reshape(-1)[:taken], record.type, (decoded.shape[0], row), where=name).numpy()
    if not np.allclose(own, decoded, rtol=1e-6, atol=1e-7 * float(np.abs(decoded).max(initial=0.0))):
        return [f"{name}: the gguf package decodes other values than strop"]
    return []


def _same(written: Value, found: Any) -> bool:
    if isinstance(written, float):
        return isinstance(found, float) and np.float32(written) == np.float32(found)
    if isinstance(written, bytes):
        return list(written) == list(found or [])
    if isinstance(written, list) and written and isinstance(written[0], float):
        return np.array_equal(np.asarray(written, np.float32), np.asarray(found, np.float32))
    return written == found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."

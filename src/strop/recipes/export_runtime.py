"""Types that llama.cpp's own quantizer writes (q2_k, q3_k_m, q5_k_m ...), from a file in full precision beside it.

The intermediate file keeps the weights' own dtype where all have one, else float32; it is removed afterwards. An
importance of the columns is handed on. What each tensor lost is measured against the intermediate file.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from strop.errors import ModelError
from strop.files.gguf.blocks import decode
from strop.files.gguf.mixtures import RUNTIME_TYPES
from strop.files.gguf.reader import GgufFile
from strop.files.gguf.rope import Value
from strop.files.gguf.writer import TensorToWrite, check_disk, file_bytes, write_gguf
from strop.progress import Reporter
from strop.recipes.export_tensors import TensorRecord
from strop.runtime.library import last_words, library


def quantize_in_runtime(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[TensorToWrite],
    records: Mapping[str, TensorRecord],
    name: str,
    importance: Mapping[str, Tensor],
    *,
    reporter: Reporter,
) -> None:
    """Write a file by llama.cpp's quantizer.

    Args:
        path: the file.
        metadata: its keys.
        tensors: in full precision.
        records: filled with what became of each.
        name: one of `RUNTIME_TYPES`.
        importance: of columns, by the checkpoint's layer names.
        reporter: told what happens.

    Raises:
        DiskFullError: no room for both files.
        ModelError: llama.cpp refuses; its own words are quoted.
    """
    whole = file_bytes(metadata, tensors)
    check_disk(path.parent, 2 * whole)
    handle, between = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".full", dir=path.parent)
    os.close(handle)
    try:
        reporter.start("write in full precision", len(tensors), "tensors")
        with open(between, "wb") as file:
            write_gguf(file, metadata, tensors, told=lambda done, tensor: reporter.advance(done, tensor=tensor))
        reporter.start("quantize in llama.cpp", None, "steps")
        _quantize(Path(between), path, RUNTIME_TYPES[name], _by_tensor(records, importance))
        _fill(records, Path(between), path)
    finally:
        reporter.finish()
        Path(between).unlink(missing_ok=True)


def _quantize(source: Path, target: Path, number: int, importance: Mapping[str, np.ndarray]) -> None:
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = number
    params.nthread = 1
    entries = [(key.encode(), np.ascontiguousarray(values, np.float32)) for key, values in importance.items()]
    table = (lib.llama_model_imatrix_data * (len(entries) + 1))()
    for row, (key, values) in zip(table, entries, strict=False):
        row.name = key
        row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        row.size = values.size
    if entries:
        params.imatrix = table
    if lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) != 0:
        raise ModelError(f"llama.cpp's quantizer failed: {last_words()}")


def _by_tensor(records: Mapping[str, TensorRecord], importance: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Importance by the file's names; experts one after the other, those that no row reached weighed alike."""
    found = {}
    for name, record in records.items():
        parts = [importance.get(line) for line in record.lines]
        if any(part is not None for part in parts):
            width = record.shape[-1]
            found[name] = np.concatenate(
                [np.ones(width, np.float32) if part is None else part.float().numpy() for part in parts]
            )
    return found


def _fill(records: Mapping[str, TensorRecord], full: Path, made: Path) -> None:
    before, after = GgufFile.open(full), GgufFile.open(made)
    for name, record in records.items():
        info = after.tensors[name]
        raw = after.raw(name)
        record.type, record.nbytes, record.reason = info.type, raw.nbytes, None
        record.sha256 = hashlib.sha256(raw.data).hexdigest()
        if info.type != "f32":
            exact = before.tensor(name).double()
            record.how = "rounded"
            record.error = float((decode(raw, info.type, info.shape).double() - exact).square().sum())
            record.power = float(exact.square().sum())

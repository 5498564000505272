"""llama.cpp's own quantizers, called in the library that llama-cpp-python brings along: an oracle for ours."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from strop.files.gguf.types import TYPES

Quantizer = Callable[[Tensor, str, Tensor | None], np.ndarray]


def ggml_quantizer() -> Quantizer:
    """A function of a weight float32 [out, in], a type's name and an importance [in]; skips without the library."""
    spec = importlib.util.find_spec("llama_cpp")
    places = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("lib/*ggml-base.*"))
    if not places:
        pytest.skip("llama-cpp-python is not installed, so llama.cpp's own quantizers cannot be asked")
    chunk = ctypes.CDLL(str(places[0])).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantize(weight: Tensor, name: str, importance: Tensor | None) -> np.ndarray:
        rows, columns = weight.shape
        weight = weight.contiguous()
        result = np.zeros((rows, TYPES[name].row_bytes(columns)), np.uint8)
        matrix = None if importance is None else importance.data_ptr()
        assert chunk(TYPES[name].number, weight.data_ptr(), result.ctypes.data, 0, rows, columns, matrix) == result.size
        return result

    return quantize

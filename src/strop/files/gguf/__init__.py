"""GGUF, the file of llama.cpp: types and blocks of weights, the reader, and what a file of a model needs besides."""

from __future__ import annotations

import os
from typing import Final

SUFFIX: Final = ".gguf"


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a GGUF file, by its ending."""
    return os.fspath(path).lower().endswith(SUFFIX)

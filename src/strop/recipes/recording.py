"""What a lossy step took: versions, seconds and peak memory, for its receipt.

`recorded` runs a recipe while its memory is watched (`strop.memory`); within it `record()` says what it took so far.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
import transformers

from strop import __version__
from strop.memory import PeakMemory

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_running: ContextVar[tuple[float, PeakMemory]] = ContextVar("strop_recording")


def recorded(recipe: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same recipe, its time and memory watched."""

    @functools.wraps(recipe)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with PeakMemory() as memory:
            token = _running.set((time.perf_counter(), memory))
            try:
                return recipe(*arguments, **options)
            finally:
                _running.reset(token)

    return run


def record() -> dict[str, Any]:
    """Versions, the seconds since the recipe began, and the most bytes that it held above what was held before.

    Raises:
        LookupError: no `recorded` recipe is running.
    """
    began, memory = _running.get()
    memory.sample()
    return {
        "strop": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "seconds": round(time.perf_counter() - began, 3),
        "peak_bytes": memory.peak_bytes,
    }

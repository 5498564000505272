"""llama.cpp's library, loaded on first use and kept silent.

What it would write to the screen is kept in memory instead: the last lines are quoted where it fails.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections import deque
from typing import Any, Final

from strop.errors import MissingInputError

_WORST: Final = 3
"""From this level of ggml's log on (2: warning, 3: error) a line is kept."""

_lines: deque[str] = deque(maxlen=8)
_keep: list[Any] = []  # what C code calls must live as long as the library


@functools.cache
def library() -> Any:
    """The low-level functions of llama-cpp-python, the backend started and its log turned to `last_words`.

    Raises:
        MissingInputError: It is not installed, or its library does not load here.
    """
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # where it aborts, it would start a debugger on this process first
    try:
        import llama_cpp.llama_cpp as functions
    except ImportError as error:
        raise MissingInputError(
            "running a GGUF file needs llama-cpp-python, which is not installed; install it with `pip install "
            f"'strop[gguf]'` (it is built from source: a C++ compiler and cmake are needed) [{error}]"
        ) from error
    except (OSError, RuntimeError) as error:  # its own loader raises both where the shared library does not fit
        raise MissingInputError(
            f"llama-cpp-python is installed, but its library does not load here ({error}); install it again with "
            "`pip install --force-reinstall --no-binary llama-cpp-python 'strop[gguf]'`"
        ) from error

    @functions.llama_log_callback
    def keep(level: int, text: bytes, _: object) -> None:
        if level == _WORST:
            _lines.append(text.decode("utf-8", errors="replace").strip())

    _keep.append(keep)
    functions.llama_log_set(keep, ctypes.c_void_p(0))
    functions.llama_backend_init()
    return functions


def require_runtime() -> None:
    """Refuse, before any work, what would need llama.cpp where it is not installed.

    Raises:
        MissingInputError: It is not installed, or its library does not load here.
    """
    library()


def runtime_version() -> str:
    """Which llama.cpp computes: the package's version and the build that it carries."""
    from importlib.metadata import version

    build = library().llama_version().decode() if hasattr(library(), "llama_version") else "unknown build"
    return f"llama-cpp-python {version('llama-cpp-python')} (llama.cpp {build})"


def forget_words() -> None:
    """Empty the log, before something is tried that may fail."""
    _lines.clear()


def last_words() -> str:
    """What llama.cpp said last of an error; empty where it said nothing."""
    return "; ".join(line for line in _lines if line)

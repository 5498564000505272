"""What llama.cpp asserts and does not check: settings of a well-formed file that would end the whole process.

Checked before llama.cpp opens a file, each rule with the case that it was made for (found by changing every value of
valid files, one at a time, and watching llama.cpp).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Final

from strop.errors import FileFormatError, UsageError
from strop.files.gguf.reader import GgufFile

MOST_BLOCKS: Final = 512
"""llama.cpp's own limit."""

_NO_WEIGHTS: Final = frozenset({"i8", "i16", "i32", "i64", "f64"})
_BLOCK: Final = re.compile(r"blk\.(\d{1,6})\.")


def check_settings(file: GgufFile) -> None:
    """Refuse what would make llama.cpp abort.

    Raises:
        UsageError: it holds an adapter alone.
        FileFormatError: everything that is wrong, with its key or its tensor.
    """
    if file.metadata.get("general.type") == "adapter":
        raise UsageError(
            f"{file.path}: is an adapter alone, which llama.cpp takes with --lora beside its base's file; name the "
            "folder that it was made of, or export that without --adapter-only"
        )
    problems = [*_of_settings(file), *_of_tensors(file)]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise FileFormatError(f"{file.path}: {'; '.join(problems[:8])}{more}. It is damaged or made to do harm")


def _of_settings(file: GgufFile) -> Iterator[str]:
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        yield f"general.architecture is {architecture!r}; a name is needed"
        return
    settings = {
        key.removeprefix(f"{architecture}."): file.metadata[key]
        for key in file.metadata
        if key.startswith(f"{architecture}.")
    }
    for name, value in settings.items():
        for number in _numbers(value):
            large = isinstance(number, int) and number >= 1 << 31
            if large or not math.isfinite(number) or (name.endswith("epsilon") and number < 0):
                yield f"{architecture}.{name} is {number}"
                break
    blocks = settings.get("block_count")
    numbered = {int(found[1]) for name in file.tensors if (found := _BLOCK.match(name))}
    needed = max(numbered, default=-1) + 1
    if not isinstance(blocks, int) or not 1 <= blocks <= MOST_BLOCKS or blocks < needed:
        yield f"{architecture}.block_count is {blocks!r}; 1 to {MOST_BLOCKS}, and {needed} for the tensors there are"
    width, heads = settings.get("embedding_length"), settings.get("attention.head_count")
    size = settings.get("attention.key_length")
    if size is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        size = width // heads
    turned = settings.get("rope.dimension_count")
    if isinstance(turned, int) and isinstance(size, int) and (turned > size or turned % 2):
        yield f"{architecture}.rope.dimension_count is {turned}; an even number up to the head's size of {size}"


def _of_tensors(file: GgufFile) -> Iterator[str]:
    for info in file.tensors.values():
        if info.type in _NO_WEIGHTS:
            yield f"tensor {info.name!r} has type {info.type}, which no weight has"
        elif len(info.shape) == 1 and info.type != "f32":
            yield f"tensor {info.name!r} is a vector of type {info.type}; f32 is needed"


def _numbers(value: Any) -> Iterator[float]:
    """Numbers of a setting, those of a list included."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _numbers(one)

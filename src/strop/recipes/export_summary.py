"""What became of a file's tensors, in sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from strop.recipes.export_tensors import TensorRecord


def summary(records: Sequence[TensorRecord]) -> list[str]:
    """How many tensors took which type, what that lost, and which took another than was asked for."""
    kinds: dict[str, list[TensorRecord]] = {}
    for one in records:
        kinds.setdefault(one.type, []).append(one)
    lines = []
    for kind, ones in sorted(kinds.items(), key=lambda item: -sum(one.nbytes for one in item[1])):
        weights = sum(math.prod(one.shape) for one in ones)
        error, power = sum(one.error for one in ones), sum(one.power for one in ones)
        moved = sum(one.how == "moved" for one in ones)
        said = f"{len(ones)} tensor{'s' if len(ones) > 1 else ''} ({weights:,} weights) as {kind}"
        if moved:
            said += f", the codes of {moved} taken over bit for bit"
        if error:
            said += f", root mean square error {100 * math.sqrt(error / power):.2g}% of the weights'"
        lines.append(said)
    again = [one for one in records if one.how == "rounded again"]
    if again:
        lines.append(
            f"WARNING: {len(again)} tensors had been quantized before, on another grid, and were ROUNDED A SECOND TIME "
            f"({again[0].name}, ...): export the full-precision model instead, or gguf:f16, which holds their values"
        )
    return [*lines, *_fallbacks(records)]


def _fallbacks(records: Sequence[TensorRecord]) -> list[str]:
    """A line for each kind of tensor that took another type, with the blocks where it did."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for one in records:
        if one.reason:
            block = re.match(r"blk\.(\d+)\.(.*)", one.name)
            part, number = (f"blk.*.{block[2]}", block[1]) if block else (one.name, "")
            groups.setdefault((part, one.type, one.reason), []).append(number)
    return [
        f"{part}: {kind}, as {reason}" + (f" (blocks {', '.join(numbers)})" if numbers != [""] else "")
        for (part, kind, reason), numbers in groups.items()
    ]

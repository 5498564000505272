"""How a plan's figures are written: sizes, least times, aligned tables."""

from __future__ import annotations

from collections.abc import Sequence

from strop.planner.memory import GIB


def size_text(size: int) -> str:
    """Return bytes as people read them, in binary units."""
    if size >= GIB / 10:
        return f"{size / GIB:.2f} GiB" if size < 100 * GIB else f"{size / GIB:,.0f} GiB"
    return f"{size / 2**20:.1f} MiB"


def seconds_text(seconds: float) -> str:
    """Return a floor: at least this long."""
    return f">{seconds:,.0f}" if seconds >= 10 else f">{seconds:.2g}"


def aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int] = ()) -> list[str]:
    """Return a table as lines: columns padded to their widest cell, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

"""Figures as a person reads them."""

from __future__ import annotations


def size(bytes_: float) -> str:
    """A number of bytes with a binary unit.

    >>> size(7_870_000), size(312)
    ('7.5 MiB', '312 B')
    """
    value, units = float(bytes_), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def seconds_text(seconds: float) -> str:
    """A time in the unit that suits it.

    >>> seconds_text(0.25), seconds_text(90), seconds_text(3 * 3600)
    ('0.25 s', '1.5 minutes', '3.0 hours')
    """
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"

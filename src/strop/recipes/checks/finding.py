"""What a check says: refuse, warn or fine, why, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

Level: TypeAlias = Literal["refuse", "warn", "fine"]

LEVELS: Final[tuple[Level, ...]] = ("refuse", "warn", "fine")


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    Attributes:
        level: `refuse`: the run would go wrong; `warn`: somebody should know; `fine`: looked at, and well.
        name: what was looked at, in a word or two.
        message: what was seen, with its figures.
        remedy: what to do; empty where nothing is to be done.
        figures: the figures by name, as JSON values.
    """

    level: Level
    name: str
    message: str
    remedy: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON values."""
        return {
            "level": self.level,
            "name": self.name,
            "message": self.message,
            "remedy": self.remedy,
            "figures": dict(self.figures),
        }


def by_weight(findings: list[Finding]) -> list[Finding]:
    """What is refused first, then warnings, then what is fine; each in the given order."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def share(part: int, whole: int) -> str:
    """A share in percent that shows neither 0 nor 100 unless it is.

    >>> share(1, 3), share(0, 3), share(1, 100_000), share(99_999, 100_000)
    ('33.3%', '0%', 'under 0.1%', 'over 99.9%')
    """
    if part in (0, whole):
        return "0%" if part == 0 else "100%"
    value = part / whole
    return "under 0.1%" if value < 0.001 else "over 99.9%" if value > 0.999 else f"{value:.1%}"


def are(number: int) -> str:
    """The verb that goes with a number.

    >>> are(1), are(2)
    ('is', 'are')
    """
    return "is" if number == 1 else "are"


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is not one.

    >>> count(1, "row"), count(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")

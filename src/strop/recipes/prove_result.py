"""What a proof came to, and how that is said: `Pass`, `Fail` or `Undecided`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from strop.evaluation.judging import Task
from strop.recipes.certificate import Certificate

_MOST_CHARACTERS: Final = 80


@dataclass(frozen=True)
class Proof:
    """What a proof came to: `Pass`, `Fail` or `Undecided`.

    Attributes:
        certificate: Everything of it; see `strop.recipes.certificate`.
        path: Where the certificate was written; None where it was not.
    """

    exit_code: ClassVar[int]
    certificate: Certificate
    path: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self.certificate.model_dump() | {"path": None if self.path is None else str(self.path)}

    def lines(self) -> list[str]:
        """The result in sentences."""
        said, proof = self.certificate.result, self.certificate
        unit = "nats per token" if proof.task == "perplexity" else "points"
        drop, low, high, limit = (_number(proof.task, v) for v in (said.drop, said.low, said.high, proof.max_drop))
        allowed = f"{limit} {unit}"
        words = {
            "pass": f"keeps {proof.task} within {allowed} of",
            "fail": f"loses more than {allowed} of {proof.task} against",
            "undecided": f"may or may not keep {proof.task} within {allowed} of",
        }
        rows = f"{said.rows:,} of {proof.data.rows:,} rows"
        if said.clusters != said.rows:
            rows += f" ({said.clusters:,} clusters)"
        lines = [
            f"{said.decision.upper()}: {proof.model.name} {words[said.decision]} {proof.reference.name}",
            f"drop {drop} {unit}, at least {low} and at most {high} (each at 95%); {rows} seen",
        ]
        if proof.task == "perplexity":
            lines.append(f"nats per token: reference {-said.reference:.4f}, model {-said.model:.4f}")
        else:
            lines.append(
                f"right: reference {said.reference:.2%}, model {said.model:.2%}; lost {said.lost:,}, "
                f"gained {said.gained:,} of the rows"
            )
        lines += list(self._next())
        for flip in proof.flipped:
            lines.append(f"  {flip.kind}: row {flip.row}, asked {_short(flip.asked)}, expected {_short(flip.expected)}")
            who, wrote = ("model", flip.model) if flip.kind == "lost" else ("reference", flip.reference)
            lines.append(f"    the {who} wrote {_from_difference(wrote, flip.expected)}")
        more = said.lost + said.gained - len(proof.flipped)
        if more and proof.flipped:
            lines.append(f"  and {more:,} more rows that only one of the two gets right")
        lines += [f"note: {note}" for note in proof.notes]
        if self.path is not None:
            lines.append(f"certificate: {self.path}")
        return lines

    def _next(self) -> Iterator[str]:
        """What to do next, where there is something."""
        yield from ()


@dataclass(frozen=True)
class Pass(Proof):
    """The drop is below the allowed one, or this is one of the 5% of cases where that is said wrongly."""

    exit_code: ClassVar[int] = 0


@dataclass(frozen=True)
class Fail(Proof):
    """The drop is above the allowed one, with the same reservation."""

    exit_code: ClassVar[int] = 1


@dataclass(frozen=True)
class Undecided(Proof):
    """The rows do not tell.

    Attributes:
        needs: Further rows that would probably decide; None where no number can be named.
    """

    exit_code: ClassVar[int] = 3

    @property
    def needs(self) -> int | None:
        """Further rows (clusters, where rows belong together) that would probably decide."""
        return self.certificate.result.needs

    def _next(self) -> Iterator[str]:
        if self.needs is None:
            yield "the drop is too close to the allowed one to say how many rows would decide; allow more or less"
        else:
            said = self.certificate.result
            what = "rows" if said.clusters == said.rows else "clusters of rows"
            yield f"about {self.needs:,} further {what} would probably decide"


def _number(task: Task, value: float) -> str:
    """Nats as they are, shares in percentage points."""
    return f"{value:.4f}" if task == "perplexity" else f"{100 * value:.2f}"


def _short(text: str) -> str:
    return repr(text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "...")


def _from_difference(text: str, expected: str) -> str:
    """A long text from a little before the place where it differs from what was expected."""
    if len(text) <= _MOST_CHARACTERS:
        return repr(text)
    alike = next((place for place, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), len(expected))
    start = max(0, alike - _MOST_CHARACTERS // 3)
    return f"...{_short(text[start:])}" if start else _short(text)

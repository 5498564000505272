"""The smallest of several sizes that is good enough: within one standard error of the best held-out loss.

    good enough:  loss(size) - loss(best) <= se(best)

the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3), with se(best)
the standard error by row of the best one's own mean loss. Whether the data already decide it is a matter of the paired
difference, whose spread is far smaller than that of the losses: all sizes answer the same rows. A size is "in" or "out"
where the 95% interval of its difference to the best lies on one side of se(best), and "open" where it holds it.

Where the smallest size that is not "out" is "open", the data do not decide. A caller that must choose takes that one
(`smallest_possible`): what is too small costs a little loss, what is too large may break a whole run.

Losses are nats per token, rows are documents (`strop.evaluation.statistics`). Nothing here corrects for looking several
times; the caller asks for the same answer twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from numpy.typing import ArrayLike

from strop.evaluation.statistics import Difference, mean_error, paired_bootstrap

Place = Literal["in", "out", "open"]


@dataclass(frozen=True)
class Standing:
    """How one size stands.

    Attributes:
        size: Its size.
        loss: Held-out loss in nats per token.
        error: Standard error of that loss by row.
        difference: Its loss less that of the best, paired by row; None for the best itself.
        place: Where its interval puts it.
    """

    size: int
    loss: float
    error: float
    difference: Difference | None
    place: Place

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def standings(sums: Mapping[int, ArrayLike], tokens: ArrayLike, *, seed: int) -> list[Standing]:
    """Compare sizes that answered the same rows; in ascending order of size.

    Args:
        sums: By size, the negative log-likelihood of each row [rows], in nats.
        tokens: Supervised tokens of each row [rows].
        seed: Of the bootstrap.

    Raises:
        ValueError: There is no size, or the rows do not fit each other.
    """
    if not sums:
        raise ValueError("there is no size to compare; at least one is needed")
    losses = {size: mean_error(sums[size], tokens) for size in sorted(sums)}
    best = min(losses, key=lambda size: losses[size][0])  # of equal ones the smallest
    margin = losses[best][1]
    result = []
    for size, (loss, error) in losses.items():
        if size == best:
            result.append(Standing(size, loss, error, None, "in"))
            continue
        difference = paired_bootstrap(sums[best], sums[size], tokens, seed=seed)
        result.append(Standing(size, loss, error, difference, _place(difference, margin)))
    return result


def best_of(board: Sequence[Standing]) -> Standing:
    """The one with the lowest loss; of equal ones the smallest."""
    return min(board, key=lambda standing: (standing.loss, standing.size))


def smallest_good(board: Sequence[Standing]) -> Standing:
    """The smallest whose loss, as it was measured, is at most that of the best plus the best's standard error."""
    best = best_of(board)
    good = [standing for standing in board if standing.loss <= best.loss + best.error]
    return min(good, key=lambda standing: standing.size)


def smallest_possible(board: Sequence[Standing]) -> Standing:
    """The smallest that its interval does not rule out; never larger than the smallest good one."""
    return min((standing for standing in board if standing.place != "out"), key=lambda standing: standing.size)


def decided(board: Sequence[Standing]) -> int | None:
    """The size that the intervals decide for: it is in, and every smaller one out; None while they do not."""
    first = smallest_possible(board)
    return first.size if first.place == "in" else None


def _place(difference: Difference, margin: float) -> Place:
    low, high = difference.low, difference.high
    if low is None or high is None:
        return "in" if difference.estimate == 0 else "open"
    if low > margin:
        return "out"
    return "in" if high <= margin else "open"

"""Is the drop below what is allowed? A test that may look after every row, and stop as soon as it knows.

Each row gives a drop y in [-1, 1]: by how much the model's score is below the reference's (1 where only the reference
is right, -1 where only the model is, 0 where they agree). The drop of the model is the mean of y over all rows that
might have been drawn. Against each of two hypotheses a gambler bets who can win only if it is false:

    Pass   refutes "the drop is `limit` or more":   wealth = prod(1 + s_t (limit - y_t)),  0 <= s_t < 1 / (1 - limit)
    Fail   refutes "the drop is `limit` or less":   wealth = prod(1 + s_t (y_t - limit)),  0 <= s_t < 1 / (1 + limit)

The stake s_t is fixed before row t is seen, so under its hypothesis no bet is favourable and the wealth is a
nonnegative supermartingale that starts at 1. By Ville's inequality it ever reaches 20 with a chance of at most 1 / 20,
however often one looks (Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS-B 86,
2024). Whatever the drop is, only one of the two verdicts is wrong, so a wrong one comes with a chance of at most 5% in
all. (At the very limit the drop is allowed, and Pass is right; it too comes with at most 5% there.)

How much is staked changes how soon a truth is found, never the validity. The stakes here are those of Kelly (1956),
which make the expected logarithm of the wealth grow fastest, for the spread E[y^2] seen so far and

    Pass   a drop of `limit` - c * `scale`; c starts at 1.2, as if a little were gained, and moves with the rows
           seen to what they say, between 0.1 and 1.2 (with limit = scale, c = 1 stands for "nothing was lost")
    Fail   four gamblers with a share each: one for limit + c * scale as above, with c up to 4, and three for drops of
           3, 10 and 30 times the scale above the limit

What it rests on: rows (or clusters of rows) are drawn independently from what the model will meet, and |y| <= 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Decision = Literal["pass", "fail", "undecided"]

ERROR: Final = 0.05
LOG_GOAL: Final = math.log(1 / ERROR)
"""Wealth of 20, as a logarithm."""

MOST_ROWS: Final = 1_000_000
"""Beyond it no number of further rows is estimated."""

_CAUTION: Final = 0.9999  # of the largest stake, so that no single row takes everything
_FIRST_SPREAD, _FIRST_ROWS = 1.0, 0.4  # before the first row: as if 0.4 / scale rows had a squared drop of 1 in all
_STRENGTH: Final = 8.0  # how long c stays near where it starts, in units of (standard deviation / scale)^2 rows
_START, _SMALLEST = 1.2, 0.1
_FAIL_LARGEST: Final = 4.0
_FAIL_SHARE: Final = 0.5
_FAR: Final = ((3.0, 0.25), (10.0, 0.15), (30.0, 0.1))  # (how many scales above the limit, share)
_MOST_VALUES: Final = 32  # different drops that an estimate of further rows tells apart


class Evidence:
    """The wealth of the gamblers against many limits, or in many replays, at once.

    Args:
        limits: The drops that are tested [n], each in (-1, 1).
        scale: The difference from a limit that is worth telling, as a drop in (0, 1): one number, or one for each.
        anchor: Which of the limits lends its stakes: for Pass to those above it, for Fail to those below. A stake that
            is fair against a limit is fair against a further one too and wins more there, so that what is refuted at
            the anchor is refuted beyond it. None: every limit has its own stakes.

    Attributes:
        log_pass: Logarithm of the wealth that refutes "the drop is the limit or more" [n].
        log_fail: Logarithm of the wealth that refutes "the drop is the limit or less" [n].
        rows: Rows seen.
    """

    def __init__(self, limits: ArrayLike, scale: ArrayLike, *, anchor: int | None = None) -> None:
        self.limits = np.atleast_1d(np.asarray(limits, dtype=np.float64))
        self.scale = np.asarray(scale, dtype=np.float64)
        if not ((np.abs(self.limits) < 1).all() and (self.scale > 0).all() and (self.scale < 1).all()):
            raise ValueError(f"limits {self.limits} and scale {scale}: needed limits in (-1, 1) and a scale in (0, 1)")
        self.rows = 0
        self._anchor = anchor
        shape = self.limits.shape
        self._drops, self._squares = np.zeros(shape), np.zeros(shape)
        self.log_pass = np.zeros(shape)
        shares = np.array([_FAIL_SHARE, *(share for _, share in _FAR)])
        self._log_fail = np.log(shares)[:, None] + np.zeros(shape)  # [gamblers, n]
        self._far = np.minimum(np.array([self.limits + times * self.scale for times, _ in _FAR]), 1.0)  # [3, n]

    @property
    def log_fail(self) -> Floats:
        """Logarithm of the wealth of all that bet on a larger drop [n]."""
        most = self._log_fail.max(axis=0)
        return most + np.log(np.exp(self._log_fail - most).sum(axis=0))

    def stakes(self) -> tuple[Floats, Floats]:
        """What will be staked on the next row: for Pass [n], and by each gambler for Fail [gamblers, n]."""
        first = _FIRST_ROWS / self.scale
        spread = np.minimum((self._squares + _FIRST_SPREAD) / (self.rows + first), 1.0)
        strength = _STRENGTH * np.maximum(spread, self.scale) / self.scale**2
        below = (self.rows * self.limits - self._drops) / self.scale  # sum of how far rows lie below the limit
        near = (_START * strength + below) / (self.rows + strength)
        passing = np.clip(near, _SMALLEST, _START) * _kelly(spread, self.limits - self.scale, self.limits, sign=-1)
        near = (_START * strength - below) / (self.rows + strength)
        adaptive = np.clip(near, _SMALLEST, _FAIL_LARGEST) * _kelly(
            spread, self.limits + self.scale, self.limits, sign=1
        )
        failing = np.vstack([adaptive[None], _kelly(spread[None], self._far, self.limits[None], sign=1)])
        most_pass, most_fail = _CAUTION / (1 - self.limits), _CAUTION / (1 + self.limits)
        passing, failing = np.minimum(passing, most_pass), np.minimum(failing, most_fail)
        if self._anchor is not None:
            passing = np.where(self.limits > self.limits[self._anchor], passing[self._anchor], passing)
            lent = failing[:, self._anchor, None]
            failing = np.where(self.limits < self.limits[self._anchor], lent, failing)
        return passing, failing

    def add(self, drops: ArrayLike) -> None:
        """Take the next row's drop: one number, or one for each of the n.

        Raises:
            ValueError: A drop is outside [-1, 1].
        """
        row = np.asarray(drops, dtype=np.float64)
        if not (np.abs(row) <= 1).all():
            raise ValueError(f"a drop of {row[~(np.abs(row) <= 1)]} is outside [-1, 1]")
        passing, failing = self.stakes()
        self.log_pass = self.log_pass + np.log1p(passing * (self.limits - row))
        self._log_fail = self._log_fail + np.log1p(failing * (row - self.limits))
        self._drops = self._drops + row
        self._squares = self._squares + row**2
        self.rows += 1

    def add_counts(self, values: Floats, counts: NDArray[np.int64]) -> None:
        """Take several rows at once, at the stakes of the first of them (so this is for estimates, not for verdicts).

        Args:
            values: The drops there are [values].
            counts: How often each came [n, values], the same number of rows for all n.
        """
        passing, failing = self.stakes()
        above = values - self.limits[:, None]  # [n, values]
        self.log_pass = self.log_pass + (counts * np.log1p(-passing[:, None] * above)).sum(axis=-1)
        self._log_fail = self._log_fail + (counts * np.log1p(failing[..., None] * above)).sum(axis=-1)
        self._drops = self._drops + counts @ values
        self._squares = self._squares + counts @ values**2
        self.rows += int(counts[0].sum())


def _kelly(spread: Floats, drop: Floats, limit: Floats, *, sign: Literal[-1, 1]) -> Floats:
    """The stake s that maximises E log(1 + s z), z = sign (y - limit), for three outcomes with this drop and spread.

    y is 1, 0 or -1 with probabilities (d + drop) / 2, 1 - d and (d - drop) / 2, d = max(spread, |drop|). With the
    payoffs z_1, z_2, z_3 the derivative vanishes where A s^2 + B s + C = 0: A = z_1 z_2 z_3, B = sum of p_i z_i times
    the other two payoffs' sum, C = E[z]; s is the smaller positive root, infinite where there is none.
    """
    d = np.maximum(spread, np.abs(drop))
    lost, tied, gained = sign * (1 - limit), sign * (0 - limit), sign * (-1 - limit)
    p_lost, p_tied, p_gained = (d + drop) / 2, 1 - d, (d - drop) / 2
    a = lost * tied * gained
    b = p_lost * lost * (tied + gained) + p_tied * tied * (lost + gained) + p_gained * gained * (lost + tied)
    c = p_lost * lost + p_tied * tied + p_gained * gained
    below = np.sqrt(np.maximum(b * b - 4 * a * c, 0)) - b
    with np.errstate(divide="ignore", invalid="ignore"):
        stake = np.where(below > 0, 2 * c / below, np.inf)
    return np.where(c > 0, stake, 0.0)


@dataclass(frozen=True)
class Verdict:
    """What the rows seen say.

    Attributes:
        decision: "pass" (the drop is below the limit), "fail" (it is above) or "undecided".
        rows: Rows it took: those up to the deciding one, or all where none decided.
        e_pass: The largest wealth that Pass reached within them; 20 decides.
        e_fail: The same of Fail.
    """

    decision: Decision
    rows: int
    e_pass: float
    e_fail: float


class DropTest:
    """One limit, row after row; the first row that decides ends it.

    Args:
        limit: The largest drop that is allowed, in (0, 1).
    """

    def __init__(self, limit: float) -> None:
        self._evidence = Evidence(limit, limit)
        self._most = [0.0, 0.0]
        self._decision: Decision = "undecided"

    @property
    def decided(self) -> bool:
        """Whether there is a verdict, so that no further row is looked at."""
        return self._decision != "undecided"

    def add(self, drops: Sequence[float] | Floats) -> Verdict:
        """Look at further rows, one after another, up to the one that decides."""
        for drop in drops:
            if self.decided:
                break
            self._evidence.add(drop)
            logs = float(self._evidence.log_pass[0]), float(self._evidence.log_fail[0])
            self._most = [max(old, new) for old, new in zip(self._most, logs, strict=True)]
            if logs[0] >= LOG_GOAL:
                self._decision = "pass"
            elif logs[1] >= LOG_GOAL:
                self._decision = "fail"
        return self.verdict

    @property
    def verdict(self) -> Verdict:
        """What the rows seen so far say."""
        e_pass, e_fail = (math.exp(min(most, 700.0)) for most in self._most)
        return Verdict(self._decision, self._evidence.rows, e_pass, e_fail)


def decide(drops: ArrayLike, limit: float) -> Verdict:
    """The verdict on rows in this order.

    >>> decide([0.0] * 400, 0.01).decision, decide([1.0] * 10, 0.01).decision, decide([0.0] * 10, 0.01).decision
    ('pass', 'fail', 'undecided')
    """
    test = DropTest(limit)
    test.add(np.asarray(drops, dtype=np.float64))
    return test.verdict


def drop_interval(drops: ArrayLike, scale: float) -> tuple[float, float]:
    """The drops that the rows do not refute, at 95% on either side, however the number of rows came about.

    A confidence sequence: every limit is tested as `DropTest` would (those below the scale in size at that scale), by
    the wealth after the last row. Limits that only earlier rows refuted count again: leaving them out would be as valid
    and a little narrower, but the interval could then miss the mean of the rows. Beyond the verdict's limit the stakes
    are the verdict's own, so that the interval lies on the side that the verdict says. The ends are taken from a grid
    that is finest (a tenth of the scale) around the mean, and rounded outwards.

    Args:
        drops: Per row [rows].
        scale: As for `Evidence`; for a verdict's interval, its limit.

    Returns:
        Lower and upper end, within [-1, 1].
    """
    rows = np.asarray(drops, dtype=np.float64)
    if not len(rows):
        return -1.0, 1.0
    around = np.concatenate([scale * np.arange(0, 30) / 10, 3 * scale * 1.15 ** np.arange(0, 45)])
    offsets = np.unique(np.concatenate([-around, around]))
    grid = np.unique(np.clip(np.append(offsets + rows.mean(), scale), -1 + 1e-9, 1 - 1e-9))
    anchor = int(np.searchsorted(grid, scale))
    evidence = Evidence(grid, np.clip(np.abs(grid), scale, 0.999), anchor=anchor)
    for row in rows:
        evidence.add(row)
    kept_above, kept_below = (np.flatnonzero(log < LOG_GOAL) for log in (evidence.log_pass, evidence.log_fail))
    high = grid[kept_above[-1] + 1] if len(kept_above) and kept_above[-1] + 1 < len(grid) else 1.0
    low = grid[kept_below[0] - 1] if len(kept_below) and kept_below[0] > 0 else -1.0
    return float(low), float(high)


def rows_to_decide(drops: ArrayLike, limit: float, *, seed: int, futures: int = 200) -> int | None:
    """How many further rows would probably decide what these did not.

    Futures are drawn that are as uncertain as the rows leave them (a Bayesian bootstrap of the drops seen, Rubin 1981;
    for answers that are right or wrong with half a lost and half a gained row added, so that what was not seen yet can
    come), each goes on from the wealth there is, and the median of the rows they take is the estimate.

    Args:
        drops: Per row seen, in order [rows]; at least one.
        limit: The largest drop that is allowed.
        seed: Of the drawing.
        futures: How many are drawn.

    Returns:
        Rows beyond those seen; None where half of the futures have no verdict by a million rows (the drop is too close
        to the limit to tell).
    """
    rows = np.asarray(drops, dtype=np.float64)
    values, counts = np.unique(rows, return_counts=True)
    weights = counts.astype(np.float64)
    if np.isin(values, (-1.0, 0.0, 1.0)).all():
        known = dict(zip(values.tolist(), weights.tolist(), strict=True))
        values = np.array([-1.0, 0.0, 1.0])
        weights = np.array([known.get(-1.0, 0.0) + 0.5, known.get(0.0, 0.0) + 1e-9, known.get(1.0, 0.0) + 0.5])
    elif len(values) > _MOST_VALUES:
        parts = np.array_split(np.sort(rows), _MOST_VALUES)
        values, weights = np.array([part.mean() for part in parts]), np.array([float(len(part)) for part in parts])
    generator = np.random.default_rng(seed)
    chances = generator.dirichlet(weights, size=futures)  # [futures, values]
    evidence = Evidence(np.full(futures, limit), limit)
    for row in rows:
        evidence.add(row)
    took = np.full(futures, np.inf)
    while evidence.rows < MOST_ROWS and np.isinf(took).sum() * 2 >= futures:
        block = max(1, evidence.rows // 50)
        evidence.add_counts(values, generator.multinomial(block, chances))
        decided = (evidence.log_pass >= LOG_GOAL) | (evidence.log_fail >= LOG_GOAL)
        took[decided & np.isinf(took)] = evidence.rows - len(rows)
    median = float(np.quantile(took, 0.5, method="higher"))
    return int(median) if math.isfinite(median) else None

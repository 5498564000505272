"""Intervals and paired tests: when may a difference between two models be claimed?

Every comparison is paired: both models answer the same rows, and what is compared is the difference row by row. The
unit of chance is the document (a conversation, a row), not the token, because tokens of one document rise and fall
together.

- Means per token (negative log-likelihood, KL divergence): a studentised bootstrap by document, `bootstrap_mean` and
  `paired_bootstrap`.
- Answers that are right or wrong: the exact McNemar test with Newcombe's interval of the paired difference,
  `compare_proportions`; Wilson's interval for one proportion, `wilson_interval`.

The verdict on a difference is "better", "worse" or "undecided"; it is undecided exactly where the interval holds zero
or the rows are too few for an interval, and then `rows_needed` says how many rows would probably decide. Each interval
stands for itself: nothing here corrects for having looked at several models.

Inputs are numbers per row (numpy float64); nothing here knows of models or tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Verdict = Literal["better", "worse", "undecided"]
Floats = NDArray[np.float64]

LEVEL: Final = 0.95
POWER: Final = 0.8
RESAMPLES: Final = 2000
MINIMUM_DOCUMENTS: Final = 6
"""Below it no two-sided claim at 5% is possible: the smallest sign-test p with 5 rows is 2 / 2**5 = 0.0625."""

_CHUNK_NUMBERS: Final = 4_000_000  # resampled numbers held at once: 32 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        estimate: The value measured.
        low: Lower end; None where the rows are too few for an interval.
        high: Upper end; None together with `low`.
        rows: Documents (or rows) that it rests on.
        level: Confidence level of the interval.
        method: How the interval was made.
    """

    estimate: float
    low: float | None
    high: float | None
    rows: int
    level: float
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """The paired difference `model - reference` with its interval and verdict.

    Attributes:
        estimate: The difference measured.
        low: Lower end of its interval; None where the rows are too few for one.
        high: Upper end; None together with `low`.
        verdict: "better" or "worse" for the model where the interval excludes zero, else "undecided".
        rows_needed: For an undecided difference, the rows at which a true difference of the size measured would be
            claimed with probability 0.8; None where the verdict is decided, where no difference at all was measured,
            or where one row says nothing of the spread.
        rows: Documents (or rows) that it rests on.
        level: Confidence level of the interval.
        method: How interval and verdict were made.
        p_value: Exact two-sided p where the method has one.
    """

    estimate: float
    low: float | None
    high: float | None
    verdict: Verdict
    rows_needed: int | None
    rows: int
    level: float
    method: str
    p_value: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def wilson_interval(successes: int, rows: int, *, level: float = LEVEL) -> Interval:
    """Wilson's score interval of one proportion.

    centre = (p + z²/2n) / (1 + z²/n), half-width = z sqrt(p(1-p)/n + z²/4n²) / (1 + z²/n) (Wilson 1927).

    Args:
        successes: Rows that succeeded.
        rows: All rows, at least 1.
        level: Confidence level.

    Returns:
        The proportion and its interval, within [0, 1].

    Raises:
        ValueError: The counts contradict each other.
    """
    if rows < 1 or not 0 <= successes <= rows:
        raise ValueError(f"{successes} successes among {rows} rows: needed 0 <= successes <= rows and at least one row")
    low, high = _wilson_ends(successes / rows, rows, _z(level))
    return Interval(successes / rows, low, high, rows, level, "Wilson")


def bootstrap_mean(
    sums: ArrayLike,
    weights: ArrayLike,
    *,
    seed: int,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Interval of the weighted mean `sum(sums) / sum(weights)`, documents drawn with replacement.

    Args:
        sums: Per document, the sum over its tokens [documents].
        weights: Per document, its tokens [documents], positive.
        seed: Seed of the resampling.
        bounds: Ends that the mean cannot pass (0 and 1 for a share); the interval is cut there.
        resamples: Bootstrap samples.
        level: Confidence level.

    Returns:
        The mean and its symmetric studentised interval (see `paired_bootstrap`).

    Raises:
        ValueError: Lengths differ, a number is not finite, or a weight is not positive.
    """
    values, tokens = _checked(sums, weights)
    estimate, low, high, _ = _studentised(values, tokens, seed=seed, resamples=resamples, level=level)
    low, high = (None if end is None else min(max(end, bounds[0]), bounds[1]) for end in (low, high))
    return Interval(estimate, low, high, len(values), level, f"studentised bootstrap by document, {resamples} samples")


def mean_error(sums: ArrayLike, weights: ArrayLike) -> tuple[float, float]:
    """The weighted mean `sum(sums) / sum(weights)` and its standard error by document, infinite for one document.

    With T the mean and w the weights: se = sqrt(n/(n-1) sum((sums - T w)²)) / sum(w), as in `paired_bootstrap`.

    Raises:
        ValueError: Lengths differ, a number is not finite, or a weight is not positive.
    """
    values, tokens = _checked(sums, weights)
    if len(values) < 2:
        return float(values.sum() / tokens.sum()), math.inf
    mean, error = _ratio_error(values[None], tokens[None])
    return float(mean[0]), float(error[0])


def paired_bootstrap(
    reference_sums: ArrayLike,
    model_sums: ArrayLike,
    weights: ArrayLike,
    *,
    seed: int,
    lower_is_better: bool = True,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Difference:
    """Difference of two token-weighted means on the same documents, with a bootstrap by document.

    With d = model - reference per document and w its tokens, the estimate is T = sum(d) / sum(w), a ratio, whose
    standard error is se = sqrt(n/(n-1) sum((d - T w)²)) / sum(w). Documents are drawn with replacement, T* and se*
    taken of each sample, and the interval is T ± q se, q being the `level` quantile of |T* - T| / se* (the symmetric
    bootstrap-t: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 12). It holds its level with far fewer
    documents than the percentile interval does.

    Args:
        reference_sums: Per document, the reference's sum over its tokens [documents].
        model_sums: The same of the model [documents].
        weights: Tokens per document [documents], positive.
        seed: Seed of the resampling.
        lower_is_better: Whether a negative difference is a gain, as with a loss.
        resamples: Bootstrap samples.
        level: Confidence level.

    Returns:
        The difference; `rows_needed` is n ((z(1-alpha/2) + z(0.8)) se / T)², n the documents there are. Fewer than 6
        documents decide nothing and have no interval.

    Raises:
        ValueError: Lengths differ, a number is not finite, or a weight is not positive.
    """
    reference, tokens = _checked(reference_sums, weights)
    model, _ = _checked(model_sums, weights)
    if len(model) != len(reference):
        raise ValueError(f"{len(model)} documents of the model against {len(reference)} of the reference: pairs needed")
    estimate, low, high, error = _studentised(model - reference, tokens, seed=seed, resamples=resamples, level=level)
    verdict = _verdict(low, high, lower_is_better=lower_is_better)
    needed = None
    if verdict == "undecided" and estimate != 0 and 0 < error < math.inf:
        ratio = (_z(level) + NormalDist().inv_cdf(POWER)) * error / abs(estimate)
        needed = max(len(tokens) + 1, MINIMUM_DOCUMENTS, math.ceil(len(tokens) * ratio**2))
    method = f"paired studentised bootstrap by document, {resamples} samples"
    return Difference(estimate, low, high, verdict, needed, len(tokens), level, method)


def mcnemar_exact(only_model: int, only_reference: int) -> float:
    """Exact two-sided p of McNemar's test: are the rows that only one of two models gets right evenly split?

    p = min(1, 2 P(X <= min(b, c))) with X binomial(b + c, 1/2) (McNemar 1947, in its exact binomial form).

    Args:
        only_model: Rows that only the model gets right (b).
        only_reference: Rows that only the reference gets right (c).

    >>> mcnemar_exact(0, 0), mcnemar_exact(0, 5), mcnemar_exact(1, 9)
    (1.0, 0.0625, 0.021484375)
    """
    rows, fewer = only_model + only_reference, min(only_model, only_reference)
    term = total = 1
    for index in range(fewer):
        term = term * (rows - index) // (index + 1)
        total += term
    # Python divides whole numbers of any length with correct rounding, so this stays exact for thousands of rows.
    return min(1.0, 2 * total / 2**rows)


def compare_proportions(
    reference_right: Sequence[bool] | NDArray[np.bool_],
    model_right: Sequence[bool] | NDArray[np.bool_],
    *,
    level: float = LEVEL,
) -> Difference:
    """Difference of two proportions on the same rows: exact McNemar test, Newcombe's interval.

    The interval squares and adds the two Wilson intervals with the rows' correlation phi (Newcombe 1998, Statistics in
    Medicine 17, 2635-2650, method 10). Where the exact test does not reject at 1 - `level`, the interval is widened to
    reach zero, so that the verdict needs both and is undecided exactly where the interval holds zero.

    Args:
        reference_right: Per row, whether the reference answers it [rows].
        model_right: The same of the model [rows].
        level: Confidence level.

    Returns:
        The difference (model - reference; a higher proportion is better). `rows_needed` is
        ((z(1-alpha/2) sqrt(psi) + z(0.8) sqrt(psi - D²)) / D)², psi the share of rows that only one of the two gets
        right, D the difference (Connor 1987, Biometrics 43, 207-211).

    Raises:
        ValueError: Lengths differ or there are no rows.
    """
    reference, model = np.asarray(reference_right, dtype=bool), np.asarray(model_right, dtype=bool)
    if reference.shape != model.shape or reference.ndim != 1 or not len(reference):
        raise ValueError(f"answers {list(model.shape)} against {list(reference.shape)}: needed one per row of each")
    rows = len(reference)
    only_model, only_reference = int((model & ~reference).sum()), int((reference & ~model).sum())
    both = int((model & reference).sum())
    p_value = mcnemar_exact(only_model, only_reference)
    estimate = (only_model - only_reference) / rows
    low, high = _newcombe_ends(both, only_model, only_reference, rows, _z(level))
    if p_value > 1 - level:
        low, high = min(low, 0.0), max(high, 0.0)
    verdict = _verdict(low, high, lower_is_better=False)
    needed = None
    if verdict == "undecided" and only_model != only_reference:
        psi = (only_model + only_reference) / rows
        reach = _z(level) * math.sqrt(psi) + NormalDist().inv_cdf(POWER) * math.sqrt(psi - estimate**2)
        needed = max(rows + 1, math.ceil((reach / estimate) ** 2))
    return Difference(estimate, low, high, verdict, needed, rows, level, "exact McNemar, Newcombe interval", p_value)


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def _verdict(low: float | None, high: float | None, *, lower_is_better: bool) -> Verdict:
    if low is None or high is None or low <= 0 <= high:
        return "undecided"
    return "better" if (high < 0) == lower_is_better else "worse"


def _wilson_ends(share: float, rows: int, z: float) -> tuple[float, float]:
    scale = 1 + z * z / rows
    centre = (share + z * z / (2 * rows)) / scale
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows)) / scale
    # At 0 and 1 an end is the share itself; rounding must not push it past.
    low = 0.0 if share == 0 else max(0.0, centre - half)
    return low, 1.0 if share == 1 else min(1.0, centre + half)


def _newcombe_ends(both: int, only_model: int, only_reference: int, rows: int, z: float) -> tuple[float, float]:
    neither = rows - both - only_model - only_reference
    model, reference = both + only_model, both + only_reference
    cross = both * neither - only_model * only_reference
    if cross > 0:
        cross = max(cross - rows / 2, 0)  # Newcombe's continuity correction of phi
    spread = math.sqrt(model * (rows - model) * reference * (rows - reference))
    phi = cross / spread if spread else 0.0
    p, q = model / rows, reference / rows
    (p_low, p_high), (q_low, q_high) = _wilson_ends(p, rows, z), _wilson_ends(q, rows, z)

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return max(-1.0, p - q - reach(p - p_low, q_high - q)), min(1.0, p - q + reach(p_high - p, q - q_low))


def _checked(sums: ArrayLike, weights: ArrayLike) -> tuple[Floats, Floats]:
    values, tokens = np.asarray(sums, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if values.shape != tokens.shape or values.ndim != 1 or not len(values):
        raise ValueError(f"sums {list(values.shape)} and weights {list(tokens.shape)}: needed one of each per document")
    if not (np.isfinite(values).all() and np.isfinite(tokens).all() and (tokens > 0).all()):
        raise ValueError("sums and weights must be finite, and every document must have at least one token")
    return values, tokens


def _studentised(
    values: Floats, tokens: Floats, *, seed: int, resamples: int, level: float
) -> tuple[float, float | None, float | None, float]:
    """Ratio sum(values) / sum(tokens), the ends of its symmetric bootstrap-t interval, and its standard error."""
    count = len(values)
    estimate = float(values.sum() / tokens.sum())
    if count < 2:
        return estimate, None, None, math.inf
    error = float(_ratio_error(values[None], tokens[None])[1][0])
    if count < MINIMUM_DOCUMENTS:
        return estimate, None, None, error
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK_NUMBERS // count)
    distances = np.empty(resamples)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        drawn = generator.integers(count, size=(stop - start, count))  # [samples, documents]
        means, errors = _ratio_error(values[drawn], tokens[drawn])
        away = np.abs(means - estimate)
        with np.errstate(divide="ignore", invalid="ignore"):
            distances[start:stop] = np.where(away == 0, 0.0, away / errors)
    reach = float(np.quantile(distances, level, method="higher")) * error if error > 0 else 0.0
    if not math.isfinite(reach):  # nearly all documents are equal: the samples say nothing about the spread
        return estimate, None, None, error
    return estimate, estimate - reach, estimate + reach, error


def _ratio_error(values: Floats, tokens: Floats) -> tuple[Floats, Floats]:
    """Ratio and its standard error of each sample: [samples, documents] -> two of [samples]."""
    count, total = values.shape[1], tokens.sum(axis=1)
    ratio = values.sum(axis=1) / total
    residual = values - ratio[:, None] * tokens
    squares = np.einsum("sd,sd->s", residual, residual)
    return ratio, np.sqrt(squares * (count / (count - 1))) / total

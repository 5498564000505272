"""Models side by side: the figures of each, the paired differences from the first, and what may be said of them.

This module holds and words results; `strop.recipes.compare` measures them. `Comparison.to_dict()` is plain JSON (no
NaN, no
infinity: an unknown is None), `headers()` and `rows()` a table with units, `verdicts()` one sentence per model, and
`headline()` the answer in a few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from strop.evaluation.likelihood import perplexity_of
from strop.evaluation.speed import Speed
from strop.evaluation.statistics import Difference, Interval, Verdict

MEBIBYTE: Final = 1 << 20
_FEW: Final = 3


@dataclass(frozen=True)
class Flip:
    """One row that one of two models answers exactly and the other does not.

    Attributes:
        row: The row's number in its source.
        prompt: The conversation up to the answer, one text.
        expected: The answer that counts as right.
        reference_answer: What the reference writes.
        model_answer: What the model writes.
        kind: "lost" where the reference is right, "gained" where the model is.
    """

    row: int
    prompt: str
    expected: str
    reference_answer: str
    model_answer: str
    kind: Literal["lost", "gained"]


@dataclass(frozen=True)
class Flips:
    """Rows on which a model and the reference disagree about being right; all counted, a few shown."""

    lost: int
    gained: int
    examples: tuple[Flip, ...]


@dataclass(frozen=True)
class ModelResult:
    """What was measured of one model.

    Attributes:
        name: Short name, unique in the comparison.
        source: Folder or hub id.
        format: Number format of its linear layers, as `--format` writes it, or its dtype.
        weights_bytes: Bytes of the weight files it needs on disk, an adapter's base included.
        adapter_bytes: The part of them that is an adapter.
        peak_bytes: Most memory held while it was opened and scored, above what was held before.
        loss: Nats per supervised token.
        speed: Tokens per second; None where it was not measured.
        kl: Nats per token from the reference; None for the reference itself.
        kl_99th: 99th percentile over tokens of the same.
        kl_rows: Rows that the divergence rests on.
        top1_agreement: Share of tokens on which the likeliest is the reference's.
        score: Share of rows answered exactly; None without a task.
        loss_difference: Loss minus the reference's.
        score_difference: Score minus the reference's.
        layer_errors: Linear layer to relative squared weight error against the reference; None where not comparable.
        flips: Rows won and lost against the reference; None without a task.
        kv_bytes_per_token: Bytes that a token takes in the cache of keys and values, once it is rounded as `format`
            says; None where no cache is rounded.
        receipt: What the receipt beside it says of how it was quantized; None where there is none.
    """

    name: str
    source: str
    format: str
    weights_bytes: int
    adapter_bytes: int | None
    peak_bytes: int
    loss: Interval
    speed: Speed | None = None
    kl: Interval | None = None
    kl_99th: float | None = None
    kl_rows: int | None = None
    top1_agreement: Interval | None = None
    score: Interval | None = None
    loss_difference: Difference | None = None
    score_difference: Difference | None = None
    layer_errors: dict[str, float] | None = None
    flips: Flips | None = None
    kv_bytes_per_token: float | None = None
    receipt: dict[str, Any] | None = None

    @property
    def judged_by(self) -> Literal["score", "loss"]:
        """What the verdict rests on: the score where there is a task, unless neither model answers a single row."""
        if self.score is None or self.score_difference is None:
            return "loss"
        nobody = self.score.estimate == 0 and self.score_difference.estimate == 0
        return "loss" if nobody else "score"

    @property
    def difference(self) -> Difference | None:
        """The difference that the verdict rests on; None for the reference itself."""
        return self.score_difference if self.judged_by == "score" else self.loss_difference

    @property
    def verdict(self) -> Verdict | None:
        """Against the reference; None for the reference itself."""
        return self.difference.verdict if self.difference else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        perplexity = {end: _perplexity(getattr(self.loss, end)) for end in ("estimate", "low", "high")}
        ratio = self.loss_difference and {
            end: _perplexity(getattr(self.loss_difference, end)) for end in ("estimate", "low", "high")
        }
        plain = _finite(asdict(self))
        plain |= {"perplexity": perplexity, "perplexity_ratio": ratio, "verdict": self.verdict}
        plain["judged_by"] = self.judged_by
        return plain


@dataclass(frozen=True)
class Comparison:
    """Models side by side on the same rows; the first is the reference.

    Attributes:
        models: The results, in the order given.
        data: Name of the data.
        rows_scored: Rows scored.
        supervised_tokens: Tokens scored in them.
        rows_sha256: Hash of the token ids scored, to tell whether two comparisons used the same.
        task: "exact-match" or None.
        seed: Of the choice of rows and the bootstrap.
        level: Confidence level of every interval.
        notes: What a reader must know to read the figures rightly.
        row_loss: Model name to summed nats per row, for comparisons of other pairs.
        row_right: Model name to whether each row was answered exactly; empty without a task.
        row_tokens: Supervised tokens per row.
    """

    models: tuple[ModelResult, ...]
    data: str
    rows_scored: int
    supervised_tokens: int
    rows_sha256: str
    task: str | None
    seed: int
    level: float
    notes: tuple[str, ...] = ()
    row_loss: dict[str, list[float]] = field(default_factory=dict, repr=False)
    row_right: dict[str, list[bool]] = field(default_factory=dict, repr=False)
    row_tokens: list[int] = field(default_factory=list, repr=False)

    @property
    def reference(self) -> ModelResult:
        """The model that the others are compared with."""
        return self.models[0]

    def model(self, name: str) -> ModelResult:
        """The result of one model by its name.

        Raises:
            KeyError: There is none of that name.
        """
        return {model.name: model for model in self.models}[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an unknown figure is None."""
        return {
            "data": self.data,
            "rows": self.rows_scored,
            "supervised_tokens": self.supervised_tokens,
            "rows_sha256": self.rows_sha256,
            "task": self.task,
            "seed": self.seed,
            "level": self.level,
            "reference": self.reference.name,
            "headline": self.headline(),
            "verdicts": self.verdicts(),
            "notes": list(self.notes),
            "models": [model.to_dict() for model in self.models],
        }

    def headers(self) -> list[str]:
        """The table's columns, with units."""
        columns = ["model", "format", "weights MiB", "peak MiB"]
        if self._has_kv:
            columns.append("KV bytes/token")
        if self._has_speed:
            columns += ["prefill tok/s", "decode tok/s"]
        columns += ["perplexity", "KL nats", "KL 99%", "top-1 %"]
        if self.task:
            columns.append("exact %")
        return [*columns, "difference", "verdict"]

    def rows(self) -> list[list[str]]:
        """The table's cells, one list per model; see `headers`."""
        return [self._cells(model) for model in self.models]

    def verdicts(self) -> list[str]:
        """One sentence for each model after the first."""
        return [verdict_sentence(model, self.reference) for model in self.models[1:]]

    def headline(self) -> str:
        """The answer in a few sentences: what is better, the smallest that keeps up, what is worse."""
        return headline(self.models)

    @property
    def _has_speed(self) -> bool:
        return any(model.speed is not None for model in self.models)

    @property
    def _has_kv(self) -> bool:
        return any(model.kv_bytes_per_token is not None for model in self.models)

    def _cells(self, model: ModelResult) -> list[str]:
        cells = [model.name, model.format, mebibytes(model.weights_bytes), mebibytes(model.peak_bytes)]
        if self._has_kv:
            cells.append("-" if model.kv_bytes_per_token is None else f"{model.kv_bytes_per_token:,.0f}")
        if self._has_speed:
            speed = model.speed
            cells += [f"{speed.prefill.median:,.0f}", f"{speed.decode.median:,.0f}"] if speed else ["-", "-"]
        cells.append(significant(_perplexity(model.loss.estimate)))
        cells += [significant(model.kl.estimate if model.kl else None, 3), significant(model.kl_99th, 3)]
        cells.append(f"{100 * model.top1_agreement.estimate:.1f}" if model.top1_agreement else "-")
        if self.task:
            cells.append(f"{100 * model.score.estimate:.1f}" if model.score else "-")
        cells.append(_difference_words(model) if model.difference else "reference")  # `verdicts` has the interval
        return [*cells, model.verdict or "-"]


def headline(models: Sequence[ModelResult]) -> str:
    """What may be said of `models` against the first, in a few sentences."""
    reference, others = models[0], models[1:]
    better, worse, undecided = (
        [model for model in others if model.verdict == verdict] for verdict in ("better", "worse", "undecided")
    )
    sentences = []
    if better:
        sentences.append(f"Better than {reference.name}: {_listed(better)}.")
    smaller = [model for model in others if model.weights_bytes < reference.weights_bytes]
    keeping = [model for model in smaller if model.verdict != "worse"]
    if keeping:
        sentences.append(_keeps_up(min(keeping, key=lambda model: model.weights_bytes), reference))
    elif smaller:
        sentences.append(f"No smaller file keeps up with {reference.name}.")
    if worse:
        sentences.append(f"Worse than {reference.name}: {_listed(worse)}.")
    if undecided:
        sentences.append(f"Undecided: {_listed(undecided)}.")
    return " ".join(sentences) or f"{reference.name} stands alone: there is nothing to compare it with."


def verdict_sentence(model: ModelResult, reference: ModelResult) -> str:
    """One sentence: the verdict on `model`, its difference with the interval, and the rows that would decide."""
    difference = model.difference
    if difference is None:
        return f"{model.name}: not compared."
    measured = f"{'exact match' if model.judged_by == 'score' else 'loss'} {_difference_words(model)}"
    if difference.low is None:
        ending = f"{difference.rows} rows are too few for an interval"
    else:
        ending = f"{round(100 * difference.level)}% interval {_ends_words(model)}"
    if difference.p_value is not None:
        ending += f", exact McNemar p {_p_words(difference.p_value)}"
    sentence = f"{model.name} against {reference.name}: {difference.verdict} ({measured}, {ending})"
    if difference.verdict == "undecided":
        if difference.estimate == 0:
            sentence += "; no difference was measured, so no number of rows can be named that would decide"
        elif difference.rows_needed is not None:
            sentence += f"; about {difference.rows_needed:,} rows would decide a difference of this size"
    return sentence + "."


def mebibytes(count: float) -> str:
    """Bytes as mebibytes with three digits or more, without the unit.

    >>> mebibytes(7_870_000), mebibytes(16 << 30)
    ('7.51', '16,384')
    """
    size = count / MEBIBYTE
    return f"{size:,.0f}" if size >= 100 else f"{size:.1f}" if size >= 10 else f"{size:.2f}"


def significant(value: float | None, digits: int = 4) -> str:
    """A number to so many significant digits, without an exponent where that stays short.

    >>> significant(1.234567), significant(0.00001234), significant(123456.7), significant(None), significant(0.0)
    ('1.235', '1.23e-05', '123,457', '-', '0')
    """
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}" if abs(value) >= 1e-3 else f"{value:.2e}"


def signed(value: float) -> str:
    """A difference with its sign, at least three decimals and at least two significant digits.

    >>> signed(0.25), signed(-0.00123), signed(4e-7), signed(0.0)
    ('+0.250', '-0.0012', '+4.0e-07', '0')
    """
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:+.1e}"
    return f"{value:+.{max(3, 1 - math.floor(math.log10(abs(value))))}f}"


def _difference_words(model: ModelResult) -> str:
    if model.difference is None:
        return "-"
    if model.judged_by == "score":
        return f"{100 * model.difference.estimate:+.1f} points"
    return f"{signed(model.difference.estimate)} nats"


def _ends_words(model: ModelResult) -> str:
    difference = model.difference
    if difference is None or difference.low is None or difference.high is None:
        return "no interval"
    if model.judged_by == "score":
        return f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    return f"{signed(difference.low)} to {signed(difference.high)}"


def _p_words(p_value: float) -> str:
    return "< 0.0001" if p_value < 1e-4 else f"{p_value:.2g}"


def _keeps_up(model: ModelResult, reference: ModelResult) -> str:
    share = model.weights_bytes / reference.weights_bytes
    size = f"{mebibytes(model.weights_bytes)} MiB, {100 * share:.0f}% of {reference.name}'s"
    if model.judged_by == "score" and model.score and reference.score:
        figures = f"{100 * model.score.estimate:.1f}% exact match against {100 * reference.score.estimate:.1f}%"
    else:
        perplexities = (significant(_perplexity(one.loss.estimate)) for one in (model, reference))
        figures = "perplexity " + " against ".join(perplexities)
    if model.verdict == "undecided":
        unit = "points" if model.judged_by == "score" else "nats"
        figures += f" (difference {_ends_words(model)} {unit}, undecided)"
    return f"{model.name} is the smallest file not shown to be worse than {reference.name}: {size}, {figures}."


def _listed(models: Sequence[ModelResult]) -> str:
    """Names with their differences, or the names alone where there are many."""
    few = len(models) <= _FEW
    parts = [f"{model.name} ({_difference_words(model)})" if few else model.name for model in models]
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def _perplexity(loss: float | None) -> float | None:
    value = None if loss is None else perplexity_of(loss)
    return value if value is not None and math.isfinite(value) else None


def _finite(value: Any) -> Any:
    """The same structure with tuples as lists and every float that JSON cannot hold as None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

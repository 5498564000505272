"""What a receipt says of held-out rows: both models' likelihood and how far they are apart, each with its interval."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from strop.errors import UsageError
from strop.evaluation.divergence import Divergence
from strop.evaluation.likelihood import Likelihood, perplexity_of
from strop.evaluation.statistics import LEVEL, Interval, bootstrap_mean


def held_out_figures(source: Likelihood, made: Likelihood, divergence: Divergence, *, seed: int = 0) -> dict[str, Any]:
    """The figures of a model against its source, as JSON values.

    Intervals are those of `bootstrap_mean` by row, at 95%; both ends are None where the rows are fewer than 6, or so
    alike that they say nothing of the spread. A perplexity beyond what a float holds is None.

    Args:
        source: Likelihood of the rows under the source.
        made: The same under the model made of it.
        divergence: Between the two.
        seed: Of the bootstrap.

    Raises:
        UsageError: No row's logits could be kept.
    """
    kept = divergence.tokens > 0
    if not bool(kept.any()):
        raise UsageError(
            "held-out rows: the logits of not a single one fit what is free on the disk for temporary files, so "
            "nothing can be judged; free some space, or shorten the rows (--max-length)"
        )

    def mean(sums: Tensor, tokens: Tensor, high: float = math.inf) -> Interval:
        said = tokens > 0
        return bootstrap_mean(sums[said].numpy(), tokens[said].numpy(), seed=seed, bounds=(0.0, high))

    kl = mean(divergence.kl_sums, divergence.tokens)
    agreement = mean(divergence.agreements, divergence.tokens, 1.0)
    losses = {name: mean(one.nll_sums, one.tokens) for name, one in (("", made), ("source_", source))}
    figures: dict[str, Any] = {
        "rows": len(divergence.tokens),
        "rows_compared": int(kept.sum()),
        "tokens": int(divergence.tokens.sum()),
        "level": LEVEL,
        "kl": kl.estimate,
        "kl_interval": [kl.low, kl.high],
        "kl_99th": divergence.kl_99th,
        "top1_agreement": agreement.estimate,
        "top1_agreement_interval": [agreement.low, agreement.high],
    }
    for name, loss in losses.items():
        figures[f"{name}perplexity"] = _perplexity(loss.estimate)
        figures[f"{name}perplexity_interval"] = [_perplexity(loss.low), _perplexity(loss.high)]
    return figures


def _perplexity(loss: float | None) -> float | None:
    value = None if loss is None else perplexity_of(loss)
    return value if value is not None and math.isfinite(value) else None

"""How likely the model finds the text: negative log-likelihood per row, and perplexity.

nll = -log p(token | tokens before it), in nats, over the supervised tokens; perplexity = exp(sum of nll / tokens).
Sums are kept per row in float64, so that intervals can be drawn by row (`strop.evaluation.statistics`).

Perplexities compare only between models with the same tokenizer, on the same supervised tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from strop.data.templates import Sample
from strop.evaluation.scoring import Piece, score, supervised_counts


class Likelihood:
    """A measure: sums of negative log-likelihood and tokens per row.

    Attributes:
        nll_sums: Nats per row [rows], float64.
        tokens: Supervised tokens per row [rows], int64.
    """

    def __init__(self, rows: int) -> None:
        self.nll_sums = torch.zeros(rows, dtype=torch.float64)
        self.tokens = torch.zeros(rows, dtype=torch.int64)

    def add(self, piece: Piece) -> None:
        """Add -log p of each target to its row."""
        taken = piece.log_probabilities.gather(1, piece.targets[:, None]).squeeze(1)
        self.nll_sums.index_add_(0, piece.rows, -taken.double())
        self.tokens.index_add_(0, piece.rows, torch.ones_like(piece.rows))

    @property
    def mean_nll(self) -> float:
        """Nats per token, all rows together."""
        return float(self.nll_sums.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """The exponential of the nats per token; infinity where that is beyond what a float holds."""
        return perplexity_of(self.mean_nll)

    @property
    def row_nll(self) -> Tensor:
        """Nats per token of each row [rows], float64."""
        return self.nll_sums / self.tokens


def perplexity_of(mean_nll: float) -> float:
    """exp(`mean_nll`), infinity beyond the largest float.

    >>> perplexity_of(0.0), perplexity_of(1e6)
    (1.0, inf)
    """
    return math.exp(mean_nll) if mean_nll < 709 else math.inf


def likelihood(model: PreTrainedModel, samples: Sequence[Sample], *, batch_size: int = 8) -> Likelihood:
    """Measure the negative log-likelihood of every row's supervised tokens.

    Args:
        model: A causal language model.
        samples: Token ids and labels per row.
        batch_size: Rows per forward pass; it changes the result by rounding only.

    Raises:
        DataError: A row has no supervised token.
        ModelError: The logits are not finite.
    """
    supervised_counts(samples)
    measure = Likelihood(len(samples))
    score(model, samples, [measure], batch_size=batch_size)
    return measure

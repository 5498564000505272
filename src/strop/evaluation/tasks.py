"""Exact match: is the whole answer what was expected, to the last token?

One teacher-forced pass decides it: an answer is right when, at every supervised position, the likeliest token is the
expected one, the stop token included. Greedy decoding from the same prompt writes exactly the expected answer in that
case and only then, since it takes the same argmax after the same tokens for as long as it is right. (In 16 bits two
logits can tie or swap between a batch and a single row by rounding alone; such rows are rare and fall either way.) In
a conversation of several answers each is judged after the expected ones before it, and all must be right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from strop.data.templates import Sample
from strop.evaluation.scoring import Piece, score, supervised_counts


class ExactMatch:
    """A measure: whether a row's answers are right to the last token.

    Attributes:
        right: Per row [rows], bool; rows that were not scored count as right.
    """

    def __init__(self, rows: int) -> None:
        self.right = torch.ones(rows, dtype=torch.bool)

    def add(self, piece: Piece) -> None:
        """A row stays right while every likeliest token is the expected one."""
        wrong = piece.rows[piece.choices != piece.targets]
        self.right[wrong] = False


def exact_match(model: PreTrainedModel, samples: Sequence[Sample], *, batch_size: int = 8) -> torch.Tensor:
    """Whether greedy decoding would write each row's answers exactly [rows], bool.

    Raises:
        DataError: A row has no supervised token.
        ModelError: The logits are not finite.
    """
    supervised_counts(samples)
    measure = ExactMatch(len(samples))
    score(model, samples, [measure], batch_size=batch_size)
    return measure.right

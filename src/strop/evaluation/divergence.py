"""How far a model's predictions are from a reference's, token by token.

KL(reference || model) = sum over the vocabulary of p (log p - log q), in nats, p the reference's probabilities and q
the model's, at every supervised position of the same text; and top-1 agreement, the share of positions where both
would choose the same token. Both are zero and one for a model that computes the same; unlike perplexity they see a
change in any direction, and need far fewer tokens.

The reference's logits are written to a bounded temporary file while the reference is open (`ReferenceLogits`), in the
dtype that it gave them, so that only one model is in memory at a time. Where the file's limit is reached, the
divergence is that of the rows whose tokens all fitted, and `tokens` says how many. The vocabularies must be the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strop.errors import ModelError
from strop.evaluation.scoring import Piece
from strop.scratch import Scratch, Stored


class ReferenceLogits:
    """A measure that keeps the reference's logits of each piece on the disk.

    Args:
        rows: Rows of the pass.
        scratch: Where they go.

    Attributes:
        vocabulary: Width of the logits; 0 before the first piece.
    """

    def __init__(self, rows: int, scratch: Scratch) -> None:
        self.vocabulary = 0
        self._scratch = scratch
        self._pieces: list[tuple[Stored, Tensor]] = []
        self._whole = torch.ones(rows, dtype=torch.bool)
        self._full = False

    def add(self, piece: Piece) -> None:
        """Set the piece aside, or mark its rows as not held once the file is full."""
        self.vocabulary = piece.logits.shape[-1]
        stored = None if self._full else self._scratch.put(piece.logits)
        if stored is None:
            self._full = True  # a later, smaller piece might fit: pieces must stay a run from the start
            self._whole[piece.rows] = False
        else:
            self._pieces.append((stored, piece.targets))

    @property
    def pieces(self) -> int:
        """Pieces held."""
        return len(self._pieces)

    @property
    def rows_held(self) -> Tensor:
        """Whether all tokens of a row are held [rows], bool."""
        return self._whole

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Logits [tokens, vocabulary] and targets [tokens] of one piece."""
        stored, targets = self._pieces[index]
        return self._scratch.get(stored), targets


class Divergence:
    """A measure of one model against `ReferenceLogits`, in the order of its pieces.

    Args:
        reference: The reference's logits, complete.
        name: The model's name, and
        reference_name: the reference's, for the error.

    Attributes:
        kl_sums: Nats per row [rows], float64; zero for rows that are not held.
        agreements: Tokens per row on which both choose the same [rows], int64.
        tokens: Tokens per row that were compared [rows], int64; zero for rows that are not held.
    """

    def __init__(self, reference: ReferenceLogits, *, name: str = "model", reference_name: str = "reference") -> None:
        rows = len(reference.rows_held)
        self.kl_sums = torch.zeros(rows, dtype=torch.float64)
        self.agreements = torch.zeros(rows, dtype=torch.int64)
        self.tokens = torch.zeros(rows, dtype=torch.int64)
        self._reference = reference
        self._names = (name, reference_name)
        self._next = 0
        self._kl: list[Tensor] = []

    def add(self, piece: Piece) -> None:
        """Compare the next piece with the reference's of the same tokens.

        Raises:
            ModelError: The vocabularies differ, or the pass is not over the same tokens.
        """
        name, reference_name = self._names
        if piece.logits.shape[-1] != self._reference.vocabulary:
            raise ModelError(
                f"{name} predicts over {piece.logits.shape[-1]} tokens, {reference_name} over "
                f"{self._reference.vocabulary}: KL divergence and agreement need the same vocabulary; compare models "
                "of one tokenizer"
            )
        if self._next >= self._reference.pieces:
            return
        logits, targets = self._reference.read(self._next)
        self._next += 1
        if not torch.equal(targets, piece.targets):
            raise ModelError(
                f"{name} was scored on other tokens than {reference_name}: the rows, their tokenization or the batch "
                "size differ; score both with the same ones"
            )
        keep = self._reference.rows_held[piece.rows]
        other = Piece(logits, targets, piece.rows)
        expected = other.log_probabilities
        kl = (expected.exp() * (expected - piece.log_probabilities)).sum(dim=-1)[keep]
        rows = piece.rows[keep]
        self.kl_sums.index_add_(0, rows, kl.double())
        self.agreements.index_add_(0, rows, (piece.choices == other.choices)[keep].long())
        self.tokens.index_add_(0, rows, torch.ones_like(rows))
        self._kl.append(kl)

    @property
    def token_kl(self) -> Tensor:
        """KL of every token compared [tokens], fp32, in the pass's order."""
        return torch.cat(self._kl) if self._kl else torch.empty(0)

    @property
    def mean_kl(self) -> float:
        """Nats per token, over all tokens compared."""
        return float(self.kl_sums.sum() / self.tokens.sum())

    @property
    def kl_99th(self) -> float:
        """The KL that 99% of the tokens stay at or below."""
        return percentile_99(self.token_kl)

    @property
    def top1_agreement(self) -> float:
        """Share of the tokens on which both choose the same."""
        return float(self.agreements.sum() / self.tokens.sum())


def percentile_99(values: Tensor) -> float:
    """The smallest of `values` [n] that at least 99% of them do not exceed; nothing is interpolated."""
    ordered = values.sort().values
    return float(ordered[-(-99 * len(ordered) // 100) - 1])

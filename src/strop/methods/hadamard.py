"""Randomized Hadamard rotations: orthogonal, fast, and they spread what a few features hold over all of them.

    x Q = x D (H / sqrt(n)),    D signs drawn at random, H a matrix of +-1 with H H^T = n I

(Tseng and others, "QuIP#", arXiv 2402.04396, section 3; Ashkboos and others, "QuaRot", arXiv 2404.00456, whose folding
of Q into a model stands in `layers/rotation.py`). H is the Kronecker product of a small one by Paley's constructions
(12, 20, 28, ... none for a power of two) and Sylvester's, applied in n log n steps. Where no such product has the size,
as 172 = 4 * 43, blocks of the largest power of two that divides it stand on the diagonal: orthogonal too, but each
spreads over its own block alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from strop.errors import UsageError

_LARGEST_BASE = 256
"""Paley matrices up to this order are used; their product is a plain matrix product."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix Q of a size, in parts.

    Attributes:
        signs: float32 [size], the diagonal of D.
        base: float32 [order, order], the small Hadamard matrix; [1, 1] for none.
        power: Order of Sylvester's matrix; size is a multiple of order * power, and the product fills the diagonal.
    """

    signs: Tensor
    base: Tensor
    power: int

    @property
    def block(self) -> int:
        """Features that are mixed with one another; the size itself where all are."""
        return len(self.base) * self.power

    def apply(self, x: Tensor) -> Tensor:
        """X Q for x [..., size], in its dtype."""
        return self._mix(x * self.signs.to(x), transposed=False)

    def undo(self, x: Tensor) -> Tensor:
        """X Q^T for x [..., size], in its dtype."""
        return self._mix(x, transposed=True) * self.signs.to(x)

    def matrix(self) -> Tensor:
        """Q, float32 [size, size]."""
        return self.apply(torch.eye(len(self.signs)))

    def _mix(self, x: Tensor, *, transposed: bool) -> Tensor:
        """Multiply by H / sqrt(block) or its transpose, block by block."""
        order, power = len(self.base), self.power
        mixed = x.reshape(-1, order, power)  # [..., size] -> [vectors * blocks, order, power]
        width = 1
        while width < power:  # one step of Sylvester's: (a, b) -> (a + b, a - b)
            pairs = mixed.reshape(-1, 2, width)
            mixed = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1)
            width *= 2
        mixed = mixed.reshape(-1, order, power)
        if order > 1:
            base = self.base.to(x)
            mixed = (base if transposed else base.t()) @ mixed
        return (mixed / self.block**0.5).view(x.shape)


def randomized_hadamard(size: int, generator: torch.Generator) -> Rotation:
    """A rotation of `size` features with signs from `generator`.

    Raises:
        UsageError: The size is below 1.
    """
    if size < 1:
        raise UsageError(f"a rotation has at least one feature, got {size}")
    signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
    power = size & -size  # the largest power of two that divides the size
    odd = size // power
    base = torch.ones(1, 1)
    order = odd * 4
    while odd > 1 and order <= min(size, _LARGEST_BASE):
        if size % order == 0 and (found := hadamard(order)) is not None:
            return Rotation(signs, found, size // order)
        order *= 2
    return Rotation(signs, base, power)


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix [order, order] by Paley's constructions over prime fields; None where they give none.

    With Jacobsthal's matrix J of a prime q (J_ij = 1 where i - j is a nonzero square modulo q, -1 where it is none):
    q = 3 modulo 4 gives order q + 1, q = 1 modulo 4 gives order 2 (q + 1).
    """
    prime = order - 1
    if order % 4 == 0 and _is_prime(prime) and prime % 4 == 3:
        skew = _bordered(prime, -1)
        return skew + torch.eye(order)
    prime = order // 2 - 1
    if order % 4 == 0 and _is_prime(prime) and prime % 4 == 1:
        symmetric = _bordered(prime, 1)
        plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(symmetric, plus) + torch.kron(torch.eye(prime + 1), minus)
    return None


def _bordered(prime: int, sign: int) -> Tensor:
    """The conference matrix of a prime: Jacobsthal's with a row of ones above and a column of `sign` to the left."""
    squares = {number * number % prime for number in range(1, prime)}
    residues = torch.tensor([0.0, *(1.0 if number in squares else -1.0 for number in range(1, prime))])
    places = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1)
    matrix[1:, 1:] = residues[(places.unsqueeze(1) - places) % prime]
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = sign
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))

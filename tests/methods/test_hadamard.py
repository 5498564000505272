"""Hadamard rotations are orthogonal, mix everything that they can, and equal the dense product."""

from __future__ import annotations

import pytest
import torch

from strop.errors import UsageError
from strop.methods.hadamard import hadamard, randomized_hadamard


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 36, 44, 60, 76])
def test_paley_matrices_are_hadamard(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones(order, order))
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order))


@pytest.mark.parametrize("order", [2, 6, 10, 18, 92, 172])
def test_orders_that_the_constructions_do_not_reach_are_none(order: int) -> None:
    assert hadamard(order) is None


@pytest.mark.parametrize(
    ("size", "block"),
    [(1, 1), (2, 2), (64, 64), (256, 256), (768, 768), (12, 12), (28, 28), (40, 40), (172, 4), (33, 1)],
)
def test_rotations_are_orthogonal_and_mix_as_widely_as_they_can(size: int, block: int) -> None:
    rotation = randomized_hadamard(size, seeded())
    matrix = rotation.matrix().double()
    assert rotation.block == block
    assert (matrix @ matrix.t() - torch.eye(size)).abs().max() < 1e-6
    assert (matrix != 0).sum(dim=1).tolist() == [block] * size
    assert (matrix[matrix != 0].abs() - block**-0.5).abs().max() < 1e-6


@pytest.mark.parametrize("size", [64, 40, 172])
def test_the_fast_product_is_the_dense_one_and_can_be_undone(size: int) -> None:
    rotation = randomized_hadamard(size, seeded())
    x = torch.randn(3, 5, size, generator=seeded(1))
    assert torch.allclose(rotation.apply(x), x @ rotation.matrix(), atol=1e-5)
    assert torch.allclose(rotation.undo(x), x @ rotation.matrix().t(), atol=1e-5)
    assert torch.allclose(rotation.undo(rotation.apply(x)), x, atol=1e-5)


def test_an_outlier_is_spread_evenly() -> None:
    x = torch.zeros(256)
    x[17] = 16.0
    assert torch.allclose(randomized_hadamard(256, seeded()).apply(x).abs(), torch.ones(256))


def test_signs_come_from_the_generator() -> None:
    one, two, other = (randomized_hadamard(64, seeded(seed)).signs for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_rotation_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one feature"):
        randomized_hadamard(0, seeded())

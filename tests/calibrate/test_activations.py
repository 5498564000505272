"""Hidden states above the budget lie on the disk and come back bit for bit."""

from __future__ import annotations

import pytest
import torch

from strop.calibrate.activations import Activations
from strop.errors import DataError
from strop.scratch import Scratch


def test_what_the_budget_does_not_hold_is_on_the_disk_and_comes_back_bit_for_bit() -> None:
    with Scratch() as scratch:
        kept = Activations(2 * 40, scratch)
        first = [torch.randn(10, generator=torch.Generator().manual_seed(n)) for n in range(4)]
        for number, tensor in enumerate(first):
            kept.put(number, tensor)
        assert scratch.used_bytes == 2 * 40
        for number, tensor in enumerate(first):
            assert kept.get(number).equal(tensor)
        for number, tensor in enumerate(first):
            kept.put(number, -tensor)
        assert scratch.used_bytes == 2 * 40, "a successor takes the place of the one before"
        for number, tensor in enumerate(first):
            assert kept.get(number).equal(-tensor)


def test_a_disk_without_room_is_said_with_the_bytes() -> None:
    with Scratch(limit_bytes=50) as scratch:
        kept = Activations(0, scratch)
        kept.put(0, torch.zeros(10))
        with pytest.raises(DataError, match=r"40 more bytes .*--max-rows"):
            kept.put(1, torch.zeros(10))


def test_what_is_dropped_makes_room_in_memory_for_others() -> None:
    with Scratch() as scratch:
        kept = Activations(40, scratch)
        for number in range(2):
            kept.put(number, torch.full((10,), float(number)))
        assert scratch.used_bytes == 40, "the second is on the disk"
        for number in (0, 1, 7):
            kept.drop(number)
            assert number not in kept
        kept.put(2, torch.ones(10))
        assert scratch.used_bytes == 40, "the third has the place of the first"
        assert kept.get(2).equal(torch.ones(10))

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

"""The instruction set that a test forces; without the native library there is none, and the tests say so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from strop import kernels

from .values import HERE


@pytest.fixture(params=HERE or [None], ids=str)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param is None:
        pytest.skip(f"no native kernels: {kernels.in_use().reason}")
    with kernels.forced(request.param) as choice:
        assert choice.name == request.param
        yield request.param

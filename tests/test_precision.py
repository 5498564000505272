"""Which precision is chosen where."""

from __future__ import annotations

import pytest
import torch

from strop import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({"avx512_bf16", "avx2"}, torch.bfloat16), ({"amx_bf16"}, torch.bfloat16), ({"avx2", "avx512f"}, torch.float32)],
)
def test_auto_takes_bf16_where_the_processor_multiplies_it(monkeypatch, flags, dtype):
    monkeypatch.setattr(precision, "_cpu_flags", lambda: flags)
    assert precision.compute_dtype("auto", CPU) is dtype


def test_what_is_asked_for_is_taken(monkeypatch):
    monkeypatch.setattr(precision, "_cpu_flags", set)
    assert precision.compute_dtype("bfloat16", CPU) is torch.bfloat16
    monkeypatch.setattr(precision, "_cpu_flags", lambda: {"avx512_bf16"})
    assert precision.compute_dtype("float32", CPU) is torch.float32


def test_flags_are_read_from_this_machine():
    flags = precision._cpu_flags()
    assert flags
    assert all(isinstance(flag, str) for flag in flags)


def test_autocast_is_on_for_bf16_only():
    for dtype, active in ((torch.float32, False), (torch.float64, False), (torch.bfloat16, True)):
        with precision.autocast(CPU, dtype):
            assert torch.is_autocast_enabled("cpu") is active


def test_auto_is_a_device_that_is_there():
    assert precision.choose_device("cpu") == CPU
    torch.empty(1, device=precision.choose_device("auto"))

"""Rounding while loading never holds the full-precision model: one dense weight is alive at a time."""

from __future__ import annotations

import gc
import weakref

import torch

from strop.memory import PeakMemory
from strop.models import load
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scheme import parse_scheme
from tests.tiny import tiny_folder

WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8}


def test_one_dense_weight_is_alive_at_a_time(tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    alive: list[weakref.ref[torch.Tensor]] = []

    def rounding(name: str, weight: torch.Tensor) -> QuantizedTensor:
        assert not [name for ref in alive if ref() is not None], f"at {name} an earlier weight is still held"
        alive.append(weakref.ref(weight))
        return quantize_tensor(weight, parse_scheme("int4-g32"), where=name)

    load(folder, "int4-g32", rounding=rounding)
    assert len(alive) == 14


def test_peak_memory_is_the_result_and_one_block(tmp_path):
    folder = tiny_folder(tmp_path, "llama", tied=True, **WIDE)
    dense_bytes = (folder / "model.safetensors").stat().st_size
    load(tiny_folder(tmp_path / "warm-up", "llama"), "int4-g32")
    gc.collect()
    with PeakMemory() as peak:
        opened = load(folder, "int4-g32")
    result = [*opened.model.parameters(), *opened.model.buffers()]
    result_bytes = sum(tensor.numel() * tensor.element_size() for tensor in result)
    block_bytes = (dense_bytes - 304 * 512 * 4) // 4
    assert dense_bytes > 45e6
    assert result_bytes < dense_bytes / 6
    assert peak.peak_bytes < result_bytes + block_bytes

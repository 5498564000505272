"""QLoRA over a mixture: its experts are held in the base's format, frozen, and adapters train on top."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from strop.layers.quant_experts import quant_experts
from strop.layers.surgery import lora_modules
from strop.models import load
from strop.recipes.quantize import quantize
from strop.recipes.tune import tune
from tests.models.common import rounded
from tests.recipes.test_tune import Notes
from tests.tiny import tiny_chat_file, tiny_folder, tiny_input


@pytest.mark.parametrize("base_format", [None, "int4-g32"], ids=["rounded while loading", "a quantized folder"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_adapters_train_over_quantized_experts(tmp_path: Path, family: str, base_format: str | None) -> None:
    base, data, notes = tiny_folder(tmp_path, family), tiny_chat_file(tmp_path / "rows.jsonl"), Notes()
    if base_format is not None:
        base = quantize(base, base_format, output=tmp_path / "base").path
    run = tune(
        base,
        data,
        method="qlora",
        output=tmp_path / "run",
        max_steps=3,
        learning_rate=1e-2,
        batch_size=2,
        reporter=notes,
    )
    assert notes.said("4 tensors of experts are no linear layers and stay as they are")
    opened, expected = load(run.path).model, rounded(family, base_format or "nf4-dq")
    assert len(quant_experts(opened)) == 4
    for name, held in quant_experts(opened).items():
        assert torch.equal(held.dense_parameter(), quant_experts(expected)[name].dense_parameter())
    adapters = lora_modules(opened)
    assert len(adapters) == 8
    assert any(adapter.lora_B.abs().max() > 0 for adapter in adapters.values())
    with torch.no_grad():
        assert not torch.allclose(opened(tiny_input()).logits, expected(tiny_input()).logits, atol=1e-4)
    report = run.to_dict()["parameters"]
    assert report["total"] - report["trained"] == sum(p.numel() for p in load(tmp_path / family).model.parameters())

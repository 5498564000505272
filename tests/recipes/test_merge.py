"""Merging: the file is the pair that was trained, or there is no file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from strop.errors import GateError, UsageError
from strop.files.peft_adapter import BaseRecord, save_adapter
from strop.layers.surgery import attach_lora, lora_modules
from strop.models import load
from strop.recipes.merge import merge
from tests.tiny import tiny_folder, tiny_input


def adapter(folder: Path, family: str, *, size: float, base_format: str | None = None, **options: object) -> Path:
    """A tiny base and an adapter over it whose B is random, `size` wide."""
    base = tiny_folder(folder, family, **options)
    model = load(base, base_format).model
    generator = torch.Generator().manual_seed(1)
    attach_lora(model, "all-linear", rank=4, alpha=8.0, generator=generator)
    for module in lora_modules(model).values():
        module.lora_B.data.normal_(std=size, generator=generator)
    save_adapter(model, folder / "adapter", base=BaseRecord(str(base), base_format), tokenizer=load(base).tokenizer)
    return folder / "adapter"


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "qwen3"])
def test_a_merged_fp32_model_answers_as_base_plus_adapter(tmp_path: Path, family: str) -> None:
    run = adapter(tmp_path, family, size=0.05)
    result = merge(run, tmp_path / "merged")
    assert result.max_logit_difference <= 1e-5
    assert result.effect == pytest.approx(1, abs=1e-4)
    tokens = tiny_input()
    with torch.inference_mode():
        pair, merged = load(run).model(tokens).logits, load(tmp_path / "merged").model(tokens).logits
    torch.testing.assert_close(merged, pair, atol=1e-5, rtol=0)
    assert load(tmp_path / "merged").adapter is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_over_four_bits_is_merged_onto_the_dequantized_base(tmp_path: Path, family: str) -> None:
    run = adapter(tmp_path, family, size=0.05, base_format="nf4-dq")
    result = merge(run, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged.scheme is None
    assert result.max_logit_difference <= 1e-5
    tokens = tiny_input()
    with torch.inference_mode():
        torch.testing.assert_close(merged.model(tokens).logits, load(run).model(tokens).logits, atol=1e-5, rtol=0)


def test_a_bf16_base_gives_a_bf16_model_that_keeps_the_effect(tmp_path: Path) -> None:
    result = merge(adapter(tmp_path, "llama", size=0.1, dtype=torch.bfloat16), tmp_path / "merged")
    assert result.stored == "bfloat16"
    assert result.effect is not None
    assert result.effect >= result.gate == 0.99
    assert load(tmp_path / "merged").model.dtype == torch.bfloat16


def test_a_small_change_that_rounding_erases_is_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    run = adapter(tmp_path, "llama", size=2e-4, base_format="nf4")
    with pytest.raises(GateError, match=r"keeps -?0\.\d+ of the adapter's effect.*qat"):
        merge(run, tmp_path / "merged", format="nf4")
    assert not (tmp_path / "merged").exists()
    assert merge(run, tmp_path / "whole").effect == pytest.approx(1, abs=1e-2)


def test_a_large_change_survives_eight_bits(tmp_path: Path) -> None:
    result = merge(adapter(tmp_path, "llama", size=0.3), tmp_path / "merged", format="int8")
    assert result.stored == "int8"
    assert load(tmp_path / "merged").scheme is not None
    account = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert account["effect"] == result.effect


def test_an_adapter_without_effect_is_said_to_change_nothing(tmp_path: Path) -> None:
    result = merge(adapter(tmp_path, "llama", size=0.0), tmp_path / "merged")
    assert result.effect is None
    assert "changes nothing" in " ".join(result.lines())


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to merge"):
        merge(tiny_folder(tmp_path, "llama"), tmp_path / "merged")


def test_what_stands_at_the_output_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    run = adapter(tmp_path, "llama", size=0.05)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "note.txt").write_text("mine")
    with pytest.raises(UsageError):
        merge(run, tmp_path / "merged")
    assert (tmp_path / "merged" / "note.txt").read_text() == "mine"
    merge(run, tmp_path / "merged", overwrite=True)
    assert not (tmp_path / "merged" / "note.txt").exists()

"""Merging: the file is the pair that was trained, or there is no file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from strop.errors import FormatError, GateError, ModelError, UsageError
from strop.files.peft_adapter import BaseRecord, base_digest, save_adapter
from strop.files.saving import save_model
from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import attach_lora, linear_modules, lora_modules
from strop.memory import PeakMemory
from strop.models import load
from strop.recipes.merge import merge
from tests.tiny import tiny_chat_file, tiny_folder, tiny_input


def adapter(
    folder: Path,
    family: str,
    *,
    size: float,
    base_format: str | None = None,
    targets: str = "all-linear",
    digest: str | None = None,
    merge_only: bool = False,
    **options: object,
) -> Path:
    """A tiny base and an adapter over it whose B is random, `size` wide."""
    base = tiny_folder(folder, family, **options)
    model = load(base, base_format).model
    generator = torch.Generator().manual_seed(1)
    attach_lora(model, targets, rank=4, alpha=8.0, generator=generator)
    for module in lora_modules(model).values():
        module.lora_B.data.normal_(std=size, generator=generator)
    record = BaseRecord(str(base), base_format, digest)
    save_adapter(model, folder / "adapter", base=record, tokenizer=load(base).tokenizer, merge_only=merge_only)
    return folder / "adapter"


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "qwen3", "gemma", "mixtral"])
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
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


def test_layers_without_an_adapter_are_dequantized_too(tmp_path: Path) -> None:
    run = adapter(tmp_path, "llama", size=0.1, base_format="int4-g32", targets="q_proj,up_proj")
    result = merge(run, tmp_path / "merged")
    assert result.layers == 4
    assert result.max_logit_difference <= 1e-5
    merged = load(tmp_path / "merged").model
    assert not any(isinstance(module, QuantLinear) for module in merged.modules())


@pytest.mark.parametrize("base_format", [None, "nf4-dq"])
def test_in_16_bits_the_arithmetic_is_exact_and_storing_costs_the_rounding_alone(
    tmp_path: Path, base_format: str | None
) -> None:
    run = adapter(tmp_path, "llama", size=0.1, base_format=base_format, dtype=torch.bfloat16)
    result = merge(run, tmp_path / "merged")
    assert result.arithmetic_error <= 1e-5 < result.max_logit_difference < 0.1
    assert result.effect is not None
    assert result.effect == pytest.approx(1, abs=1e-2)


def test_the_file_is_what_is_measured(tmp_path: Path) -> None:
    run = adapter(tmp_path, "llama", size=0.1, dtype=torch.bfloat16)
    result = merge(run, tmp_path / "merged", data=str(tiny_chat_file(tmp_path / "rows.jsonl")))
    assert result.asked == "rows of the data"
    tokens = tiny_input(rows=4)
    with torch.inference_mode():
        pair, merged = (load(folder, dtype="float32").model(tokens).logits for folder in (run, tmp_path / "merged"))
    assert float((pair - merged).abs().max()) == pytest.approx(result.max_logit_difference, rel=2)


@pytest.mark.parametrize("size", [2e-4, 1e-3, 1e-2, 0.3])
def test_the_gate_over_the_size_of_the_change(tmp_path: Path, size: float) -> None:
    """Rounding erases a change that is small beside a step, and keeps one that is large."""
    run = adapter(tmp_path, "llama", size=size, base_format="nf4")
    result = merge(run, tmp_path / "merged", format="nf4", force=True)
    assert result.effect is not None
    assert result.effect < 0.1 if size <= 1e-2 else result.effect > 0.95
    assert result.forced == (result.effect < result.gate == 0.95)
    assert any("forced" in line for line in result.lines()) == result.forced


def test_a_format_is_measured_against_the_base_in_that_format(tmp_path: Path) -> None:
    """A full-precision base: what rounding the base does on its own is not the adapter's effect, nor its loss."""
    result = merge(adapter(tmp_path, "llama", size=0.1), tmp_path / "merged", format="int6-g32")
    assert result.effect == pytest.approx(1, abs=0.05)
    again = load(tmp_path / "merged")
    assert again.scheme is not None
    assert again.scheme.name == result.stored == "int6-g32"


def test_layers_that_no_adapter_touched_keep_their_codes_bit_for_bit(tmp_path: Path) -> None:
    run = adapter(tmp_path, "llama", size=0.3, base_format="int4-g32", targets="q_proj")
    before = {
        name: module.base if hasattr(module, "base") else module
        for name, module in linear_modules(load(run).model).items()
    }
    merge(run, tmp_path / "merged", format="int4-g32", force=True)
    for name, module in linear_modules(load(tmp_path / "merged").model).items():
        assert isinstance(module, QuantLinear)
        assert module.qtensor.codes.equal(before[name].qtensor.codes) is not name.endswith("q_proj")


def test_another_base_than_the_one_trained_on_is_said(tmp_path: Path) -> None:
    known = adapter(tmp_path / "a", "llama", size=0.1, digest=base_digest(tiny_folder(tmp_path / "same", "llama")))
    assert merge(known, tmp_path / "one").warnings == ()
    (tmp_path / "a" / "llama" / "model.safetensors").write_bytes(
        (tiny_folder(tmp_path / "other", "llama", seed=5) / "model.safetensors").read_bytes()
    )
    result = merge(known, tmp_path / "two")
    assert any("SHA-256 differs" in warning for warning in result.warnings)
    assert any("warning" in line for line in result.lines())
    (known / "strop_base.json").unlink()
    assert any("nothing records" in warning for warning in merge(known, tmp_path / "three").warnings)
    assert "nothing records" in (tmp_path / "three" / "merge.json").read_text()


def test_the_runs_own_rows_are_asked_where_they_are_still_there(tmp_path: Path) -> None:
    run = adapter(tmp_path, "llama", size=0.1).rename(tmp_path / "best")
    data = tiny_chat_file(tmp_path / "rows.jsonl", rows=20)
    (tmp_path / "config.yaml").write_text(f"model: base\ndata: {data}\nmethod: lora\n")
    assert merge(tmp_path, tmp_path / "one").asked == "the run's own rows"
    assert merge(run, tmp_path / "two").asked == "the run's own rows"
    data.unlink()
    assert merge(run, tmp_path / "three").asked == "built-in prompts"


def test_an_adapter_that_serves_only_merged_is_merged(tmp_path: Path) -> None:
    run = adapter(tmp_path, "llama", size=0.3, merge_only=True, base_format="int8")
    with pytest.raises(ModelError, match="trained to be merged"):
        load(run)
    assert merge(run, tmp_path / "merged", format="int8").effect == pytest.approx(1, abs=0.05)


def test_a_format_that_cannot_hold_the_layers_is_refused_before_any_work(tmp_path: Path) -> None:
    run = adapter(tmp_path, "gpt2", size=0.1)
    with pytest.raises(FormatError, match="Conv1D"):
        merge(run, tmp_path / "merged", format="int8")
    with pytest.raises(FormatError, match="strop export"):
        merge(run, tmp_path / "merged", format="gguf:q8_0")
    with pytest.raises(FormatError, match="fixed from data; merge without a format first"):
        merge(run, tmp_path / "merged", format="int8-a8-static")
    with pytest.raises(FormatError, match="not divisible by group size 48"):
        merge(run, tmp_path / "merged", format="int4-g48")
    assert not (tmp_path / "merged").exists()


def test_a_failure_while_writing_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = adapter(tmp_path, "llama", size=0.1)
    before = sorted(path.name for path in tmp_path.iterdir())

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("strop.files.saving._write_configs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(run, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_merging_needs_the_model_and_a_layer_never_an_fp32_copy(tmp_path: Path) -> None:
    """A base of 24 MiB in bf16: merging may hold it and the read-back, not the 48 MiB of its fp32 copy beside it."""
    options = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 18, "head_dim": 64}
    run = adapter(tmp_path, "llama", size=0.1, dtype=torch.bfloat16, **options)
    weights = (tmp_path / "llama" / "model.safetensors").stat().st_size
    assert weights > 20 << 20
    merge(run, tmp_path / "first")  # what is imported and cached once
    with PeakMemory() as peak:
        merge(run, tmp_path / "second")
    assert peak.peak_bytes < 2.2 * weights, f"{peak.peak_bytes / weights:.2f} times the weights"


def test_the_merged_model_is_a_plain_one_that_is_saved_and_opened_like_any_other(tmp_path: Path) -> None:
    merge(adapter(tmp_path, "llama", size=0.1, tied=True), tmp_path / "merged")
    opened = load(tmp_path / "merged")
    assert not lora_modules(opened.model)
    assert opened.model.get_output_embeddings().weight is opened.model.get_input_embeddings().weight
    assert opened.tokenizer is not None
    save_model(opened.model, opened.tokenizer, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "merged" / "model.safetensors"
    ).read_bytes()

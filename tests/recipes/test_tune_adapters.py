"""`tune` with adapters: trained further, over quantized bases, opened by others."""

from __future__ import annotations

import pytest
import torch

import strop
from strop.errors import ConfigError, FormatError, UsageError
from strop.files.peft_adapter import read_adapter_config
from strop.layers.surgery import attach_lora, lora_modules
from strop.numerics.scheme import parse_scheme
from tests.recipes.helpers import Notes, short
from tests.tiny import tiny_folder, tiny_input

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft

# --- an adapter trained further ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("way", ["as the model", "as a setting"])
def test_an_adapter_is_trained_further_from_where_it_was(base, data, tmp_path, method, way):
    settings = {"method": method, "learning_rate": 2e-2, "schedule": "constant", "batch_size": 16, "valid_fraction": 0}
    first = short(base, data, tmp_path / "first", rank=4, max_steps=8, **settings)
    notes = Notes()
    if way == "as the model":
        second = short(first.path, data, tmp_path / "second", max_steps=1, reporter=notes, **settings)
    else:
        second = short(base, data, tmp_path / "second", max_steps=1, adapter=first.path, reporter=notes, **settings)
    assert notes.said("an adapter of rank 4 is trained further")
    assert second.metrics[0]["loss"] < first.metrics[-1]["loss"]
    config = read_adapter_config(second.last_path)
    assert (config.rank, config.alpha) == (4, 8.0)
    assert config.base == str(base)
    assert config.record == read_adapter_config(first.last_path).record


def test_training_further_on_another_base_is_said(base, data, tmp_path):
    first, notes = short(base, data, tmp_path / "first", method="qlora"), Notes()
    other = tiny_folder(tmp_path, "llama", seed=1, dtype=torch.bfloat16)
    short(other, data, tmp_path / "second", method="lora", adapter=first.path, reporter=notes)
    assert notes.said("this adapter was trained over its base in nf4-dq, and is opened over it in full precision")
    assert notes.said("the adapter was trained on other weights")


def test_an_adapter_of_peft_is_trained_further(base, data, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        strop.load(base, dtype=torch.float32).model,
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "theirs")
    run = short(base, data, tmp_path / "run", adapter=tmp_path / "theirs")
    assert len(lora_modules(strop.load(run.path).model)) == 4


def test_whole_weights_under_an_adapter_are_refused(base, data, tmp_path):
    first = short(base, data, tmp_path / "first")
    for method, extra in (("full", {}), ("qat", {"format": "int8"})):
        with pytest.raises(UsageError, match="merge it first"):
            short(first.path, data, tmp_path / "second", method=method, **extra)


def test_what_is_no_adapter_is_refused_as_one(base, data, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no adapter_config\.json"):
        short(base, data, tmp_path / "run", adapter=base)


# --- quantized bases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "scheme"), [(None, "nf4-dq"), ("int4-g32", "int4-g32"), ("nf4", "nf4")])
def test_qlora_trains_over_the_format_it_is_asked_for(base, data, tmp_path, asked, scheme):
    run = short(base, data, tmp_path / "run", method="qlora", format=asked)
    assert run.report["format"] == scheme
    opened = strop.load(run.path)
    assert opened.scheme is not None
    assert opened.scheme.name == scheme
    layer = opened.model.model.layers[0].mlp.up_proj.base
    expected = strop.load(base, format=scheme).model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.qtensor.codes, expected.qtensor.codes)


def test_a_base_that_is_quantized_on_disk_takes_adapters_under_qlora_only(base, data, tmp_path):
    quantized = short(base, data, tmp_path / "qat", method="qat", format="int4-g32")
    run = short(quantized.path, data, tmp_path / "run", method="qlora")
    assert run.report["format"] == "int4-g32"
    assert strop.load(run.path).scheme == parse_scheme("int4-g32")
    for method, extra in (("lora", {}), ("full", {}), ("qat", {"format": "int8"})):
        with pytest.raises(UsageError, match="its weights are quantized"):
            short(quantized.path, data, tmp_path / "other", method=method, **extra)
    with pytest.raises(FormatError, match="quantized already"):
        short(quantized.path, data, tmp_path / "other", method="qlora", format="nf4")


# --- by others -------------------------------------------------------------------------------------------------------


def test_the_adapters_of_a_run_open_in_peft(base, data, tmp_path):
    peft = pytest.importorskip("peft")
    run = short(base, data, tmp_path / "run", dtype="float32")
    theirs = peft.PeftModel.from_pretrained(strop.load(base, dtype=torch.float32).model, run.best_path)
    ours = strop.load(run.path, dtype=torch.float32)
    difference = (theirs(tiny_input()).logits - ours.model(tiny_input()).logits).abs().max()
    assert difference < 1e-5


def test_a_fresh_adapter_of_the_same_seed_is_where_a_run_begins(base, data, tmp_path):
    run = short(base, data, tmp_path / "run", seed=7, max_steps=1, learning_rate=1e-12, rank=4)
    model = strop.load(base).model
    attach_lora(model, rank=4, alpha=8, generator=torch.Generator().manual_seed(7))
    trained = lora_modules(strop.load(run.path).model)
    for name, module in lora_modules(model).items():
        assert torch.allclose(trained[name].lora_A, module.lora_A, atol=1e-9)

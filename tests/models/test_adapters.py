"""Adapter folders open as their base with the adapter over it, in the precision that the adapter was trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from strop.errors import FormatError, MissingInputError, ModelError
from strop.files.peft_adapter import BaseRecord, save_adapter
from strop.layers import surgery
from strop.layers.quant_linear import QuantLinear
from strop.models import load
from strop.numerics.scheme import parse_scheme
from tests.models.common import edit_json, edit_weights, logits, quantized_copy, rounded
from tests.tiny import FAMILIES, tiny_folder, tiny_model, tiny_tokenizer

# PEFT asks transformers by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def _adapted(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    surgery.attach_lora(model, rank=4, alpha=8.0, generator=generator)
    for module in surgery.lora_modules(model).values():
        module.lora_B.data.normal_(std=0.1, generator=generator)
    return model


def _adapter(tmp_path: Path, family: str, *, base: str, form: str | None = None) -> Path:
    model = _adapted(tiny_model(family) if form is None else rounded(family, form))
    save_adapter(model, tmp_path / "adapter", base=BaseRecord(base, form, None))
    return tmp_path / "adapter"


@pytest.mark.parametrize("form", [None, "nf4-dq", "int4-g32"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe"])
def test_an_adapter_of_ours_opens_over_its_base_as_it_was_trained(tmp_path, family, form):
    base = tiny_folder(tmp_path, family)
    opened = load(_adapter(tmp_path, family, base=str(base), form=form))
    expected = _adapted(tiny_model(family) if form is None else rounded(family, form))
    assert torch.allclose(logits(opened.model), logits(expected), atol=1e-5)
    assert not torch.allclose(logits(opened.model), logits(load(base, form).model), atol=1e-2)
    adapters = surgery.lora_modules(opened.model)
    assert list(adapters) == list(surgery.linear_modules(opened.model))
    assert all(isinstance(module.base, QuantLinear) is (form is not None) for module in adapters.values())
    assert opened.scheme == (None if form is None else parse_scheme(form))
    assert opened.adapter.rank == 4
    assert opened.source == str(tmp_path / "adapter")
    assert not opened.model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_peft_saved_opens_with_pefts_logits(tmp_path, family):
    base = tiny_folder(tmp_path, family)
    suffixes = sorted({name.rpartition(".")[2] for name in surgery.linear_modules(tiny_model(family))})
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=suffixes, fan_in_fan_out=family == "gpt2", init_lora_weights=False
    )
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "theirs")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "theirs").eval()
    ours = load(tmp_path / "theirs")
    assert torch.allclose(logits(ours.model), logits(theirs), atol=1e-5)
    assert not torch.allclose(logits(ours.model), logits(tiny_model(family)), atol=1e-2)
    assert ours.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()  # the base's


def test_adapters_are_fp32_over_a_16_bit_base(tmp_path):
    base = tiny_folder(tmp_path, "llama", dtype=torch.bfloat16)
    opened = load(_adapter(tmp_path, "llama", base=str(base)))
    assert opened.model.dtype == torch.bfloat16
    for module in surgery.lora_modules(opened.model).values():
        assert module.lora_A.dtype == module.lora_B.dtype == torch.float32
        assert module.base.weight.dtype == torch.bfloat16
    assert logits(opened.model).dtype == torch.bfloat16


def test_a_relative_base_is_looked_for_beside_the_adapter(tmp_path, monkeypatch):
    tiny_folder(tmp_path, "llama")
    _adapter(tmp_path, "llama", base="../llama")
    monkeypatch.chdir("/")
    assert load(tmp_path / "adapter").adapter.base == str(tmp_path / "llama")


def test_a_named_format_rounds_the_base_anew(tmp_path):
    base = tiny_folder(tmp_path, "llama")
    opened = load(_adapter(tmp_path, "llama", base=str(base), form="nf4-dq"), "int8")
    assert opened.scheme == parse_scheme("int8")
    assert torch.allclose(logits(opened.model), logits(_adapted(rounded("llama", "int8"))), atol=1e-5)


def test_an_adapter_over_a_quantized_folder_takes_its_codes(tmp_path):
    base = quantized_copy(tiny_folder(tmp_path, "llama"), rounded("llama", "int4-g32"), tmp_path / "quantized")
    opened = load(_adapter(tmp_path, "llama", base=str(base)))
    assert opened.scheme == parse_scheme("int4-g32")
    assert torch.allclose(logits(opened.model), logits(_adapted(rounded("llama", "int4-g32"))), atol=1e-5)


def test_a_run_opens_its_best_adapter(tmp_path):
    base = tiny_folder(tmp_path, "llama")
    shutil.move(_adapter(tmp_path, "llama", base=str(base)), tmp_path / "run" / "best")
    opened = load(tmp_path / "run")
    assert opened.adapter is not None
    assert opened.source == str(tmp_path / "run" / "best")


def test_the_adapters_own_tokenizer_comes_before_the_bases(tmp_path):
    base = tiny_folder(tmp_path, "llama")
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.save_pretrained(_adapter(tmp_path, "llama", base=str(base)))
    assert load(tmp_path / "adapter").tokenizer.chat_template is None


def test_a_base_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(MissingInputError, match=r"adapter.*base.*gone"):
        load(_adapter(tmp_path, "llama", base=str(tmp_path / "gone")))


def test_an_adapter_over_an_adapter_is_refused(tmp_path):
    base = tiny_folder(tmp_path, "llama")
    first = shutil.move(_adapter(tmp_path, "llama", base=str(base)), tmp_path / "first")
    with pytest.raises(ModelError, match="merge that one first"):
        load(_adapter(tmp_path, "llama", base=str(first)))


def test_an_adapter_for_another_model_is_refused_and_says_what_does_not_fit(tmp_path):
    other = tiny_folder(tmp_path, "llama", hidden_size=32)
    with pytest.raises(ModelError, match=r"q_proj\.lora_A\.weight"):
        load(_adapter(tmp_path, "llama", base=str(other)))


def test_each_renamed_key_of_an_adapter_is_refused(tmp_path):
    base = tiny_folder(tmp_path, "gpt2", n_layer=1)
    model = _adapted(tiny_model("gpt2", n_layer=1))
    save_adapter(model, tmp_path / "adapter", base=BaseRecord(str(base)))
    names = [f"base_model.model.{name}.lora_{half}.weight" for name in surgery.lora_modules(model) for half in "AB"]
    for name in names:
        broken = shutil.copytree(tmp_path / "adapter", tmp_path / "broken")
        (broken / "adapter_model.safetensors").rename(broken / "model.safetensors")
        edit_weights(broken, lambda tensors, name=name: tensors.update({f"{name}x": tensors.pop(name)}))
        (broken / "model.safetensors").rename(broken / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=name.replace(".", r"\.")):
            load(broken)
        shutil.rmtree(broken)


def test_an_adapter_that_is_more_than_lora_is_refused(tmp_path):
    base = tiny_folder(tmp_path, "llama")
    edit_json(_adapter(tmp_path, "llama", base=str(base)) / "adapter_config.json", use_dora=True)
    with pytest.raises(FormatError, match="use_dora"):
        load(tmp_path / "adapter")

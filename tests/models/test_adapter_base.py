"""An adapter over another precision than it was trained on is warned of, with the measured shift; one that serves only
merged is refused on every way in.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from strop.app.cli import app
from strop.errors import ModelError, UsageError
from strop.evaluation.engines import open_engine
from strop.files.peft_adapter import BaseRecord, read_adapter_config, save_adapter
from strop.layers.base import dense_weight
from strop.layers.surgery import attach_lora, lora_modules
from strop.models import load
from strop.recipes.compare import compare
from strop.recipes.doctor import doctor
from strop.recipes.export import export
from strop.recipes.generate import predict
from strop.recipes.merge import merge
from tests.models.common import edit_json
from tests.models.foreign import foreign_folder
from tests.recipes.helpers import Notes, short
from tests.tiny import tiny_chat_file, tiny_folder, tiny_tokenizer

# PEFT asks transformers by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def adapter(folder: Path, base: Path, form: str | None, *, precision: str | None, merge_only: bool = False) -> Path:
    """An adapter over `base` in `form`, whose record says `precision`."""
    model = load(base, form).model
    generator = torch.Generator().manual_seed(0)
    attach_lora(model, rank=4, alpha=8.0, generator=generator)
    for module in lora_modules(model).values():
        module.lora_B.data.normal_(std=0.02, generator=generator)
    record = BaseRecord(str(base), form, None, precision)
    save_adapter(model, folder / "adapter", base=record, tokenizer=tiny_tokenizer(), merge_only=merge_only)
    return folder / "adapter"


def measured(note: str) -> tuple[float, float]:
    """The relative difference and how many times the adapter's change it is."""
    match = re.search(r"differ by ([\d.]+)% \(relative\), ([\d.e+-]+) times what the adapter changes", note)
    assert match is not None, note
    return float(match[1]) / 100, float(match[2])


def expected(base: Path, run: Path, trained: str | None, opened: str | None) -> tuple[float, float]:
    """The same from whole models, opened one after another."""
    one, other, over = (load(place, form).model for place, form in ((base, trained), (base, opened), (run, opened)))
    adapted = lora_modules(over)
    names = list(adapted)[:: -(-len(adapted) // 8)]
    there, here = ([dense_weight(model.get_submodule(name)).float() for name in names] for model in (one, other))
    change = [adapted[name].scaling * adapted[name].lora_B @ adapted[name].lora_A for name in names]

    def norm(parts: list[torch.Tensor]) -> float:
        return float(torch.cat([part.detach().flatten() for part in parts]).norm())

    difference = norm([a - b for a, b in zip(there, here, strict=True)])
    return difference / norm(here), difference / norm(change)


@pytest.mark.parametrize(
    ("trained", "opened"), [("nf4", None), (None, "nf4"), ("int4-g32", "int8"), ("int3-g32-asym", None)]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_another_precision_is_said_with_the_shift_of_both_bases(tmp_path, family, trained, opened):
    base = tiny_folder(tmp_path, family)
    run = adapter(tmp_path, base, trained, precision=trained or "full precision")
    assert load(run, trained).warnings == []
    edit_json(run / "strop_base.json", format=None)  # opened over what is asked for, as by another tool's user
    (note,) = load(run, opened).warnings
    assert (
        f"trained over its base in {trained or 'full precision'}, and is opened over it in {opened or 'full'}" in note
    )
    assert measured(note) == pytest.approx(expected(base, run, trained, opened), rel=0.06)
    assert measured(note)[0] > 0.003


def test_a_run_records_the_precision_of_a_base_that_is_stored_quantized(tmp_path):
    base, _ = foreign_folder(tmp_path, "gptq-asym")
    data = tiny_chat_file(tmp_path / "chat.jsonl")
    run = short(base, data, tmp_path / "run", method="qlora")
    record = read_adapter_config(run.best_path).record
    assert (record.format, record.precision) == (None, "int4-g32-asym")
    assert load(run.path).warnings == []
    dense = tiny_folder(tmp_path / "dense", "llama")
    edit_json(run.best_path / "adapter_config.json", base_model_name_or_path=str(dense))
    (note,) = load(run.path).warnings
    assert "trained over its base in int4-g32-asym, and is opened over it in full precision" in note
    assert measured(note)[0] > 0.03
    result = merge(run.path, tmp_path / "merged", force=True)
    assert any("int4-g32-asym" in warning for warning in result.warnings)
    table = compare([run.path], data, speed=False)
    assert any("int4-g32-asym" in text for text in table.notes)
    notes = Notes()
    predict(run.path, data, tmp_path / "answers.jsonl", max_new_tokens=2, max_rows=1, reporter=notes)
    assert notes.said("int4-g32-asym")
    shown = CliRunner().invoke(app, ["chat", str(run.path), "-p", "hi", "--max-new-tokens", "2"])
    assert "int4-g32-asym" in re.sub(r"\s+", "", shown.output)


def test_an_adapter_of_peft_is_spoken_of_only_over_a_quantized_base(tmp_path):
    base = tiny_folder(tmp_path, "llama")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "theirs")
    assert load(tmp_path / "theirs").warnings == []
    (note,) = load(tmp_path / "theirs", "nf4").warnings
    assert "nothing records the precision of the base that this adapter was trained on" in note
    assert "opened over nf4; were it full precision, the weights of 7 of 14 adapted layers differ by" in note
    quantized, _ = foreign_folder(tmp_path / "gptq", "gptq")
    edit_json(tmp_path / "theirs" / "adapter_config.json", base_model_name_or_path=str(quantized))
    (note,) = load(tmp_path / "theirs").warnings
    assert "opened over int4-g32. If it was trained over another" in note


def test_training_further_over_another_precision_says_how_far_it_is(tmp_path):
    base, data = tiny_folder(tmp_path, "llama"), tiny_chat_file(tmp_path / "chat.jsonl")
    run = short(base, data, tmp_path / "run", method="qlora", format="int3-g32")
    notes = Notes()
    short(base, data, tmp_path / "again", method="lora", adapter=run.path, reporter=notes)
    (note,) = [text for text in notes.notes if "trained over its base in int3-g32" in text]
    assert note.startswith("warning: ")
    assert measured(note)[0] > 0.1


# --- adapters that serve only merged ---------------------------------------------------------------------------------


WAYS_IN = {
    "load": lambda run, data, out: load(run),
    "load over a format": lambda run, data, out: load(run, "int4-g32"),
    "chat": lambda run, data, out: open_engine(run),
    "compare": lambda run, data, out: compare([run], data, speed=False),
    "predict": lambda run, data, out: predict(run, data, out / "answers.jsonl"),
    "training it further": lambda run, data, out: short(run, data, out / "run", method="qlora"),
    "training it further over its base": lambda run, data, out: short(
        read_adapter_config(run).base, data, out / "run", method="qlora", adapter=run
    ),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_an_adapter_trained_to_be_merged_is_refused_on_every_way_in_but_merging(tmp_path, way):
    base = tiny_folder(tmp_path, "llama")
    run = adapter(tmp_path, base, "int8", precision="int8", merge_only=True)
    with pytest.raises(ModelError, match=r"was trained to be merged into its quantized base.*strop merge"):
        WAYS_IN[way](run, tiny_chat_file(tmp_path / "chat.jsonl"), tmp_path)
    assert merge(run, tmp_path / "merged", format="int8", force=True).layers == 14


def test_the_command_line_the_doctor_and_an_export_of_it_alone_refuse_it_too(tmp_path):
    run = adapter(tmp_path, tiny_folder(tmp_path, "llama"), "int8", precision="int8", merge_only=True)
    found = doctor(run, tiny_chat_file(tmp_path / "chat.jsonl"), method="qlora")
    assert found.refused
    assert any("was trained to be merged" in str(finding.to_dict()) for finding in found.findings)
    with pytest.raises(UsageError, match="was trained to be merged"):
        export(run, tmp_path / "adapter.gguf", format="gguf:f32", adapter_only=True)
    shown = CliRunner().invoke(app, ["chat", str(run), "-p", "hi"])
    assert shown.exit_code == 1

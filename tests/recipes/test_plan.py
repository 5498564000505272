"""`plan`: the notes' table from its formula, a real model's true counts beside it, and what fits where."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import strop
from strop.errors import DataError, MissingInputError, TargetError, UsageError
from strop.planner.memory import GIB
from strop.recipes.plan import ModelPlan, SizesPlan, plan, plan_model, plan_sizes
from tests.tiny import tiny_chat_file, tiny_config, tiny_folder

SIZES, RANKS = ["7B", "13B", "70B", "180B"], [1, 2, 8, 16, 512]


def test_the_table_of_the_notes() -> None:
    found = plan_sizes(SIZES, RANKS).to_dict()
    assert json.loads(json.dumps(found)) == found
    table = found["square_matrix"]
    assert list(table) == SIZES
    assert all(list(row) == ["1", "2", "8", "16", "512"] for row in table.values())
    assert table["7B"] == {"1": 167_332, "2": 334_664, "8": 1_338_656, "16": 2_677_312, "512": 85_673_987}
    assert table["70B"]["512"] == 270_924_934


def test_the_table_is_printed_as_the_notes_lay_it_out_and_exactly() -> None:
    planned = plan_sizes(SIZES, RANKS)
    assert planned.table() == [
        ["rank", "7B", "13B", "70B", "180B"],
        ["1", "167K", "228K", "529K", "849K"],
        ["2", "335K", "456K", "1M", "2M"],  # the notes truncate 334,664 to 334K
        ["8", "1M", "2M", "4M", "7M"],
        ["16", "3M", "4M", "8M", "14M"],
        ["512", "86M", "117M", "271M", "434M"],  # and 270,924,934 to 270M
    ]
    text = "\n".join(planned.lines())
    assert "334,664" in text
    assert "270,924,934" in text
    assert "approximated" in text


def test_sizes_and_ranks_come_as_text_too() -> None:
    assert plan_sizes([" 7B", "1.5b"], ["1", " 8"]).counts == plan_sizes(["7B", "1.5b"], [1, 8]).counts


def test_every_bad_size_and_rank_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        plan_sizes(["7B", "7X", "0"], ["1", "no", "-2"])
    for bad in ("'7X'", "'0'", "'no'", "'-2'"):
        assert bad in str(caught.value)
    with pytest.raises(UsageError, match="at least one"):
        plan_sizes([], [1])


# --- a real model -----------------------------------------------------------------------------------------------------


def test_llama_2_7b_at_rank_16_has_both_counts_and_says_which_is_which(material: Path) -> None:
    planned = plan_model(material / "configs" / "Llama-2-7b-hf", rank=16, device="H200")
    found = planned.to_dict()
    assert found["trainable_parameters"] == {"true": 39_976_960, "square_matrix": 2_626_811}
    assert found["parameters"] == 6_738_415_616
    text = planned.lines()
    (true,) = [line for line in text if "39,976,960" in line]
    (approximate,) = [line for line in text if "2,626,811" in line]
    assert "true count" in true
    assert "rank * (in + out)" in true
    assert "approximation" in approximate
    assert "one square matrix" in approximate
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("plan"), "llama")


def test_every_method_has_its_bytes_its_disk_and_its_floor(folder: Path) -> None:
    found = plan_model(folder, device="H200").to_dict()
    assert list(found["methods"]) == ["full", "full-bf16", "lora", "qlora", "qlora-int4-g32", "qat", "qat-lora"]
    for method in found["methods"].values():
        for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes", "logits_bytes"):
            assert method[name] > 0
        assert method["peak_bytes"] > method["weights_bytes"]
        assert method["disk_bytes"] > 0
        assert method["floor_seconds_per_step"] > 0
        assert method["fits"] is True
        assert method["changes_to_fit"] == []
    assert found["methods"]["qlora"]["step"]["format"] == "nf4-dq"
    assert found["methods"]["full"]["trainable_parameters"] == found["parameters"]
    assert found["methods"]["lora"]["trainable_parameters"] == found["trainable_parameters"]["true"]
    assert found["file_bytes"]["int4-g32"] < found["file_bytes"]["int8"] < found["file_bytes"]["bf16"]


def test_what_does_not_fit_comes_with_the_changes_that_make_it(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import strop.recipes.plan as recipe

    def tight() -> object:
        return replace(machine, accelerators=(), available_bytes=8 * GIB)

    machine = recipe.this_machine()
    monkeypatch.setattr(recipe, "this_machine", tight)
    # On a processor without bfloat16 weights are held in float32, and nothing would fit.
    monkeypatch.setattr(strop.precision, "compute_dtype", lambda asked, device: torch.bfloat16)
    planned = plan_model(material / "configs" / "Meta-Llama-3-8B", device="H200")
    fits = {method.label: method.fits for method in planned.methods}
    assert set(fits.values()) == {False}
    text = "\n".join(planned.lines())
    assert "QLoRA: the frozen weights in nf4-dq" in text
    assert "gradient checkpointing" in text
    assert "fits" in text
    for method in planned.methods:
        assert method.changes[-1].fits
        assert method.changes[-1].plan.peak_bytes < 8 * GIB


def test_targets_rank_rows_and_length_change_the_plan(folder: Path) -> None:
    base = plan_model(folder, device="H200")
    narrow = plan_model(folder, targets="q_proj,v_proj", rank=4, device="H200")
    assert len(base.adapted) == 14
    assert {linear.name.rpartition(".")[2] for linear in narrow.adapted} == {"q_proj", "v_proj"}
    assert narrow.true_count == 4 * 2 * (64 + 64 + 64 + 32)
    larger = plan_model(folder, batch_size=4, max_length=256, device="H200")
    smaller = plan_model(folder, batch_size=1, max_length=256, device="H200")
    assert larger.methods[2].memory.activations_bytes > 3 * smaller.methods[2].memory.activations_bytes
    kept = plan_model(folder, batch_size=4, max_length=256, checkpointing=True, device="H200")
    assert kept.methods[2].memory.activations_bytes < larger.methods[2].memory.activations_bytes


def test_the_optimizer_changes_its_state_and_nothing_else(folder: Path) -> None:
    plain, small = (plan_model(folder, optimizer=name, device="H200") for name in ("adamw", "adamw-8bit"))
    for one, other in zip(plain.methods, small.methods, strict=True):
        if one.label == "full-bf16":  # for comparison: both its moments are in bf16
            assert one.memory.optimizer_bytes == other.memory.optimizer_bytes
            continue
        assert one.memory.optimizer_bytes == 8 * one.memory.trainable_parameters
        assert other.memory.optimizer_bytes == math.ceil((2 + 8 / 256) * other.memory.trainable_parameters)
        saved = one.memory.optimizer_bytes - other.memory.optimizer_bytes
        assert one.memory.peak_bytes - other.memory.peak_bytes == saved
    assert "adamw-8bit" in "\n".join(small.lines())
    assert small.to_dict()["step"]["optimizer"] == "adamw-8bit"
    with pytest.raises(UsageError, match=r"'adam-8bit'.*did you mean 'adamw-8bit'"):
        plan_model(folder, optimizer="adam-8bit", device="H200")  # type: ignore[arg-type]  # as a command line gives it


def test_the_command_line_takes_the_optimizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from strop.app.cli import main

    with pytest.raises(SystemExit):
        main(["plan", str(folder), "--optimizer", "adamw-8bit", "--json"])
    step = json.loads(capsys.readouterr().out)["step"]
    assert step["optimizer"] == "adamw-8bit"


def test_data_are_counted_with_the_models_own_tokenizer(folder: Path, tmp_path: Path) -> None:
    data = tiny_chat_file(tmp_path / "chats.jsonl", rows=10)
    planned = plan_model(folder, data=data, max_length=128, device="H200")
    assert planned.data is not None
    assert 0 < planned.data.supervised_tokens < planned.data.tokens
    assert planned.data.longest_row_tokens > 0
    assert f"{planned.data.tokens:,} tokens" in "\n".join(planned.lines())
    with pytest.raises(UsageError, match="tokenizer"):
        plan_model(tiny_config("llama"), data=data, device="H200")
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n")
    with pytest.raises(DataError, match=r"broken\.jsonl"):
        plan_model(folder, data=broken, device="H200")


def test_experts_are_reported_as_quantized_and_not_adapted() -> None:
    planned = plan_model(tiny_config("mixtral"), device="H200")
    text = "\n".join(planned.lines())
    assert "not adapted, quantized like linear layers" in text
    assert "2 of 4" in text
    assert planned.to_dict()["expert_weights"] > 0


def test_a_format_that_does_not_fit_a_layer_is_said(material: Path) -> None:
    planned = plan_model(material / "models" / "stories260K", device="H200")
    assert "int4-g32 does not fit model.layers.0.mlp.down_proj and 4 more" in "\n".join(planned.lines())


def test_the_bundled_model_is_planned_by_name() -> None:
    planned = plan_model("demo", device="H200")
    assert planned.shape.source == "demo"
    assert 3e6 < planned.shape.parameters < 5e6


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"rank": 0}, UsageError, "rank 0"),
        ({"batch_size": 0, "max_length": -1}, UsageError, "batch_size is 0.*max_length is -1"),
        ({"device": "abacus"}, UsageError, "abacus"),
        ({"targets": "q_prj"}, TargetError, "q_proj"),
    ],
)
def test_bad_settings_are_refused_by_name(folder: Path, settings: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        plan_model(folder, **{"device": "H200"} | settings)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="nowhere"):
        plan_model(tmp_path / "nowhere")


def test_plan_takes_a_model_or_sizes_and_never_both(folder: Path) -> None:
    assert isinstance(plan(sizes=["7B"], ranks=[1]), SizesPlan)
    assert isinstance(plan(folder, rank=4, device="H200"), ModelPlan)
    assert strop.plan is plan
    for arguments in ({}, {"model": folder, "sizes": ["7B"]}):
        with pytest.raises(UsageError, match="either a model or sizes"):
            plan(**arguments)
    with pytest.raises(UsageError, match="rank"):
        plan(sizes=["7B"], rank=4)

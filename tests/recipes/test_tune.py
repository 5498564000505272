"""`tune` from a folder and a file to a run that others open: every method, every setting, every way to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import strop
from strop.config import TuneConfig, load_config
from strop.data.records import Message
from strop.data.templates import prompt_ids, stop_ids
from strop.errors import (
    ConfigError,
)
from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import lora_modules
from strop.numerics.affine import fake_quantize
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from strop.recipes.tune import Run, tune, tune_from_config
from strop.training.checkpoints import newest_checkpoint
from tests.recipes.helpers import METHODS, Notes, same, short, tensors
from tests.tiny import tiny_chat_file, tiny_folder, tiny_input, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft

# --- every method, end to end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_each_method_ends_in_a_run_that_opens_and_has_learned(base, data, tmp_path, method):
    notes = Notes()
    run = short(base, data, tmp_path / "run", method=method, reporter=notes, max_steps=12, **METHODS[method])
    assert notes.steps == list(range(1, 13))
    assert run.metrics[-1]["loss"] < 0.8 * run.metrics[0]["loss"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "best", "last", "config.yaml", "metrics.jsonl", "run.json", "manifest.json", ".lock",
    }  # fmt: skip
    opened = strop.load(run.path, dtype=torch.float32)
    assert opened.source == str(run.best_path)
    logits = opened.model(tiny_input()).logits
    assert torch.isfinite(logits).all()
    before = strop.load(base, dtype=torch.float32).model(tiny_input()).logits
    assert (logits - before).abs().max() > 1e-3
    assert opened.tokenizer is not None
    assert opened.tokenizer.chat_template


def test_notes_say_what_is_trained_on_what(base, data, tmp_path):
    notes = Notes()
    short(base, data, tmp_path / "run", reporter=notes)
    assert notes.said("1 of 16 rows are held out")
    assert notes.said("are learned")
    assert notes.said("parameters are trained (22.49%)")
    assert notes.said("14 linear layers")
    assert notes.said("learning rate 0.0064, the default of lora at width 64")
    assert notes.said("4 steps of up to 4 rows are an epoch; the run has 3")


def test_nothing_is_printed(base, data, tmp_path, capfd):
    short(base, data, tmp_path / "run")
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_the_report_is_json_and_says_what_it_took(base, data, tmp_path):
    run = short(base, data, tmp_path / "run", method="qlora")
    report = json.loads(json.dumps(run.to_dict()))
    assert report == {
        "path": str(run.path),
        "best_path": str(run.best_path),
        **json.loads((run.path / "run.json").read_text()),
    }
    assert report["finished"] is True
    assert report["format"] == "nf4-dq"
    assert report["parameters"]["trained"] == 32768
    assert report["parameters"]["total"] == 32768 + 112960
    assert 0 < report["data"]["train"]["supervised_share"] < 1
    assert report["result"]["steps"] == 3
    assert Run.open(run.path).to_dict() == run.to_dict()
    assert any("validation loss" in line for line in run.lines())


def test_the_resolved_settings_read_back_to_the_same(base, data, tmp_path):
    run = short(base, data, tmp_path / "run", lora_r=4, max_seq_length=64)
    assert load_config(run.path / "config.yaml") == run.config
    assert run.config.optimization.learning_rate == pytest.approx(0.0064)
    assert run.config.samples.max_length == 64
    assert run.config.output == str(run.path)


def test_a_yaml_file_does_what_the_arguments_do(base, data, tmp_path):
    first = short(base, data, tmp_path / "a", rank=2)
    again = tune_from_config(load_config(first.path / "config.yaml", {"output": tmp_path / "b"}))
    assert same(tensors(first.last_path), tensors(again.last_path))


@pytest.mark.parametrize("family", ["qwen3", "gemma", "gpt2", "falcon", "mixtral", "qwen3_moe"])
def test_other_architectures_train_with_adapters(tmp_path, data, family):
    base, notes = tiny_folder(tmp_path, family), Notes()
    run = short(base, data, tmp_path / "run", reporter=notes)
    opened = strop.load(run.path)
    assert lora_modules(opened.model)
    if family in ("mixtral", "qwen3_moe"):
        assert notes.said("experts are no linear layers")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["full", "qat"])
def test_whole_models_are_stored_in_the_dtype_of_their_base(tmp_path, data, method, stored):
    base = tiny_folder(tmp_path, "llama", dtype=stored)
    run = short(base, data, tmp_path / "run", method=method, save_steps=3, **METHODS[method])
    embedding = next(value for name, value in tensors(run.last_path).items() if "embed_tokens" in name)
    assert embedding.dtype == stored
    masters = newest_checkpoint(run.path / "checkpoints")[0]
    assert masters is not None
    assert {value.dtype for value in masters.weights.values()} == {torch.float32}
    assert torch.equal(embedding, masters.weights["model.embed_tokens.weight"].to(stored))


# --- qat: what was trained is what is stored --------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["int3-g32", "int4-g32", "int2-g32", "int8", "int4-g64-asym", "nf4"])
def test_reopened_codes_are_bit_for_bit_those_of_training(base, data, tmp_path, format):
    run = short(base, data, tmp_path / "run", method="qat", format=format, save_steps=3)
    latent = newest_checkpoint(run.path / "checkpoints")[0]
    assert latent is not None
    opened, scheme = strop.load(run.last_path), parse_scheme(format)
    layers = {name: module for name, module in opened.model.named_modules() if isinstance(module, QuantLinear)}
    assert len(layers) == 14
    assert run.report["layers"] == 14
    for name, layer in layers.items():
        weight = latent.weights[f"{name}.weight"]
        assert torch.equal(layer.dense_weight(), fake_quantize(weight, scheme)), name
        stored, made = layer.qtensor.tensors(), quantize_tensor(weight, scheme).tensors()
        assert all(torch.equal(stored[key].float(), made[key].float()) for key in made), name


def test_qat_moves_codes_and_not_only_what_rounds_to_the_same(base, data, tmp_path):
    run = short(base, data, tmp_path / "run", method="qat", format="int2-g32", max_steps=12, learning_rate=3e-3)
    before = strop.load(base, format="int2-g32")
    after = strop.load(run.last_path)
    moved = [
        (before.model.get_submodule(name).qtensor.codes != layer.qtensor.codes).double().mean()
        for name, layer in after.model.named_modules()
        if isinstance(layer, QuantLinear)
    ]
    assert max(moved) > 0.02


def test_qat_over_some_layers_leaves_the_others_dense(base, data, tmp_path):
    run = short(base, data, tmp_path / "run", method="qat", format="int4-g32", targets="mlp.up_proj")
    kinds = {
        name: isinstance(module, QuantLinear)
        for name, module in strop.load(run.path).model.named_modules()
        if name.endswith("_proj")
    }
    assert {name for name, quantized in kinds.items() if quantized} == {
        f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)
    }


def test_the_loss_of_the_stored_model_is_the_one_that_was_measured(base, data, tmp_path):
    """bf16 outside the quantized layers moves it by its rounding only."""
    from strop.data.records import read_data
    from strop.data.samples import prepare
    from strop.evaluation.likelihood import likelihood

    run = short(base, data, tmp_path / "run", method="qat", format="int3-g32", max_steps=6)
    opened = strop.load(run.last_path, dtype=torch.float32)
    valid = prepare(read_data(data, seed=0, valid_fraction=0.05).valid, opened.require_tokenizer(), max_length=256)
    assert likelihood(opened.model, valid.samples).mean_nll == pytest.approx(
        run.report["result"]["valid_loss"], rel=5e-3
    )


# --- every setting changes something ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    run = short(base, data, tmp_path_factory.mktemp("plain") / "run", max_steps=4, learning_rate=0.05)
    return tensors(run.last_path)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"rank": 3},
        {"alpha": 4},
        {"dropout": 0.5},
        {"targets": "q_proj"},
        {"rank_stabilised": True},
        {"learning_rate": 0.01},
        {"schedule": "linear"},
        {"schedule": "constant"},
        {"warmup_ratio": 0.5},
        {"weight_decay": 1.0},
        {"clip_norm": 1e-7},
        {"batch_size": 3},
        {"accumulation": 2},
        {"max_length": 26},
        {"packing": True, "max_length": 96, "batch_size": 1},
        {"train_on": "all"},
        {"chat_template": "plain"},
        {"valid_fraction": 0.5},
        {"dtype": "bfloat16"},
        {"method": "qlora"},
        {"method": "qlora", "format": "int2-g32"},
        {"max_steps": 2},
        {"epochs": 0.5},
    ],
    ids=str,
)
def test_each_setting_changes_what_is_trained(base, data, tmp_path, plain, change):
    length = {} if "epochs" in change else {"max_steps": 4}
    run = short(base, data, tmp_path / "run", **({"learning_rate": 0.05} | length | change))
    assert not same(tensors(run.last_path), plain)


def test_the_same_settings_give_the_same_bits(base, data, tmp_path, plain):
    run = short(base, data, tmp_path / "run", max_steps=4, learning_rate=0.05)
    assert same(tensors(run.last_path), plain)


def test_evaluation_saving_and_recomputing_change_nothing_that_is_trained(base, data, tmp_path, plain):
    run = short(
        base, data, tmp_path / "run", max_steps=4, learning_rate=0.05, eval_steps=1, save_steps=2, patience=9,
        checkpointing=True, device="cpu",
    )  # fmt: skip
    assert same(tensors(run.last_path), plain)
    assert all("valid_loss" in row for row in run.metrics)
    assert [path.name for path in sorted((run.path / "checkpoints").iterdir())] == ["step-000002", "step-000004"]


def test_patience_ends_a_run_that_gets_worse(base, data, tmp_path):
    run = short(base, data, tmp_path / "run", max_steps=40, eval_steps=1, patience=2, learning_rate=3.0)
    assert run.report["result"]["steps"] < 40
    assert run.report["result"]["ended"].startswith("no better evaluation")


def test_a_run_in_minutes_ends(base, data, tmp_path):
    run = short(base, data, tmp_path / "run", minutes=0.01)
    assert run.report["result"]["steps"] >= 1


def test_without_an_output_runs_are_numbered(base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [tune(base, data, max_steps=1, valid_fraction=0).path.as_posix() for _ in range(2)]
    assert paths == ["runs/llama-lora", "runs/llama-lora-2"]


def test_a_valid_split_that_is_given_is_used(base, data, tmp_path):
    folder = tmp_path / "splits"
    folder.mkdir()
    shutil.copy(data, folder / "train.jsonl")
    tiny_chat_file(folder / "valid.jsonl", rows=5)
    notes = Notes()
    run = short(base, folder, tmp_path / "run", reporter=notes)
    assert run.report["data"]["train"]["rows"] == 16
    assert run.report["data"]["valid"]["rows"] == 5
    assert not notes.said("held out")


def test_without_held_out_rows_the_best_is_the_last(base, data, tmp_path):
    run = short(base, data, tmp_path / "run", valid_fraction=0)
    assert run.best_path == run.last_path
    assert strop.load(run.path).source == str(run.last_path)


# --- the stop token ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_is_eos", [False, True], ids=["own pad", "pad is eos"])
def test_eight_rows_learned_by_heart_are_answered_and_stopped_eight_times(tmp_path, pad_is_eos):
    tokenizer = tiny_tokenizer()
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>'", "eos_token")
    base = tiny_folder(tmp_path, "llama", tokenizer=tokenizer)
    data = tiny_chat_file(tmp_path / "eight.jsonl", rows=8)
    run = tune(
        base, data, method="full", output=tmp_path / "run", max_steps=60, learning_rate=4e-3, batch_size=4,
        accumulation=2, valid_fraction=0, dtype="float32", clip_norm=0,
    )  # fmt: skip
    opened = strop.load(run.path)
    stops, answers = set(stop_ids(opened.tokenizer)), []
    for line in data.read_text().splitlines():
        messages = json.loads(line)["messages"]
        ids = prompt_ids([Message(**messages[0])], opened.tokenizer)
        answer: list[int] = []
        while len(answer) < 24 and not (answer and answer[-1] in stops):
            with torch.no_grad():
                logits = opened.model(torch.tensor([[*ids, *answer]])).logits
            answer.append(int(logits[0, -1].argmax()))
        answers.append((answer[-1] in stops, opened.tokenizer.decode(answer[:-1]) == messages[1]["content"]))
    assert answers == [(True, True)] * 8


# --- arguments --------------------------------------------------------------------------------------------------------


def test_arguments_given_twice_are_refused(base, data):
    with pytest.raises(ConfigError, match="base_model and model both set model"):
        tune(base, data, base_model="x")


def test_a_config_is_all_it_takes(base, data, tmp_path):
    config = TuneConfig.from_flat({"model": base, "data": data, "output": tmp_path / "run", "max_steps": 1})
    assert tune_from_config(config).path == tmp_path / "run"

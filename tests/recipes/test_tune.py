"""`tune` from a folder and a file to a run that others open: every method, every setting, every way to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import strop
from strop.config import TuneConfig, load_config
from strop.data.records import Message
from strop.data.templates import prompt_ids, stop_ids
from strop.errors import (
    ConfigError,
    DataError,
    FormatError,
    MissingInputError,
    ModelError,
    TargetError,
    TrainingError,
    UsageError,
)
from strop.files.folders import sha256_file
from strop.files.peft_adapter import read_adapter_config
from strop.files.shards import iter_tensors
from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import attach_lora, lora_modules
from strop.numerics.affine import fake_quantize
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from strop.recipes.tune import Run, tune, tune_from_config
from strop.training.checkpoints import load_checkpoint, newest_checkpoint
from tests.tiny import tiny_chat_file, tiny_folder, tiny_input, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft

METHODS = {"full": {}, "lora": {}, "qlora": {}, "qat": {"format": "int3-g32"}}


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


class Notes:
    """A reporter that remembers what it was told, and calls `at_step` after each step."""

    def __init__(self, at_step: Any = None) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []
        self._at_step = at_step

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, title: str, total: float | None, unit: str) -> None:
        pass

    def advance(self, done: float, **fields: float | int | str) -> None:
        self.steps.append(int(done))
        if self._at_step is not None:
            self._at_step(int(done))

    def finish(self) -> None:
        pass

    def said(self, part: str) -> bool:
        return any(part in note for note in self.notes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 model with a chat template."""
    return tiny_folder(tmp_path_factory.mktemp("base"), "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_file(tmp_path_factory.mktemp("data") / "chats.jsonl", rows=16)


def short(base: Path, data: Path, output: Path, **settings: Any) -> Run:
    defaults = {"dtype": "float32", "batch_size": 4}
    length = {} if settings.keys() & {"epochs", "minutes"} else {"max_steps": 3}
    return tune(base, data, output=output, **(defaults | length | settings))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "adapter_model.safetensors").is_file():
        return dict(iter_tensors(folder, stem="adapter_model"))
    return dict(iter_tensors(folder))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


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


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_runs_end_in_the_same_files(base, data, tmp_path, method):
    settings = {
        "method": method, "max_steps": 5, "save_steps": 2, "eval_steps": 2, "batch_size": 2, "accumulation": 2,
        "packing": True, "max_length": 96, "dtype": "auto", **METHODS[method],
    }  # fmt: skip
    if method in ("lora", "qlora"):
        settings["dropout"] = 0.2
    straight = short(base, data, tmp_path / "straight", **settings)

    def kill(step: int) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        short(base, data, tmp_path / "killed", reporter=Notes(kill), **settings)
    assert not (tmp_path / "killed" / "last").exists()
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["finished"] is False
    notes = Notes()
    resumed = short(base, data, tmp_path / "killed", resume=True, reporter=notes, **settings)
    assert notes.said("resumed after step 2 of 5")
    for part in ("best", "last"):
        assert same(tensors(resumed.path / part), tensors(straight.path / part))
        name = "model.safetensors" if method in ("full", "qat") else "adapter_model.safetensors"
        assert sha256_file(resumed.path / part / name) == sha256_file(straight.path / part / name)
    assert [row["loss"] for row in resumed.metrics] == [row["loss"] for row in straight.metrics]


def test_ctrl_c_keeps_the_state_and_resume_ends_in_the_same_files(base, data, tmp_path):
    straight = short(base, data, tmp_path / "straight")

    def press(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        short(base, data, tmp_path / "run", reporter=Notes(press))
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000002").step == 2
    with pytest.raises(UsageError, match="already holds best, checkpoints"):
        short(base, data, tmp_path / "run")
    resumed = tune_from_config(load_config(tmp_path / "run" / "config.yaml", {"resume": True}))
    assert same(tensors(resumed.last_path), tensors(straight.last_path))
    assert resumed.config == straight.config.replace(output=str(tmp_path / "run"))


def test_resuming_a_finished_run_gives_that_run(base, data, tmp_path):
    run, notes = short(base, data, tmp_path / "run"), Notes()
    again = short(base, data, tmp_path / "run", resume=True, reporter=notes)
    assert again.to_dict() == run.to_dict()
    assert notes.said("the run is finished")


def test_resuming_with_other_settings_lists_them_all(base, data, tmp_path):
    short(base, data, tmp_path / "run", rank=4)
    with pytest.raises(ConfigError) as error:
        short(base, data, tmp_path / "run", rank=8, seed=3, learning_rate=0.5, resume=True)
    for part in ("rank was 4 and is 8", "seed was 0 and is 3", "learning_rate was 0.0064 and is 0.5", "alpha was 8.0"):
        assert part in str(error.value)


def test_resuming_on_other_rows_or_another_base_is_refused(base, data, tmp_path):
    def kill(step: int) -> None:
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        short(base, data, tmp_path / "run", save_steps=1, reporter=Notes(kill))
    other_rows = tiny_chat_file(tmp_path / "other.jsonl", rows=17)
    with pytest.raises(TrainingError, match="samples"):
        short(base, other_rows, tmp_path / "run", save_steps=1, resume=True)
    other_base = tiny_folder(tmp_path, "llama", seed=1, dtype=torch.bfloat16)
    with pytest.raises(TrainingError, match="base was"):
        short(other_base, data, tmp_path / "run", save_steps=1, resume=True)
    moved = tmp_path / "moved.jsonl"
    shutil.copy(data, moved)
    assert short(base, moved, tmp_path / "run", save_steps=1, resume=True).report["finished"]


def test_resuming_what_is_not_there_is_refused(base, data, tmp_path):
    with pytest.raises(MissingInputError, match="no run to resume"):
        short(base, data, tmp_path / "none", resume=True)
    with pytest.raises(ConfigError, match="output: name the run's folder"):
        tune(base, data, resume=True)


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
    assert notes.said("the adapter was trained on its base in nf4-dq")
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


# --- bad input leaves nothing behind ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": "no/such/folder/here"}, MissingInputError, "no such folder"),
        ({"data": "no.jsonl"}, MissingInputError, "no such file"),
        ({"targets": "q_projj"}, TargetError, "q_proj"),
        ({"method": "qat", "format": "int3-g7"}, FormatError, "7"),
        ({"method": "qat", "format": "int33"}, FormatError, "int33"),
        ({"method": "qlora", "format": "gguf:q4_0"}, FormatError, "gguf"),
        ({"max_length": 100_000}, ConfigError, "has 256 positions"),
        ({"max_length": 3}, DataError, "max_length"),
        ({"rnak": 3}, ConfigError, "did you mean 'rank'"),
        ({"chat_template": "no.jinja"}, MissingInputError, "no.jinja"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(base, data, tmp_path, change, error, says):
    given = {"model": base, "data": data} | change
    with pytest.raises(error, match=says.replace(".", r"\.")):
        short(given.pop("model"), given.pop("data"), tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_broken_rows_and_empty_files_are_refused_before_anything_is_written(base, tmp_path):
    broken, empty = tmp_path / "broken.jsonl", tmp_path / "empty.jsonl"
    broken.write_text('{"messages": [{"role": "user", "content": 3}]}\n{"messages"\n')
    empty.write_text("")
    for path in (broken, empty):
        with pytest.raises(DataError, match=path.name):
            short(base, path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_base_without_a_template_needs_one_and_keeps_what_it_is_given(tmp_path, data):
    base = tiny_folder(tmp_path, "llama", tokenizer=tiny_tokenizer(chat_template=False))
    with pytest.raises(DataError, match=r"chat.template"):
        short(base, data, tmp_path / "run")
    run = short(base, data, tmp_path / "run", chat_template="chatml")
    assert "im_start" in (run.best_path / "chat_template.jinja").read_text()


def test_a_folder_without_weights_or_with_broken_ones_is_refused(tmp_path, base, data):
    empty = tmp_path / "empty"
    shutil.copytree(base, empty)
    (empty / "model.safetensors").unlink()
    with pytest.raises((ModelError, MissingInputError)):
        short(empty, data, tmp_path / "run")
    (empty / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(strop.errors.FileFormatError):
        short(empty, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_conv1d_model_is_refused_for_integers_before_it_is_trained(tmp_path, data):
    base = tiny_folder(tmp_path, "gpt2")
    with pytest.raises(FormatError, match="Conv1D"):
        short(base, data, tmp_path / "run", method="qat", format="int8")
    run = short(base, data, tmp_path / "run", method="qat", format="nf4")
    assert strop.load(run.path).scheme == parse_scheme("nf4")


def test_a_folder_that_holds_something_else_is_not_touched(base, data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="files that are no run"):
        short(base, data, tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        short(base, data, tmp_path / "file")
    run = short(base, data, tmp_path / "run")
    with pytest.raises(UsageError, match="already holds best, last"):
        short(base, data, run.path)


def test_a_run_that_diverges_stops_and_may_be_started_again_in_its_place(base, data, tmp_path):
    with pytest.raises(TrainingError, match="learning rate's peak is"):
        short(base, data, tmp_path / "run", method="full", learning_rate=1e30, max_steps=9, clip_norm=0)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"] is False


def test_a_run_without_a_single_step_kept_may_be_started_again(base, data, tmp_path):
    def kill(step: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        short(base, data, tmp_path / "run", reporter=Notes(kill), valid_fraction=0)
    assert short(base, data, tmp_path / "run").report["finished"]


def test_arguments_given_twice_are_refused(base, data):
    with pytest.raises(ConfigError, match="base_model and model both set model"):
        tune(base, data, base_model="x")


def test_a_config_is_all_it_takes(base, data, tmp_path):
    config = TuneConfig.from_flat({"model": base, "data": data, "output": tmp_path / "run", "max_steps": 1})
    assert tune_from_config(config).path == tmp_path / "run"


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

"""`tune` with a teacher: beside, switched off, on the disk; stopped and resumed; what cannot teach is refused."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from strop.config import TuneConfig
from strop.errors import ConfigError, StropError, TrainingError, UsageError
from strop.recipes import session as session_recipe
from strop.recipes.doctor import doctor
from strop.recipes.manifest import load_manifest
from strop.recipes.stages import tune_stages
from tests.recipes.helpers import Killed, Notes, same, short, tensors
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer

TAUGHT: dict[str, dict[str, Any]] = {
    "full": {"teacher": "base", "distill": 0.5},
    "lora": {"teacher": "base", "distill": 0.5},
    "qlora": {"teacher": "base"},
    "qat": {"teacher": "base", "format": "int3-g32"},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("teacher"), "llama", seed=7)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("method", TAUGHT)
def test_killed_and_resumed_runs_end_in_the_same_files(base, data, tmp_path, method, packing):
    settings = {"method": method, "max_steps": 4, "save_steps": 2, "eval_steps": 2, "batch_size": 2, **TAUGHT[method]}
    settings |= {"packing": packing, "max_length": 96, "dtype": "bfloat16" if packing else "float32"}
    straight = short(base, data, tmp_path / "straight", **settings)

    def kill(step: int) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        short(base, data, tmp_path / "killed", reporter=Notes(kill), **settings)
    assert (tmp_path / "killed" / "teacher").is_dir() == (method != "lora")
    notes = Notes()
    resumed = short(base, data, tmp_path / "killed", resume=True, reporter=notes, **settings)
    assert notes.said("resumed after step 2 of 4")
    for part in ("best", "last"):
        assert same(tensors(resumed.path / part), tensors(straight.path / part))
    assert [row["loss"] for row in resumed.metrics] == [row["loss"] for row in straight.metrics]
    assert straight.report["teacher"]["logits"] == ("shared" if method == "lora" else "disk")
    assert not (straight.path / "teacher").exists()


def test_beside_and_on_disk_teach_the_same_where_the_whole_vocabulary_is_kept(
    base, data, tmp_path, teacher, monkeypatch
):
    monkeypatch.setattr("strop.training.teacher_cache.TOP", 10**6)
    settings = {"method": "qat", "format": "int4-g32", "teacher": teacher, "eval_steps": 1}
    runs = [short(base, data, tmp_path / way, teacher_logits=way, **settings) for way in ("memory", "disk")]
    assert [run.report["teacher"]["logits"] for run in runs] == ["memory", "disk"]
    for beside, kept in zip(*(run.metrics for run in runs), strict=True):
        assert kept["valid_divergence"] == pytest.approx(beside["valid_divergence"], rel=2e-3)
        assert kept["loss"] == pytest.approx(beside["loss"], rel=2e-3)


def test_the_run_says_what_its_loss_is_made_of(base, data, tmp_path, teacher):
    run = short(base, data, tmp_path / "run", teacher=teacher, distill=0.25)
    assert any("75% of the labels' and 25% of the divergence" in line for line in run.lines())
    last = run.metrics[-1]
    assert run.report["result"]["valid_loss"] == last["valid_loss"]
    assert last["valid_loss"] == pytest.approx(0.75 * last["valid_label_loss"] + 0.25 * last["valid_divergence"])


def test_every_weight_of_the_loss_changes_the_run(base, data, tmp_path, teacher):
    shares = (0.0, 0.5, 1.0)
    ends = [tensors(short(base, data, tmp_path / str(d), teacher=teacher, distill=d).last_path) for d in shares]
    assert not any(same(ends[i], ends[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
    plain = short(base, data, tmp_path / "plain")
    assert same(tensors(plain.last_path), ends[0])


def test_the_teacher_is_gone_before_the_student_is_opened(base, data, tmp_path, teacher, monkeypatch):
    opened = session_recipe.open_base

    def looking(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        assert not {id(one) for one in models()} - before
        return opened(*args, **kwargs)

    def models() -> list[Any]:
        return [one for one in gc.get_objects() if issubclass(type(one), PreTrainedModel)]

    gc.collect()
    before = {id(one) for one in models()}
    monkeypatch.setattr(session_recipe, "open_base", looking)
    assert short(base, data, tmp_path / "run", teacher=teacher).report["teacher"]["logits"] == "disk"


@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
def test_a_pass_of_the_teacher_that_is_stopped_goes_on_with_the_same_command(
    base, data, tmp_path, teacher, monkeypatch, error
):
    monkeypatch.setattr("strop.training.teacher_cache.PART_TOKENS", 10)
    straight = short(base, data, tmp_path / "straight", teacher=teacher)

    def stop(done: int) -> None:
        if done > 8:
            raise error

    class Stopping(Notes):
        def advance(self, done: float, **fields: float | int | str) -> None:
            stop(int(done))

    if error is Killed:  # nothing is tidied up
        monkeypatch.setattr("strop.recipes.tune._leaving_nothing", contextlib.nullcontext)
    with pytest.raises(error):
        short(base, data, tmp_path / "run", teacher=teacher, reporter=Stopping())
    notes = Notes()
    run = short(base, data, tmp_path / "run", teacher=teacher, reporter=notes)
    assert notes.said("rows were read with the teacher before")
    assert same(tensors(run.last_path), tensors(straight.last_path))


def test_what_another_teacher_said_is_not_taken(base, data, tmp_path, teacher):
    def kill(step: int) -> None:
        if step == 2:  # the first step's state is saved
            raise Killed

    with pytest.raises(Killed):
        short(base, data, tmp_path / "run", teacher=teacher, save_steps=1, reporter=Notes(kill))
    other = tiny_folder(tmp_path, "llama", seed=8)
    with pytest.raises(TrainingError, match="teacher changed"):
        short(base, data, tmp_path / "run", teacher=other, save_steps=1, resume=True)
    shutil.rmtree(tmp_path / "run" / "teacher")
    with pytest.raises(TrainingError, match="teacher was"):
        short(base, data, tmp_path / "run", teacher=other, save_steps=1, resume=True)
    shutil.rmtree(tmp_path / "run" / "teacher")
    moved = shutil.copytree(teacher, tmp_path / "moved")
    assert short(base, data, tmp_path / "run", teacher=moved, save_steps=1, resume=True).report["finished"]


def test_verify_knows_the_teacher_and_the_plan_weighs_it(base, data, tmp_path, teacher):
    copied = shutil.copytree(teacher, tmp_path / "copied")
    plain = short(base, data, tmp_path / "plain", max_steps=1)
    taught = short(base, data, tmp_path / "taught", max_steps=1, teacher=copied, teacher_logits="memory")
    assert taught.verify().ok
    assert plain.verify().ok
    predicted = [load_manifest(run.path)["memory"]["predicted_bytes"] for run in (plain, taught)]
    assert predicted[1] - predicted[0] == 4 * tiny_model("llama").num_parameters()
    weights = copied / "model.safetensors"
    data_bytes = bytearray(weights.read_bytes())
    data_bytes[-1] ^= 1
    weights.write_bytes(data_bytes)
    assert any("teacher" in finding.name for finding in taught.verify().input_findings)


@pytest.mark.parametrize("asked", ["auto", "disk"])
def test_a_disk_without_room_is_refused_or_passed_by(base, data, tmp_path, teacher, monkeypatch, asked):
    monkeypatch.setattr("strop.recipes.teacher.cache_bytes", lambda tokens, vocabulary: 2**60)
    if asked == "disk":
        with pytest.raises(UsageError, match=r"take 1048576\.0 TiB in .* are free; free some"):
            short(base, data, tmp_path / "run", teacher=teacher, teacher_logits="disk")
        assert not (tmp_path / "run").exists()
        return
    notes = Notes()
    run = short(base, data, tmp_path / "run", teacher=teacher, reporter=notes)
    assert notes.said("runs beside the student")
    assert (run.report["teacher"]["logits"], run.config.distillation.teacher_logits) == ("memory", "memory")


def test_doctor_tries_steps_with_the_teacher_and_writes_nothing(base, data, tmp_path, teacher, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = doctor(str(base), str(data), teacher=str(teacher), distill=0.5, dtype="float32")
    assert not seen.refused
    assert {"movement", "accumulation"} <= {finding.name for finding in seen.findings}
    assert not list(tmp_path.iterdir())


def test_an_adapter_teaches_a_quantized_model(base, data, tmp_path):
    adapter = short(base, data, tmp_path / "adapter", max_steps=6, learning_rate=1e-2)
    student = short(base, data, tmp_path / "qat", method="qat", format="int4-g32", teacher=adapter.path, eval_steps=1)
    assert student.report["teacher"]["folder"] == str(adapter.best_path)
    assert student.metrics[-1]["valid_divergence"] < student.metrics[0]["valid_divergence"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(base: Path, data: Path, tmp_path: Path, error: type[StropError], **settings: Any) -> str:
    with pytest.raises(error) as raised:
        short(base, data, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
    return str(raised.value)


def test_a_teacher_with_other_tokens_is_refused_by_sizes_and_first_token(base, data, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    larger = tiny_folder(tmp_path, "llama", tokenizer=tokenizer, vocab_size=305)
    said = refused(base, data, tmp_path, UsageError, teacher=larger)
    assert "it has 305 logits and the student 304" in said
    assert "token 304 is '<|more|>' in the teacher and missing in the student" in said
    assert "same family" in said


def test_a_teacher_of_the_same_size_with_swapped_tokens_is_refused(base, data, tmp_path):
    other = tiny_folder(tmp_path, "llama")
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    said = refused(base, data, tmp_path, UsageError, teacher=other)
    assert f"token {vocabulary[second]} is {second!r} in the teacher and {first!r} in the student" in said


def test_a_teacher_without_a_tokenizer_or_with_too_few_positions_is_refused(base, data, tmp_path):
    short_one = tiny_folder(tmp_path, "llama", max_position_embeddings=64)
    assert "has 64 positions" in refused(base, data, tmp_path, UsageError, teacher=short_one)
    bare = tiny_folder(tmp_path, "qwen3")
    for file in bare.glob("token*"):
        file.unlink()
    assert "holds no tokenizer" in refused(base, data, tmp_path, StropError, teacher=bare)


def test_base_needs_a_model_in_full_precision_without_an_adapter(base, data, tmp_path):
    quantized = short(base, data, tmp_path / "q", method="qat", format="int8").best_path
    said = refused(quantized, data, tmp_path, UsageError, method="qlora", teacher="base")
    assert "stored quantized" in said
    adapter = short(base, data, tmp_path / "a").best_path
    assert "name that adapter's" in refused(adapter, data, tmp_path, UsageError, teacher="base", distill=0.5)


def test_a_missing_teacher_is_named(base, data, tmp_path):
    assert "no/such" in refused(base, data, tmp_path, StropError, teacher="no/such/teacher")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"distill": 0.5, "teacher_logits": "disk"}, ["distill: says how", "teacher_logits: says how"]),
        ({"teacher": "base"}, ["nothing to learn"]),
        ({"teacher": "base", "method": "full", "distill": 1.5}, ["distill: got 1.5"]),
        ({"teacher": "base", "distill": 0.5, "teacher_logits": "disk"}, ["takes no memory beside it"]),
        ({"teacher": "base", "distill": 0.5, "adapter": "a"}, ["without the adapter"]),
        ({"teacher": "t", "rank": "auto", "teacher_logits": "floppy"}, ["rank auto races", "teacher_logits: got"]),
        ({"teacher": ""}, ["teacher: got ''"]),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused_all_at_once(settings, says):
    with pytest.raises(ConfigError) as raised:
        TuneConfig.from_flat({"model": "m", "data": "d", "batch_size": 0, **settings})
    for part in [*says, "batch_size: got 0"]:
        assert part in str(raised.value)


def test_a_teacher_is_taken_from_yaml_flags_and_python_alike(tmp_path):
    values = {"model": "m", "data": "d", "teacher": "t"}
    config = TuneConfig.from_flat(values)
    assert (config.distillation.distill, config.distillation.teacher_logits) == (1.0, "auto")
    assert TuneConfig.from_flat(config.flat()) == config
    assert "distill" not in TuneConfig.from_flat({"model": "m", "data": "d"}).flat()
    assert TuneConfig.from_flat({"model": "m", "data": "d", "teacher_model": "t"}) == config


def test_stages_refuse_a_teacher_before_the_first_of_them_begins(base, data, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    other = tiny_folder(tmp_path, "llama", tokenizer=tokenizer, vocab_size=305)
    common = {"data": str(data), "max_steps": 1, "valid_fraction": 0.3}
    stages = [
        {"name": "first", "method": "lora", "teacher": str(other), **common},
        {"name": "second", "method": "lora", "teacher": "base", "distill": 0.5, **common},
    ]
    with pytest.raises(ConfigError) as raised:
        tune_stages({"model": str(base), "output": str(tmp_path / "run"), "stages": stages})
    assert "stage 1 (first): teacher: " in str(raised.value)
    assert "stage 2 (second): teacher: base is a model in full precision" in str(raised.value)
    assert not (tmp_path / "run").exists()

"""Stages: each starts from the last one's result, is resumed where it stopped, and is measured on all held-out sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import strop
from strop.app.cli import main
from strop.config import TuneConfig, load_stages
from strop.data.records import read_data
from strop.errors import ConfigError, MissingInputError, UsageError
from strop.evaluation.likelihood import likelihood
from strop.files.folders import sha256_file
from strop.files.peft_adapter import read_adapter_config
from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import lora_modules
from strop.models.sources import is_adapter
from strop.recipes.forgetting import account, read_held_out
from strop.recipes.stages import StagesRun, tune_stages
from tests.tiny import tiny_chat_file, tiny_folder


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


class Notes:
    """Remembers notes, and ends the process at one step of one training."""

    def __init__(self, kill: tuple[int, int] | None = None) -> None:
        self.notes: list[str] = []
        self.trainings = 0
        self._kill, self._training = kill, False

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, title: str, total: float | None, unit: str) -> None:
        self._training = title == "training"
        self.trainings += self._training

    def advance(self, done: float, **fields: float | int | str) -> None:
        if self._training and (self.trainings, int(done)) == self._kill:
            raise Killed

    def finish(self) -> None:
        pass


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a text and conversations."""
    folder = tmp_path_factory.mktemp("home")
    tiny_folder(folder, "llama", dtype=torch.bfloat16)
    tiny_chat_file(folder / "chats.jsonl", rows=32)
    lines = [{"text": f"the {word} fox jumps over the lazy dog {n}"} for n, word in enumerate(["quick", "brown"] * 16)]
    (folder / "notes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


DOMAIN = {"name": "domain", "data": "notes.jsonl", "method": "full", "max_steps": 6}
TASK = {"name": "task", "data": "chats.jsonl", "method": "lora", "rank": 4, "max_steps": 6}
SHIP = {"name": "ship", "data": "chats.jsonl", "method": "qat", "format": "int4-g32", "max_steps": 4}


def settings(home: Path, output: Path | str, *stages: dict[str, Any], **top: Any) -> dict[str, Any]:
    placed = [dict(stage) | ({"data": str(home / stage["data"])} if "data" in stage else {}) for stage in stages]
    common = {"valid_fraction": 0.25, "dtype": "float32", "batch_size": 8, "save_steps": 2, "eval_steps": 3}
    return {"model": str(home / "llama"), "output": str(output), **common, **top, "stages": placed}


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> StagesRun:
    """Full, then an adapter, then through the quantizer."""
    return tune_stages(settings(home, tmp_path_factory.mktemp("runs") / "all", DOMAIN, TASK, SHIP))


# --- one after the other ----------------------------------------------------------------------------------------------


def test_each_stage_starts_from_the_last_ones_result(run, home):
    domain, task, ship = run.runs
    assert [stage["folder"] for stage in run.report["stages"]] == ["1-domain", "2-task", "3-ship"]
    assert domain.config.model == str(home / "llama")
    assert task.config.model == str(domain.best_path)
    assert read_adapter_config(task.best_path).base == str(domain.best_path)
    assert ship.config.model == str(run.path / "merged" / "before-3-ship")
    assert json.loads((run.path / "merged" / "before-3-ship" / "merge.json").read_text())["effect"] >= 0.99
    assert run.report["stages"][2]["start"] == "merged: the adapter of task into its base, then qat"
    last = strop.load(run.path / run.report["stages"][-1]["model"])
    assert sum(isinstance(module, QuantLinear) for module in last.model.modules()) == 14
    assert run.verify().ok
    assert StagesRun.open(run.path).to_dict() == run.to_dict()


@pytest.mark.parametrize("format", ["int4-g32", "gguf:q4_0"])
def test_the_last_stage_may_be_an_adapter_through_the_rounding(home, tmp_path, format):
    ship = SHIP | {"method": "qat-lora", "format": format, "rank": 4}
    run = tune_stages(settings(home, tmp_path / "all", TASK, ship))
    assert run.report["stages"][1]["start"] == "merged: the adapter of task into its base, then qat-lora"
    last = strop.load(run.path / run.report["stages"][-1]["model"])
    assert sum(isinstance(module, QuantLinear) for module in last.model.modules()) == 14
    with pytest.raises(UsageError, match="ends in quantized ones"):
        tune_stages(settings(home, tmp_path / "further", TASK, ship, DOMAIN))


def test_an_adapter_is_trained_further_unless_its_shape_is_given_anew(home, tmp_path):
    more = {"name": "more", "data": "notes.jsonl", "method": "lora", "max_steps": 2}
    wider = {"name": "wider", "data": "chats.jsonl", "method": "lora", "rank": 8, "max_steps": 2}
    made = tune_stages(settings(home, tmp_path / "run", TASK, more, wider))
    first, second, third = made.runs
    assert second.config.method.rank == 4
    assert read_adapter_config(second.best_path).base == read_adapter_config(first.best_path).base
    assert read_adapter_config(second.best_path).rank == 4
    assert made.report["stages"][1]["start"] == "the adapter of task trained further (lora)"
    assert read_adapter_config(third.best_path).rank == 8
    assert read_adapter_config(third.best_path).base == str(tmp_path / "run" / "merged" / "before-3-wider")
    assert is_adapter(third.best_path)
    assert len(lora_modules(strop.load(third.path).model)) == 14


def test_adapters_go_on_over_what_a_stage_quantized(home, tmp_path):
    over = {"name": "over", "data": "chats.jsonl", "method": "qlora", "max_steps": 1}
    made = tune_stages(settings(home, tmp_path / "run", SHIP, over))
    assert made.runs[1].report["format"] == "int4-g32"


# --- what was gained and forgotten ------------------------------------------------------------------------------------


def test_every_model_is_measured_on_the_rows_that_were_held_out(run, home):
    report = run.report
    assert [model["model"] for model in report["matrix"]] == ["base", "domain", "task", "ship"]
    held = read_data(home / "notes.jsonl", valid_fraction=0.25).valid
    rows = read_held_out(run.path / "held_out" / "1-domain.jsonl")
    assert rows.texts == [f"{record.text}<|eos|>" for record in held]
    for number, folder in ((0, home / "llama"), (2, run.path / "2-task"), (3, run.path / "3-ship")):
        found = likelihood(strop.load(folder, tokenizer=False).model, rows.samples).mean_nll
        assert report["matrix"][number]["loss"][0]["estimate"] == pytest.approx(found, rel=1e-6)


def test_a_stage_gains_on_its_own_rows_and_forgets_earlier_ones(run):
    words = {(effect["stage"], effect["set"]): effect for effect in run.report["effects"]}
    assert list(words) == [
        ("domain", "domain"), ("task", "task"), ("task", "domain"), ("ship", "task"), ("ship", "domain"),
    ]  # fmt: skip
    assert run.headers()[1:] == ["domain", "task, ship"]  # the same rows are measured once
    assert words["ship", "task"]["own"]
    assert words["domain", "domain"]["word"] == "gained"
    assert words["task", "task"]["word"] == "gained"
    assert words["task", "domain"]["difference"]["estimate"] == pytest.approx(
        run.report["matrix"][2]["loss"][0]["estimate"] - run.report["matrix"][1]["loss"][0]["estimate"]
    )
    assert any("nats per token" in line and "domain: gained" in line for line in run.lines())
    assert [row[0] for row in run.rows()] == ["base", "after domain", "after task", "after ship"]


def test_a_change_in_either_direction_gets_its_word_and_noise_gets_none():
    tokens = [4.0] * 12
    before = [8.0 + 0.1 * row for row in range(12)]
    sets = {
        "base": before,
        "less": [value - 1 - 0.01 * row for row, value in enumerate(before)],
        "more": [value + 1 + 0.01 * row for row, value in enumerate(before)],
        "noise": [value + 1 + (0.5 if row % 2 else -0.5) for row, value in enumerate(before)],
    }
    names = ["less", "more", "noise"]
    measured = [
        {"model": name, "sets": {held: {"nats": nats, "tokens": tokens} for held in names}}
        for name, nats in sets.items()
    ]
    report = {"measured": measured, "held_out": [{"name": name} for name in names]}
    found = account(report, seed=0)["effects"]
    assert [effect["word"] for effect in found if effect["own"]] == ["gained", "forgot", "undecided"]
    assert found[0]["sentence"].startswith("less: gained 0.2637 nats per token (0.2")
    assert found[3]["sentence"].startswith("noise: undecided on its own held-out rows: the loss ")


def test_windows_of_one_text_are_one_row(home, tmp_path):
    rows = [{"text": f"{row} " + "the quick brown fox jumps over the lazy dog " * 6} for row in range(8)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = DOMAIN | {"data": str(tmp_path / "long.jsonl"), "max_steps": 1, "max_length": 32}
    made = tune_stages(settings(home, tmp_path / "run", stage))
    assert made.report["held_out"][0]["rows"] == 2
    assert len(made.report["measured"][0]["sets"]["domain"]["nats"]) == 2
    assert len(read_held_out(tmp_path / "run" / "held_out" / "1-domain.jsonl").samples) > 2
    assert made.report["effects"][0]["word"] == "undecided"  # two rows decide nothing
    assert "too few for an interval" in made.report["effects"][0]["sentence"]
    assert [note.split(":")[0] for note in made.report["notes"]] == [
        "domain holds out 2 rows, and fewer than 6 decide nothing"
    ]


def test_held_out_rows_that_another_stage_trains_on_are_said(home, tmp_path):
    made = tune_stages(settings(home, tmp_path / "run", TASK | {"max_steps": 1}, SHIP | {"seed": 5, "max_steps": 1}))
    assert any("held-out rows of task are training rows of ship" in note for note in made.report["notes"])
    assert "Mind:" in (tmp_path / "run" / "stages.html").read_text()


def test_the_page_stands_alone_and_holds_every_figure(run):
    page = (run.path / "stages.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    for model in run.report["matrix"]:
        for loss in model["loss"]:
            assert f"{loss['estimate']:.4f}" in page
    for effect in run.report["effects"]:
        assert f"{effect['difference']['estimate']:+.4f}" in page
    assert "1. domain" in page


# --- resume -----------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*.safetensors")
        if "checkpoints" not in path.parts
    }  # fmt: skip


def test_a_killed_run_goes_on_at_its_unfinished_stage_and_ends_in_the_same_files(run, home, tmp_path):
    given = settings(home, tmp_path / "run", DOMAIN, TASK, SHIP)
    with pytest.raises(Killed):
        tune_stages(given, reporter=Notes(kill=(2, 5)))
    report = json.loads((tmp_path / "run" / "stages.json").read_text())
    assert ([stage["name"] for stage in report["stages"]], report["finished"]) == (["domain"], False)
    assert strop.verify(tmp_path / "run").ok
    notes = Notes()
    resumed = tune_stages(given, resume=True, reporter=notes)
    assert notes.trainings == 2
    assert any("resumed after step 4 of 6" in note for note in notes.notes)
    assert resumed.report["matrix"] == run.report["matrix"]
    assert files(resumed.path) == files(run.path)
    assert resumed.verify().ok
    notes = Notes()
    assert tune_stages(given, resume=True, reporter=notes).to_dict() == resumed.to_dict()
    assert notes.trainings == 0


def test_ctrl_c_says_how_to_go_on(home, tmp_path):
    class Pressing(Notes):
        def advance(self, done: float, **fields: float | int | str) -> None:
            raise KeyboardInterrupt

    notes = Pressing()
    with pytest.raises(KeyboardInterrupt):
        tune_stages(settings(home, tmp_path / "run", DOMAIN | {"max_steps": 1}), reporter=notes)
    assert notes.notes[-1].startswith(f"strop tune {tmp_path / 'run' / 'config.yaml'} --resume")
    assert tune_stages(tmp_path / "run" / "config.yaml", resume=True).report["finished"]


@pytest.mark.parametrize("name", ["1-domain/best/model.safetensors", "1-domain/manifest.json", "held_out/2-task.jsonl"])
def test_a_finished_stage_whose_files_changed_is_refused(run, tmp_path, name):
    copy = shutil.copytree(run.path, tmp_path / "run")
    given = copy / name
    changed = bytearray(given.read_bytes())
    changed[-9] ^= 1
    given.write_bytes(changed)
    with pytest.raises(UsageError, match=f"finished stages changed(.|\n)*{name}"):
        tune_stages(copy / "config.yaml", output=copy, resume=True)


def test_resuming_with_other_stages_lists_them_all(run, home):
    with pytest.raises(ConfigError) as error:
        tune_stages(settings(home, run.path, DOMAIN, TASK | {"rank": 8}, SHIP | {"seed": 3}), resume=True)
    for part in ("stage task: rank was 4 and is 8", "stage ship: seed was 0 and is 3"):
        assert part in str(error.value)
    with pytest.raises(UsageError, match="already holds files"):
        tune_stages(settings(home, run.path, DOMAIN))
    with pytest.raises(MissingInputError, match="no run in stages"):
        tune_stages(settings(home, run.path / "none", DOMAIN), resume=True)


# --- refused before any training --------------------------------------------------------------------------------------


def test_problems_of_all_stages_are_found_before_any_training(home, tmp_path):
    stages = [
        SHIP | {"name": "first"},
        TASK | {"data": "none.jsonl"},
        SHIP | {"format": "int4-g48"},
        DOMAIN | {"valid_fraction": 0, "max_length": 4096},
    ]
    notes = Notes()
    with pytest.raises(ConfigError) as error:
        tune_stages(settings(home, tmp_path / "run", *stages), reporter=notes)
    text = str(error.value)
    assert "stage 2 (task): lora needs dense weights, and first ends in quantized ones (int4-g32)" in text
    assert "none.jsonl: no such file" in text
    assert "stage 3 (ship)" in text
    assert "leaves no row to hold out" in text
    assert notes.trainings == 0
    assert not (tmp_path / "run").exists()


def test_an_adapter_over_a_quantized_base_is_not_merged(home, tmp_path):
    over = {"name": "over", "data": "chats.jsonl", "method": "qlora", "max_steps": 1}
    with pytest.raises(ConfigError, match=r"stage 3 \(domain\).*stored quantized \(int4-g32\)"):
        tune_stages(settings(home, tmp_path / "run", SHIP, over, DOMAIN))


def test_settings_of_all_stages_are_checked_at_once(home, tmp_path):
    given = settings(home, tmp_path, {"name": "a", "method": "lora", "rnk": 3, "data": "chats.jsonl"},
                     {"name": "a", "method": "full", "rank": 3}, {"name": "b/c", "data": "chats.jsonl", "model": "x"},
                     dora=1)  # fmt: skip
    with pytest.raises(ConfigError) as error:
        load_stages(given)
    for part in (
        "stage 1 (a): rnk: unknown setting (did you mean 'rank'?)",
        "stage 2 (a): rank: a setting of lora, qlora",
        "stage 2 (a): data: missing",
        "stage 3 (b/c): name",
        "stage 3 (b/c): model: belongs beside stages",
        "dora",
    ):
        assert part in str(error.value), part


def test_defaults_reach_the_stages_that_have_them_and_flags_beat_them(home):
    given = settings(home, "out", DOMAIN, {"name": "task", "data": "chats.jsonl", "method": "lora"}, rank=2, epochs=3)
    config = load_stages(given, {"lr": 0.5, "rank": None})
    assert config is not None
    domain, task = config.stages
    assert domain.values["max_steps"] == 6
    assert "rank" not in domain.values
    assert (task.values["rank"], task.values["alpha"], task.values["epochs"]) == (2, 4.0, 3)
    assert {stage.values["learning_rate"] for stage in config.stages} == {0.5}
    with pytest.raises(ConfigError, match="rank: a setting of lora, qlora, and no stage has such a method"):
        load_stages(settings(home, "out", DOMAIN, rank=2))
    assert load_stages({"model": "m", "data": "d"}) is None


def test_resolved_stages_are_printed_and_read_back_to_the_same(home, tmp_path, capsys):
    more = {"name": "more", "data": "notes.jsonl", "method": "lora"}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings(home, tmp_path / "run", DOMAIN, TASK, more, SHIP)), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["tune", str(file), "--dry-run", "--lr", "1e-3"])
    assert ended.value.code in (None, 0)
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_stages(printed) == load_stages(file, {"learning_rate": 1e-3})
    assert not (tmp_path / "run").exists()


def test_a_misspelt_list_of_stages_is_named():
    with pytest.raises(ConfigError, match=r"stage: unknown setting \(did you mean 'stages'"):
        TuneConfig.from_flat({"model": "m", "data": "d", "stage": []})


def test_a_setting_given_twice_in_a_stage_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: m\nstages:\n  - {data: d, seed: 1, seed: 2}\n")
    with pytest.raises(ConfigError, match="seed: given twice"):
        load_stages(file)


def test_the_verb_shows_the_table_and_what_was_gained(home, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings(home, tmp_path / "run", DOMAIN | {"max_steps": 1})), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["tune", str(file)])
    assert ended.value.code in (None, 0)
    out = capsys.readouterr().out
    assert "after domain" in out
    assert "the page:" in out
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path / "run")])
    assert "intact" in capsys.readouterr().out

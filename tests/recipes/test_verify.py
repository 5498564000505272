"""`verify`: every kind of change is found by name, nothing is said of a clean run, and inputs are told apart."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import strop
from strop.app.cli import main
from strop.config import TuneConfig
from strop.errors import MissingInputError
from strop.files.folders import sha256_file
from strop.recipes.manifest import load_manifest, predicted_memory
from strop.recipes.session import open_session
from strop.recipes.tune import Run, tune
from tests.tiny import tiny_chat_file, tiny_folder


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


class KilledAt:
    """A reporter that ends the process after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def note(self, text: str) -> None:
        pass

    def start(self, title: str, total: float | None, unit: str) -> None:
        pass

    def advance(self, done: float, **fields: float | int | str) -> None:
        if done == self._step:
            raise Killed

    def finish(self) -> None:
        pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data and a run with a checkpoint, all below it."""
    home = tmp_path_factory.mktemp("made")
    tiny_folder(home, "llama", dtype=torch.bfloat16)
    tiny_chat_file(home / "chats.jsonl", rows=16)
    tune(home / "llama", home / "chats.jsonl", output=home / "run", max_steps=2, save_steps=2, dtype="float32",
         batch_size=4, rank=2, tensorboard=True)  # fmt: skip
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A copy of all of it, somewhere else."""
    return shutil.copytree(made, tmp_path / "copy")


def names(findings: list) -> list[tuple[str, str]]:
    return [(finding.what, finding.name) for finding in findings]


def test_nothing_is_said_of_a_clean_run(made):
    result = strop.verify(made / "run")
    assert (result.run_findings, result.input_findings, result.notes) == ([], [], [])
    assert result.finished
    assert result.ok
    assert result.files == len([path for path in (made / "run").rglob("*") if path.is_file()]) - 2  # lock, manifest
    assert Run.open(made / "run").verify().to_dict() == result.to_dict()
    assert len(result.lines()) == 2


def test_a_run_that_was_moved_with_its_inputs_still_verifies(home, made):
    assert strop.verify(home / "run").ok
    tiny_chat_file(home / "chats.jsonl", rows=15)
    assert not strop.verify(home / "run").ok  # the data beside it are looked at, not those where it was
    assert strop.verify(made / "run").ok


def test_the_manifest_says_what_the_run_was_made_of(made):
    manifest = load_manifest(made / "run")
    assert manifest["inputs"]["data"]["files"]["chats.jsonl"]["sha256"] == sha256_file(made / "chats.jsonl")
    assert manifest["inputs"]["base"]["path"] == str(made / "llama")
    assert len(manifest["inputs"]["template"]["sha256"]) == 64
    assert manifest["seed"] == 0
    assert manifest["threads"] == torch.get_num_threads()
    assert manifest["versions"]["torch"] == torch.__version__
    predicted, measured = manifest["memory"]["predicted_bytes"], manifest["memory"]["measured_bytes"]
    assert 2 * 112960 < predicted < 100 << 20
    assert measured == json.loads((made / "run" / "run.json").read_text())["peak_bytes"]
    assert "tensorboard/events.out.tfevents.0.strop" in manifest["files"]
    assert "checkpoints/step-000002/weights.safetensors" in manifest["files"]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "run.json", "best/adapter_model.safetensors"])
def test_changed_missing_and_added_files_are_named(home, name):
    run = home / "run"
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole + b"\n")
    assert names(strop.verify(run).run_findings) == [("changed", name)]
    (run / name).unlink()
    assert names(strop.verify(run).run_findings) == [("missing", name)]
    (run / name).write_bytes(whole)
    (run / "best" / "more.txt").write_text("x")
    result = strop.verify(run)
    assert names(result.run_findings) == [("added", "best/more.txt")]
    assert not result.intact
    assert result.input_findings == []


def test_one_changed_byte_anywhere_in_a_run_is_found(home):
    run, chance = home / "run", random.Random(0)
    for path in sorted(run.rglob("*")):
        if not path.is_file() or path.name == ".lock":
            continue
        whole = path.read_bytes()
        tried = sorted(chance.sample(range(len(whole)), 5))
        for place in tried:
            changed = bytearray(whole)
            changed[place] ^= 1 << chance.randrange(8)
            path.write_bytes(changed)
            result = strop.verify(run)
            assert [name for _, name in names(result.run_findings)] == [path.relative_to(run).as_posix()], place
        path.write_bytes(whole)
    assert strop.verify(run).ok


def test_changed_inputs_are_told_apart_from_a_changed_run(home):
    rows = (home / "chats.jsonl").read_text()
    (home / "chats.jsonl").write_text(rows.replace("red", "rot"))
    result = strop.verify(home / "run")
    assert names(result.input_findings) == [("changed", f"data {home / 'chats.jsonl'}")]
    assert result.intact
    assert not result.ok
    assert any("intact" in line for line in result.lines())
    (home / "chats.jsonl").write_text(rows)
    config = home / "llama" / "config.json"
    config.write_text(config.read_text() + " ")
    result = strop.verify(home / "run")
    assert [finding.what for finding in result.input_findings] == ["changed"]
    assert "base" in result.input_findings[0].name


def test_missing_inputs_are_named(home, made, monkeypatch):
    manifest = json.loads((home / "run" / "manifest.json").read_text())
    assert manifest["inputs"]["data"]["from_run"] == "../chats.jsonl"
    (home / "chats.jsonl").unlink()
    monkeypatch.setattr("strop.recipes.verify._found", lambda record, run: None)
    assert strop.verify(home / "run").input_findings[0].what == "missing"


def test_a_folder_of_data_names_what_was_added_and_what_is_gone(tmp_path):
    base = tiny_folder(tmp_path, "llama")
    (tmp_path / "data").mkdir()
    tiny_chat_file(tmp_path / "data" / "train.jsonl", rows=8)
    tiny_chat_file(tmp_path / "data" / "valid.jsonl", rows=2)
    run = tune(base, tmp_path / "data", output=tmp_path / "run", max_steps=1, dtype="float32", rank=2)
    (tmp_path / "data" / "valid.jsonl").rename(tmp_path / "data" / "test.jsonl")
    assert names(run.verify().input_findings) == [
        ("added", f"data {tmp_path / 'data' / 'test.jsonl'}"),
        ("missing", f"data {tmp_path / 'data' / 'valid.jsonl'}"),
    ]


def test_a_killed_run_says_what_it_was_made_of_and_its_checkpoints_are_checked(home):
    settings = dict(max_steps=3, save_steps=1, dtype="float32", batch_size=4, rank=2)
    with pytest.raises(Killed):
        tune(home / "llama", home / "chats.jsonl", output=home / "killed", reporter=KilledAt(2), **settings)
    result = strop.verify(home / "killed")
    assert (result.finished, result.ok) == (False, True)
    assert result.files == 5  # those of a checkpoint: the second step was killed before it was saved
    assert load_manifest(home / "killed")["memory"]["measured_bytes"] is None
    weights = home / "killed" / "checkpoints" / "step-000001" / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    config = home / "killed" / "config.yaml"
    config.write_text(config.read_text().replace("rank: 2", "rank: 3"))
    found = strop.verify(home / "killed").run_findings
    assert names(found) == [("changed", "checkpoints/step-000001"), ("changed", "config.yaml")]
    assert "weights.safetensors" in found[0].text


def test_a_run_killed_before_its_last_file_is_completed_when_it_is_resumed(home, monkeypatch):
    settings = dict(max_steps=1, dtype="float32", rank=2)

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("strop.recipes.tune.finish_manifest", kill)
        with pytest.raises(Killed):
            tune(home / "llama", home / "chats.jsonl", output=home / "killed", **settings)
    assert not strop.verify(home / "killed").finished
    run = tune(home / "llama", home / "chats.jsonl", output=home / "killed", resume=True, **settings)
    assert run.verify().finished
    assert run.verify().ok


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(MissingInputError, match="no such folder"):
        strop.verify(tmp_path / "none")
    with pytest.raises(MissingInputError, match="nothing to compare with"):
        strop.verify(tmp_path)


def test_the_verb_ends_with_one_when_anything_differs(home, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(home / "run")])
    assert ended.value.code in (None, 0)
    assert "intact" in capsys.readouterr().out
    (home / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(home / "run"), "--json"])
    assert ended.value.code == 1
    assert json.loads(capsys.readouterr().out)["run_findings"][0]["name"] == "metrics.jsonl"


def test_the_predicted_memory_knows_the_optimizer(tmp_path):
    base = tiny_folder(tmp_path, "llama", hidden_size=128)
    data = tiny_chat_file(tmp_path / "chats.jsonl")
    predicted = []
    for optimizer in ("adamw", "adamw-8bit"):
        config = TuneConfig.from_flat({"model": base, "data": data, "method": "full", "optimizer": optimizer})
        session = open_session(config)
        plan = predicted_memory(session, session.train_settings())
        assert plan is not None
        predicted.append(plan.optimizer_bytes)
    assert predicted[1] < 0.5 * predicted[0]

"""`tune` over large files, and what it leaves of the rendered rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from strop.data import records
from strop.errors import StropError, TargetError
from strop.recipes import tune as tune_module
from strop.recipes.tune import tune
from tests.recipes.helpers import Notes
from tests.tiny import tiny_chat_file, tiny_folder

SETTINGS = {"max_steps": 3, "batch_size": 4, "dtype": "float32"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"), "llama")


def test_a_file_that_is_read_as_a_stream_trains_to_the_same_losses(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_chat_file(tmp_path / "chats.jsonl", rows=24)
    held = tune(base, data, output=tmp_path / "held", packing=True, max_length=96, **SETTINGS)
    monkeypatch.setattr(records, "KEPT_BYTES", 0)
    streamed = tune(base, data, output=tmp_path / "streamed", packing=True, max_length=96, **SETTINGS)
    assert [row["loss"] for row in streamed.metrics] == [row["loss"] for row in held.metrics]
    assert streamed.report["data"] == held.report["data"]
    assert streamed.report["result"]["valid_loss"] == held.report["result"]["valid_loss"]


def test_a_run_that_is_refused_leaves_no_rows_behind(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_chat_file(tmp_path / "chats.jsonl")
    with pytest.raises(TargetError):
        tune(base, data, output=tmp_path / "run", targets="nothing", **SETTINGS)
    assert not (tmp_path / "run").exists()

    def refuse(*args: object, **settings: object) -> None:
        assert (tmp_path / "run" / "cache").is_dir()
        raise StropError("refused")

    monkeypatch.setattr(tune_module, "check_start", refuse)
    with pytest.raises(StropError, match="refused"):
        tune(base, data, output=tmp_path / "run", **SETTINGS)
    assert not (tmp_path / "run").exists()


def test_a_start_after_a_kill_before_the_first_step_finds_the_rows(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run_dir = tiny_chat_file(tmp_path / "chats.jsonl"), tmp_path / "run"
    run_dir.mkdir()  # what was there before a refusal stays there

    def stop(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tune_module, "check_start", stop)
        with pytest.raises(KeyboardInterrupt):
            tune(base, data, output=run_dir, **SETTINGS)
    assert [path.name for path in run_dir.iterdir()] == ["cache"]
    notes = Notes()
    tune(base, data, output=run_dir, reporter=notes, **SETTINGS)
    assert notes.said("the rows were rendered before")
    assert not (run_dir / "cache").exists()

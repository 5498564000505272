"""What `tune` refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import shutil

import pytest

import strop
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
from strop.numerics.scheme import parse_scheme
from tests.recipes.helpers import Killed, Notes, short
from tests.tiny import tiny_folder, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft

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

"""The command line, run in process: what it prints, where, and its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiny import tiny_chat_file, tiny_folder
from typer.testing import CliRunner, Result

import strop
from strop.app.cli import app

EXPLAIN_AFFINE = ["explain", "affine", "--format", "uint8", "--json"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def failed(result: Result, code: int, *words: str) -> None:
    """The verb left with `code` and one message that holds `words`, and no traceback."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("cli"), "llama")


def test_help_and_import_leave_torch_and_transformers_alone() -> None:
    code = (
        "import sys, strop; from typer.testing import CliRunner; from strop.app.cli import app;"
        "r = CliRunner().invoke(app, ['--help']); assert r.exit_code == 0 and 'tune' in r.output;"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_are_these() -> None:
    assert sorted(strop.__all__) == sorted(
        [
            "Fail",
            "OpenedModel",
            "Pass",
            "QuantizedTensor",
            "Scheme",
            "Undecided",
            "__version__",
            "apply",
            "bench",
            "compare",
            "diff",
            "doctor",
            "export",
            "load",
            "merge",
            "parse_format",
            "plan",
            "predict",
            "prove",
            "quantize",
            "tune",
            "tune_stages",
            "verify",
        ]
    )
    for name in strop.__all__:
        assert getattr(strop, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = strop.nothing


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--range", "0", "1000", "--scheme", "symmetric", "--value", "250"], (1000 / 255, 0, 64)),
        (["--range", "-20", "1000", "--scheme", "asymmetric", "--value", "-20"], (4.0, 5, 0)),
    ],
    ids=["symmetric", "asymmetric"],
)
def test_explain_affine_gives_the_notes_figures(options: list[str], wanted: tuple[float, int, int]) -> None:
    result = run(*EXPLAIN_AFFINE, *options)
    assert result.exit_code == 0, result.output
    explained = json.loads(result.stdout)
    assert explained["scale"] == pytest.approx(wanted[0])
    assert (explained["zero_point"], explained["code"]) == wanted[1:]
    assert explained["restored"] == pytest.approx((wanted[2] - wanted[1]) * wanted[0])


def test_plan_prints_the_square_matrix_table_as_json() -> None:
    result = run("plan", "--sizes", "7B,13B,70B,180B", "--ranks", "1,2,8,16,512", "--json")
    table = json.loads(result.stdout)["square_matrix"]
    assert (table["7B"]["1"], table["70B"]["512"]) == (167332, 270924934)


def test_an_unknown_verb_names_the_nearest() -> None:
    failed(run("tun", "x"), 2, "did you mean 'tune'")


def test_a_planned_verb_says_that_it_is_not_there_yet() -> None:
    failed(run("squeeze", "x"), 2, "planned")


def test_a_misspelt_flag_is_refused() -> None:
    failed(run("quantize", "demo", "--formt", "int8"), 2, "--formt", "--format")


def test_a_missing_model_is_misuse(tmp_path: Path) -> None:
    failed(run("quantize", tmp_path / "nowhere", "--format", "int8", "-o", tmp_path / "out"), 2, "nowhere")


def test_an_unknown_format_names_what_there_is(llama: Path, tmp_path: Path) -> None:
    failed(run("quantize", llama, "--format", "int9", "-o", tmp_path / "out"), 2, "int9")
    assert not (tmp_path / "out").exists()


def test_a_missing_data_file_is_misuse(llama: Path, tmp_path: Path) -> None:
    failed(run("tune", llama, "--data", tmp_path / "no.jsonl", "-o", tmp_path / "run", "--max-steps", 1), 2, "no.jsonl")


def test_an_unknown_key_in_the_yaml_names_the_nearest(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {llama}\ndata: x.jsonl\nlearning_rat: 1.0e-3\n")
    failed(run("tune", file), 2, "learning_rat", "learning_rate")


def test_a_wrong_type_in_the_yaml_is_named(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {llama}\ndata: x.jsonl\nrank: many\nseed: [1]\n")
    failed(run("tune", file), 2, "rank", "seed")


def test_flags_beat_the_yaml_which_beats_the_defaults(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {llama}\ndata: x.jsonl\nlora_r: 4\nseed: 7\n")
    result = run("tune", file, "--rank", 2, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "rank: 2" in result.stdout
    assert "seed: 7" in result.stdout


def test_a_broken_row_names_file_and_line(llama: Path, tmp_path: Path) -> None:
    data = tiny_chat_file(tmp_path / "chats.jsonl")
    data.write_text(data.read_text() + '{"messages": [\n')
    failed(run("tune", llama, "--data", data, "-o", tmp_path / "run", "--max-steps", 1), 1, "chats.jsonl", "9")
    assert not (tmp_path / "run" / "best").exists()


def test_an_empty_split_is_an_error(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("")
    failed(run("tune", llama, "--data", folder, "-o", tmp_path / "run", "--max-steps", 1), 1, "train.jsonl")


def test_a_folder_without_weights_is_an_error(llama: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((llama / "config.json").read_bytes())
    failed(run("quantize", bare, "--format", "int8", "-o", tmp_path / "out"), 1, "bare", "safetensors")


def test_a_corrupt_weights_file_is_an_error(llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in llama.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:1000])
    failed(run("quantize", broken, "--format", "int8", "-o", tmp_path / "out"), 1, "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_with_a_message_and_leaves_nothing_half_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_model: object, _tokenizer: object, folder: Path, **_options: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("strop.recipes.quantize.write_model", interrupted)
    failed(run("quantize", llama, "--format", "int8", "-o", tmp_path / "out"), 130, "Ctrl-C")
    assert list(tmp_path.iterdir()) == []


def test_plan_wants_a_model_or_sizes() -> None:
    failed(run("plan"), 2, "neither")


def test_quantize_compare_and_chat_run_from_the_command_line(llama: Path, tmp_path: Path) -> None:
    data = tiny_chat_file(tmp_path / "chats.jsonl", rows=6)
    made = run("quantize", llama, "--format", "int4-g32", "-o", tmp_path / "int4", "--json")
    assert made.exit_code == 0, made.output
    compared = run("compare", llama, tmp_path / "int4", "--data", data, "--json", "-o", tmp_path / "page.html")
    assert compared.exit_code == 0, compared.output
    assert len(json.loads(compared.stdout)["models"]) == 2
    assert "<svg" in (tmp_path / "page.html").read_text()
    said = run("chat", tmp_path / "int4", "--prompt", "hello", "--max-new-tokens", 4)
    assert said.exit_code == 0, said.output


def test_merge_rounds_to_a_format_and_says_when_it_was_forced(llama: Path, tmp_path: Path) -> None:
    data = tiny_chat_file(tmp_path / "chats.jsonl", rows=8)
    tuned = run("tune", llama, "--data", data, "-o", tmp_path / "run", "--max-steps", 1, "--lr", 1e-5)
    assert tuned.exit_code == 0, tuned.output
    merged = ("merge", tmp_path / "run", "-o", tmp_path / "merged", "--format", "int2-g32")
    failed(run(*merged), 1, "effect", "int2-g32")
    assert not (tmp_path / "merged").exists()
    forced = run(*merged, "--force", "--json")
    assert forced.exit_code == 0, forced.output
    told = json.loads(forced.stdout)
    assert told["forced"] is True
    assert told["stored"] == "int2-g32"

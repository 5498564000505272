"""`strop chat` and `predict` from the command line: GGUF files, several models at once, one of them failing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tests.runtime.files import tiny_gguf
from tests.tiny import tiny_chat_file
from typer.testing import CliRunner, Result

from strop.app.cli import app
from strop.runtime.library import library

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tiny_gguf(folder)
    tiny_gguf(folder, "f16", template="")
    return folder


def run(*arguments: object, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed)


ONCE = ("--prompt", "say red", "--max-new-tokens", 6)


def test_a_file_answers_as_its_folder_and_both_stand_side_by_side(place: Path) -> None:
    alone = run("chat", place / "tiny-f32.gguf", *ONCE)
    assert alone.exit_code == 0, alone.output
    assert run("chat", place / "llama", *ONCE).stdout == alone.stdout
    both = run("chat", place / "llama", place / "tiny-f32.gguf", *ONCE)
    answer = alone.stdout.rstrip("\n")
    assert both.stdout == f"llama          {answer}\ntiny-f32.gguf  {answer}\n"


def test_each_of_several_models_remembers_the_conversation(place: Path) -> None:
    models = (place / "llama", place / "tiny-f32.gguf")
    said = run("chat", *models, "--max-new-tokens", 4, typed="say red\nand again\n\n")
    assert said.exit_code == 0, said.output
    assert [line[:13].strip("> ") for line in said.stdout.splitlines()[:4]].count("llama") == 2
    assert "leaves" in said.stderr


def test_a_question_that_fails_does_not_end_the_conversation(place: Path) -> None:
    typed = f"{'no way ' * 300}\nsay red\n\n"
    said = run("chat", place / "tiny-f32.gguf", "--max-new-tokens", 6, typed=typed)
    assert said.exit_code == 0, said.output
    assert "(no answer)" in said.stdout
    assert "context of 256" in said.stderr
    assert run("chat", place / "tiny-f32.gguf", *ONCE).stdout.strip() in said.stdout


def test_where_one_of_two_cannot_answer_the_other_does_and_the_reason_is_said(place: Path) -> None:
    said = run("chat", place / "tiny-f16.gguf", place / "tiny-f32.gguf", *ONCE)
    assert said.exit_code == 1
    lines = said.stdout.splitlines()
    assert lines[0] == "tiny-f16.gguf  (no answer)"
    assert lines[1].startswith("tiny-f32.gguf  ")
    assert len(lines[1]) > 16
    assert "tiny-f16.gguf: " in said.stderr
    assert "--chat-template" in said.stderr


def test_a_template_can_be_given_to_what_has_none(place: Path, tmp_path: Path) -> None:
    alone = run("chat", place / "tiny-f16.gguf", *ONCE)
    assert (alone.exit_code, "--chat-template chatml" in alone.stderr) == (1, True)
    assert run("chat", place / "tiny-f16.gguf", "--chat-template", "chatml", *ONCE).exit_code == 0
    rows, answers = tiny_chat_file(tmp_path / "rows.jsonl", rows=2), tmp_path / "answers.jsonl"
    options = ("--data", rows, "-o", answers, "--max-new-tokens", 4, "--chat-template", "chatml")
    assert run("predict", place / "tiny-f16.gguf", *options).exit_code == 0
    assert [json.loads(line)["row"] for line in answers.read_text().splitlines()] == [1, 2]


def test_a_truncated_file_among_several_is_refused_before_anything_is_asked(place: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes((place / "tiny-f32.gguf").read_bytes()[:-64])
    for models in ([tmp_path / "broken.gguf"], [place / "tiny-f32.gguf", tmp_path / "broken.gguf"]):
        said = run("chat", *models, *ONCE)
        assert said.exit_code == 1
        assert "broken.gguf" in said.stderr
        assert "truncated" in said.stderr
        assert said.stdout == ""


def test_without_the_runtime_the_extra_is_named_and_folders_still_answer(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", None)
    rows = tiny_chat_file(tmp_path / "rows.jsonl", rows=2)
    file = place / "tiny-f32.gguf"
    try:
        for arguments in (
            ("chat", file, *ONCE),
            ("predict", file, "--data", rows, "-o", tmp_path / "answers.jsonl"),
            ("compare", place / "llama", file, "--data", rows),
            ("serve", file, "--port", 0),
        ):
            said = run(*arguments)
            assert (said.exit_code, "strop[gguf]" in said.stderr) == (2, True), said.output
            assert "Traceback" not in said.output
        assert run("chat", place / "llama", *ONCE).exit_code == 0
    finally:
        library.cache_clear()


def test_a_rounded_cache_is_refused_for_a_file(place: Path) -> None:
    said = run("chat", place / "tiny-f32.gguf", "--kv-cache", "int8", *ONCE)
    assert (said.exit_code, "leave it out" in said.stderr) == (2, True)

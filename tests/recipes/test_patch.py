"""`diff` and `apply`: a tuned file as a patch and back, whole or not at all, in Python and on the command line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from typer.testing import CliRunner, Result

import strop
from strop.app.cli import app
from strop.errors import DiskFullError, FileFormatError, MissingInputError, UsageError
from strop.files.gguf.patch_streams import number
from strop.files.gguf.reader import GgufFile
from strop.recipes import patch as recipe
from tests.files.patching import Part, gguf_bytes, raw_of, sealed


def file_of(path: Path, seed: int, name: str = "demo", kind: str = "q4_0") -> Path:
    parts = [Part("w", kind, raw_of(kind, 16, 1)), Part("v", "q4_0", raw_of("q4_0", 16, seed))]
    path.write_bytes(gguf_bytes([*parts, Part("n", "f32", bytes(28))], [("general.name", name)]))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, a tuned file and the patch between them."""
    base, tuned = file_of(tmp_path / "base.gguf", 2), file_of(tmp_path / "tuned.gguf", 3, name="mine")
    strop.diff(base, tuned, tmp_path / "task.patch")
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


THREE = ["base.gguf", "task.patch", "tuned.gguf"]


def test_a_tuned_file_comes_back_byte_for_byte_and_nothing_is_left_beside_it(folder: Path) -> None:
    result = strop.apply(folder / "base.gguf", folder / "task.patch", folder / "again.gguf")
    assert (folder / "again.gguf").read_bytes() == (folder / "tuned.gguf").read_bytes()
    assert result.tuned.sha256 == hashlib.sha256((folder / "tuned.gguf").read_bytes()).hexdigest()
    assert names(folder) == ["again.gguf", *THREE]


def test_the_same_files_make_the_same_patch(folder: Path) -> None:
    strop.diff(folder / "base.gguf", folder / "tuned.gguf", folder / "again.patch")
    assert (folder / "again.patch").read_bytes() == (folder / "task.patch").read_bytes()


def test_a_patch_between_a_file_and_itself_changes_nothing(folder: Path) -> None:
    base = folder / "base.gguf"
    made = strop.diff(base, base, folder / "none.patch")
    assert made.summary.new_bytes == 0
    assert not any(moves.moved.total() for moves in made.summary.types.values())
    strop.apply(base, folder / "none.patch", folder / "same.gguf")
    assert (folder / "same.gguf").read_bytes() == base.read_bytes()


def test_other_tensors_are_refused_and_nothing_is_written(folder: Path) -> None:
    other = file_of(folder / "other.gguf", 2, kind="q4_1")
    with pytest.raises(UsageError, match=r"w: q4_0 \[512\] and q4_1 \[512\]"):
        strop.diff(folder / "base.gguf", other, folder / "new.patch")
    assert names(folder) == ["base.gguf", "other.gguf", "task.patch", "tuned.gguf"]


def test_a_wrong_base_and_the_tuned_file_itself_are_refused_and_nothing_is_written(folder: Path) -> None:
    other = file_of(folder / "other.gguf", 9)
    with pytest.raises(UsageError, match=r"is not the file that .*task.patch belongs to"):
        strop.apply(other, folder / "task.patch", folder / "new.gguf")
    other.unlink()
    with pytest.raises(UsageError, match="makes already"):
        strop.apply(folder / "tuned.gguf", folder / "task.patch", folder / "new.gguf")
    assert names(folder) == THREE


def test_a_patch_that_makes_another_file_than_it_promises_keeps_nothing(folder: Path) -> None:
    base, tuned = (folder / "base.gguf").read_bytes(), (folder / "tuned.gguf").read_bytes()
    opened = GgufFile.open(folder / "base.gguf")
    rest = opened.nbytes - sum(info.nbytes for info in opened.tensors.values())
    body = b"\0\1\0" + number(rest) + bytes(4) + bytes(2 + 2 + 1)  # one copy, no text, and no field moved
    (folder / "lie.patch").write_bytes(sealed(base=base, tuned=tuned[: len(base)], body=body))
    with pytest.raises(FileFormatError, match=r"makes a file of SHA-256 [0-9a-f]{64}, and [0-9a-f]{64}"):
        strop.apply(folder / "base.gguf", folder / "lie.patch", folder / "new.gguf")
    assert names(folder) == ["base.gguf", "lie.patch", *THREE[1:]]


def test_a_patch_that_does_not_give_the_tuned_file_again_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when one of the files changes while it is read."""
    real = recipe.PatchFile.restored

    def other(self: Any, *given: Any) -> Any:
        yield from real(self, *given)
        yield b"x"

    monkeypatch.setattr(recipe.PatchFile, "restored", other)
    with pytest.raises(FileFormatError, match=r"did not give .* again"):
        strop.diff(folder / "base.gguf", folder / "tuned.gguf", folder / "new.patch")
    assert names(folder) == THREE


class Failing:
    """A file that fails at its third piece."""

    def __init__(self, file: BinaryIO, error: BaseException) -> None:
        self.file, self.error, self.pieces = file, error, 0

    def write(self, piece: bytes) -> int:
        self.pieces += 1
        if self.pieces == 3:
            raise self.error
        return self.file.write(piece)

    def __enter__(self) -> Failing:
        return self

    def __exit__(self, *given: object) -> None:
        self.file.close()


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    real = Path.open

    def opened(path: Path, mode: str = "r", *given: Any, **named: Any) -> Any:
        file = real(path, mode, *given, **named)
        return Failing(file, error) if mode == "wb" else file

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize("verb", ["diff", "apply"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), DiskFullError),
        (OSError(errno.EIO, "broken disk"), OSError),
    ],
    ids=["Ctrl-C", "full disk", "broken disk"],
)
def test_writing_that_is_interrupted_leaves_nothing(
    verb: str, error: BaseException, raised: type[BaseException], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [folder / name for name in ("base.gguf", "tuned.gguf" if verb == "diff" else "task.patch")]
    failing(monkeypatch, error)
    with pytest.raises(raised):
        getattr(strop, verb)(*inputs, folder / "new")
    assert names(folder) == THREE
    (folder / "new").write_bytes(b"before")
    with pytest.raises(raised):
        getattr(strop, verb)(*inputs, folder / "new", overwrite=True)
    assert (folder / "new").read_bytes() == b"before"


def test_a_disk_without_room_is_said_before_any_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskFullError, match="1,000 are free"):
        strop.apply(folder / "base.gguf", folder / "task.patch", folder / "new.gguf")
    assert names(folder) == THREE


def test_an_output_that_stands_there_or_is_an_input_is_refused(folder: Path) -> None:
    base, tuned, patch = (folder / name for name in ("base.gguf", "tuned.gguf", "task.patch"))
    with pytest.raises(UsageError, match="stands there already"):
        strop.diff(base, tuned, patch)
    with pytest.raises(UsageError, match="stands there already"):
        strop.apply(base, patch, tuned)
    for verb, output in (("diff", base), ("diff", tuned), ("apply", base), ("apply", patch)):
        inputs = (base, tuned) if verb == "diff" else (base, patch)
        with pytest.raises(UsageError, match="is read to make the output"):
            getattr(strop, verb)(*inputs, output, overwrite=True)
    strop.apply(base, patch, tuned, overwrite=True)


def test_a_file_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(MissingInputError, match=r"nowhere.gguf: no such file"):
        strop.diff(folder / "nowhere.gguf", folder / "tuned.gguf", folder / "new")
    with pytest.raises(MissingInputError, match=r"nowhere.patch: no such file"):
        strop.apply(folder / "base.gguf", folder / "nowhere.patch", folder / "new")


def test_neither_verb_loads_torch(folder: Path) -> None:
    code = (
        "import sys; from strop.app.cli import main\n"
        "for words in (['diff', 'base.gguf', 'tuned.gguf', '-o', 'a'], ['apply', 'base.gguf', 'a', '-o', 'b']):\n"
        "    try: main(words)\n"
        "    except SystemExit as error: assert not error.code, error\n"
        "assert not {'torch', 'transformers', 'datasets', 'gguf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, capture_output=True)
    assert (folder / "b").read_bytes() == (folder / "tuned.gguf").read_bytes()


# --- the command line -------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_both_verbs_say_what_moved_and_the_digests(folder: Path) -> None:
    base, tuned, patch = (folder / name for name in ("base.gguf", "tuned.gguf", "task.patch"))
    made = run("diff", base, tuned, "-o", folder / "new.patch")
    applied = run("apply", base, patch, "-o", folder / "new.gguf")
    for result in (made, applied):
        assert result.exit_code == 0, result.output
        for path in (base, tuned):
            assert hashlib.sha256(path.read_bytes()).hexdigest() in result.stdout
        assert "of 1,024 codes moved (" in result.stdout
        assert "in 1 of 2 tensors" in result.stdout
        assert "0 of 7 values moved (0.00%), in 0 of 1 tensors" in result.stdout
    share = patch.stat().st_size / tuned.stat().st_size
    assert f"{patch.stat().st_size:,} bytes, {share:.2%} of the tuned file" in made.stdout


def test_json_holds_the_figures(folder: Path) -> None:
    base, tuned, patch = (folder / name for name in ("base.gguf", "tuned.gguf", "task.patch"))
    made = json.loads(run("diff", base, tuned, "-o", folder / "new.patch", "--json").stdout)
    applied = json.loads(run("apply", base, patch, "-o", folder / "new.gguf", "--json").stdout)
    assert made | {"path": ""} == applied | {"path": ""}
    assert made["path"] == str(folder / "new.patch")
    assert made["patch_bytes"] == patch.stat().st_size
    assert made["share"] == patch.stat().st_size / tuned.stat().st_size
    assert made["tuned"] == {
        "bytes": tuned.stat().st_size,
        "sha256": hashlib.sha256(tuned.read_bytes()).hexdigest(),
    }
    assert made["types"]["q4_0"]["numbers"] == {"scales": 32, "codes": 1024}
    assert made["types"]["f32"] == {
        "tensors": 1,
        "tensors_moved": 0,
        "numbers": {"values": 7},
        "moved": {"values": 0},
    }


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["diff", "base.gguf", "tuned.gguf", "--ouput", "x"], 2, ["--ouput", "--output"]),
        (["diff", "base.gguf", "tuned.gguf"], 2, ["--output"]),
        (["diff", "base.gguf", "-o", "x"], 2, ["tuned"]),
        (["diff", "base.gguf", "no.gguf", "-o", "x"], 2, ["no.gguf: no such file"]),
        (["diff", "base.gguf", "tuned.gguf", "-o", "task.patch"], 2, ["stands there already", "--overwrite"]),
        (["apply", "base.gguf", "task.patch", "-o", "tuned.gguf"], 2, ["stands there already"]),
        (["apply", "base.gguf", "no.patch", "-o", "x"], 2, ["no.patch: no such file"]),
        (["apply", "tuned.gguf", "task.patch", "-o", "x"], 2, ["makes already"]),
        (["apply", "task.patch", "base.gguf", "-o", "x"], 1, ["name the base first, the patch second"]),
        (["diff", "task.patch", "base.gguf", "-o", "x"], 1, ["no GGUF file"]),
        (["aply", "base.gguf", "task.patch", "-o", "x"], 2, ["did you mean 'apply'?"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_misuse_ends_with_one_message_and_writes_nothing(
    words: list[str], code: int, said: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = run(*words)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    for part in said:
        assert part in " ".join(result.output.split())
    assert names(folder) == THREE


def test_ctrl_c_on_the_command_line_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    result = run("apply", folder / "base.gguf", folder / "task.patch", "-o", folder / "new.gguf")
    assert result.exit_code == 130
    assert names(folder) == THREE

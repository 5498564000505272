"""The commands that the documentation gives for real data sets run on those files as they are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from strop.app.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "fine-tuning.md"
BLOCK = next(block for block in re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S))
COMMANDS = [line.split("#")[0].strip() for line in BLOCK.splitlines()]


def test_there_is_a_command_for_every_kind_of_file() -> None:
    assert len(COMMANDS) == 6


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split("--data ")[1].split()[0])
def test_the_command_runs_on_the_file_as_it_is(
    command: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = command.split("--data ")[1].split()[0]
    (tmp_path / name).write_bytes((material / "data" / name).read_bytes())
    short = ["--max-steps", "2", "--batch-size", "2", "--max-length", "256"]
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], *short])
    assert result.exit_code == 0, result.output
    assert "2 steps" in result.stdout

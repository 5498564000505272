"""Every example in the documentation runs and prints what the page says."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from strop.app.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(kind: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        texts = [text for language, text in BLOCK.findall(page.read_text(encoding="utf-8")) if language == kind]
        found += [(f"{page.name}-{index}", text) for index, text in enumerate(texts)]
    return found


@pytest.mark.parametrize("text", [text for _, text in blocks("console")], ids=[name for name, _ in blocks("console")])
def test_a_command_prints_what_the_page_shows(text: str) -> None:
    command, _, shown = text.partition("\n")
    assert command.startswith("$ strop ")
    result = CliRunner().invoke(app, shlex.split(command.removeprefix("$ strop ")))
    assert result.exit_code == 0, result.output
    expected, printed = shown.splitlines(), result.stdout.splitlines()
    if expected[-1] == "...":
        expected = expected[:-1]
        printed = printed[: len(expected)]
    assert printed == expected


def test_python_examples_give_what_the_pages_show() -> None:
    for page in PAGES:
        texts = [text for language, text in BLOCK.findall(page.read_text(encoding="utf-8")) if language == "python"]
        if texts:
            test = doctest.DocTestParser().get_doctest("\n".join(texts), {}, page.name, str(page), 0)
            runner = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF)
            runner.run(test)
            assert runner.summarize(verbose=False).failed == 0, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_verb_and_flag_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n".join(body for _, body in BLOCK.findall(text)) + "\n" + "\n".join(re.findall(r"^    (.*)$", text, re.M))
    commands = re.findall(r"^(?:\$ )?(strop [a-z].*?)(?:\s+#.*)?$", code, re.MULTILINE)
    assert commands
    for command in commands:
        words = shlex.split(command)[1:]
        verb = words[:2] if words[0] == "explain" else words[:1]
        shown = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200"}, terminal_width=200)
        assert shown.exit_code == 0, command
        for flag in (word for word in words if word.startswith("--")):
            assert flag in shown.output, f"{page.name}: {command}: no {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"

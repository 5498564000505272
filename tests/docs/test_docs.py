"""Every example in the documentation runs, in order, and prints what the page says; every figure comes from one."""

from __future__ import annotations

import doctest
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from strop.app.cli import app

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"(?<![\w./-])\d[\d,]*(?:\.\d+)?%?")


def matches(expected: list[str], printed: list[str]) -> bool:
    """Whether lines are those expected: `...` alone stands for any lines, within a line for any text."""
    if not expected:
        return not printed
    if expected[0] == "...":
        return any(matches(expected[1:], printed[start:]) for start in range(len(printed) + 1))
    if not printed:
        return False
    pattern = ".*".join(re.escape(part) for part in expected[0].split("..."))
    return re.fullmatch(pattern, printed[0].rstrip()) is not None and matches(expected[1:], printed[1:])


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines that it is shown to print."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *shown = part.rstrip("\n").split("\n")
        yield command, [line.rstrip() for line in shown]


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("a\n...", "a", True),
        ("a\n...\nd", "a\nb\nc\nd", True),
        ("a ... c", "a b c", True),
        ("a ... c", "a b", False),
        ("a", "a\nb", False),
        ("...\nb", "a", False),
        ("1.5", "1x5", False),
    ],
)
def test_dots_stand_for_what_they_should(expected: str, printed: str, same: bool) -> None:
    assert matches(expected.split("\n"), printed.split("\n")) == same


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_example_of_a_page_runs_and_prints_what_is_shown(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    runner = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF)
    ran = 0
    for index, (kind, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8"))):
        if kind == "python":
            test = doctest.DocTestParser().get_doctest(text, names, f"{page.name}-{index}", str(page), 0)
            assert test.examples, f"a python block without an example: {text}"
            complaints: list[str] = []
            assert runner.run(test, out=complaints.append, clear_globs=False).failed == 0, "".join(complaints)
            names.update(test.globs)
            ran += 1
        elif kind == "console":
            for command, shown in commands(text):
                assert command.startswith("strop "), command
                result = CliRunner().invoke(app, shlex.split(command)[1:])
                assert result.exit_code == 0, f"{command}\n{result.output}"
                printed = result.stdout.rstrip("\n").split("\n")
                assert matches(shown, printed), f"{command}\nprinted:\n{result.stdout}"
                ran += 1
    assert ran >= 5


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_figure_in_a_pages_prose_stands_in_one_of_its_examples(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    examples = "\n".join(body for _, body in BLOCK.findall(text))
    prose = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))
    found = [match.rstrip(".,") for match in FIGURE.findall(prose)]
    # Small whole numbers are counts and names (4 bits, 2 moments); longer ones were measured or calculated.
    figures = [figure for figure in found if len(re.sub(r"\D", "", figure)) >= 3]
    missing = [figure for figure in figures if figure not in examples]
    assert not missing, f"{page.name}: {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_verb_and_flag_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n".join(body for _, body in BLOCK.findall(text)) + "\n" + "\n".join(re.findall(r"^    (.*)$", text, re.M))
    shown: dict[tuple[str, ...], str] = {}
    for command in re.findall(r"^(?:\$ )?(strop [a-z].*?)(?:\s+#.*)?$", code, re.MULTILINE):
        words = shlex.split(command)[1:]
        verb = tuple(words[:2] if words[0] == "explain" else words[:1])
        if verb not in shown:
            result = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200"}, terminal_width=200)
            assert result.exit_code == 0, command
            shown[verb] = result.output
        for flag in (word for word in words if word.startswith("--")):
            assert flag in shown[verb], f"{page.name}: {command}: no {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in headings, f"{page.name}: #{anchor}"

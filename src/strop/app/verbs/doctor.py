"""`doctor`: what training will really see, and whether it would go well."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strop.app.verbs.common import Data, Json, dump

if TYPE_CHECKING:
    from rich.text import Text

    from strop.recipes.doctor import Examination, ShownDocument, ShownRow

SHOWN_CHARACTERS = 1200
"""Of a document, in the terminal; the page shows all of it."""

_STYLES = {"refuse": "bold red", "warn": "bold yellow", "fine": "green"}


def doctor(
    model: Annotated[str, typer.Argument(help="A config.yaml of a run; or the base, with --data.")],
    data: Data = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="full, lora, qlora or qat.")] = None,
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="qat and qlora: the grid of the weights.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", "--cutoff-len", "--max-seq-length", help="Tokens in a row.")
    ] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Several rows in a sequence, isolated.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="chatml, plain or a jinja file, for bases that have none.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "--per-device-train-batch-size", help="Rows in a micro batch.")
    ] = None,
    accumulation: Annotated[
        int | None, typer.Option("--accumulation", "--gradient-accumulation-steps", help="Micro batches in a step.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting of tune, as key=value; may be repeated.")
    ] = None,
    page: Annotated[Path | None, typer.Option("--output", "-o", help="Write a page to look at (.html).")] = None,
    rows: Annotated[int, typer.Option(help="Rows of the first step to show.", min=0)] = 3,
    trial: Annotated[
        bool, typer.Option("--trial/--no-trial", help="Take two steps, and undo them, to see what they do and need.")
    ] = True,
    json: Json = False,
) -> None:
    """Show what training will really see: rows with their loss mask, stop tokens, truncation, leaks, disk, time.

    Leaves with 1 if training would be refused. Nothing is written but the page.

    Example: strop doctor run.yaml -o page.html     strop doctor demo --data chats.jsonl --set learning_rate=1e-4
    """
    given = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in {"model", "set_", "page", "rows", "trial", "json"}
    }
    from strop.app.console import ConsoleReporter
    from strop.recipes.doctor import doctor as run

    given |= _settings(set_ or [])
    result = run(model, **given, page=page, rows=rows, trial=trial, reporter=ConsoleReporter())
    if json:
        dump(result.to_dict())
    else:
        _print(result)
        if page:
            print(f"page: {page}")
    if result.refused:
        raise typer.Exit(1)


def _settings(pairs: list[str]) -> dict[str, Any]:
    """`key=value` texts as settings; values are read as YAML, so that 3, true and [a, b] are what they look like."""
    import yaml

    from strop.errors import ConfigError

    settings: dict[str, Any] = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found or not key:
            raise ConfigError(f"--set {pair}: needs the form key=value, such as --set learning_rate=1e-4")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {pair}: the value is not valid YAML; put it in quotes") from error
    return settings


def _print(result: Examination) -> None:
    """Rows first, findings below them with the gravest on top, the verdict last: where the eye is when it ends."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from strop.app.console import output

    if result.rows:
        output.print(
            Text.assemble("What is learned is ", ("⟦green, in brackets⟧", "bold green"), "; the rest is only read.\n")
        )
    for number, row in enumerate(result.rows, start=1):
        _print_row(number, row)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for finding in result.findings:
        said = Text(finding.message)
        if finding.level != "fine" and finding.remedy:
            said.append(f"\n→ {finding.remedy}", style="dim")
        grid.add_row(Text(finding.level, style=_STYLES[finding.level]), Text(finding.name, style="bold"), said)
    output.print(Padding(grid, (0, 0, 1, 0)), soft_wrap=False)
    output.print(Text(result.verdict, style="bold red" if result.refused else "bold"))


def _print_row(number: int, row: ShownRow) -> None:
    from rich.text import Text

    from strop.app.console import output

    packed = len(row.documents) > 1
    padding = f", then {row.padding} of padding" if row.padding else ""
    if packed:
        tokens = sum(document.tokens for document in row.documents)
        output.print(
            Text(f"sequence {number}: {len(row.documents)} documents, {tokens:,} tokens{padding}", style="bold")
        )
    for place, document in enumerate(row.documents, start=1):
        head = f"document {place}" if packed else f"row {number} of the first step"
        tail = "" if packed else padding
        where = (
            f"{document.source}, row {document.row}; {document.learned:,} of {document.tokens:,} tokens learned{tail}"
        )
        output.print(Text.assemble(("── " if packed else "") + head, (f"  {where}", "dim")))
        output.print(_masked(document))
    output.print()


def _masked(document: ShownDocument) -> Text:
    """The document's text, what is learned in green and in brackets; the middle of a long one left out."""
    from rich.text import Text

    text = Text()
    for piece in document.pieces:
        if piece.learned:
            text.append(f"⟦{_readable(piece.text)}⟧", style="bold green")
        else:
            text.append(_readable(piece.text))
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    left_out = Text(f" … {len(text) - 2 * half:,} characters … ", style="dim")
    return text[:half] + left_out + text[-half:]


def _readable(text: str) -> str:
    """Control characters as pictures, so that no text can steer the terminal; line ends stay."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)

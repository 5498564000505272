"""What several verbs share: options by the same name, and the ways to show a result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Model = Annotated[
    str, typer.Argument(help="A folder, a hub id, a run or adapter folder, or 'demo' (the bundled model).")
]
Data = Annotated[
    str | None,
    typer.Option("--data", "-d", "--dataset", help="A file (jsonl, json, csv, txt, parquet), folder or hub id."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the result is written.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands at the output path.")]


def stop(message: str, code: int) -> NoReturn:
    """Print why the verb ends on standard error and leave with `code`."""
    from strop.app.console import messages

    messages.print(f"[bold red]strop:[/] {_escape(message)}")
    raise typer.Exit(code)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def dump(value: Any) -> None:
    """Print a result as JSON on standard output."""
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    print()


def show(headers: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """Print a table on standard output."""
    from strop.app.console import output, table

    output.print(table(headers, rows, title=title))

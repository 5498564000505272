"""What several verbs share: options by the same name, and the ways to show a result."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer

_NUMBER: Final = re.compile(r"\d+(\.\d*)?|\.\d+")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Model = Annotated[
    str, typer.Argument(help="A folder, a hub id, a run or adapter folder, or 'demo' (the bundled model).")
]
Data = Annotated[
    str | None,
    typer.Option("--data", "-d", "--dataset", help="A file (jsonl, json, csv, txt, parquet), folder or hub id."),
]
DataSets = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        "--dataset",
        help="A file (jsonl, json, csv, txt, each also .gz; parquet), folder or hub id; once for each set. "
        "PATH=WEIGHT: an epoch takes its rows so often (2: twice, 0.5: half of them).",
    ),
]
KVCache = Annotated[
    str | None,
    typer.Option("--kv-cache", help="Keep keys and values as int8 or int4 (compare: of every model but the first)."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the result is written.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands at the output path.")]


def data_sets(given: list[str] | None) -> str | list[str | dict[str, object]] | None:
    """What `--data` names: one set as it is, several (or one with a weight) as a list.

    Raises:
        ConfigError: `a=2.jsonl`-like names that could be read both ways.
    """
    if not given:
        return None
    sets = [_weighted(text) for text in given]
    return sets[0] if len(sets) == 1 and isinstance(sets[0], str) else sets


def memory_size(text: str) -> int:
    """What `--max-memory` says, in bytes.

    Raises:
        ConfigError: it is no size.
    """
    from strop.config.settings import size_in_bytes
    from strop.errors import ConfigError

    try:
        return size_in_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--max-memory {text}: {error}") from None


def _weighted(text: str) -> str | dict[str, object]:
    path, sign, number = text.rpartition("=")
    if not sign or not _NUMBER.fullmatch(number):
        return text
    if Path(text).exists():
        from strop.errors import ConfigError

        raise ConfigError(
            f"data: {text!r} is the name of what stands there and reads as {path!r} with the weight {number}; write "
            f"{text}=1, or name sets and weights in a config.yaml"
        )
    return {"path": path, "weight": float(number)}


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

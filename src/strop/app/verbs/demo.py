"""`demo`: the whole way on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where data, models and the page go.")] = Path(
        "strop-demo"
    ),
    seed: Annotated[int, typer.Option(help="Of data order and adapters.")] = 0,
) -> None:
    """The whole way on the bundled model and data, in minutes, on a plain CPU, offline.

    Example: strop demo -o strop-demo
    """
    from strop.app.console import ConsoleReporter
    from strop.recipes.demo import demo as run

    result = run(output, seed=seed, reporter=ConsoleReporter())
    for line in result.lines():
        print(line)

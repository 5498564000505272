"""`bench`: this machine against its limits, and a model on it."""

from __future__ import annotations

from typing import Annotated

import typer

from strop.app.verbs.common import Json, dump, show


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder, a hub id, a run or adapter folder, a .gguf file, or 'demo'; none for the machine alone.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Of each probe.")] = 1.0,
    json: Json = False,
) -> None:
    """Measure this machine (memory, matrix products, kernels) and, given a model, how near it comes to the limits.

    Example: strop bench     strop bench demo --json
    """
    from strop.app.console import ConsoleReporter
    from strop.recipes.bench import bench as run

    found = run(model, seconds=seconds, reporter=ConsoleReporter())
    if json:
        dump(found.to_dict())
        return
    for line in found.lines():
        print(line)
    show(list(found.HEADERS), found.rows())
    if found.model is not None:
        for line in found.model.lines():
            print(line)
        show(list(found.model.HEADERS), found.model.rows())

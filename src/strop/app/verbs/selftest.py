"""`selftest`: kill and resume a training run before the user's eyes."""

from __future__ import annotations

from typing import Annotated

import typer

from strop.app.verbs.common import Json, dump


def selftest(
    kills: Annotated[int, typer.Option("--kill", "--kills", help="How many processes are killed.", min=1)] = 50,
    method: Annotated[str, typer.Option("--method", "-m", help="full, lora, qlora or qat.")] = "lora",
    seed: Annotated[int, typer.Option(help="Of the moments at which they are killed.")] = 0,
    json: Json = False,
) -> None:
    """Kill a small training run again and again, resume it, and compare it bit for bit with one left alone.

    Example: strop selftest --kill 50
    """
    from strop.app.console import ConsoleReporter
    from strop.recipes.selftest import selftest as run

    result = run(kills=kills, method=method, seed=seed, reporter=ConsoleReporter())
    if json:
        dump(result.to_dict())
    else:
        for line in result.lines():
            print(line)
    if not result.passed:
        raise typer.Exit(1)

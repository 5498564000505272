"""`plan`: what a model takes."""

from __future__ import annotations

from typing import Annotated

import typer

from strop.app.verbs.common import Json, dump


def plan(
    model: Annotated[
        str | None, typer.Argument(help="A model folder, a config.json, a hub id, or 'demo'.", show_default=False)
    ] = None,
    sizes: Annotated[str | None, typer.Option("--sizes", help="Parameter counts: 7B,13B,70B.")] = None,
    ranks: Annotated[str, typer.Option("--ranks", help="Ranks for --sizes.")] = "1,2,8,16,512",
    rank: Annotated[int, typer.Option("--rank", "--lora-r", help="The adapter's rank.", min=1)] = 16,
    targets: Annotated[
        str, typer.Option("--targets", help="all-linear, or names and patterns with commas.")
    ] = "all-linear",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows in a micro batch.", min=1)] = 1,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens in a row.", min=1)] = 512,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, or adamw-8bit (8-bit moments).")] = "adamw",
    json: Json = False,
) -> None:
    """What does this take: parameters, memory, disk and time, for each method; what fits here.

    Example: strop plan demo --rank 16     strop plan --sizes 7B,70B --ranks 1,8
    """
    from strop.recipes.plan import plan as run

    if model is None or sizes is not None:
        planned = run(model, sizes=None if sizes is None else sizes.split(","), ranks=ranks.split(","))
    else:
        planned = run(
            model, rank=rank, targets=targets, batch_size=batch_size, max_length=max_length, optimizer=optimizer
        )
    if json:
        dump(planned.to_dict())
        return
    for line in planned.lines():
        print(line)

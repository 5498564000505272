"""`compare`: models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strop.app.verbs.common import Json, KVCache, dump, show


def compare(
    models: Annotated[
        list[str], typer.Argument(help="Two models or more (one with --kv-cache); the first is the reference.")
    ],
    data: Annotated[str, typer.Option("--data", "-d", help="Rows that trained and calibrated nothing.")],
    task: Annotated[str | None, typer.Option(help="exact-match: is the whole answer right?")] = None,
    max_rows: Annotated[int, typer.Option("--max-rows", help="Rows to use.", min=2)] = 300,
    kv_cache: KVCache = None,
    page: Annotated[Path | None, typer.Option("--output", "-o", help="Write a page to look at (.html).")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json: Json = False,
) -> None:
    """Put models side by side: size, memory, speed, perplexity, divergence, agreement, task score, with intervals.

    Example: strop compare base tuned tuned-int4 --data test.jsonl --task exact-match -o page.html
    """
    from strop.app.console import ConsoleReporter
    from strop.recipes.compare import compare as run

    comparison = run(
        models,
        data,
        task=task,
        page=page,
        max_rows=max_rows,
        kv_cache=kv_cache,
        seed=seed,
        reporter=ConsoleReporter(),
    )
    if json:
        dump(comparison.to_dict())
        return
    show(comparison.headers(), comparison.rows())
    for line in comparison.verdicts():
        print(line)
    if page:
        print(f"page: {page}")

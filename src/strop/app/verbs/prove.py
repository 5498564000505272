"""`prove`: pass, fail, or undecided."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strop.app.verbs.common import Json, dump


def prove(
    model: Annotated[str, typer.Argument(help="What you ship: a GGUF file, a folder, a run, an adapter, a hub id.")],
    data: Annotated[str, typer.Option("--data", "-d", help="Rows that trained, calibrated and chose nothing.")],
    max_drop: Annotated[
        float,
        typer.Option("--max-drop", help="Largest drop allowed: in the share of right answers; perplexity: nats/token."),
    ] = 0.01,
    against: Annotated[
        str | None, typer.Option("--against", help="The reference; by default what the model was made of.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="exact-match, perplexity, or choice (rows with choices and an answer).")
    ] = "exact-match",
    certificate: Annotated[
        Path | None, typer.Option("--certificate", help="Where it is written; by default MODEL.proof.json.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option("--max-rows", help="Look at so many rows at the most.", min=1)] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", "--cutoff-len", "--max-seq-length", help="Most tokens of a row.", min=2),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows per forward pass.", min=1)] = 16,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", help="A name or file, for models that have none.")
    ] = None,
    leave_out_seen: Annotated[
        bool, typer.Option("--leave-out-seen", help="Leave out rows that trained, calibrated or chose.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the certificate that stands there.")] = False,
    seed: Annotated[int, typer.Option(help="Of the rows' order.")] = 0,
    json: Json = False,
) -> None:
    """Prove that a file keeps your task within a drop that you allow, on as few rows as that takes.

    Ends with 0 (pass), 1 (fail) or 3 (undecided: more rows are needed). Stopped before, it writes nothing.

    Example: strop prove tuned-int4 --data test.jsonl --max-drop 0.01
    """
    from strop.app.console import ConsoleReporter
    from strop.recipes.prove import prove as run

    proof = run(
        model,
        data,
        max_drop=max_drop,
        against=against,
        task=task,
        certificate=certificate,
        max_rows=max_rows,
        max_length=max_length,
        batch_size=batch_size,
        chat_template=chat_template,
        leave_out_seen=leave_out_seen,
        overwrite=overwrite,
        seed=seed,
        reporter=ConsoleReporter(),
    )
    if json:
        dump(proof.to_dict())
    else:
        for line in proof.lines():
            print(line)
    if proof.exit_code:
        raise typer.Exit(proof.exit_code)

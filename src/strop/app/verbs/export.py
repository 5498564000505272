"""`export`: one GGUF file, proved."""

from __future__ import annotations

from typing import Annotated

import typer

from strop.app.verbs.common import Data, Json, Model, Output, Overwrite, dump


def export(
    model: Model,
    output: Output,
    format: Annotated[
        str,
        typer.Option("--format", "-f", help="gguf:q8_0, gguf:q4_k_m, gguf:f16, gguf:q4_0, gguf:q6_k, gguf:f32 ..."),
    ],
    data: Data = None,
    max_rows: Annotated[
        int, typer.Option("--max-rows", help="Rows of --data that weigh the columns of the matrices.", min=1)
    ] = 128,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", "--cutoff-len", "--max-seq-length", help="Most tokens of a row.", min=2),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", help="A name or file, embedded in models that have none.")
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="An adapter alone, as a GGUF adapter, instead of merged.")
    ] = False,
    embeddings: Annotated[
        str | None,
        typer.Option("--embeddings", "--token-embedding-type", help="Type of embedding and head: f16, q8_0, q6_k ..."),
    ] = None,
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Write an Ollama Modelfile beside it.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Prove the file before it gets its name.")
    ] = True,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl", help="Fail above this KL (nats per token) between the file in llama.cpp and the model.", min=0
        ),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a model, a run or an adapter as a GGUF file for llama.cpp, Ollama and others.

    Example: strop export demo --format gguf:q4_k_m -o demo.gguf
    """
    from strop.app.console import ConsoleReporter
    from strop.recipes.export import export as run

    result = run(
        model,
        output,
        format=format,
        data=data,
        max_rows=max_rows,
        max_length=max_length,
        chat_template=chat_template,
        adapter_only=adapter_only,
        embeddings=embeddings,
        modelfile=modelfile,
        verify=verify,
        max_kl=max_kl,
        overwrite=overwrite,
        reporter=ConsoleReporter(),
    )
    if json:
        dump(result.receipt)
        return
    for line in result.lines():
        print(line)

"""`chat` and `predict`: answers, one at a time or a file of them."""

from __future__ import annotations

from typing import Annotated

import typer

from strop.app.verbs.common import KVCache, Model, Output


def chat(
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask once, print the answer, leave.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    kv_cache: KVCache = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
) -> None:
    """Talk to a model; --prompt asks once.

    Example: strop chat run --prompt "wake me at half past six on weekdays"
    """
    from strop.app.console import messages
    from strop.models import load
    from strop.recipes.generate import answer, kv_cache_line

    told = kv_cache_line(kv_cache)
    opened = load(model)
    if told is not None:
        messages.print(told(opened), style="dim")
    turns = [{"role": "system", "content": system}] if system else []

    def reply(text: str) -> None:
        turns.append({"role": "user", "content": text})
        said = answer(
            opened,
            turns,
            max_new_tokens=max_new_tokens,
            kv_cache=kv_cache,
            temperature=temperature,
            seed=seed,
            stream=lambda piece: print(piece, end="", flush=True),
        )
        print()
        turns.append({"role": "assistant", "content": said})

    if prompt is not None:
        reply(prompt)
        return
    messages.print("An empty line or Ctrl-D leaves.", style="dim")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        reply(text)


def predict(
    model: Model,
    data: Annotated[str, typer.Option("--data", "-d", help="The rows to answer.")],
    output: Output,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    batch_size: Annotated[int, typer.Option(help="Rows answered at once.", min=1)] = 16,
    kv_cache: KVCache = None,
    max_rows: Annotated[int | None, typer.Option(help="Answer only the first so many.")] = None,
) -> None:
    """Answer every row of a file.

    Example: strop predict run --data test.jsonl -o answers.jsonl
    """
    from strop.app.console import ConsoleReporter
    from strop.recipes.generate import predict as run

    path = run(
        model,
        data,
        output,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        kv_cache=kv_cache,
        max_rows=max_rows,
        reporter=ConsoleReporter(),
    )
    print(f"answers: {path}")

"""`chat` and `predict`: answers, one at a time or a file of them."""

from __future__ import annotations

from typing import Annotated

import typer

from strop.app.verbs.common import KVCache, Model, Output

Template = Annotated[
    str | None, typer.Option("--chat-template", help="For models that have none: chatml, plain, or a Jinja file.")
]


def chat(
    models: Annotated[
        list[str], typer.Argument(help="A folder, hub id, run, adapter, 'demo' or GGUF file; two to compare answers.")
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask once, print the answer, leave.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    kv_cache: KVCache = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    chat_template: Template = None,
) -> None:
    """Talk to a model, or to several at once; --prompt asks once.

    Example: strop chat run --prompt "wake me at half past six on weekdays"
    """
    from strop.app.console import messages
    from strop.errors import StropError
    from strop.evaluation.engines import open_engine
    from strop.recipes.compare import model_names
    from strop.recipes.generate import Chat, kv_cache_line

    told = kv_cache_line(kv_cache)
    chats: dict[str, Chat] = {}
    for name, place in zip(model_names(models), models, strict=True):
        engine = open_engine(place)
        for note in engine.notes:
            messages.print(note, style="dim", markup=False)
        if told is not None:
            messages.print(told(engine), style="dim")
        chats[name] = Chat(
            engine,
            system=system,
            max_new_tokens=max_new_tokens,
            kv_cache=kv_cache,
            temperature=temperature,
            seed=seed,
            chat_template=chat_template,
        )
    longest = max(map(len, chats))

    def reply(text: str) -> list[StropError]:
        """Ask every model; what fails within a conversation, or beside others, is shown in the answer's place."""
        failed = []
        for name, one in chats.items():
            if len(chats) > 1:
                print(f"{name:<{longest}}  ", end="", flush=True)
            try:
                one.ask(text, stream=lambda piece: print(piece, end="", flush=True))
                print()
            except StropError as error:
                if len(chats) == 1 and prompt is not None:
                    raise
                print("(no answer)", flush=True)
                messages.print(f"{name}: {error}", style="red", markup=False)
                failed.append(error)
        return failed

    if prompt is not None:
        failed = reply(prompt)
        if failed:
            raise typer.Exit(max(error.exit_code for error in failed))
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
    batch_size: Annotated[int, typer.Option(help="Rows answered at once (GGUF files: one).", min=1)] = 16,
    kv_cache: KVCache = None,
    max_rows: Annotated[int | None, typer.Option(help="Answer only the first so many.")] = None,
    chat_template: Template = None,
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
        chat_template=chat_template,
        reporter=ConsoleReporter(),
    )
    print(f"answers: {path}")

"""`serve`: a model behind OpenAI's endpoint."""

from __future__ import annotations

from typing import Annotated

import typer


def serve(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, a run, an adapter, 'demo' or a GGUF file.")],
    host: Annotated[str, typer.Option(help="Where to listen; another than this machine's own needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes any that is free.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="STROP_API_KEY", help="The token that a request must bring.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What requests call the model; by default its file's name.")] = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", help="For models that have none: chatml, plain, or a Jinja file.")
    ] = None,
) -> None:
    """Serve a model as OpenAI's API (chat and plain completions, streaming) until Ctrl-C.

    Example: strop serve model.gguf --port 8000
    """
    from strop.recipes.serve import Service, check_address

    loopback = check_address(host, api_key)
    try:
        from strop.app.server import bind, build_app, run
    except ImportError as error:
        from strop.errors import MissingInputError

        raise MissingInputError(
            f"serving needs fastapi and uvicorn, which are not installed; pip install 'strop[serve]' [{error}]"
        ) from error
    from strop.app.console import messages
    from strop.evaluation.engines import open_engine
    from strop.recipes.compare import model_names

    with bind(host, port) as listening:  # before the model is read: a port that is taken is said at once
        engine = open_engine(model)
        service = Service(engine, name or model_names([model])[0], chat_template=chat_template)
        app = build_app(service, token=api_key or None, loopback=loopback)
        shown = f"[{host.strip('[]')}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}/v1"

        def ready() -> None:
            print(f"serving {service.name} ({engine.format}) at {address}; Ctrl-C ends", flush=True)
            if not service.has_template:
                messages.print("it has no chat template: plain completions only, unless --chat-template names one")

        run(app, service, listening, ready=ready)
    print("stopped", flush=True)

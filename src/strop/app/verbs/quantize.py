"""`quantize`: rounding after training."""

from __future__ import annotations

from typing import Annotated

import typer

from strop.app.verbs.common import Data, Json, Model, Output, Overwrite, dump, memory_size


def quantize(
    model: Model,
    output: Output,
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="int8, int8-a8, int4-g32, int4-g128-asym, int3-g32, nf4 ...")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Instead: 3.5bits per weight, 300MB for the model, or kl<0.02; bits by layer."),
    ] = None,
    formats: Annotated[
        str | None, typer.Option("--formats", help="What layers may become under a budget: int3-g32,int4-g32,int8-g32.")
    ] = None,
    method: Annotated[
        str,
        typer.Option("--method", "-m", help="rtn, search, stochastic, hqq, gptq, awq, smooth, autoround, blockwise."),
    ] = "rtn",
    observer: Annotated[
        str, typer.Option("--observer", help="How rtn finds the range: minmax, percentile, mse.")
    ] = "minmax",
    activation_observer: Annotated[
        str,
        typer.Option(
            "--activation-observer",
            help="How int8-a8-static finds the range of activations: minmax, average, percentile, entropy.",
        ),
    ] = "minmax",
    data: Data = None,
    max_rows: Annotated[
        int, typer.Option("--max-rows", help="Rows of --data to use; a quarter of them is held out.", min=1)
    ] = 128,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", "--cutoff-len", "--max-seq-length", help="Most tokens of a row.", min=2),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", help="A name or file, for models that have none.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="Kept while calibrating: 2GB, 800MB; the disk takes the rest.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", help="Fail above this KL (nats per token) on held-out rows.", min=0)
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option("--min-agreement", help="Fail below this top-1 agreement on held-out rows.", min=0, max=1),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Past the gate, more bits for the layers to blame, until it passes.")
    ] = False,
    scale_steps: Annotated[
        int,
        typer.Option(
            "--scale-steps", help="Then train all scales end to end for so many steps; best at 2 and 3 bits.", min=0
        ),
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of methods that draw.")] = 0,
    keep_indivisible: Annotated[
        bool, typer.Option("--keep-indivisible", help="Keep layers that a group size does not divide in 16 bits.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Round a model's linear layers to a format and write it with a receipt of what was lost.

    Example: strop quantize demo --format int4-g32 -o demo-int4
    """
    from strop.app.console import ConsoleReporter
    from strop.recipes.quantize import quantize as run

    result = run(
        model,
        format,
        output=output,
        budget=budget,
        method=method,
        observer=observer,
        activation_observer=activation_observer,
        data=data,
        max_rows=max_rows,
        max_length=max_length,
        chat_template=chat_template,
        max_memory=None if max_memory is None else memory_size(max_memory),
        max_kl=max_kl,
        min_agreement=min_agreement,
        repair=repair,
        scale_steps=scale_steps,
        seed=seed,
        keep_indivisible=keep_indivisible,
        overwrite=overwrite,
        reporter=ConsoleReporter(),
        **({} if formats is None else {"formats": [name.strip() for name in formats.split(",") if name.strip()]}),
    )
    if json:
        dump({"path": str(result.path), "receipt": result.receipt})
        return
    for line in result.lines():
        print(line)

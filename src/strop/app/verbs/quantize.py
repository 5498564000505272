"""`quantize`: rounding after training."""

from __future__ import annotations

from typing import Annotated

import typer

from strop.app.verbs.common import Data, Json, Model, Output, Overwrite, dump


def quantize(
    model: Model,
    format: Annotated[
        str, typer.Option("--format", "-f", help="int8, int8-a8, int4-g32, int4-g128-asym, int3-g32, nf4 ...")
    ],
    output: Output,
    method: Annotated[
        str, typer.Option("--method", "-m", help="rtn (round to nearest) or search (searched scales).")
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
    max_rows: Annotated[int, typer.Option("--max-rows", help="Rows of --data to calibrate with.", min=1)] = 128,
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
        method=method,
        observer=observer,
        activation_observer=activation_observer,
        data=data,
        max_rows=max_rows,
        keep_indivisible=keep_indivisible,
        overwrite=overwrite,
        reporter=ConsoleReporter(),
    )
    if json:
        dump({"path": str(result.path), "receipt": result.receipt})
        return
    for line in result.lines():
        print(line)

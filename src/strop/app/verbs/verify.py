"""`verify`: a run's hashes checked again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strop.app.verbs.common import Json, dump


def verify(
    run: Annotated[Path, typer.Argument(help="A run's folder, also of a run in stages, or a certificate of `prove`.")],
    json: Json = False,
) -> None:
    """Check that a run is byte for byte what it was, and apart from that whether its data and base changed since.

    Of a certificate: that model, reference and data are those of the proof, and that its rows say what it says.
    Ends with 1 when anything differs. Example: strop verify runs/demo-lora
    """
    from strop.recipes.certificate import check_certificate
    from strop.recipes.verify import verify as check

    result = check_certificate(run) if run.is_file() else check(run)
    if json:
        dump(result.to_dict())
    else:
        for line in result.lines():
            print(line)
    if not result.ok:
        raise typer.Exit(1)

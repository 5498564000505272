"""`diff` and `apply`: a tuned GGUF file as a patch on its base, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strop.app.verbs.common import Json, Output, Overwrite, dump

if TYPE_CHECKING:
    from strop.recipes.patch import PatchResult

Base = Annotated[Path, typer.Argument(help="The GGUF file that everybody has.")]


def diff(
    base: Base,
    tuned: Annotated[Path, typer.Argument(help="A GGUF file with the same tensors: names, types and shapes.")],
    output: Output,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write what makes one GGUF file of another as a small patch.

    Example: strop diff base.gguf tuned.gguf -o task.patch
    """
    from strop.recipes.patch import diff as run

    _show(run(base, tuned, output, overwrite=overwrite), json=json)


def apply(
    base: Base,
    patch: Annotated[Path, typer.Argument(help="A patch of `strop diff`, made from this very base.")],
    output: Output,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Restore a tuned GGUF file from its base and a patch, byte for byte.

    Example: strop apply base.gguf task.patch -o tuned.gguf
    """
    from strop.recipes.patch import apply as run

    _show(run(base, patch, output, overwrite=overwrite), json=json)


def _show(result: PatchResult, *, json: bool) -> None:
    if json:
        dump(result.to_dict())
        return
    for line in result.lines():
        print(line)

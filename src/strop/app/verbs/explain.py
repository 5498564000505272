"""`explain`: a number's bits, an affine mapping, a tensor on a grid."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from strop.app.verbs.common import Json, Model, Output, dump


def bits(
    value: Annotated[float, typer.Argument(help="The number.")],
    format: Annotated[str, typer.Option("--format", "-f", help="fp32, fp16, bf16, fp8, mxfp4, int8 ...")] = "fp16",
    json: Json = False,
) -> None:
    """Show a number's sign, exponent and significand in a format, and the value that is really stored.

    Example: strop explain bits 7.32 --format fp16
    """
    from strop.recipes.explain import explain_bits

    _explained(explain_bits(value, format), as_json=json)


def affine(
    range: Annotated[tuple[float, float], typer.Option("--range", help="The lowest and the highest value to be held.")],
    value: Annotated[float, typer.Option("--value", help="A value to send through and back.")],
    format: Annotated[str, typer.Option("--format", "-f", help="int2 to int8, uint2 to uint8.")] = "uint8",
    scheme: Annotated[str, typer.Option("--scheme", help="symmetric, symmetric-full or asymmetric.")] = "asymmetric",
    json: Json = False,
) -> None:
    """Work an affine quantization step by step: scale, zero point, code, restored value.

    Example: strop explain affine --range -20 1000 --format uint8 --scheme asymmetric --value -20
    """
    from strop.recipes.explain import explain_affine

    _explained(explain_affine(range[0], range[1], format, scheme, value), as_json=json)


def tensor(
    model: Model,
    name: Annotated[str, typer.Argument(help="The tensor's name, as in the weights file.")],
    output: Output,
    format: Annotated[str, typer.Option("--format", "-f", help="int4-g32, nf4, mxfp4, gguf:q4_k ...")] = "int4-g32",
    json: Json = False,
) -> None:
    """Draw a weight's histogram with the grid of a format, and its error.

    Example: strop explain tensor demo model.layers.0.mlp.up_proj.weight --format int4-g32 -o picture.png
    """
    from strop.recipes.explain import explain_tensor

    _explained(explain_tensor(model, name, format, output), as_json=json)


def _explained(explanation: Any, *, as_json: bool) -> None:
    if as_json:
        dump(explanation.to_dict())
        return
    for line in explanation.lines():
        print(line)

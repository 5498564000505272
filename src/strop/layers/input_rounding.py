"""Inputs of linear layers rounded while a model trains, as the runtime of the file will round them.

    int8    per token, symmetric: scale = max|x| / 127.5 of that token (`numerics.activations`)
    q8_0    blocks of 32 values: d = max|x| / 127, codes round(x * (127 / max|x|)), the scale stored in float16;
            what llama.cpp does to the inputs of Q4_0, Q5_0 and Q8_0 weights (ggml, `quantize_row_q8_0`)

The gradient passes straight through. Nothing of it is stored: it makes training see what inference computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from strop.errors import ConfigError, nearest
from strop.methods.rounding import straight
from strop.numerics.activations import Activations, rounded

Q8_0_BLOCK: Final = 32


class InputRounding(Protocol):
    """x [..., in] to what the runtime computes with, in x's dtype."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """The rounded inputs, with a straight-through gradient."""
        ...


def int8_inputs(x: Tensor) -> Tensor:
    """Inputs as int8 codes of each token."""
    with torch.no_grad():
        values = rounded(x, Activations())
    return straight(values.to(x.dtype), x)


def q8_0_inputs(x: Tensor) -> Tensor:
    """Inputs as llama.cpp's Q8_0 blocks; a last block that is not full is rounded as it is."""
    with torch.no_grad():
        values = q8_0_values(x.float())
    return straight(values.to(x.dtype), x)


def q8_0_values(x: Tensor) -> Tensor:
    """What Q8_0 makes of x, float32 [..., in]: d of every 32 values in float16, codes found with the exact 1 / d."""
    columns = x.shape[-1]
    missing = -columns % Q8_0_BLOCK
    blocks = torch.nn.functional.pad(x, (0, missing)).unflatten(-1, (-1, Q8_0_BLOCK))  # [..., blocks, 32]
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    stored = (largest / 127.0).half().float()
    return (blocks * inverse).round_().mul_(stored).flatten(-2)[..., :columns]


INPUT_ROUNDINGS: Final[Mapping[str, InputRounding]] = MappingProxyType({"int8": int8_inputs, "q8_0": q8_0_inputs})


def input_rounding(name: str | None) -> InputRounding | None:
    """The rounding of a name; None for None.

    Raises:
        ConfigError: there is no such.
    """
    if name is None:
        return None
    found = INPUT_ROUNDINGS.get(name)
    if found is None:
        raise ConfigError(f"activations: {name!r} is unknown{nearest(name, INPUT_ROUNDINGS)}; there are int8 and q8_0")
    return found


@contextmanager
def rounding_inputs(model: nn.Module, layers: Iterable[str], name: str) -> Iterator[None]:
    """Round the inputs of the named layers of a model for a while."""
    rounding = input_rounding(name)
    assert rounding is not None

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounding(inputs[0]), *inputs[1:])

    handles = [model.get_submodule(layer).register_forward_pre_hook(before) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

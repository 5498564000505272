"""Linear layers in bfloat16 that are given a few rows, the way that is fast where the processor has matrix tiles (AMX).

torch's linear lays the whole weight out anew for the tiles at every call. That is nothing beside a long prompt, and
most of the time where one token, or one for each of a few texts, goes through the layer. So while `few_rows` lasts,
dense layers of a model compute

    one row         y = W x          torch.mv, which reads the weight as it lies
    a few rows      y = (W X^T)^T    the same product with the sides changed: only X is laid out anew

Products are summed in float32 and rounded once, with a bias twice at the most, as torch's are; the order of the sum may
differ, and with it last bits.
On processors without AMX torch's own way is the faster one, and nothing is changed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

MOST_ROWS: Final = 16


def has_tiles() -> bool:
    """Whether this processor multiplies bfloat16 by AMX."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


@contextlib.contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """Let the dense bfloat16 layers of a model take few rows the fast way while the context lasts, on the CPU."""
    changed = [module for module in model.modules() if has_tiles() and _is_plain(module)]
    for module in changed:
        module.forward = functools.partial(linear, module)  # pyright: ignore[reportArgumentType]  plain ones are Linear
    try:
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


def _is_plain(module: nn.Module) -> bool:
    """A linear layer of torch's own, in bfloat16, that nobody else gave another forward."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """X [..., in] -> [..., out], as `layer` computes it."""
    weight, bias = layer.weight, layer.bias
    rows = x.numel() // weight.shape[1]
    if not 1 <= rows <= MOST_ROWS or x.dtype != weight.dtype or torch.is_grad_enabled():
        return functional.linear(x, weight, bias)
    if rows == 1:
        one = x.reshape(-1)
        y = torch.mv(weight, one) if bias is None else torch.addmv(bias, weight, one)
    else:
        few = x.reshape(rows, -1).t()
        y = torch.mm(weight, few) if bias is None else torch.addmm(bias[:, None], weight, few)
        y = y.t().contiguous()
    return y.view(*x.shape[:-1], weight.shape[0])

"""The gradient of whole weights, without training them and even where they have none, and its spectrum.

For y = W x the chain rule gives dL/dW = dYᵀ X, with X [tokens, in] what the layer met and dY [tokens, out] the
gradient at its output. Both pass by in one forward and one backward pass, whatever the layer is made of: a quantized
base, whose codes have no gradient, gives the gradient of the weight that it stands for. No activation is kept that the
backward pass does not keep anyway; memory is one fp32 matrix [out, in] a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from strop.data.batches import Batch
from strop.precision import autocast
from strop.training.losses import token_loss_sum
from strop.training.shapes import at_common_width, positions_of


@contextmanager
def weight_gradients(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Sum dYᵀ X of the named linear layers over every backward pass while the context lasts.

    Yields:
        Name to gradient [out, in], fp32 (fp64 where the activations are); a layer that no backward pass reached is
        absent.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, dy: Tensor) -> None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = dy.detach().reshape(-1, dy.shape[-1]).to(wide)  # [..., out] -> [tokens, out]
        gradient = rows.t() @ x.reshape(-1, x.shape[-1]).to(wide)
        sums[name] = sums[name] + gradient if name in sums else gradient

    def watch(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()  # nothing before this layer is trained: the chain begins here
        output.register_hook(partial(add, name, inputs[0].detach()))

    hooks = [model.get_submodule(name).register_forward_hook(partial(watch, name)) for name in names]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def probe_gradients(
    model: nn.Module, names: Sequence[str], batches: Iterable[Batch], *, compute_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Gradient of the mean loss per supervised token with regard to each named layer's whole weight.

    Args:
        model: A causal language model; nothing of it changes.
        names: Linear layers.
        batches: What the loss is summed over.
        compute_dtype: Of the products.
    """
    device, limit = next(model.parameters()).device, positions_of(model)
    supervised = 0
    with weight_gradients(model, names) as sums, torch.enable_grad():
        for batch in batches:
            with autocast(device, compute_dtype):
                loss_sum, count = token_loss_sum(model, at_common_width(batch, limit=limit))
            inner = [parameter for parameter in model.parameters() if parameter.requires_grad]
            assert not inner, "the probe looks at a frozen base"
            loss_sum.backward()
            supervised += count
    return {name: total / max(1, supervised) for name, total in sums.items()}


def energy_rank(values: Tensor, share: float) -> int:
    """The fewest singular values that hold `share` of the sum of their squares.

    >>> energy_rank(torch.tensor([3.0, 1.0, 0.0]), 0.9), energy_rank(torch.tensor([1.0, 1.0, 1.0, 1.0]), 0.9)
    (1, 4)
    """
    energy = values.double().square()
    if float(energy.sum()) == 0:
        return 1
    held = energy.cumsum(0) / energy.sum()
    return min(len(values), int((held < share - 1e-12).sum()) + 1)


def entropy_rank(values: Tensor) -> float:
    """The effective rank exp(-sum p log p), p = values / sum (Roy and Vetterli, "The effective rank", 2007).

    >>> entropy_rank(torch.tensor([2.0, 2.0, 0.0]))
    2.0
    """
    shares = values.double() / values.double().sum()
    shares = shares[shares > 0]
    return round(float(torch.exp(-(shares * shares.log()).sum())), 9) if len(shares) else 1.0


def reproduced_energy(first: Tensor, second: Tensor) -> Tensor:
    """Of each singular direction of one half's gradient, the part that the other half repeats: s_i * (u_iᵀ G v_i).

    Chance gives zero on average, so that what sums up is the signal.
    """
    u, values, vt = torch.linalg.svd(first, full_matrices=False)
    again = torch.einsum("or,oi,ri->r", u, second, vt)  # [out, r], [out, in], [r, in] -> [r]
    return values * again

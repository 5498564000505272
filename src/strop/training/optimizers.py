"""AdamW over fp32 weights, its parameter groups, and the learning rate that each method starts from.

    m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2;   w = w - rate * (m^ / (sqrt(v^) + eps) + decay * w)

with bias-corrected m^ and v^ (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019); torch's own
implementation. The trained weights are the fp32 master weights themselves: an update below 2^-9 of a weight is lost in
bf16, so trained parameters are widened to fp32 (`widen_trained`) and the forward pass casts them down where that is
faster. Moments are fp32, or 8 bits each (`adamw8bit.py`). Weight decay spares vectors: norms, biases, and every other
one-dimensional parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from strop.numerics.dynamic8 import BLOCK
from strop.training.adamw8bit import SMALL, AdamW8bit

OptimizerName: TypeAlias = Literal["adamw", "adamw-8bit"]

BETAS: Final = (0.9, 0.999)
EPSILON: Final = 1e-8
QUANTITIES: Final = ("step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
"""What an optimizer's state of one parameter may hold."""

REFERENCE_RATE: Final = 2e-5
REFERENCE_WIDTH: Final = 4096
ADAPTER_FACTOR: Final = 10.0


def default_learning_rate(hidden_size: int, *, adapters: bool) -> float:
    """The peak learning rate where none is given: 2e-5 * 4096 / hidden size, for adapters ten times that.

    Narrow models take larger steps. The rule passes through common practice at width 4096 (full 2e-5) and through
    QLoRA's rates (Dettmers et al., 2023: 2e-4 for 7B, width 4096; 1e-4 for 65B, width 8192); below a width of 128 it is
    held. A starting point, not an optimum.

    >>> default_learning_rate(4096, adapters=True), default_learning_rate(256, adapters=False)
    (0.0002, 0.00032)
    """
    rate = REFERENCE_RATE * REFERENCE_WIDTH / max(hidden_size, 128)
    return rate * ADAPTER_FACTOR if adapters else rate


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with gradient by name, in the model's order; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def widen_trained(model: nn.Module) -> None:
    """Turn every trained parameter narrower than fp32 into fp32, in place; ties stay tied."""
    for parameter in trained_parameters(model).values():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def make_optimizer(
    name: OptimizerName,
    parameters: dict[str, nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    rates: Mapping[str, float] = MappingProxyType({}),
) -> torch.optim.Optimizer:
    """An optimizer over `parameters`: matrices with decay, vectors without, and those that have a rate of their own.

    Each group says under `peak` what its rate is at the peak of the schedule.

    Args:
        name: `adamw` is torch's, with fp32 moments; `adamw-8bit` keeps them in 8 bits.
        parameters: By name; the order decides the order of the optimizer's state.
        learning_rate: The first rate; the loop sets each step's own.
        weight_decay: Decoupled decay of the parameters with two dimensions or more.
        rates: Peak rates of those parameters that have one of their own, by name; they have no decay.
    """
    matrices = [value for name, value in parameters.items() if value.dim() >= 2 and name not in rates]
    vectors = [value for name, value in parameters.items() if value.dim() < 2 and name not in rates]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay, "peak": learning_rate},
        {"params": vectors, "weight_decay": 0.0, "peak": learning_rate},
    ]
    for rate in sorted({rates[name] for name in parameters if name in rates}):
        own = [value for name, value in parameters.items() if rates.get(name) == rate]
        groups.append({"params": own, "weight_decay": 0.0, "peak": rate})
    groups = [group for group in groups if group["params"]]
    if name == "adamw-8bit":
        return AdamW8bit(groups, lr=learning_rate, betas=BETAS, eps=EPSILON)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values())
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=EPSILON, fused=fused)


def state_bytes(name: OptimizerName, parameters: Mapping[str, Tensor]) -> int:
    """The bytes that an optimizer's moments will take."""
    sizes = [parameter.numel() for parameter in parameters.values()]
    if name == "adamw":
        return sum(2 * 4 * size for size in sizes)
    return sum(8 * size if size < SMALL else 2 * size + 8 * -(-size // BLOCK) for size in sizes)


def vanishing_share(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, dtype: torch.dtype = torch.bfloat16
) -> float:
    """The share of the weights that moved whose move would be lost if they were kept in `dtype`.

    A move is lost where round(round(before) + (after - before)) = round(before), rounding to `dtype`: below 2^-9 to
    2^-8 of the weight in bf16. Weights that did not move at all are not counted; 0.0 where none moved.

    Args:
        before: fp32 weights by name, copied before a step.
        after: the same weights after it.
        dtype: what the weights would be kept in.
    """
    moved = lost = 0
    for name, start in before.items():
        move = after[name].detach() - start
        kept = start.to(dtype)
        same = (kept.to(move.dtype) + move).to(dtype) == kept
        moved += int(move.count_nonzero())
        lost += int((same & (move != 0)).sum())
    return lost / moved if moved else 0.0


def gradient_norm(parameters: dict[str, nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients together; a scalar, NaN or infinite if any of them is."""
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, foreach=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors, `<parameter>.<quantity>`; empty before the first step."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for quantity, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{quantity}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put the tensors of `optimizer_tensors` back into an optimizer over the same parameters.

    Raises:
        ValueError: a tensor belongs to no parameter.
    """
    rest = dict(tensors)
    for name, parameter in parameters.items():
        state = {}
        for quantity in QUANTITIES:
            value = rest.pop(f"{name}.{quantity}", None)
            if value is not None:
                state[quantity] = value.to(parameter.device)
        if state:
            optimizer.state[parameter] = state
    if rest:
        raise ValueError(f"optimizer state of unknown parameters: {', '.join(sorted(rest))}")

"""AdamW over fp32 weights, its parameter groups, and the learning rate that each method starts from.

    m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2;   w = w - rate * (m^ / (sqrt(v^) + eps) + decay * w)

with bias-corrected m^ and v^ (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019); torch's own
implementation. The trained weights are the fp32 master weights themselves: an update below 2^-9 of a weight is lost in
bf16, so trained parameters are widened to fp32 (`widen_trained`) and the forward pass casts them down where that is
faster. Moments are fp32. Weight decay spares vectors: norms, biases, and every other one-dimensional parameter.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

BETAS: Final = (0.9, 0.999)
EPSILON: Final = 1e-8
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


def adamw(parameters: dict[str, nn.Parameter], *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over `parameters` in two groups: matrices with decay, vectors without.

    Args:
        parameters: By name; the order decides the order of the optimizer's state.
        learning_rate: The first rate; the loop sets each step's own.
        weight_decay: Decoupled decay of the parameters with two dimensions or more.
    """
    matrices = [parameter for parameter in parameters.values() if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values())
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=EPSILON, fused=fused)


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
        for quantity in ("step", "exp_avg", "exp_avg_sq"):
            value = rest.pop(f"{name}.{quantity}", None)
            if value is not None:
                state[quantity] = value.to(parameter.device)
        if state:
            optimizer.state[parameter] = state
    if rest:
        raise ValueError(f"optimizer state of unknown parameters: {', '.join(sorted(rest))}")

"""AdamW whose two moments take 8 bits each, on any device: in plain torch, and with the same bits by a native kernel.

    m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2;   w = w - rate * (m^ / (sqrt(v^) + eps) + decay * w)

as in `optimizers.py`, with m and v kept as codes of the dynamic map in blocks of 256 (`strop.numerics.dynamic8`;
Dettmers and others, "8-bit Optimizers via Block-wise Quantization", 2022). A step reads a piece of both, computes in
fp32, moves the weights by the moments as computed, and stores the moments rounded: 2 + 8/256 bytes a parameter in place
of 8. Parameters of fewer than 4,096 elements keep fp32 moments, as in the paper.

State of a parameter, all of it tensors, so that a checkpoint holds it bit for bit:

    step                       float32 scalar
    exp_avg, exp_avg_sq        uint8, the parameter's shape (float32 where it is small)
    exp_avg_scale, exp_avg_sq_scale      float32 [ceil(elements / 256)]

Two deviations. The paper puts embeddings into a layer of their own with 32-bit state, since most of their rows have no
gradient at most steps; here they are like all others, and what makes them safe is that a second moment above zero is
never stored as zero. And the weights are the fp32 masters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

from strop.kernels import adam
from strop.numerics.codebook import dynamic_map
from strop.numerics.dynamic8 import BLOCK, cells, dequantize_blocks, quantize_blocks

SMALL: Final = 4096
"""Parameters with fewer elements keep fp32 moments."""

_PIECE: Final = {"cpu": 2**18}
_PIECE_ELSEWHERE: Final = 2**24
"""Elements worked on at once: some 8 MiB of scratch on a CPU."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with block-wise 8-bit moments.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: how slowly the two moments forget.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # torch's has overloads
        """Move every parameter that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_fresh(parameter))
        state["step"] += 1
        weight, gradient = parameter.detach().reshape(-1), parameter.grad
        assert gradient is not None
        gradient = gradient.reshape(-1)
        rates = _rates(int(state["step"]), group)
        if not _moved_natively(weight, gradient, state, rates):
            piece = _PIECE.get(weight.device.type, _PIECE_ELSEWHERE)
            for start in range(0, weight.numel(), piece):
                part = slice(start, start + piece)
                first = _Moment(state, "exp_avg", part, signed=True)
                second = _Moment(state, "exp_avg_sq", part, signed=False)
                _update(weight[part], gradient[part].float(), first.values, second.values, rates)
                first.store()
                second.store()
        if weight.data_ptr() != parameter.data_ptr():  # not contiguous: reshape made a copy
            parameter.copy_(weight.view_as(parameter))


class _Moment:
    """A piece of one moment in fp32, and its way back into the state."""

    def __init__(self, state: dict[str, Any], name: str, part: slice, *, signed: bool) -> None:
        self.kept, self.signed = state[name].view(-1)[part], signed
        self.scale: Tensor | None = None
        if self.kept.dtype == torch.uint8:
            scale: Tensor = state[f"{name}_scale"][part.start // BLOCK : part.stop // BLOCK]
            self.scale, self.values = scale, dequantize_blocks(self.kept, scale, signed=signed)
        else:
            self.values = self.kept

    def store(self) -> None:
        if self.scale is not None:
            codes, scale = quantize_blocks(self.values, signed=self.signed)
            self.kept.copy_(codes)
            self.scale.copy_(scale)


def _fresh(parameter: nn.Parameter) -> dict[str, Tensor]:
    """Moments of zero."""
    step = torch.zeros((), dtype=torch.float32, device="cpu")
    if parameter.numel() < SMALL:
        zeros = [torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device) for _ in range(2)]
        return {"step": step, "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
    state = {"step": step}
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        blocks = math.ceil(parameter.numel() / BLOCK)
        zero = int(quantize_blocks(torch.zeros(1), signed=signed)[0])
        state[name] = torch.full(parameter.shape, zero, dtype=torch.uint8, device=parameter.device)
        state[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
    return state


def _rates(step: int, group: dict[str, Any]) -> adam.Rates:
    (beta1, beta2), rate = group["betas"], group["lr"]
    return adam.Rates(
        new_first=1 - beta1,
        old_second=beta2,
        new_second=1 - beta2,
        root_scale=1 / math.sqrt(1 - beta2**step),
        eps=group["eps"],
        decay=1 - rate * group["weight_decay"],
        rate=-rate / (1 - beta1**step),
    )


def _moved_natively(weight: Tensor, gradient: Tensor, state: dict[str, Any], rates: adam.Rates) -> bool:
    """The step by the native kernels, which give the bits of `_update`; False where they cannot."""
    if state["exp_avg"].dtype != torch.uint8 or not weight.is_cpu:
        return False
    moments = [
        adam.Moment(
            state[name].view(-1),
            state[f"{name}_scale"],
            dynamic_map(weight.device, signed=signed),
            *cells(weight.device, signed=signed),
        )
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False))
    ]
    return adam.step(weight, gradient, moments[0], moments[1], rates)


def _update(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: adam.Rates) -> None:
    """One step over flat pieces, in place: the moments first, then the weights.

    Every operation stands alone, so that each is rounded once: torch's `lerp`, `addcmul` and an `alpha` are not, or not
    everywhere, and neither is its float32 root on a CPU (the vector library's may be off by a bit).
    """
    first.add_((gradient - first).mul_(rates.new_first))
    second.mul_(rates.old_second).add_(gradient.square().mul_(rates.new_second))
    root = second.double().sqrt().float() if second.is_cpu else second.sqrt()
    root.mul_(rates.root_scale).add_(rates.eps)
    weight.mul_(rates.decay)
    weight.add_((first / root).mul_(rates.rate).to(weight.dtype))

"""`LoraLinear`: a frozen linear layer and a trainable change of low rank.

    y = base(x) + scaling * dropout(x) @ A^T @ B^T,        W = W0 + scaling * B @ A

A is [r, in], B is [out, r]; both are fp32 parameters and stay fp32 when the model is cast to a narrower dtype (an
update of 0.2% of a value is lost in bf16). They are multiplied in the activation's dtype. scaling = alpha / r, or
alpha / sqrt(r) when rank-stabilised. A starts uniform in +-1/sqrt(in) and B at zero, so that a fresh adapter changes
nothing. The base may be any linear layer: of it, only `in_features`, `out_features` and `forward` are used, and its
dense weight where the two are merged.

Sources: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1; Kalajdzievski, "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023). The initialisation of A is PEFT's
(`kaiming_uniform_(a=sqrt(5))`), not the Gaussian of the first paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from strop.errors import ConfigError
from strop.layers.base import compute_dtype, dense_weight, extra_repr, held_back, linear_shape


class LoraLinear(nn.Module):
    """A linear layer with a low-rank adapter; the base is frozen, `lora_A` [r, in] and `lora_B` [out, r] are trained.

    Args:
        base: any linear layer; its parameters are frozen here.
        rank: r, at least 1.
        alpha: numerator of the scaling.
        dropout: probability with which an input of the adapter is dropped in training; 0 <= dropout < 1.
        rank_stabilised: scale by alpha / sqrt(r) instead of alpha / r.
        generator: where the random start of `lora_A` is drawn from; None draws from torch's default generator.

    Raises:
        ConfigError: a rank below 1 or a dropout outside [0, 1).
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rank_stabilised: bool = False,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        problems = []
        if rank < 1:
            problems.append(f"rank is {rank}; it must be at least 1")
        if not 0.0 <= dropout < 1.0:
            problems.append(f"dropout is {dropout}; it must be at least 0 and below 1")
        if problems:
            raise ConfigError("LoRA: " + "; ".join(problems))
        self.out_features, self.in_features = linear_shape(base)
        self.rank, self.alpha, self.dropout, self.rank_stabilised = rank, alpha, dropout, rank_stabilised
        self.scaling = alpha / math.sqrt(rank) if rank_stabilised else alpha / rank
        self.switched_off = False  # set for as long as the base alone is to answer (a teacher's turn)
        self.base = base.requires_grad_(requires_grad=False)
        device = next(base.parameters()).device
        if device.type == "meta":
            start = torch.empty(rank, self.in_features, device=device)
        else:
            start = torch.empty(rank, self.in_features)
            bound = 1.0 / math.sqrt(self.in_features)  # what kaiming_uniform_(a=sqrt(5)) comes to
            start = start.uniform_(-bound, bound, generator=generator).to(device)
        self.lora_A = nn.Parameter(start)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in] -> [..., out] in the dtype that the base answers in."""
        y = self.base(x)
        if self.switched_off:
            return y
        dtype = compute_dtype(x)
        change = x.to(dtype)
        if self.training and self.dropout > 0.0:
            change = functional.dropout(change, self.dropout)
        change = functional.linear(change, self.lora_A.to(dtype))  # [..., in] -> [..., r]
        change = functional.linear(change, self.lora_B.to(dtype))  # [..., r] -> [..., out]
        return y + (change * self.scaling).to(y.dtype)

    def change(self) -> Tensor:
        """What the adapter adds to the weight: scaling * B @ A, [out, in], fp32, detached."""
        return (self.lora_B.detach().float() @ self.lora_A.detach().float()) * self.scaling

    def dense_weight(self) -> Tensor:
        """The merged weight W0 + scaling * B @ A, [out, in], fp32."""
        return dense_weight(self.base).float() + self.change()

    def extra_repr(self) -> str:
        """Shape, rank and scaling, for printing."""
        return extra_repr(self, rank=self.rank, alpha=self.alpha, dropout=self.dropout, scaling=f"{self.scaling:.4g}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraLinear:  # noqa: FBT001, FBT002
        # Casting the model to bf16 must not round the adapter; a wider dtype (float64 in tests) is followed.
        with held_back(self, ("lora_A", "lora_B"), fn, widen=True):
            super()._apply(fn, recurse)
        return self

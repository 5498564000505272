"""The least time that a training step can take: its matrix products over the rate at which a device multiplies.

A floor, not a forecast. Everything between the products (norms, activations, softmax, the optimizer, reading memory,
waiting) comes on top: on the machines measured, a step of plain PyTorch reached a third to three quarters of this
rate, the smaller models the lower share.

Operations of one step over T tokens, a multiplication and an addition counted as two:

- linear layers and head, P weights: forward 2PT. Full fine-tuning needs the gradient of the input (2PT) and of the
  weight (2PT): 6PT. With a frozen base only the input's gradient: 4PT, and 6 times the adapters' own parameters;
- attention over rows of S tokens, with causal masking used: forward 2 * h_q * S per token and layer (two products of
  2 * h_q * S, half of it masked), backward 2.5 times that (the scores are computed again);
- with checkpointing, one more forward pass of the blocks.

A mixture's experts count with those that work on a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from strop.planner.hardware import Rate
from strop.planner.parameters import LinearShape, ModelShape, lora_parameters

_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one optimizer step's forward and backward passes."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.attention

    def floor_seconds(self, rate: Rate) -> float:
        """Return the least time for them at this rate."""
        return self.total / rate.flops


def step_flops(
    shape: ModelShape,
    *,
    rows: int,
    length: int,
    adapters: Iterable[LinearShape] | None = None,
    rank: int = 0,
    checkpointing: bool = False,
) -> StepFlops:
    """Count the operations of one step over `rows` rows of `length` tokens.

    Args:
        shape: the model.
        rows: rows in a step.
        length: tokens in a row.
        adapters: the adapted layers of LoRA or QLoRA; None where every weight is trained.
        rank: the adapters' rank.
        checkpointing: whether activations are computed again in the backward pass.
    """
    tokens = rows * length
    blocks = shape.linear_weights + active_expert_weights(shape)
    passes = 6 if adapters is None else 4
    linear = passes * (blocks + shape.head_parameters) * tokens
    if adapters is not None:
        linear += 6 * lora_parameters(adapters, rank) * tokens
    attention_forward = 2 * shape.query_features * length * tokens * shape.layers
    attention = attention_forward * (1 + _ATTENTION_BACKWARD)
    if checkpointing:
        linear += 2 * blocks * tokens
        attention += attention_forward
    return StepFlops(float(linear), float(attention))


def active_expert_weights(shape: ModelShape) -> int:
    """Return the expert weights that work on one token."""
    return sum(
        expert.weights // expert.shape[0] * min(shape.active_experts, expert.shape[0]) for expert in shape.experts
    )

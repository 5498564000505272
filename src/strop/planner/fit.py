"""What would make a training step fit: changes tried one on top of the other, the ones that cost least first.

Within a method: one row at a time (accumulation keeps the step the same), checkpointing (one more forward pass, the
same result), moments in 8 bits, shorter rows, a lower rank. Where all of them together are not enough, the next method
down is tried: full fine-tuning, then LoRA, then QLoRA; QAT of
every weight, then of an adapter. A change that saves less than 1% of the peak is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from strop.planner.memory import ADAPTERS, RUNTIME_BYTES, MemoryPlan, Method, Step, plan_memory
from strop.planner.parameters import LinearShape, ModelShape

SHORTEST_ROW = 256
LOWEST_RANK = 4
_NEXT_METHOD: dict[Method, Method] = {
    "full": "lora",
    "full-bf16": "lora",
    "qat": "qat-lora",
    "lora": "qlora",
}
_WORTH = 0.99


@dataclass(frozen=True)
class Change:
    """One change, and the step with it and all changes before it."""

    text: str
    plan: MemoryPlan
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the change and where it leads."""
        return {"change": self.text, "method": self.plan.method, "peak_bytes": self.plan.peak_bytes, "fits": self.fits}


def changes_to_fit(
    shape: ModelShape,
    method: Method,
    step: Step,
    available_bytes: int,
    *,
    adapted: Sequence[LinearShape] | None = None,
) -> list[Change]:
    """Return the changes that make a step fit, in order; the last one says whether they do.

    Args:
        shape: the model.
        method: the method that was asked for.
        step: the step that was asked for.
        available_bytes: the memory there is, interpreter and libraries included.
        adapted: the layers that carry adapters; None for all linear layers.

    Returns:
        An empty list where the step fits as it is.
    """
    if plan_memory(shape, method, step, adapted=adapted).fits(available_bytes):
        return []
    first = method
    while True:
        changes: list[Change] = []
        if method != first:
            plan = plan_memory(shape, method, step, adapted=adapted)
            changes.append(Change(_describe(plan), plan, plan.fits(available_bytes)))
        changes += _within(shape, method, step, available_bytes, adapted, fits=bool(changes) and changes[-1].fits)
        if (changes and changes[-1].fits) or method not in _NEXT_METHOD:
            return changes
        method = _NEXT_METHOD[method]


def missing_bytes(plan: MemoryPlan, available_bytes: int) -> int:
    """Return how much memory a step lacks; zero where it fits."""
    return max(plan.peak_bytes + RUNTIME_BYTES - available_bytes, 0)


def _within(
    shape: ModelShape,
    method: Method,
    step: Step,
    available_bytes: int,
    adapted: Sequence[LinearShape] | None,
    *,
    fits: bool,
) -> list[Change]:
    changes: list[Change] = []
    peak = plan_memory(shape, method, step, adapted=adapted).peak_bytes
    while not fits:
        for text, easier in _moves(method, step):
            plan = plan_memory(shape, method, easier, adapted=adapted)
            if plan.peak_bytes < _WORTH * peak:
                step, peak, fits = easier, plan.peak_bytes, plan.fits(available_bytes)
                changes.append(Change(text, plan, fits))
                break
        else:
            break
    return changes


def _moves(method: Method, step: Step) -> Iterator[tuple[str, Step]]:
    if step.rows > 1:
        yield f"micro batches of 1 row, accumulated {step.rows} times", replace(step, rows=1)
    if not step.checkpointing:
        yield "gradient checkpointing", replace(step, checkpointing=True)
    if step.optimizer == "adamw" and method != "full-bf16":
        yield "the optimizer adamw-8bit", replace(step, optimizer="adamw-8bit")
    if step.length > SHORTEST_ROW:
        shorter = max(step.length // 2, SHORTEST_ROW)
        yield f"rows of {shorter:,} tokens", replace(step, length=shorter)
    if method == "qat-lora" and not step.held:
        yield "the base held as the format's own codes (hold: codes)", replace(step, held=step.format)
    if method in ADAPTERS and step.rank > LOWEST_RANK:
        lower = max(step.rank // 2, LOWEST_RANK)
        yield f"rank {lower}", replace(step, rank=lower)


def _describe(plan: MemoryPlan) -> str:
    if plan.method == "qat-lora":
        return f"an adapter of rank {plan.step.rank} through the rounding, in place of training every weight"
    if plan.method == "lora":
        return f"LoRA of rank {plan.step.rank} in place of training every weight"
    return f"QLoRA: the frozen weights in {plan.step.format}"

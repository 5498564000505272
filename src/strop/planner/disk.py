"""The disk that a run needs: what it exports, and the checkpoints that let it go on.

A run keeps its best and its last state, and writes a new one before an old one goes: three exports at the fullest
moment. The newest checkpoints hold the trained weights and both of AdamW's moments in fp32, 12 bytes a trained
parameter; one more exists while it is written. The base, which is there already, and the tokenizer are left out.
"""

from __future__ import annotations

from strop.numerics.scheme import parse_scheme
from strop.planner.memory import MemoryPlan, format_bytes
from strop.planner.parameters import ModelShape
from strop.training.checkpoints import KEPT

_EXPORTS = 3
_CHECKPOINT_BYTES = 12


def run_bytes(shape: ModelShape, plan: MemoryPlan) -> int:
    """Return the disk that a run of this plan needs at its fullest."""
    if plan.method in ("lora", "qlora"):
        exported = 4 * plan.trainable_parameters
    elif plan.method in ("qat", "qat-lora"):
        exported, _ = format_bytes(shape, parse_scheme(plan.step.format))
    else:
        exported = 2 * shape.parameters
    return fullest_bytes(exported, plan.trainable_parameters)


def fullest_bytes(exported_bytes: int, trained_parameters: int) -> int:
    """Return the disk at the fullest moment of a run whose model takes `exported_bytes` a time."""
    return _EXPORTS * exported_bytes + (KEPT + 1) * _CHECKPOINT_BYTES * trained_parameters

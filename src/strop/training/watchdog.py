"""Watches loss, gradient and updates of a run, and says when something is wrong and what it is.

    not a number    loss or gradient is NaN or infinite: nothing is updated, the step's data are skipped
    divergence      the loss of `HIGH_STEPS` steps in a row is far above its recent median: weights and optimizer return
                    to the last planned checkpoint, the data go on, so that what was read since is skipped
    standstill      the gradient is exactly zero for `STILL_STEPS` steps in a row: told once
    lost updates    most of the looked-at weights with a gradient kept their bits through a step: told once

Returning and skipping is what Chowdhery et al. ("PaLM", 2022) did by hand. "Far above" is more than ten robust standard
deviations (1.4826 times the median absolute deviation) and more than half a nat above the median of the last `WINDOW`
ordinary steps. One step's high loss is no alarm: it is measured before the update, and clipping bounds what its
gradient does. After `ATTEMPTS` remedies within `HORIZON` steps the run stops.

All that is remembered stands in `Progress`, so that a resumed run judges as the run in one go would.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from strop.errors import TrainingError
from strop.training.settings import Progress

WINDOW: Final = 32
HIGH_STEPS: Final = 5
STILL_STEPS: Final = 10
ATTEMPTS: Final = 3
HORIZON: Final = 100
SKIPPED: Final = "skipped"
ROLLED_BACK: Final = "rolled_back_from"
LOOK_STEPS: Final = 50
"""Steps between two looks at the updates."""
_LOOKED_AT: Final = 4096  # weights of each parameter
_LOST_SHARE: Final = 0.5


class NotFiniteError(TrainingError):
    """Loss or gradient of a step is no number; nothing was updated."""


def diverges(progress: Progress, loss: float) -> bool:
    """Take in the loss of a step that is not applied yet; True when it is the last of too many high ones in a row."""
    losses = progress.losses
    if len(losses) == WINDOW:
        middle = statistics.median(losses)
        spread = 1.4826 * statistics.median(abs(value - middle) for value in losses)
        if loss > middle + max(10 * spread, 0.5):
            progress.high += 1
            return progress.high >= HIGH_STEPS
    progress.high = 0
    progress.losses = [*losses, loss][-WINDOW:]
    return False


def stands_still(progress: Progress, gradient_norm: float) -> bool:
    """Take in a step's gradient norm; True at the step that makes it a standstill."""
    progress.still = progress.still + 1 if gradient_norm == 0.0 else 0
    return progress.still == STILL_STEPS


def check_every_gradient(parameters: Mapping[str, nn.Parameter], step: int) -> None:
    """Refuse to go on where a trained parameter got no gradient.

    Raises:
        TrainingError: at least one has none; they are named.
    """
    without = [name for name, part in parameters.items() if part.requires_grad and part.grad is None]
    if without:
        shown = "\n  ".join(without[:10]) + (f"\n  and {len(without) - 10} more" if len(without) > 10 else "")
        raise TrainingError(
            f"step {step}: {len(without)} of {len(parameters)} trained parameters got no gradient, "
            f"so they would never change:\n  {shown}\nLeave them out of the targets, or choose another method."
        )


def may_try_again(progress: Progress, step: int) -> bool:
    """Whether another remedy is allowed at `step`."""
    remedies = [event for event in progress.events if event["kind"] in (SKIPPED, ROLLED_BACK)]
    recent = [event for event in remedies if event["step"] > step - HORIZON]
    return len(recent) < ATTEMPTS


class UpdateProbe:
    """Some weights of each parameter before a step, to be compared with those after it.

    Args:
        parameters: With this step's gradients.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parts: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for parameter in parameters.values():
            if parameter.grad is not None:
                moved = _some(parameter.grad) != 0
                self._parts.append((parameter, moved, _some(parameter.detach()).clone()))

    def lost_share(self) -> float:
        """The share of the weights with a gradient whose bits the step left as they were; 0 where there are none."""
        looked_at = sum(int(moved.sum()) for _, moved, _ in self._parts)
        lost = sum(int((moved & (_some(now.detach()) == before)).sum()) for now, moved, before in self._parts)
        return lost / looked_at if looked_at else 0.0


def loses_updates(share: float) -> bool:
    """Whether so large a share of lost updates is worth a word."""
    return share > _LOST_SHARE


def _some(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // _LOOKED_AT)]


def why_out_of_memory(error: BaseException) -> str:
    """What an exception says of the memory that ran out, in one line; any other is raised again."""
    if not out_of_memory(error):
        raise error
    return str(error).strip().split("\n")[0][:200]


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: CUDA's own class, Python's, or the CPU allocator's message."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )

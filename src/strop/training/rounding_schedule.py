"""When a run rounds: from which step on weights go through their grid, and from which their scales stay.

    steps 0 .. delay * total        weights as they are                     (a delayed start)
    then                            rounded
    (1 - freeze) * total .. total   rounded, with the scales of that moment (frozen scales)

The phase is a function of the step alone, so that a run that is resumed in the middle of one goes on bit for bit; held
scales travel in the checkpoint. What is evaluated and written is rounded in every phase.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from torch import Tensor, nn

from strop.layers.fake_quant_linear import FakeQuantLinear
from strop.layers.grids import FACTORS, LearnedGrid, RangeGrid
from strop.layers.qat_lora_linear import QatLoraLinear
from strop.layers.scale_linear import ScaleLinear
from strop.progress import Reporter

ZERO_RATE: Final = 1e-2
"""Of learned zero points, in steps of the grid."""


class RoundingSchedule:
    """The layers of a model that train through their rounding, and the phase that they are in.

    Args:
        model: with its layers in place; other models have nothing here to do.
        delay: share of the steps before the rounding begins.
        freeze: share of the steps at the end in which the scales stay.
        scale_rate: peak rate of learned scales, in multiples of their start.
    """

    def __init__(self, model: nn.Module, *, delay: float = 0.0, freeze: float = 0.0, scale_rate: float = 1e-3) -> None:
        self.delay, self.freeze, self.scale_rate = delay, freeze, scale_rate
        self._told = self._held = False
        modules = dict(model.named_modules())
        self._rounding = [module for module in modules.values() if isinstance(module, FakeQuantLinear | QatLoraLinear)]
        self._holding = [*self._rounding, *(module for module in modules.values() if isinstance(module, ScaleLinear))]
        self._ranges = {name: module for name, module in modules.items() if isinstance(module, RangeGrid)}
        self._learned = {
            name: module for name, module in modules.items() if isinstance(module, LearnedGrid | ScaleLinear)
        }

    def rates(self) -> dict[str, float]:
        """Peak rates of the parameters that have one of their own, by name."""
        found: dict[str, float] = {}
        for name, module in self._learned.items():
            found[f"{name}.factor"] = self.scale_rate
            if isinstance(module, LearnedGrid) and module.zero is not None:
                found[f"{name}.zero"] = ZERO_RATE
        return found

    def buffers(self) -> dict[str, Tensor]:
        """Held scales and zero points by name: what a checkpoint needs beside the parameters."""
        return {
            f"{name}.{part}": tensor
            for name, module in self._ranges.items()
            for part, tensor in (("scale", module.scale), ("zero_point", module.zero_point))
            if tensor is not None
        }

    def before_step(self, step: int, total: int) -> bool:
        """Enter the phase of a step, counted from 0; returns whether a delayed rounding begins with it."""
        for module in self._rounding:
            module.rounds = step >= self.first_rounded(total)
        if step >= self._first_held(total) and not self._held:
            self._held = True
            for module in self._holding:
                module.hold()
        return step == self.first_rounded(total) > 0

    def after_update(self, step: int, reporter: Reporter) -> None:
        """Keep learned scales from vanishing and turning after a step's update; that it was needed is told once."""
        grids = [module if isinstance(module, ScaleLinear) else module.grid for module in self._holding]
        stopped = sum(grid.keep_in_bounds() for grid in grids)
        if stopped and not self._told:
            self._told = True
            reporter.note(
                f"step {step + 1}: {stopped:,} learned scales went below {FACTORS[0]:g} or above {FACTORS[1]:g} times "
                "their start and are stopped there; a lower scale_rate keeps them away from it"
            )

    def used(self, parameters: Mapping[str, nn.Parameter], step: int, total: int) -> dict[str, nn.Parameter]:
        """The parameters that a step must give a gradient: scales get none before the rounding begins."""
        idle = self.rates() if step < self.first_rounded(total) else {}
        return {name: value for name, value in parameters.items() if name not in idle}

    def restored(self, steps: int, total: int) -> None:
        """Be as after so many completed steps, parameters and buffers restored."""
        held = self._held = steps > self._first_held(total)
        for grid in self._ranges.values():
            grid.held = held and grid.scale is not None
        for module in self._learned.values():
            for parameter in (module.factor, getattr(module, "zero", None)):
                if parameter is not None:
                    parameter.requires_grad = not held

    @contextmanager
    def rounding(self) -> Iterator[None]:
        """Round in any phase: for evaluations, and for what is written."""
        before: Mapping[nn.Module, bool] = {module: module.rounds for module in self._rounding}
        for module in self._rounding:
            module.rounds = True
        try:
            yield
        finally:
            for module in self._rounding:
                module.rounds = before[module]

    def first_rounded(self, total: int) -> int:
        """The first step that rounds, counted from 0."""
        return round(self.delay * total)

    def _first_held(self, total: int) -> int:
        return total - round(self.freeze * total) if self.freeze else total + 1

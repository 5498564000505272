"""A step of AdamW whose moments are kept in 8 bits, on tensors: what `training.adamw8bit` does, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from strop.kernels import library
from strop.kernels.library import AdamJob
from strop.kernels.operations import usable

_TYPES = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True, eq=False)
class Moment:
    """A moment in 8 bits and its tables, all contiguous.

    Attributes:
        codes: uint8 [n].
        scales: float32 [ceil(n / 256)].
        levels: What the codes mean, float32 [256].
        below: Of the upper 16 bits of a number: the code of the level below, uint8 [65536].
        edges: Likewise: the midpoint to the next level, float32 [65536].
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor
    below: Tensor
    edges: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All of it."""
        return self.codes, self.scales, self.levels, self.below, self.edges

    def laid(self) -> library.Moment:
        """Where the kernels find it."""
        return library.Moment(*(tensor.data_ptr() for tensor in self.tensors()))


@dataclass(frozen=True)
class Rates:
    """The numbers of a step, each rounded to float32: m += (g - m) new_first, v = v old_second + g g new_second,
    w = w decay + m / (sqrt(v) root_scale + eps) rate.
    """

    new_first: float
    old_second: float
    new_second: float
    root_scale: float
    eps: float
    decay: float
    rate: float


def step(weight: Tensor, gradient: Tensor, first: Moment, second: Moment, rates: Rates) -> bool:
    """Move weights and moments in place; False, and nothing moved, where the kernels cannot do it.

    Args:
        weight: float32 [n].
        gradient: float32 or bfloat16 [n].
        first: The mean of gradients.
        second: The mean of their squares, its codes unsigned: what is above zero is not stored as zero.
        rates: The step's.
    """
    if weight.dtype != torch.float32 or gradient.dtype not in _TYPES:
        return False
    found = usable(weight, gradient, *first.tensors(), *second.tensors())
    if found is None:
        return False
    job = AdamJob(first=first.laid(), second=second.laid(), rows=weight.numel(), columns=1, **vars(rates))
    job.weight, job.gradient, job.gradient_type = weight.data_ptr(), gradient.data_ptr(), _TYPES[gradient.dtype]
    native, instruction_set = found
    return native.call("adam_step", job, instruction_set, torch.get_num_threads())

"""`plan`: what fine-tuning takes, before anything is loaded: parameters, memory, disk, least time, and what fits here.

Two counts of LoRA's parameters are told apart and named: the approximation 2 * r * sqrt(N), which takes the whole model
for one square matrix (what tables "by model size" print), and the true sum of r * (in + out) over the adapted layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from strop import demo
from strop.errors import UsageError
from strop.layers.surgery import select
from strop.models.sources import BUNDLED
from strop.planner.fit import Change, changes_to_fit
from strop.planner.hardware import Machine, Rate, fastest_rate, this_machine
from strop.planner.memory import GIB, METHODS, MemoryPlan, Method, Step, plan_memory
from strop.planner.parameters import (
    ModelShape,
    abbreviate,
    lora_parameters,
    open_shape,
    parse_rank,
    parse_size,
    square_matrix_parameters,
)
from strop.planner.time import step_flops

QAT_FORMAT: Final = "int4-g32"
"""The grid that qat is planned with; its memory is the same on every grid."""


@dataclass(frozen=True)
class SizesPlan:
    """LoRA's parameters by model size and rank, by the square-matrix approximation.

    Attributes:
        square_matrix: size, as it was written, to rank to parameters.
    """

    square_matrix: dict[str, dict[str, int]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"square_matrix": self.square_matrix, "formula": "2 * rank * sqrt(parameters)"}

    def lines(self) -> list[str]:
        """The table, rank by rank, in the short form of notes (167K, 1M)."""
        sizes = list(self.square_matrix)
        ranks = list(self.square_matrix[sizes[0]])
        lines = [
            "trainable parameters of LoRA, approximation 2 * rank * sqrt(parameters): the model as one square matrix",
            "rank".rjust(6) + "".join(size.rjust(10) for size in sizes),
        ]
        for rank in ranks:
            cells = (abbreviate(self.square_matrix[size][rank]).rjust(10) for size in sizes)
            lines.append(rank.rjust(6) + "".join(cells))
        return [*lines, "the true count of an architecture: strop plan MODEL --rank R"]


@dataclass(frozen=True)
class ModelPlan:
    """What a model's fine-tuning takes by every method.

    Attributes:
        shape: the model.
        rank: of the adapters.
        adapted: names of the adapted layers.
        lora: the true count, sum of rank * (in + out) over the adapted layers.
        approximation: 2 * rank * sqrt(parameters).
        memory: by method, for the step that was asked for.
        changes: by method, what would make it fit where it does not.
        floor_seconds: by method, the least time of a step on this machine: products alone, at the measured rate.
        rate: the rate that the floor rests on.
        machine: what the plan is weighed against.
        result_bytes: by method, what the run writes as its result.
    """

    shape: ModelShape
    rank: int
    adapted: tuple[str, ...]
    lora: int
    approximation: int
    memory: dict[Method, MemoryPlan]
    changes: dict[Method, list[Change]]
    floor_seconds: dict[Method, float]
    rate: Rate
    machine: Machine
    result_bytes: dict[Method, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        shape = self.shape
        return {
            "model": shape.source,
            "architecture": shape.architecture,
            "parameters": shape.parameters,
            "lora": {
                "rank": self.rank,
                "layers": len(self.adapted),
                "parameters": self.lora,
                "share": self.lora / shape.parameters,
                "square_matrix": self.approximation,
            },
            "experts_not_adapted": shape.expert_weights,
            "methods": {
                method: plan.to_dict()
                | {
                    "fits": plan.fits(self.machine.training_bytes),
                    "to_fit": [change.to_dict() for change in self.changes[method]],
                    "floor_seconds": self.floor_seconds[method],
                    "result_bytes": self.result_bytes[method],
                }
                for method, plan in self.memory.items()
            },
            "rate": {"device": self.rate.device, "dtype": self.rate.dtype, "flops": self.rate.flops},
            "machine": self.machine.to_dict(),
        }

    def lines(self) -> list[str]:
        """The plan as a table and a few sentences."""
        shape, machine = self.shape, self.machine
        step = next(iter(self.memory.values())).step
        lines = [
            f"{shape.source}: {shape.architecture}, {shape.parameters:,} parameters, {shape.linear_weights:,} of them "
            f"in {len(shape.linears)} linear layers",
            f"LoRA rank {self.rank} on {len(self.adapted)} layers: {self.lora:,} parameters "
            f"({self.lora / shape.parameters:.2%}), the sum of rank * (in + out)",
            f"  as one square matrix, 2 * rank * sqrt(parameters): {self.approximation:,} (an approximation)",
        ]
        if shape.expert_weights:
            lines.append(f"  {shape.expert_weights:,} weights of experts carry no adapter and are not quantized")
        lines += [
            "",
            f"one step of {step.rows} x {step.length} tokens in {step.dtype}, GiB",
            f"{'method':10}{'trained':>10}{'weights':>9}{'grads':>9}{'AdamW':>9}{'activ.':>9}{'other':>9}{'peak':>9}"
            f"{'result':>9}{'least s':>9}  fits here",
        ]
        for method, plan in self.memory.items():
            other = plan.peak_bytes - plan.weights_bytes - plan.gradients_bytes - plan.optimizer_bytes
            other -= plan.activations_bytes
            figures = (plan.weights_bytes, plan.gradients_bytes, plan.optimizer_bytes, plan.activations_bytes, other)
            cells = "".join(f"{_gib(count):>9}" for count in (*figures, plan.peak_bytes, self.result_bytes[method]))
            fits = "yes" if plan.fits(machine.training_bytes) else "no"
            trained = abbreviate(plan.trainable_parameters, digits=1)
            lines.append(f"{method:10}{trained:>10}{cells}{self.floor_seconds[method]:>9.2g}  {fits}")
        lines.append(
            f"least s: matrix products alone at the {self.rate.flops / 1e9:,.0f} GFLOP/s just measured on "
            f"{self.rate.device} ({self.rate.dtype}); a real step takes longer"
        )
        lines.append(
            f"here: {_gib(machine.training_bytes)} GiB free on {machine.training_device}, {machine.cores} cores, "
            f"{_gib(machine.disk_free_bytes)} GiB of disk free"
        )
        for method, changes in self.changes.items():
            if changes:
                end = "fits" if changes[-1].fits else "still does not fit"
                lines.append(f"{method}: {'; then '.join(change.text for change in changes)}: {end}")
        return lines


def plan_sizes(sizes: Sequence[str], ranks: Sequence[str | int]) -> SizesPlan:
    """Tabulate 2 * rank * sqrt(parameters).

    Args:
        sizes: parameter counts such as 7B, 1.5B, 350M.
        ranks: whole numbers of at least 1.

    Raises:
        UsageError: a size or a rank is none; the message names it.

    >>> plan_sizes(["7B"], [1]).square_matrix
    {'7B': {'1': 167332}}
    """
    if not sizes or not ranks:
        raise UsageError("a table needs at least one size and one rank; for example --sizes 7B,13B --ranks 1,8")
    counted = {size.strip(): parse_size(size) for size in sizes}
    numbers = [parse_rank(rank) for rank in ranks]
    return SizesPlan(
        {
            size: {str(rank): square_matrix_parameters(count, rank) for rank in numbers}
            for size, count in counted.items()
        }
    )


def plan_model(
    model: str | Path,
    *,
    rank: int = 16,
    targets: str | Sequence[str] = "all-linear",
    batch_size: int = 1,
    max_length: int = 512,
    checkpointing: bool = False,
) -> ModelPlan:
    """Count a model's parameters and weigh every method against this machine; no weight is read.

    Args:
        model: a folder, a config.json, a hub id, or "demo".
        rank: of the adapters.
        targets: which linear layers carry them, as `tune` takes it.
        batch_size: rows in a micro batch.
        max_length: tokens in a row.
        checkpointing: whether activations are computed again in the backward pass.

    Raises:
        MissingInputError, ModelError: the model's configuration is not there or not usable.
        TargetError: a target matches nothing.
        UsageError: a rank, a batch or a length below 1.
    """
    parse_rank(rank)
    if batch_size < 1 or max_length < 1:
        raise UsageError(f"batch_size {batch_size}, max_length {max_length}: needed at least 1 of each")
    bundled = str(model) == BUNDLED and not Path(BUNDLED).exists()
    shape, skeleton = open_shape(demo.model_path() if bundled else model)
    wanted = targets.split(",") if isinstance(targets, str) and "," in targets else targets
    names = select(skeleton, wanted)
    by_name = {linear.name: linear for linear in shape.linears}
    adapted = [by_name[name] for name in names]
    machine = this_machine()
    rate = fastest_rate()
    memory: dict[Method, MemoryPlan] = {}
    changes: dict[Method, list[Change]] = {}
    floor: dict[Method, float] = {}
    result: dict[Method, int] = {}
    lora = lora_parameters(adapted, rank)
    for method in METHODS:
        step = Step(
            rows=batch_size,
            length=max_length,
            checkpointing=checkpointing,
            rank=rank,
            format=QAT_FORMAT if method == "qat" else Step.format,
            dtype=rate.dtype,
        )
        has_adapter = method in ("lora", "qlora")
        memory[method] = plan_memory(shape, method, step, adapted=adapted)
        changes[method] = changes_to_fit(shape, method, step, machine.training_bytes, adapted=adapted)
        flops = step_flops(
            shape,
            rows=batch_size,
            length=max_length,
            adapters=adapted if has_adapter else None,
            rank=rank if has_adapter else 0,
            checkpointing=checkpointing,
        )
        floor[method] = flops.floor_seconds(rate)
        result[method] = 4 * lora if has_adapter else 2 * shape.parameters
    return ModelPlan(
        shape=shape,
        rank=rank,
        adapted=tuple(names),
        lora=lora,
        approximation=square_matrix_parameters(shape.parameters, rank),
        memory=memory,
        changes=changes,
        floor_seconds=floor,
        rate=rate,
        machine=machine,
        result_bytes=result,
    )


def plan(
    model: str | Path | None = None,
    *,
    sizes: Sequence[str] | None = None,
    ranks: Sequence[str | int] = (1, 2, 8, 16, 512),
    **options: Any,
) -> SizesPlan | ModelPlan:
    """Plan a model (see `plan_model`), or tabulate sizes and ranks (see `plan_sizes`).

    Raises:
        UsageError: neither a model nor sizes, or both.
    """
    if (model is None) == (sizes is None):
        got = "both" if model is not None else "neither"
        raise UsageError(f"plan takes either a model or sizes; got {got}")
    if sizes is not None:
        return plan_sizes(sizes, ranks)
    assert model is not None
    return plan_model(model, **options)


def _gib(count: float) -> str:
    size = count / GIB
    return f"{size:,.1f}" if size >= 10 else f"{size:.2f}" if size >= 0.1 else f"{size:.3f}"

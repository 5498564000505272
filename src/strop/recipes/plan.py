"""`plan`: what a fine-tuning takes, before anything is loaded: parameters, memory, disk, the least time; what fits
here.

`plan_sizes` prints the notes' table: LoRA's trainable parameters by rank and model size, from the approximation that
takes a model as one square matrix. `plan_model` reads a real architecture and prints that figure beside the true count,
and the bytes of every method. `plan` takes either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from strop.errors import ModelError, UsageError, nearest
from strop.kernels import block as kernels
from strop.numerics.scheme import parse_scheme
from strop.planner.activations import Attention, blocks
from strop.planner.disk import run_bytes
from strop.planner.fit import Change, changes_to_fit, missing_bytes
from strop.planner.hardware import Machine, Rate, fastest_rate, named_rate, this_machine
from strop.planner.memory import ADAPTERS, MemoryPlan, Method, Step, format_bytes, plan_memory
from strop.planner.parameters import (
    LinearShape,
    ModelShape,
    abbreviate,
    lora_parameters,
    open_shape,
    parse_rank,
    parse_size,
    square_matrix_parameters,
)
from strop.planner.time import step_flops
from strop.recipes.plan_text import aligned, seconds_text, size_text
from strop.training.optimizers import OptimizerName

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

DEFAULT_SIZES = ("7B", "13B", "70B", "180B")
DEFAULT_RANKS = (1, 2, 8, 16, 512)
QLORA_FORMATS = ("nf4-dq", "int4-g32")
QAT_FORMAT = "int4-g32"
FILE_FORMATS = ("int8", "int4-g32", "nf4-dq", "int3-g32", "int2-g32")

# --- the notes' table -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SizesPlan:
    """LoRA's trainable parameters by size and rank, each model taken as one square matrix.

    `counts[size][rank]`, sizes as they were written, ranks ascending as they were given.
    """

    counts: dict[str, dict[int, int]]

    def to_dict(self) -> dict[str, Any]:
        """Return {"square_matrix": {size: {rank: count}}}, ranks as text since JSON has no other keys."""
        table = {size: {str(rank): count for rank, count in row.items()} for size, row in self.counts.items()}
        return {"square_matrix": table}

    def table(self) -> list[list[str]]:
        """Return the table as the notes lay it out: a header, then a row a rank, counts shortened (167K, 1M)."""
        ranks = next(iter(self.counts.values()))
        header = ["rank", *self.counts]
        return [header, *([str(rank), *(abbreviate(row[rank]) for row in self.counts.values())] for rank in ranks)]

    def lines(self) -> list[str]:
        """Return both tables as text, shortened and exact, and what the figures are."""
        ranks = next(iter(self.counts.values()))
        exact = [["rank", *self.counts]]
        exact += [[str(rank), *(f"{row[rank]:,}" for row in self.counts.values())] for rank in ranks]
        return [
            "Trainable parameters of LoRA, approximated as 2 * rank * sqrt(parameters):",
            "each model taken as one square matrix, shortened to the nearest.",
            "",
            *aligned(self.table()),
            "",
            "The same, exact:",
            "",
            *aligned(exact),
            "",
            "True counts depend on the architecture: strop plan MODEL_OR_CONFIG --rank R.",
        ]


def plan_sizes(sizes: Sequence[str] = DEFAULT_SIZES, ranks: Sequence[int | str] = DEFAULT_RANKS) -> SizesPlan:
    """Return the approximation 2 * rank * sqrt(parameters) for every size and rank.

    Args:
        sizes: parameter counts as people write them: 7B, 1.5B, 350M.
        ranks: whole numbers of at least 1.

    Raises:
        UsageError: a size or a rank is none; the message names it. All of a kind are named at once.
    """
    problems: list[str] = []
    counted: dict[str, int] = {}
    known: list[int] = []
    for size in sizes:
        try:
            counted[size.strip()] = parse_size(size)
        except UsageError as error:
            problems.append(str(error))
    for rank in ranks:
        try:
            known.append(parse_rank(rank))
        except UsageError as error:
            problems.append(str(error))
    if not problems and not (counted and known):
        problems.append("a table needs at least one size and one rank.")
    if problems:
        raise UsageError("\n".join(problems))
    return SizesPlan(
        {size: {rank: square_matrix_parameters(count, rank) for rank in known} for size, count in counted.items()}
    )


# --- a real model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MethodPlan:
    """One method: its memory, the run's disk, the least time of a step, and what would make it fit."""

    label: str
    memory: MemoryPlan
    disk_bytes: int
    floor_seconds: float
    fits: bool
    changes: tuple[Change, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return self.memory.to_dict() | {
            "disk_bytes": self.disk_bytes,
            "floor_seconds_per_step": self.floor_seconds,
            "fits": self.fits,
            "changes_to_fit": [change.to_dict() for change in self.changes],
        }


@dataclass(frozen=True)
class DataPlan:
    """The rows of a data set as the model's tokenizer and template see them."""

    rows: int
    samples: int
    tokens: int
    supervised_tokens: int
    truncated_rows: int
    longest_row_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return dict(vars(self))


@dataclass(frozen=True)
class ModelPlan:
    """What fine-tuning one model takes, on one machine."""

    shape: ModelShape
    rank: int
    targets: str
    adapted: tuple[LinearShape, ...]
    step: Step
    methods: tuple[MethodPlan, ...]
    file_bytes: dict[str, int]
    rate: Rate
    machine: Machine
    data: DataPlan | None

    @property
    def true_count(self) -> int:
        """The adapters' parameters: the sum of rank * (in_features + out_features) over the adapted layers."""
        return lora_parameters(self.adapted, self.rank)

    @property
    def approximation(self) -> int:
        """The same with the model taken as one square matrix."""
        return square_matrix_parameters(self.shape.parameters, self.rank)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data; all sizes in bytes."""
        shape = self.shape
        return {
            "model": shape.source,
            "architecture": shape.architecture,
            "parameters": shape.parameters,
            "embedding_parameters": shape.embedding_parameters,
            "tied": shape.tied,
            "linear_layers": len(shape.linears),
            "linear_weights": shape.linear_weights,
            "expert_weights": shape.expert_weights,
            "rank": self.rank,
            "targets": self.targets,
            "adapted_layers": len(self.adapted),
            "trainable_parameters": {"true": self.true_count, "square_matrix": self.approximation},
            "step": {
                "rows": self.step.rows,
                "length": self.step.length,
                "dtype": self.step.dtype,
                "optimizer": self.step.optimizer,
            },
            "methods": {method.label: method.to_dict() for method in self.methods},
            "file_bytes": self.file_bytes,
            "matmul": {
                "device": self.rate.device,
                "dtype": self.rate.dtype,
                "flops_per_second": self.rate.flops,
                "measured": self.rate.measured,
            },
            "machine": self.machine.to_dict(),
            "data": None if self.data is None else self.data.to_dict(),
        }

    def lines(self) -> list[str]:
        """Return the plan as text."""
        return [*self._model_lines(), "", *self._count_lines(), "", *self._method_lines(), "", *self._machine_lines()]

    def _model_lines(self) -> list[str]:
        shape = self.shape
        head = "tied to the embedding" if shape.tied else f"{shape.head_parameters:,}"
        lines = [
            f"{shape.source}: {shape.architecture}, {shape.parameters:,} parameters",
            f"  {len(shape.linears)} linear layers in {shape.layers} blocks: {shape.linear_weights:,}; "
            f"embedding: {shape.embedding_parameters:,}; head: {head}",
        ]
        if shape.experts:
            reached = all(expert.linear is not None for expert in shape.experts)
            lines.append(
                f"  experts: {shape.expert_weights:,} ({shape.expert_weights / shape.parameters:.0%} of all), "
                f"{shape.active_experts} of {shape.experts[0].shape[0]} at work on a token; "
                f"not adapted, {'quantized like linear layers' if reached else 'nor quantized'}"
            )
        sizes = ", ".join(f"{name} {size_text(size)}" for name, size in self.file_bytes.items())
        return [*lines, f"  weights on disk: {sizes}"]

    def _count_lines(self) -> list[str]:
        rows = [
            ["true count", f"{self.true_count:,}", "sum of rank * (in + out) over the adapted layers"],
            ["approximation", f"{self.approximation:,}", "2 * rank * sqrt(parameters): one square matrix"],
        ]
        title = f"Trainable parameters of LoRA, rank {self.rank}, {self.targets} ({len(self.adapted)} layers):"
        return [title, *aligned(rows, left=(0, 2))]

    def _method_lines(self) -> list[str]:
        step = self.step
        table = [
            ["method", "trained", "weights", "grads", step.optimizer, "activations", "peak", "disk", "seconds", "fits"]
        ]
        for method in self.methods:
            memory = method.memory
            working = memory.peak_bytes - memory.weights_bytes - memory.gradients_bytes - memory.optimizer_bytes
            table.append(
                [
                    method.label,
                    abbreviate(memory.trainable_parameters, digits=1),
                    size_text(memory.weights_bytes),
                    size_text(memory.gradients_bytes),
                    size_text(memory.optimizer_bytes),
                    size_text(working),
                    size_text(memory.peak_bytes),
                    size_text(method.disk_bytes),
                    seconds_text(method.floor_seconds),
                    "yes" if method.fits else "no",
                ]
            )
        rows = "1 row" if step.rows == 1 else f"{step.rows} rows"
        where = "measured now" if self.rate.measured else "from its data sheet"
        lines = [
            f"One step of {rows} of {step.length} tokens in {step.dtype} (activations: with logits, copies, scratch"
            + (", and what the process keeps):" if step.device == "cpu" else "):"),
            *aligned(table, left=(0,)),
            f"  seconds a step is a floor: the matrix products alone, at {self.rate.flops / 1e9:,.0f} GFLOP/s "
            f"in {self.rate.dtype} ({self.rate.device}, {where}).",
        ]
        if step.device == "cpu" and step.dtype == "bfloat16":
            each = max(method.memory.products_bytes for method in self.methods)
            lines.append(f"  peak is for rows of one length; another length adds up to {size_text(each)}.")
        lines.append("  full-bf16 is for comparison: tune keeps what it trains in fp32, where small updates count.")
        for method in self.methods:
            if method.memory.kept_wide:
                names = f"{method.memory.kept_wide[0]} and {len(method.memory.kept_wide) - 1} more"
                lines.append(
                    f"  {method.memory.step.format} does not fit {names}: counted in 16 bits; tune refuses it."
                )
                break
        if self.data is not None:
            data = self.data
            share = data.supervised_tokens / data.tokens if data.tokens else 0.0
            lines.append(
                f"  data: {data.rows:,} rows, {data.tokens:,} tokens ({share:.0%} supervised), longest "
                f"{data.longest_row_tokens:,}, {data.truncated_rows:,} cut."
            )
        return lines

    def _machine_lines(self) -> list[str]:
        machine = self.machine
        lines = [
            f"This machine: {machine.training_device}, {size_text(machine.training_bytes)} free for training, "
            f"{machine.cores} cores, {size_text(machine.disk_free_bytes)} of disk free."
        ]
        alike: dict[tuple[str, ...], list[MethodPlan]] = {}
        for method in self.methods:
            if not method.fits:
                alike.setdefault(tuple(change.text for change in method.changes), []).append(method)
        for methods in alike.values():
            names = [
                f"{method.label} lacks {size_text(missing_bytes(method.memory, machine.training_bytes))}"
                for method in methods
            ]
            lines.append(f"  {', '.join(names)}. To fit, one on top of the other:")
            changes = methods[0].changes
            for change in changes:
                outcome = "fits" if change.fits else "not yet"
                lines.append(f"    {change.text}: {size_text(change.plan.peak_bytes)}, {outcome}")
            if not (changes and changes[-1].fits):
                last = changes[-1].plan if changes else methods[0].memory
                lines.append(f"    still {size_text(missing_bytes(last, machine.training_bytes))} short")
        return lines


def plan_model(
    model_or_config: str | Path | PreTrainedConfig | nn.Module,
    *,
    rank: int = 16,
    targets: str | Sequence[str] = "all-linear",
    batch_size: int = 1,
    max_length: int = 512,
    checkpointing: bool = False,
    optimizer: OptimizerName = "adamw",
    data: str | Path | None = None,
    device: str | None = None,
) -> ModelPlan:
    """Return what fine-tuning a model takes.

    Args:
        model_or_config: a folder, a config.json, a hub id, `demo`, a transformers configuration, or a model.
        rank: of the adapters.
        targets: the layers that carry adapters, as `tune` takes them.
        batch_size: rows in a micro batch.
        max_length: tokens in a row.
        checkpointing: whether activations are computed again instead of kept.
        optimizer: `adamw`, or `adamw-8bit`, whose moments take a quarter; full-bf16 has none of its own.
        data: rows to count with the model's own tokenizer; needs a model folder or hub id.
        device: a device's name (`H200`, `RTX-4090`) whose printed speed is used; None measures this machine's products
            for a fraction of a second.

    Raises:
        UsageError: a number is out of range, a device is unknown.
        TargetError: a target matches no layer.
        MissingInputError, ModelError: as `read_shape`.
        DataError: the data cannot be read.
    """
    from strop.layers.surgery import select
    from strop.precision import choose_device, compute_dtype
    from strop.recipes.session import EAGER_LENGTH

    rank = parse_rank(rank)
    problems = [
        f"{name} is {number}; it must be at least 1."
        for name, number in (("batch_size", batch_size), ("max_length", max_length))
        if number < 1
    ]
    if optimizer not in get_args(OptimizerName):
        known = get_args(OptimizerName)
        problems.append(f"optimizer {optimizer!r}{nearest(optimizer, known)} is none of {', '.join(known)}.")
    if problems:
        raise UsageError(" ".join(problems))
    rate = named_rate(device) if device is not None else None
    shape, model = open_shape(model_or_config)
    names = set(select(model, targets))
    adapted = tuple(linear for linear in shape.linears if linear.name in names)
    where = choose_device("auto")
    dtype = compute_dtype("auto", where)
    plain = where.type == "cpu" and max_length <= EAGER_LENGTH.get(dtype, 0)
    attention: Attention = "plain" if plain else "fused"
    whole = where.type == "cpu" and kernels.available() and all(block.in_one_piece for block in blocks(shape).values())
    step = Step(
        rows=batch_size,
        length=max_length,
        checkpointing=checkpointing,
        rank=rank,
        dtype="float32" if str(dtype) == "torch.float32" else "bfloat16",
        attention="block" if whole else attention,
        optimizer=optimizer,
        device="cpu" if where.type == "cpu" else "accelerator",
    )
    machine = this_machine()
    rate = rate or fastest_rate()
    methods = [_method_plan(shape, "full", "full", step, adapted, machine, rate)]
    methods.append(_method_plan(shape, "full-bf16", "full-bf16", step, adapted, machine, rate))
    methods.append(_method_plan(shape, "lora", "lora", step, adapted, machine, rate))
    for number, format in enumerate(QLORA_FORMATS):
        label = "qlora" if number == 0 else f"qlora-{format}"
        methods.append(_method_plan(shape, "qlora", label, _in_format(step, format), adapted, machine, rate))
    in_qat = _in_format(step, QAT_FORMAT)
    methods.append(_method_plan(shape, "qat", "qat", in_qat, adapted, machine, rate))
    sums = replace(in_qat, attention=attention)  # what rounds the sum of base and adapter does not run as one piece
    methods.append(_method_plan(shape, "qat-lora", "qat-lora", sums, adapted, machine, rate))
    files = {"bf16": 2 * shape.parameters}
    files |= {format: format_bytes(shape, parse_scheme(format))[0] for format in FILE_FORMATS}
    return ModelPlan(
        shape=shape,
        rank=rank,
        targets=targets if isinstance(targets, str) else ", ".join(targets),
        adapted=adapted,
        step=step,
        methods=tuple(methods),
        file_bytes=files,
        rate=rate,
        machine=machine,
        data=None if data is None else _plan_data(model_or_config, data, max_length),
    )


def plan(
    model: str | Path | PreTrainedConfig | nn.Module | None = None,
    *,
    sizes: Sequence[str] | None = None,
    ranks: Sequence[int | str] = DEFAULT_RANKS,
    **settings: Any,
) -> SizesPlan | ModelPlan:
    """Plan a model, or print the notes' table for sizes: `plan("demo", rank=8)`, `plan(sizes=["7B"], ranks=[1, 8])`.

    Raises:
        UsageError: neither a model nor sizes were given, or both. Otherwise as `plan_model` and `plan_sizes`.
    """
    if (model is None) == (sizes is None):
        raise UsageError(f"plan takes either a model or sizes; got {'neither' if model is None else 'both'}.")
    if model is not None:
        return plan_model(model, **settings)
    if settings:
        raise UsageError(f"{', '.join(settings)}: settings of a model's plan; with sizes there are ranks only.")
    return plan_sizes(sizes or (), ranks)


def _in_format(step: Step, format: str) -> Step:
    return replace(step, format=format)


def _method_plan(
    shape: ModelShape,
    method: Method,
    label: str,
    step: Step,
    adapted: tuple[LinearShape, ...],
    machine: Machine,
    rate: Rate,
) -> MethodPlan:
    memory = plan_memory(shape, method, step, adapted=adapted)
    flops = step_flops(
        shape,
        rows=step.rows,
        length=step.length,
        adapters=adapted if method in ADAPTERS else None,
        rank=step.rank,
        checkpointing=step.checkpointing,
    )
    return MethodPlan(
        label=label,
        memory=memory,
        disk_bytes=run_bytes(shape, memory),
        floor_seconds=flops.floor_seconds(rate),
        fits=memory.fits(machine.training_bytes),
        changes=tuple(changes_to_fit(shape, method, step, machine.training_bytes, adapted=adapted)),
    )


def _plan_data(source: Any, data: str | Path, max_length: int) -> DataPlan:
    from transformers import AutoTokenizer

    from strop.data.records import read_data
    from strop.data.samples import prepare
    from strop.models.sources import find_folder

    if not isinstance(source, str | Path):
        raise UsageError("data are counted with a tokenizer: name a model's folder or hub id, not a configuration.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(find_folder(source)), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{source}: no tokenizer to count the data with ({type(error).__name__}).") from error
    report = prepare(read_data(data).train, tokenizer, max_length=max_length).report
    return DataPlan(
        rows=report.rows,
        samples=report.samples,
        tokens=report.tokens,
        supervised_tokens=report.supervised_tokens,
        truncated_rows=report.truncated_rows,
        longest_row_tokens=report.longest_row_tokens,
    )

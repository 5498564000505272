"""A model quantized block by block over calibration rows, kept on the disk, and judged on rows held out."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor, nn

from strop import __version__
from strop.calibrate.ends import end_weight, round_head, stand_ins
from strop.calibrate.memory import MemoryPlan, plan_memory
from strop.calibrate.quantizing import BlockReport, BlockWork, quantize_blocks
from strop.calibrate.results import Results, Taken
from strop.calibrate.stream import BlockStream
from strop.data.batches import Batch, eval_batches
from strop.data.templates import Sample
from strop.errors import UsageError
from strop.evaluation.divergence import Divergence, ReferenceLogits
from strop.evaluation.held_out import held_out_figures
from strop.evaluation.likelihood import Likelihood
from strop.evaluation.scoring import pieces
from strop.files.receipts import TensorReceipt
from strop.files.shards import tensor_files
from strop.layers.quant_embedding import find_ends
from strop.layers.quant_experts import quant_experts
from strop.memory import steady_allocation
from strop.methods import DRIFT, HESSIAN, Method, search
from strop.methods.reconstruction import LEAST_BATCHES
from strop.models.blocks import BlockwiseModel
from strop.models.opening import load, open_tokenizer
from strop.numerics.activation_observers import ActivationObserver, MinMax
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme
from strop.progress import SILENT, Reporter
from strop.recipes.calibration import MAX_LENGTH, CalibrationRows, calibration_rows
from strop.recipes.rows import Rows
from strop.scratch import Scratch
from strop.training.losses import Head, find_head
from strop.training.scales import TrainedScales, train_scales

DISK_BYTES: Final = 64 << 30
"""Most bytes of hidden states and logits on the disk; `Scratch` takes at most half of what is free."""

FOLDING: Final = frozenset({"awq", "smooth", "smooth-search"})
"""Methods that scale weights by what other parameters take up."""


@dataclass
class Calibrated:
    """What became of a model's blocks.

    Attributes:
        reports: How far each block's output is from full precision, and what is to be known.
        receipts: What each layer lost, by name.
        rows: The rows that calibrated and those that judged.
        held_out: Figures on the held-out rows; empty where there are none.
        folders: The blocks on the disk; before their scales were trained, and, where that was asked for, after.
        ends: What the embedding and the head became, by name, where they were quantized.
    """

    reports: list[BlockReport]
    receipts: Mapping[str, TensorReceipt]
    rows: CalibrationRows
    held_out: dict[str, Any]
    folders: Sequence[Results]
    ends: Mapping[str, QuantizedTensor]

    @property
    def results(self) -> Results:
        """The blocks as they are now."""
        return self.folders[-1]

    @cached_property
    def taken(self) -> Taken:
        """What layers became."""
        return Taken(self.results, [report.name for report in self.reports])

    def weight(self, name: str) -> QuantizedTensor:
        """What a layer, the embedding or the head became."""
        return self.ends[name] if name in self.ends else self.taken.weight(name)

    def remove(self) -> None:
        """Give the disk back, that of an earlier run which trained scales included."""
        first, *_ = self.folders
        first.remove()
        shutil.rmtree(_of_scales(first.folder), ignore_errors=True)


@dataclass(frozen=True)
class Bench:
    """A model opened for calibration, with its rows and what of the memory it may use.

    Attributes:
        model: Opened block by block.
        rows: The rows.
        memory: How the budget is spent.
    """

    model: BlockwiseModel
    rows: CalibrationRows
    memory: MemoryPlan

    def choosing(self) -> Bench:
        """The same with a part of the calibrating rows in place of the held-out ones: to choose by, not to judge."""
        return replace(self, rows=self.rows.choosing())

    def stream(
        self, scratch: Scratch, ends: Mapping[str, Tensor] = MappingProxyType({}), *, drift: bool = False
    ) -> BlockStream:
        """All rows at the first block; `ends` and `drift` as `BlockStream` has them."""
        size = self.memory.batch_size
        calibrating, held = (list(eval_batches(part, size)) for part in (self.rows.calibrating, self.rows.held_out))
        return BlockStream(
            self.model,
            [*calibrating, *held],
            len(calibrating),
            memory_bytes=self.memory.hidden_bytes,
            scratch=scratch,
            ends=ends,
            drift=drift,
        )


def open_bench(
    source: Path,
    data: Rows | None,
    *,
    max_rows: int,
    max_length: int | None,
    max_memory: int | None,
    hessian: bool,
    trains: bool,
    whole: Mapping[str, Sequence[Scheme]] | None = None,
    chat_template: str | os.PathLike[str] | None,
    reporter: Reporter = SILENT,
) -> Bench:
    """Open a model and its rows.

    Args:
        source: The model's folder.
        data: As `calibration_rows`.
        max_rows: As `calibration_rows`.
        max_length: As `calibration_rows`; the model's context by default.
        max_memory: A budget in bytes, or None.
        hessian: Whether the method needs second moments.
        trains: Whether it runs gradients through a block.
        whole: As `plan_memory`.
        chat_template: As `calibration_rows`.
        reporter: Told what happens.

    Raises:
        As `calibration_rows`, `plan_memory` and `BlockwiseModel`.
    """
    model = BlockwiseModel(source)
    context = getattr(model.model.config.get_text_config(), "max_position_embeddings", None) or MAX_LENGTH
    rows = calibration_rows(
        data,
        open_tokenizer(source),
        max_rows=max_rows,
        max_length=min(max_length or MAX_LENGTH, context),
        chat_template=chat_template,
        reporter=reporter,
    )
    samples = [*rows.calibrating, *rows.held_out]
    memory = plan_memory(model, samples, max_memory=max_memory, hessian=hessian, trains=trains, whole=whole)
    return Bench(model, rows, memory)


def calibrate_model(
    bench: Bench,
    schemes: Mapping[str, Scheme],
    work: BlockWork,
    *,
    plan: Mapping[str, Any],
    folder: Path,
    end_method: Method = search,
    activation_observer: Callable[[], ActivationObserver] = MinMax,
    scale_steps: int = 0,
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> Calibrated:
    """Quantize a model's blocks, train their scales end to end where that is asked for, and measure the result.

    Args:
        bench: The model and its rows.
        schemes: Layer to its scheme; the embedding and the head may be among them.
        work: Quantizes one block.
        plan: What `work` is, as JSON values, the `method` among them: finished blocks of another plan are not used.
        folder: Where the blocks are kept.
        end_method: Rounds a head that is not tied; the scales of an embedding are searched.
        activation_observer: As `quantize_blocks`.
        scale_steps: Steps of `train_scales` once the blocks are done; 0: none.
        seed: Of the order of its batches.
        reporter: Told what happens.

    Raises:
        UsageError: Scales are to be trained, and there are none, or the model's logits are not its head over its last
            hidden states.
    """
    whole_plan = {
        **plan,
        "strop": __version__,
        "source": _identity(bench.model.folder),
        "schemes": {name: scheme.name for name, scheme in schemes.items()},
        "rows": bench.rows.sha256,
        "batch_size": bench.memory.batch_size,
    }
    results = Results(folder, whole_plan)
    folders = [results]
    if results.found:
        reporter.note(f"{results.found} of {len(bench.model.blocks)} blocks were finished before: going on from there")
    receipts: dict[str, TensorReceipt] = {}
    folds = plan["method"] in FOLDING

    def weigh(name: str, weight: Tensor, quantized: QuantizedTensor) -> None:
        receipts[name] = TensorReceipt.of(name, weight, quantized, schemes[name].name, folds=folds)

    def through(stream: BlockStream, into: Results, stage: str) -> list[BlockReport]:
        with into.kept_if_of_use():
            return quantize_blocks(
                stream,
                schemes,
                work,
                into,
                weigh=weigh,
                activation_observer=activation_observer,
                stage=stage,
                reporter=reporter,
            )

    around, outside = find_ends(bench.model.model), dict[str, QuantizedTensor]()

    def put_outside(name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        outside[name] = quantized
        weigh(name, end_weight(bench.model.model, name), quantized)
        return stand_ins(around, name, quantized.dequantize())

    with Scratch(DISK_BYTES) as scratch:
        ends: dict[str, Tensor] = {}
        if around.embedding is not None and around.embedding in schemes:
            table = end_weight(bench.model.model, around.embedding)
            found = search(table, schemes[around.embedding], where=around.embedding)
            ends = put_outside(around.embedding, found)
        stream = bench.stream(scratch, ends, drift=plan["method"] in DRIFT)
        head = _head(bench.model, stream.batches[0]) if scale_steps else None
        reports = through(stream, results, "calibrate and quantize")
        if around.head is not None and around.head in schemes:
            own, hessian = schemes[around.head], plan["method"] in HESSIAN
            found = round_head(stream, around.head, own, end_method, hessian=hessian)
            stream.ends |= put_outside(around.head, found)
        if head is not None:
            trained = Results(_of_scales(folder), {**whole_plan, "scale_steps": scale_steps, "seed": seed})
            if trained.found < len(reports):
                # what is freed must not count against a budget
                steady = contextlib.nullcontext() if bench.memory.hidden_bytes is None else steady_allocation()
                with trained.kept_if_of_use(), steady:
                    _train_scales(
                        stream,
                        head,
                        schemes,
                        outside,
                        results,
                        trained,
                        steps=scale_steps,
                        seed=seed,
                        reporter=reporter,
                    )
            stream.rewind()  # the same rows again, through the blocks as they are now
            reports = through(stream, trained, "measure the blocks again")
            folders.append(trained)
        held = stream.batches[stream.calibrating :]
        held_out = _judge(stream, held, bench.rows.held_out, scratch) if held else {}
        count = sum(int(batch.lengths.sum()) for batch in stream.batches[: stream.calibrating])
    for name, tokens in [item for report in reports for item in report.tokens.items()]:
        receipts[name] = replace(receipts[name], calibration_tokens=tokens, calibration_share=tokens / count)
    return Calibrated(reports, receipts, bench.rows, held_out, folders, outside)


def _of_scales(folder: Path) -> Path:
    """Where the blocks of a folder are kept with trained scales."""
    return folder.with_name(f"{folder.name}.scales")


def _head(model: BlockwiseModel, batch: Batch) -> Head:
    model.learn_returns(batch.select(0).inputs())
    with model.passing():
        head = find_head(model.model, batch)
    if head is None:
        raise UsageError(
            f"{model.folder}: the logits of this model are not its head over its last hidden states, by which scales "
            "are trained; leave --scale-steps out"
        )
    return head


def _train_scales(
    stream: BlockStream,
    head: Head,
    schemes: Mapping[str, Scheme],
    ends: Mapping[str, QuantizedTensor],
    results: Results,
    trained: Results,
    *,
    steps: int,
    seed: int,
    reporter: Reporter,
) -> None:
    """Train the scales of what stands in `results`; `trained` holds the blocks with the new ones afterwards."""
    names = list(stream.model.blocks)
    before = Taken(results, names)
    student = load(
        stream.model.folder,
        schemes,
        rounding=lambda name, _: ends[name] if name in ends else before.weight(name),
        dtype="float32",
        tokenizer=False,
    ).model
    for name, parameter in before.others().items():
        student.get_parameter(name).data.copy_(parameter)
    batches = stream.batches[: stream.calibrating]
    reporter.start("train scales", steps, "steps")
    try:
        found = train_scales(
            student,
            batches,
            lambda number: stream.model.states_after_blocks(
                batches[number].inputs(), stream.given(number, quantized=False)
            ),
            head,
            steps=steps,
            dtype=stream.model.dtype,
            seed=seed,
            say=lambda done, text: reporter.advance(done, step=text),
        )
    finally:
        reporter.finish()
    for note in _notes(found, student, len(batches)):
        reporter.note(note)
    for index, name in enumerate(names):
        result, error = results.get(index)
        weights = {layer: found.weights.get(layer, quantized) for layer, quantized in result.weights.items()}
        mine = {other: tensor for other, tensor in found.others.items() if other.startswith(f"{name}.")}
        trained.put(index, replace(result, weights=weights, others={**result.others, **mine}), error)


def _notes(found: TrainedScales, student: nn.Module, batches: int) -> Iterator[str]:
    if batches < LEAST_BATCHES:
        yield f"scales: {batches} batches are too few to hold one out; all of them train and measure"
    if quant_experts(student):
        yield "scales: the scales of experts stay; those of the other layers are trained"
    if found.after < found.before:
        yield f"scales: on rows that measured, KL {found.before:.2e} nats became {found.after:.2e}"
    else:
        yield f"scales: no step brought the model nearer than it was (KL {found.before:.2e} nats); all of them stay"


def _judge(stream: BlockStream, held: Sequence[Batch], samples: Sequence[Sample], scratch: Scratch) -> dict[str, Any]:
    """Both models on the held-out rows, batch by batch."""
    reference = ReferenceLogits(len(samples), scratch)
    source, made = Likelihood(len(samples)), Likelihood(len(samples))
    divergence = Divergence(reference)
    for place, batch in enumerate(held):
        number = stream.calibrating + place
        for quantized in (False, True):
            for piece in pieces(stream.model.model, batch, stream.after(number, quantized=quantized)):
                for measure in (made, divergence) if quantized else (source, reference):
                    measure.add(piece)
    return held_out_figures(source, made, divergence)


def _identity(source: Path) -> dict[str, list[int]]:
    """Size and time of every file of weights: another model gives other figures."""
    files = {path for path in tensor_files(source).values()} | {source / "config.json"}
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)}

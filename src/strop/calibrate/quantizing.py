"""Quantize a model block by block: a method over each block's inputs, its result in place before the next block runs.

Where schemes round activations too (`int8-a8`), what follows a block sees outputs of rounded inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from strop.calibrate.block import CalibrationBlock
from strop.calibrate.input_scales import fix_input_scales, input_rounding
from strop.calibrate.results import Results
from strop.calibrate.stream import BlockError, BlockStream
from strop.errors import ModelError
from strop.methods import Block, BlockResult
from strop.numerics.activation_observers import ActivationObserver, MinMax
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.reductions import all_finite
from strop.numerics.scheme import Scheme
from strop.progress import SILENT, Reporter

BlockWork = Callable[[Block, Mapping[str, Scheme], Callable[[str], None]], BlockResult]
"""(block, scheme by layer, told what is being done) to what the block becomes."""


@dataclass(frozen=True)
class BlockReport:
    """What became of one block.

    Attributes:
        name: Its full name.
        error: How far its output is from full precision.
        notes: What a user should know.
        tokens: Of the experts of a mixture: how many calibration tokens the router gave each.
    """

    name: str
    error: BlockError
    notes: tuple[str, ...]
    tokens: Mapping[str, int] = field(default_factory=dict[str, int])


def quantize_blocks(
    stream: BlockStream,
    schemes: Mapping[str, Scheme],
    work: BlockWork,
    results: Results,
    *,
    weigh: Callable[[str, Tensor, QuantizedTensor], None] = lambda *_: None,
    activation_observer: Callable[[], ActivationObserver] = MinMax,
    stage: str = "calibrate and quantize",
    reporter: Reporter = SILENT,
) -> list[BlockReport]:
    """Quantize every layer that `schemes` names; the results are in `results` afterwards.

    Args:
        stream: Batches at the first block.
        schemes: Layer to its scheme.
        work: Quantizes one block.
        results: Where they go; blocks that are there already are taken from it.
        weigh: Shown each layer's weight and what it became, for receipts.
        activation_observer: Makes what finds the range of a layer's inputs, where the scheme has one scale for them.
        stage: What this is, for the reporter.
        reporter: Told the blocks done.
    """
    reports: list[BlockReport] = []
    names = list(stream.model.blocks)
    reporter.start(stage, len(names), "blocks")
    try:
        for index, name in enumerate(names):
            mine = {layer: scheme for layer, scheme in schemes.items() if layer.startswith(f"{name}.")}
            run = _Run(stream.model.dtype, mine, work, results, index, reporter, weigh, activation_observer)
            error = stream.through(name, list(mine), run, drift=not results.has(index))
            if not results.has(index):
                results.put(index, run.result, error)
            reports.append(BlockReport(name, error, tuple(run.result.notes), run.result.tokens))
            reporter.advance(index + 1, block=name, error=error.calibration)
    finally:
        reporter.finish()
    return reports


def _check_finite(block: CalibrationBlock) -> None:
    """Refuse weights with NaN or infinities before they reach the inputs of innocent layers; all of them are named."""
    broken = [layer for layer, weight in block.weights.items() if not all_finite(weight)]
    if broken:
        raise ModelError(
            f"{', '.join(broken)}: the weights hold NaN or infinite values; there is no grid for them: check the "
            "training that made them, or take an earlier checkpoint"
        )


@dataclass
class _Run:
    """One block's turn: the work over it, or its finished result."""

    dtype: torch.dtype
    schemes: Mapping[str, Scheme]
    work: BlockWork
    results: Results
    index: int
    reporter: Reporter
    weigh: Callable[[str, Tensor, QuantizedTensor], None]
    activation_observer: Callable[[], ActivationObserver]
    result: BlockResult = field(default_factory=lambda: BlockResult({}))

    def __call__(self, block: CalibrationBlock) -> dict[str, Tensor]:
        if self.results.has(self.index):
            self.result, _ = self.results.get(self.index)
        else:
            _check_finite(block)
            made = self.work(block, self.schemes, lambda text: self.reporter.advance(self.index, step=text))
            # What follows must see the parameters as the model's files will hold them.
            others = {name: tensor.to(self.dtype).float() for name, tensor in made.others.items()}
            tokens = block.expert_tokens()
            notes = [*_shares(tokens, block.token_count), *made.notes]
            made = BlockResult(made.weights, others, notes, tokens)
            self.result = fix_input_scales(block, made, self.activation_observer)
        for layer, quantized in self.result.weights.items():
            self.weigh(layer, block.weights[layer], quantized)
        block.round_inputs(input_rounding(self.result))
        return {layer: q.dequantize() for layer, q in self.result.weights.items()} | dict(self.result.others)


def _shares(tokens: Mapping[str, int], count: int) -> list[str]:
    """Each expert's share of the calibration tokens, a sentence for each block of experts."""
    owners: dict[str, dict[str, int]] = {}
    for layer, own in tokens.items():
        parameter, _, expert = layer.rpartition(".")
        owners.setdefault(parameter.rpartition(".")[0], {})[expert] = own  # its projections see the same tokens
    return [
        f"{owner}: of {count:,} calibration tokens its {len(seen)} experts are given "
        + ", ".join(f"{100 * own / count:.1f}%" for own in seen.values())
        for owner, seen in owners.items()
    ]

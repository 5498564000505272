"""How much each column of each matrix is used: the mean square of what it is multiplied with, over rows of data.

An importance matrix, as llama.cpp calls it. The model runs over the rows block by block in full precision, one block in
memory; what the layers are given is summed up. Heads and embeddings have none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from strop.calibrate.block import CalibrationBlock
from strop.errors import FormatError
from strop.files.gguf.architectures import Architecture
from strop.layers.quant_experts import expert_weights
from strop.layers.surgery import linear_modules
from strop.progress import Reporter
from strop.recipes.calibrated import DISK_BYTES, open_bench
from strop.recipes.export_source import Source
from strop.recipes.rows import Rows
from strop.scratch import Scratch


@dataclass(frozen=True)
class Importance:
    """Mean squares by the checkpoint's layer names, float32 [in], and the rows that they were taken on."""

    columns: Mapping[str, Tensor]
    rows: Mapping[str, Any]


def measure_importance(
    source: Source,
    architecture: Architecture,
    data: Rows,
    *,
    max_rows: int,
    max_length: int | None,
    chat_template: str | os.PathLike[str] | None,
    reporter: Reporter,
) -> Importance:
    """Run a model over rows and sum up what its layers are given.

    Raises:
        FormatError: the model is quantized; an importance weighs a rounding, and its codes are not rounded.
        DataError, ModelError: as `open_bench`.
    """
    if source.container is not None:
        raise FormatError(
            f"{source.folder}: is quantized already, and data would weigh a second rounding; leave --data out, or "
            "export the full-precision model"
        )
    bench = open_bench(
        source.folder,
        data,
        max_rows=max_rows,
        max_length=max_length,
        max_memory=None,
        hessian=False,
        trains=False,
        chat_template=chat_template,
        reporter=reporter,
    )
    layers = _layers(bench.model.model)
    found: dict[str, Tensor] = {}

    def take(block: CalibrationBlock) -> dict[str, Tensor]:
        names = [name for group in block.shared for name in group]
        for name, statistics in block.statistics(names, {}).items():
            for line in architecture.lines_of(name):
                found[line] = statistics.mean_square
        return {}

    reporter.start("weigh the columns", len(bench.model.blocks), "blocks")
    try:
        with Scratch(DISK_BYTES) as scratch:
            stream = replace(bench, rows=replace(bench.rows, held_out=())).stream(scratch)  # those are left out
            for done, name in enumerate(bench.model.blocks, start=1):
                stream.through(name, [layer for layer in layers if layer.startswith(f"{name}.")], take)
                reporter.advance(done)
    finally:
        reporter.finish()
    return Importance(found, bench.rows.to_dict())


def _layers(model: nn.Module) -> list[str]:
    experts = [name for weights in expert_weights(model).values() for name in weights.names]
    return [*linear_modules(model), *experts]

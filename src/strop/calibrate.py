"""Calibration: what a linear layer's inputs look like on real rows, gathered in one pass of the full-precision model.

Of each layer only the mean square of every input feature is kept, [in] in float32, summed in float64: what the searched
methods weigh their error by. Padding does not count. The whole model is in memory; streaming it block by block is not
done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from strop.data.batches import eval_batches
from strop.data.templates import Sample
from strop.errors import DataError
from strop.layers.surgery import linear_modules
from strop.methods import Statistics
from strop.progress import SILENT, Reporter


class _Sums:
    """Running sums of squares of one layer's inputs."""

    def __init__(self) -> None:
        self.squares: Tensor | None = None
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Take inputs [rows, in]."""
        squares = x.double().square().sum(0)
        self.squares = squares if self.squares is None else self.squares + squares
        self.rows += len(x)


def gather_statistics(
    model: PreTrainedModel, samples: Sequence[Sample], *, batch_size: int = 8, reporter: Reporter = SILENT
) -> dict[str, Statistics]:
    """Mean squares of the inputs of every linear layer inside the blocks.

    Args:
        model: In full precision; its weights and mode are left as they are.
        samples: Token ids; every token of a sample counts, supervised or not.
        batch_size: Rows per forward pass.
        reporter: Told the rows done; the caller starts and ends the step.

    Returns:
        Layer name to statistics; a layer that saw no token (a mixture's unused branch) is absent.

    Raises:
        DataError: There is no sample.
    """
    if not samples:
        raise DataError("calibration needs at least one row; the data gave none")
    sums = {name: _Sums() for name in linear_modules(model)}
    real: list[Tensor] = []  # the current batch's mask of real tokens, [rows * length]

    def listen(own: _Sums) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            own.add(x[real[0]] if len(real[0]) == len(x) else x)

        return hook

    handles = [module.register_forward_pre_hook(listen(sums[name])) for name, module in linear_modules(model).items()]
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            done = 0
            for batch in eval_batches(samples, batch_size):
                lengths = torch.tensor([len(samples[places[0]]) for places in batch.rows])
                mask = torch.arange(batch.input_ids.shape[1])[None, :] < lengths[:, None]  # [rows, length]
                real[:] = [mask.flatten().to(model.device)]
                model(**batch.to(model.device).inputs())
                done += len(batch.rows)
                reporter.advance(done)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {
        name: Statistics((own.squares / own.rows).float().cpu(), own.rows)
        for name, own in sums.items()
        if own.squares is not None and own.rows
    }

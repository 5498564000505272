"""What the linear layers of a model meet: the mean square of each input feature, over a pass of your own rows.

    mean_square[i] = sum over tokens of x[i]^2 / tokens,        x [tokens, in]: the layer's input

Padding counts for nothing. Sums are kept in float64, one vector per layer; no activation outlives its layer's call. A
layer that shares its input with others (q, k and v) is measured on its own: the cost is small beside the pass.

`gather_activation_scales` fixes, from the same pass, one scale for all inputs of a layer (static int8 activations).

Not here: second moments between features (GPTQ's Hessian), and calibration block by block for models that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from strop.data.batches import Batch
from strop.errors import DataError
from strop.layers.surgery import linear_modules
from strop.methods import Statistics
from strop.numerics.activation_observers import ActivationObserver
from strop.numerics.activations import tensor_scale
from strop.progress import SILENT, Reporter


def gather_statistics(
    model: nn.Module, batches: Iterable[Batch], *, reporter: Reporter = SILENT
) -> dict[str, Statistics]:
    """Run the model once over `batches` and measure the inputs of its linear layers.

    Args:
        model: any causal language model; left in the mode it came in, with nothing attached.
        batches: padded batches (`eval_batches`).
        reporter: told the rows done.

    Returns:
        Name of the layer to its statistics; a layer that nothing reached (an expert that was never chosen) is left out.

    Raises:
        DataError: there are no batches, or a layer's inputs are not finite.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def measure(name: str, x: Tensor) -> None:
        total = x.to(torch.float32).square_().sum(dim=0, dtype=torch.float64)
        sums[name] = sums[name] + total if name in sums else total
        counts[name] = counts.get(name, 0) + x.shape[0]

    _show_inputs(model, batches, measure, reporter)
    broken = [name for name, total in sums.items() if not torch.isfinite(total).all()]
    if broken:
        raise DataError(
            f"calibration: the inputs of {len(broken)} layer(s) are not finite ({', '.join(broken[:3])}); the model "
            "overflows "
            "on these rows. Open it in float32, or check its weights"
        )
    return {
        name: Statistics((total / counts[name]).to(torch.float32).cpu(), counts[name])
        for name, total in sums.items()
        if counts[name]
    }


def gather_activation_scales(
    model: nn.Module,
    batches: Iterable[Batch],
    observer: Callable[[], ActivationObserver],
    *,
    reporter: Reporter = SILENT,
) -> dict[str, float]:
    """Run the model once over `batches` and fix one scale for the inputs of each linear layer.

    Args:
        model: any causal language model; left in the mode it came in, with nothing attached.
        batches: padded batches (`eval_batches`); padding is not observed.
        observer: makes what observes one layer (`numerics.activation_observers`).
        reporter: told the rows done.

    Returns:
        Name of the layer to the scale of its inputs; a layer that nothing reached is left out.

    Raises:
        DataError: there are no batches, or a layer's inputs are not finite.
    """
    seen: dict[str, ActivationObserver] = {}

    def observe(name: str, x: Tensor) -> None:
        if not x.numel():
            return
        try:
            seen.setdefault(name, observer()).observe(x)
        except DataError as error:
            raise DataError(f"calibration: {name}: {error}; open the model in float32, or check its weights") from None

    _show_inputs(model, batches, observe, reporter)
    return {name: tensor_scale(*one.range()) for name, one in seen.items()}


def _show_inputs(
    model: nn.Module, batches: Iterable[Batch], look: Callable[[str, Tensor], None], reporter: Reporter
) -> None:
    """Run the model over `batches` and show `look` the inputs [tokens, in] of every linear layer, without padding."""
    mask = torch.empty(0)

    def show(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach()
        if x.shape[:-1] == mask.shape:
            x = x[mask]  # [batch, length, in] -> [tokens, in]
        look(name, x.reshape(-1, x.shape[-1]))

    hooks = [module.register_forward_pre_hook(partial(show, name)) for name, module in linear_modules(model).items()]
    training, device = model.training, next(model.parameters()).device
    model.eval()
    rows = 0
    try:
        with torch.inference_mode():
            for batch in batches:
                moved = batch.to(device)
                places = torch.arange(moved.input_ids.shape[1], device=device)
                mask = places[None, :] < moved.lengths[:, None]
                model(**moved.inputs())
                rows += len(batch.rows)
                reporter.advance(rows)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    if not rows:
        raise DataError("calibration: there are no rows to run the model over")

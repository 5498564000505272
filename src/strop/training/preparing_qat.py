"""The layers that train through their rounding put into a model, as `qat` and `qat-lora` ask for.

    scales: range     found on every step; `learned` (LSQ) and `fixed` begin from the start's
    train: all        every weight; last:N the last N blocks (the others stand as their codes); scales those alone
    max_moved         codes leave the start's only so far
    hold              how the base of an adapter is held while its sum with the adapter is rounded

The start is a quantized model's weights where one is given, with the gains and biases inside its blocks (some methods
move those too), else the weight on the grid, its scales searched for where they are to be kept or learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from strop.config import Qat, QatLora
from strop.errors import FormatError, UsageError
from strop.layers.base import dense_weight
from strop.layers.fake_quant_linear import FakeQuantLinear
from strop.layers.grids import CodeMoves, Grid, LearnedGrid, MovesGrid, RangeGrid, ZeroMoves
from strop.layers.input_rounding import input_rounding
from strop.layers.lora_linear import LoraLinear
from strop.layers.quant_linear import QuantLinear
from strop.layers.scale_linear import ScaleLinear
from strop.layers.surgery import attach_fake_quant, attach_lora, attach_rounding, blocks, replace
from strop.methods import search
from strop.methods.rounding import beside
from strop.models import load
from strop.models.sources import find_folder
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scheme import Scheme

HELD_IN_8_BITS: Final = "int8-g32"
"""What `hold: int8` rounds a base to: 8.5 bits a weight."""

HELD_AS_CODES: Final = ("codes", "zero-points")
"""Ways of holding a base as the destination's own codes."""

Start = Callable[[str, Tensor], QuantizedTensor]
"""A layer's name and weight to the weight on the grid where training begins."""


def put_qat(model: PreTrainedModel, scheme: Scheme, method: Qat, targets: str | Sequence[str]) -> list[str]:
    """Put the layers of `qat` in, and let require gradient what is trained; returns the layers' names.

    Args:
        model: dense, in fp32.
        scheme: the grid.
        method: how.
        targets: which layers.

    Raises:
        TargetError, FormatError: as `attach_fake_quant`; a grid whose scales can be neither learned nor kept.
        UsageError: the start is no such model, or there are fewer blocks than are to be trained.
    """
    start = _start(model, scheme, method)

    def grid(name: str, weight: Tensor) -> Grid:
        if method.max_moved is not None or method.scales == "fixed":
            return MovesGrid(start(name, weight), 1.0 if method.max_moved is None else method.max_moved)
        if method.scales == "learned" or method.train == "scales":
            return LearnedGrid(start(name, weight))
        return RangeGrid(scheme, (weight.shape[0], weight.shape[1]), holds=method.freeze > 0, device=weight.device)

    model.requires_grad_(requires_grad=True)
    inputs = input_rounding(method.activations)
    names = attach_fake_quant(model, scheme, targets, grid=grid, inputs=inputs)
    fakes = {name: cast("FakeQuantLinear", model.get_submodule(name)) for name in names}
    if method.start is not None:
        for name, fake in fakes.items():
            _begin_at(fake, start(name, fake.weight.detach()), where=name)
    if method.train == "scales":
        for name, fake in fakes.items():
            replace(model, name, ScaleLinear(fake.to_quant_linear(), inputs=inputs))
        _train_scales(model)
    elif method.train != "all":
        _train_last(model, int(method.train.removeprefix("last:")), fakes, start)
    elif method.max_moved is not None:
        _keep_ends(model)
    return names


def put_qat_lora(
    model: PreTrainedModel, scheme: Scheme, method: QatLora, targets: str | Sequence[str], *, seed: int
) -> list[str]:
    """Put adapters on whose sum with the base is rounded; returns the layers' names.

    Args:
        model: dense, or held as `hold` says.
        scheme: the grid.
        method: how.
        targets: which layers.
        seed: of the adapters' first values.

    Raises:
        TargetError, FormatError: as `attach_lora`; a base held as codes of another grid.
    """
    attach_lora(
        model,
        targets,
        rank=method.rank,
        alpha=method.alpha,
        rank_stabilised=method.rank_stabilised,
        generator=torch.Generator().manual_seed(seed),
    )

    def grid(name: str, adapter: LoraLinear) -> Grid:
        if method.hold in HELD_AS_CODES:
            held = _codes(adapter.base, scheme, name)
            share = 1.0 if method.max_moved is None else method.max_moved
            return CodeMoves(held, share) if method.hold == "codes" else ZeroMoves(held, share)
        if method.max_moved is not None:
            return MovesGrid(_nearest(name, dense_weight(adapter.base).float(), scheme), method.max_moved)
        size, device = (adapter.out_features, adapter.in_features), adapter.lora_A.device
        return RangeGrid(scheme, size, holds=method.freeze > 0, device=device)

    return attach_rounding(model, grid, input_rounding(method.activations))


def _start(model: PreTrainedModel, scheme: Scheme, method: Qat) -> Start:
    """Where the scales of each layer begin."""
    if method.start is None:
        return lambda name, weight: _nearest(name, weight, scheme)
    if not scheme.has_real_scales:
        raise FormatError(f"start: the scales of {scheme} are codes themselves, and found anew; leave start out")
    folder = find_folder(method.start)
    begun = load(folder, tokenizer=False, device=model.device).model
    found = {name: module for name, module in begun.named_modules() if isinstance(module, QuantLinear)}
    _take_gains(model, begun)

    def taken(name: str, weight: Tensor) -> QuantizedTensor:
        layer = found.get(name)
        if layer is None or layer.qtensor.shape != tuple(weight.shape):
            raise UsageError(
                f"start: {folder} holds no quantized layer {name} of shape {list(weight.shape)}; quantize "
                f"this very model to {scheme} (strop quantize), and name its folder"
            )
        if layer.scheme != scheme:
            raise UsageError(
                f"start: {folder} holds {name} as {layer.scheme}, and the format is {scheme}; give both the same"
            )
        return layer.qtensor

    return taken


def _take_gains(model: nn.Module, begun: nn.Module) -> None:
    """Gains and biases inside the blocks as the start has them, to which its codes were fitted."""
    inside = tuple(f"{name}." for name in blocks(model))
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in begun.named_parameters():
            if name.startswith(inside) and parameter.ndim == 1 and name in own and own[name].shape == parameter.shape:
                own[name].copy_(parameter)


def _nearest(name: str, weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """The weight on the grid, scales searched where they are numbers of their own."""
    if scheme.has_real_scales:
        return search(weight, scheme, None)
    return quantize_tensor(weight, scheme, where=name)


def _begin_at(fake: FakeQuantLinear, start: QuantizedTensor, *, where: str) -> None:
    """Move the weight no further than it takes to round to the start's codes, on the start's scales."""
    assert start.scale is not None
    zero = None if start.zero_point is None else start.zero_point.float()
    with torch.no_grad():
        fake.weight.copy_(beside(fake.weight.float(), start, start.scale.float(), zero, where=where))


def _codes(base: nn.Module, scheme: Scheme, name: str) -> QuantizedTensor:
    if not isinstance(base, QuantLinear) or base.scheme != scheme:
        held = base.scheme if isinstance(base, QuantLinear) else "dense"
        raise FormatError(
            f"{name}: is held as {held}, and its codes are to be those of {scheme}; give the format that it has"
        )
    return base.qtensor


def _train_scales(model: nn.Module) -> None:
    """Scales, and gains and biases inside the blocks; all else stays."""
    inside = tuple(f"{name}." for name in blocks(model))
    for name, parameter in model.named_parameters():
        own = name.startswith(inside) and (parameter.ndim == 1 or name.endswith(".factor"))
        parameter.requires_grad = own and parameter.is_floating_point()


def _train_last(model: nn.Module, count: int, fakes: dict[str, FakeQuantLinear], start: Start) -> None:
    """The last blocks; layers of the others stand as the start's codes.

    Raises:
        UsageError: there are not so many.
    """
    names = list(blocks(model))
    if count > len(names):
        raise UsageError(f"train: last:{count}: the model has {len(names)} blocks; give at most so many, or all")
    trained = tuple(f"{name}." for name in names[-count:])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(trained)
    for name, fake in fakes.items():
        if not name.startswith(trained):
            replace(model, name, QuantLinear(start(name, fake.weight.detach()), fake.bias))


def _keep_ends(model: nn.Module) -> None:
    """Embeddings and head stay as they are, so that a patch holds moved codes and gains alone."""
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter)()
        if isinstance(module, nn.Module):
            module.requires_grad_(requires_grad=False)

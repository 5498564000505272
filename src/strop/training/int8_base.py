"""The frozen base's products in int8 while an adapter trains on a CPU, where that is measured to be good enough.

Before the first step the first batches of the run go through the model, forward and backward. Beside each product of a
block in one piece (`layers.fused_block`) its int8 stand-in (`layers.int8_products`) computes the same from the same
inputs; where the cosine between both, of the output or of the input's gradient, falls below `LEAST_COSINE`, those
layers keep their own products. Then the gradient of all that is trained is compared, with every stand-in that passed at
work: below `LEAST_COSINE`, none is used. A run that goes on does this again, before its state is read, and comes to the
same, for it starts from the same batches and weights.

Only training computes in int8. Evaluations, whose losses choose the best state, and whatever else finds the model in
evaluation mode, take the base as it is held. The int8 codes take a byte a weight beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from strop.data.batches import Batch, BatchStream
from strop.errors import ConfigError
from strop.kernels import int8
from strop.kernels.library import native
from strop.layers.block_products import Operands, Part, Product
from strop.layers.fake_quant_linear import FakeQuantLinear
from strop.layers.fused_block import FusedBlock
from strop.layers.int8_products import Int8Weight, MeasuredInt8, cosine
from strop.layers.surgery import block_lists
from strop.numerics.int8_matmul import native_is_exact
from strop.precision import autocast
from strop.progress import Reporter
from strop.training.losses import find_head
from strop.training.objective import Objective
from strop.training.settings import TrainSettings

LEAST_COSINE: Final = 0.99
BATCHES: Final = 2
"""Micro-batches that are looked at, each of a step of its own."""


def require_int8(one_piece: int) -> None:
    """Refuse a run that could not compute in int8.

    Args:
        one_piece: How many blocks run as one piece.

    Raises:
        ConfigError: None does, or the machine has no kernels for it.
    """
    if native() is None or not (int8.is_native() or native_is_exact("cpu")):
        raise ConfigError(
            "compute: int8 needs strop's native kernels and a processor whose int8 products are exact (with AVX2, VNNI "
            "or AMX), and there are none here; leave it out"
        )
    if not one_piece:
        raise ConfigError(
            "compute: int8 is computed in blocks that run as one piece, and none of this model's does; leave it out"
        )


@contextlib.contextmanager
def int8_base(
    model: nn.Module, stream: BatchStream, settings: TrainSettings, objective: Objective, reporter: Reporter
) -> Iterator[dict[str, Any]]:
    """Let the products that pass be computed in int8 while the context lasts.

    Args:
        model: Its blocks in one piece, as the run begins.
        stream: The run's data; where it stands is left as it was.
        settings: The run's.
        objective: What it minimises.
        reporter: Told what came of it.

    Yields:
        For run.json: how many products of how many are in int8, the least cosine of each kind, the bytes of the codes,
        and the layers that keep their own products, with their cosines.
    """
    blocks = _pieces(model)
    names = {id(module): name for name, module in model.named_modules()}
    trials = [(block, place) for block in blocks for place in range(len(block.int8)) if _is_frozen(block, place)]
    found: dict[str, Any] = {"products": 0, "of": len(trials), "bytes": 0, "kept": {}}
    try:
        for block, place in trials:
            block.int8[place] = MeasuredInt8(_int8_weight(block, place, settings.compute_dtype))
        batches = _first_batches(stream)
        own = _gradients(model, batches, settings, objective)
        used: list[float] = []
        for block, place in trials:
            tried = block.int8[place]
            assert isinstance(tried, MeasuredInt8)
            passes = tried.cosine >= LEAST_COSINE
            block.int8[place] = tried.weight if passes else None
            if passes:
                used.append(tried.cosine)
                found["bytes"] += tried.weight.nbytes
            else:
                layers = [names[id(part.base)].removesuffix(".base") for part in block.parts.groups()[place]]
                found["kept"] |= dict.fromkeys(layers, tried.cosine)
        if used:
            found |= {"products": len(used), "cosine": min(used)}
            found["gradient_cosine"] = cosine(own, _gradients(model, batches, settings, objective))
            if not found["gradient_cosine"] >= LEAST_COSINE:
                found |= {"products": 0, "bytes": 0}
                for block in blocks:
                    block.int8 = [None] * len(block.int8)
        _tell(found, settings, reporter)
        yield found
    finally:
        for block in blocks:
            block.int8 = [None] * len(block.int8)


def _pieces(model: nn.Module) -> list[FusedBlock]:
    given = (vars(block).get("forward") for blocks in block_lists(model) for block in blocks)
    return [forward for forward in given if isinstance(forward, FusedBlock) and forward.in_place()]


def _is_frozen(block: FusedBlock, place: int) -> bool:
    """Whether nothing trains or rounds the weights of a product."""
    bases = [part.base for part in block.parts.groups()[place]]
    return not any(isinstance(base, FakeQuantLinear) or _trains(base) for base in bases)


def _trains(base: nn.Module) -> bool:
    return any(value.requires_grad for name, value in base.named_parameters() if name != "bias")


def _int8_weight(block: FusedBlock, place: int, dtype: torch.dtype) -> Int8Weight:
    parts: Sequence[Part] = block.parts.groups()[place]
    product = Product([Operands.of(part, dtype) for part in parts], dtype)
    with torch.no_grad():
        return Int8Weight((product.starts[-1], product.columns), product.tiles())


def _first_batches(stream: BatchStream) -> list[Batch]:
    place = stream.state_dict()
    batches = [stream.next_step()[0] for _ in range(BATCHES)]
    stream.load_state_dict(place)
    return batches


def _gradients(model: nn.Module, batches: Sequence[Batch], settings: TrainSettings, objective: Objective) -> Tensor:
    """The gradient of all that is trained, over some batches; drawn numbers are the same in each call."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before, mode, head = [parameter.grad for parameter in trained], model.training, find_head(model, batches[0])
    sums = [torch.zeros_like(parameter) for parameter in trained]
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            for batch in batches:
                for parameter in trained:
                    parameter.grad = None
                with autocast(torch.device("cpu"), settings.compute_dtype):
                    loss = objective.loss_sum(model, batch, head=head)
                (loss / max(1, batch.supervised_tokens)).backward()
                for total, parameter in zip(sums, trained, strict=True):
                    if parameter.grad is not None:
                        total += parameter.grad
    finally:
        model.train(mode)
        for parameter, grad in zip(trained, before, strict=True):
            parameter.grad = grad
    return torch.cat([total.flatten() for total in sums])


def _tell(found: Mapping[str, Any], settings: TrainSettings, reporter: Reporter) -> None:
    dtype = str(settings.compute_dtype).removeprefix("torch.")
    kept = found["kept"]
    for layer, seen in kept.items():
        reporter.note(f"{layer}: stays in {dtype}, for int8 agrees to a cosine of {seen:.4f} only")
    if not found["products"]:
        seen = found.get("gradient_cosine")
        why = "no product passed" if seen is None else f"the whole gradient agrees to a cosine of {seen:.4f} only"
        reporter.note(f"warning: compute: int8: {why} ({LEAST_COSINE} is needed); all is computed in {dtype}")
        return
    way = "strop's kernels" if int8.is_native() else "torch._int_mm"
    reporter.note(
        f"{found['products']} of {found['of']} products of the frozen base are computed in int8, by {way}: cosine of "
        f"the gradient {found['gradient_cosine']:.4f}, least of a product {found['cosine']:.4f}; the codes take "
        f"{found['bytes'] / 1e6:.1f} MB more. Evaluations are computed in {dtype}"
    )

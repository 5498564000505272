"""Scales trained end to end: the codes of a quantized model stay, its scales learn from the full-precision model.

    w^ = s * (q - z)                q, z fixed
    L  = mean over real tokens of sum over the vocabulary of p (log p - log q)                            [nats]

p are the probabilities of the model in full precision and q those of the quantized one. The second phase of
"EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", Chen and others, 2024 (arXiv
2407.11062), which trains the step sizes alone after block-wise training; here from the divergence and not from the
text's own tokens, after any method, and with the gains and biases inside the blocks. What squared errors of hidden
states do not see, what the final norm and the head make of them, is seen here.

A scale learns as a multiple of its start and is rounded to its dtype on the way, the gradient passing straight through.
Scales that are codes themselves (double quantization, superblocks, powers of two) stay, as do experts. The best of ten
measurements on batches that train nothing is kept, the start among them. The quantized model is in memory whole, one of
its blocks dense at a time: activations are made again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from strop.data.batches import Batch
from strop.errors import TrainingError, UsageError
from strop.layers.quant_linear import QuantLinear
from strop.layers.scale_linear import ScaleLinear
from strop.layers.surgery import blocks
from strop.methods.reconstruction import BETAS, MEASUREMENTS, in_random_order, to_train_and_measure
from strop.numerics.qtensor import QuantizedTensor
from strop.training.losses import Head, divergence_sum
from strop.training.recompute import recomputed

SCALE_RATE: Final = 3e-3
"""Of a scale's start."""
GAIN_RATE: Final = 1e-3
"""Of the mean of a gain or bias."""
_EPS: Final = 1e-20
"""Above the gradients whose square is no float32 number: below it, what the rows say nothing of would leap."""

Teacher = Callable[[int], Tensor]
"""A batch's number to the full-precision model's last hidden states, those that its head is given."""


@dataclass(frozen=True)
class TrainedScales:
    """What training changed.

    Attributes:
        weights: Layers with other scales, by full name.
        others: Gains and biases, float32 numbers that the model's dtype holds, by full name.
        before: Mean KL from full precision on the batches that measure, in nats per token, of the start.
        after: The same of what was kept.
    """

    weights: Mapping[str, QuantizedTensor]
    others: Mapping[str, Tensor]
    before: float
    after: float


def train_scales(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    teacher: Teacher,
    head: Head,
    *,
    steps: int,
    dtype: torch.dtype,
    seed: int = 0,
    say: Callable[[int, str], None] = lambda *_: None,
) -> TrainedScales:
    """Train the scales of a model's `QuantLinear` layers, and what has one dimension in its blocks.

    Args:
        model: Quantized, otherwise in float32; it is left as it came.
        batches: One in eight measures, the others train; with fewer than four, all do both.
        teacher: The full-precision model on each of them.
        head: What `find_head` says of the full-precision model.
        steps: Batches to train on, by Adam, at a rate that falls linearly to 0.
        dtype: Of gains and biases where the model is stored.
        seed: Decides the order of the batches.
        say: Told the steps done and how far the loss has come.

    Raises:
        UsageError: No layer has a scale that can be trained.
        TrainingError: The divergence is not finite.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear) and module.scheme.has_real_scales
    }
    if not layers:
        raise UsageError("scale_steps: no layer has a scale to train; formats such as int4-g32 and nf4 have")
    training, measuring = to_train_and_measure(len(batches))
    parts = {name: ScaleLinear(module) for name, module in layers.items()}
    others = _others(model)
    with recomputed(model), _standing_in(model, parts):
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.requires_grad_(requires_grad=False)
        for parameter in (*(part.factor for part in parts.values()), *others.values()):
            parameter.requires_grad_()
        groups = [{"params": [part.factor for part in parts.values()], "lr": SCALE_RATE}]
        groups += [{"params": [p], "lr": GAIN_RATE * float(p.detach().abs().mean())} for p in others.values()]
        starts = {name: parameter.detach().clone() for name, parameter in others.items()}

        def kl(number: int) -> tuple[Tensor, int]:
            return _divergence(model.base_model, head, batches[number], teacher(number))

        def measured() -> float:
            with torch.no_grad(), _rounded(others, dtype):
                found = [kl(number) for number in measuring]
            return float(sum(total for total, _ in found)) / sum(count for _, count in found)

        try:
            before = best = measured()
            if not math.isfinite(before):
                raise TrainingError("scale_steps: the divergence from full precision is not finite; check the weights")
            kept: tuple[dict[str, QuantizedTensor], dict[str, Tensor]] = ({}, {})
            optimizer = torch.optim.Adam(groups, betas=BETAS, eps=_EPS)
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            order = in_random_order(training, torch.Generator().manual_seed(seed))
            for step in range(steps):
                total, count = kl(next(order))
                (total / count).backward()
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (1 - step / steps)
                optimizer.step()
                optimizer.zero_grad()
                for part in parts.values():
                    part.keep_in_bounds()
                done = step + 1
                if done * MEASUREMENTS // steps > step * MEASUREMENTS // steps:
                    found = measured()
                    if found < best:
                        best = found
                        weights = {name: part.stored() for name, part in parts.items()}
                        kept = weights, {name: p.detach().to(dtype, copy=True).float() for name, p in others.items()}
                say(done, f"KL {best:.2e} nats, {before:.2e} at the start")
        finally:
            for name, parameter in others.items():
                parameter.requires_grad = False
                parameter.data.copy_(starts[name])
                parameter.grad = None
            for parameter in learned:
                parameter.requires_grad_()
    return TrainedScales(*kept, before, best)


@contextmanager
def _standing_in(model: nn.Module, parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Modules in the place of those of the same names."""
    before = {name: model.get_submodule(name) for name in parts}
    for name, part in parts.items():
        model.set_submodule(name, part)
    try:
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def _others(model: nn.Module) -> dict[str, nn.Parameter]:
    """Gains and biases inside the blocks; those that are all zero have no rate of their own and stay."""
    inside = tuple(f"{name}." for name in blocks(model))
    quantized = {
        id(p) for m in model.modules() if isinstance(m, QuantLinear) for p in m.parameters() if p is not m.bias
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(inside)
        and id(parameter) not in quantized
        and parameter.ndim == 1
        and parameter.is_floating_point()
        and bool(parameter.any())
    }


@contextmanager
def _rounded(parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> Iterator[None]:
    """The parameters as they will be stored."""
    before = {name: parameter.data for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.data = parameter.data.to(dtype).float()
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def _divergence(base: nn.Module, head: Head, batch: Batch, wanted: Tensor) -> tuple[Tensor, int]:
    """KL summed over a batch's real tokens, and how many there are."""
    tokens = torch.arange(batch.input_ids.shape[1])[None, :] < batch.lengths[:, None]  # [rows, length]
    hidden = base(**batch.inputs()).last_hidden_state
    return divergence_sum(head, hidden[tokens], wanted[tokens]), int(tokens.sum())

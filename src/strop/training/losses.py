"""The loss of a micro-batch: summed over supervised tokens, never a mean.

    loss_sum = sum over supervised positions t of (1 - d) * CE_t + d * KL_t                              [nats]
    CE_t     = - log q(token_t | tokens before t)                            q: the model that is trained
    KL_t     = sum over tokens v of p(v) * (log p(v) - log q(v))             p: the teacher, if there is one

d is 0 without a teacher.

The caller divides by the supervised tokens of the whole optimizer step, so that accumulation, ragged lengths and
packing do not change what a token weighs (a mean of means would). Labels are not shifted: the label at t is predicted
by the hidden state at t - 1, and -100 marks a token without loss.

Hidden states whose token is not supervised are dropped before the output head, and the head runs over at most
`CHUNK_LOGITS` logits at a time, which are computed again in the backward pass: with answers of a tenth of the tokens
and a vocabulary of 150,000 this is most of a step's memory. A head that is not trained takes two products a chunk in
place of three: the gradient is found in the forward pass. `find_head` allows that only for models whose logits are, bit
for bit, `finish(head(base(...).last_hidden_state))` with `finish` nothing, a scale, a divisor or a soft cap by a number
that the configuration names; others go through their own forward.

Measured (2,000 supervised rows of 4,000, hidden 32, vocabulary 100,000, fp32; all supervised logits are 800 MB, with
as much again for their gradient): a forward and backward pass grows by 214 MB with a trained head, by 201 MB with a
frozen one, which is three tensors of a chunk's 64 MiB.

Shapes: hidden [rows, length, hidden], logits [tokens, vocabulary]. Sums are fp32, or fp64 where the logits are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from strop.kernels import block as kernels
from strop.layers.base import is_linear, refuse_second_derivative
from strop.training.shapes import round_up

IGNORED: Final = -100
"""The label of a token that carries no loss."""

CHUNK_LOGITS: Final = 2**24
"""Logits computed at once: 64 MiB in fp32."""


class TokenBatch(Protocol):
    """What a loss needs of a micro-batch; `strop.data.batches.Batch` offers it."""

    @property
    def labels(self) -> Tensor:
        """[rows, length] int64, -100 where there is no loss, not shifted."""
        ...

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for the model's forward, without labels."""
        ...


class Wanted(Protocol):
    """What a teacher says at supervised tokens; see `strop.training.teachers`."""

    def __getitem__(self, part: slice, /) -> Wanted:
        """Of some of the tokens."""
        ...

    def divergence_sum(self, logits: Tensor) -> Tensor:
        """KL(teacher || student) summed, of the student's logits [tokens, vocabulary]; tokens may be added behind."""
        ...


@dataclass(frozen=True)
class Kept:
    """The supervised tokens of a batch, brought to a common number (`shapes.py`).

    Attributes:
        places: [tokens], of the positions [rows * (length - 1)] that predict them; those added repeat the first.
        labels: [tokens], -100 where added.
        supervised: how many are no additions; they come first.
    """

    places: Tensor
    labels: Tensor
    supervised: int

    @classmethod
    def of(cls, batch: TokenBatch, device: torch.device) -> Kept:
        """Find them in a batch."""
        labels = batch.labels[:, 1:].reshape(-1).to(device)  # [rows, length] -> [rows * (length - 1)]
        places = (labels != IGNORED).nonzero().flatten()
        supervised, added = len(places), round_up(len(places), smallest_step=16) - len(places)
        if supervised:  # the added ones carry no label
            places = functional.pad(places, (0, added), value=int(places[0]))
        labels = functional.pad(labels[places[:supervised]], (0, len(places) - supervised), value=IGNORED)
        return cls(places, labels, supervised)

    def rows(self, states: Tensor) -> Tensor:
        """States or logits [rows, length, size] at the places that predict: [tokens, size]."""
        before = states[:, :-1]
        return before.reshape(-1, before.shape[-1])[self.places]


@dataclass(frozen=True)
class _Targets:
    """What the logits of some tokens are held against."""

    labels: Tensor
    wanted: Wanted | None
    share: float

    def __getitem__(self, part: slice) -> _Targets:
        return _Targets(self.labels[part], None if self.wanted is None else self.wanted[part], self.share)

    def loss_sum(self, logits: Tensor) -> Tensor:
        if self.wanted is None or self.share == 0.0:
            return _cross_entropy_sum(logits, self.labels)
        divergence = self.wanted.divergence_sum(wide(logits))
        if self.share == 1.0:
            return divergence
        return (1.0 - self.share) * _cross_entropy_sum(logits, self.labels) + self.share * divergence


_LossOf: TypeAlias = "Callable[[Head, Tensor, Any, Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]]"
"""(head, hidden states, targets, tensors) to a sum, detached, and its gradients for the tensors."""

Finish: TypeAlias = Callable[[Tensor], Tensor]
"""What a model does to its logits after the head."""


def unchanged(logits: Tensor) -> Tensor:
    """The finish of most models: none."""
    return logits


@dataclass(frozen=True)
class Head:
    """A model in pieces: logits = finish(projection(base(...).last_hidden_state))."""

    base: nn.Module
    projection: nn.Module
    finish: Finish

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [tokens, vocabulary] of hidden states [tokens, hidden]."""
        return self.finish(self.projection(hidden))


def _finishes(model: nn.Module) -> Iterator[Finish]:
    """What may be done to logits, from the numbers that the configuration has for them: a scale, a divisor, a cap."""
    config = getattr(model, "config", None)
    values = vars(config.get_text_config()) if config is not None else {}
    for name, value in values.items():
        if "logit" in name and isinstance(value, int | float) and not isinstance(value, bool) and value not in (0, 1):
            number = float(value)
            yield lambda logits, number=number: logits * number
            yield lambda logits, number=number: logits / number
            yield lambda logits, number=number: torch.tanh(logits / number) * number
    yield unchanged


def find_head(model: nn.Module, batch: TokenBatch) -> Head | None:
    """Split `model` into base, output projection and what follows it, if they give its logits bit for bit; else None.

    Two forward passes over the first row of `batch` without gradient. The model's mode is left as it was.
    """
    base = getattr(model, "base_model", None)
    get_head = getattr(model, "get_output_embeddings", None)
    projection = get_head() if callable(get_head) else None
    if not isinstance(base, nn.Module) or not isinstance(projection, nn.Module) or base is model:
        return None
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            rows = len(batch.labels)
            inputs = on_device(batch.inputs(), next(model.parameters()).device)
            inputs = {name: value[:1] if _of_rows(value, rows) else value for name, value in inputs.items()}
            hidden = getattr(base(**inputs), "last_hidden_state", None)
            if hidden is None:
                return None
            logits = model(**inputs).logits
            plain = projection(hidden)
            for finish in _finishes(model):
                if torch.equal(finish(plain).to(logits.dtype), logits):
                    return Head(base, projection, finish)
    finally:
        model.train(training)
    return None


def token_loss_sum(
    model: nn.Module, batch: TokenBatch, *, head: Head | None = None, wanted: Wanted | None = None, share: float = 0.0
) -> tuple[Tensor, int]:
    """The loss of one micro-batch, summed over its supervised tokens.

    Args:
        model: A causal language model whose forward returns `.logits` [rows, length, vocabulary].
        batch: Token ids and labels.
        head: The model's two pieces from `find_head`; None computes all logits through the model itself.
        wanted: What a teacher says at the batch's supervised tokens, in the order of `Kept`.
        share: d, from 0 (labels alone) to 1 (teacher alone).

    Returns:
        The sum (a scalar with gradient, fp32 or fp64) and the number of supervised tokens. With no supervised token
        the sum is zero, still attached to the graph.
    """
    device = next(model.parameters()).device
    inputs = on_device(batch.inputs(), device)
    kept = Kept.of(batch, device)
    targets = _Targets(kept.labels, wanted, share)
    if head is None:
        return targets.loss_sum(kept.rows(model(**inputs).logits)), kept.supervised
    hidden = kept.rows(head.base(**inputs).last_hidden_state)
    rows = max(1, CHUNK_LOGITS // _vocabulary(head.projection))
    if torch.is_grad_enabled():
        return _through_head(hidden, targets, head, rows, _targets_loss), kept.supervised
    total = _zero(hidden)
    for start in range(0, len(hidden), rows):
        total += _targets_loss(head, hidden[start : start + rows], targets[start : start + rows], ())[0]
    return total, kept.supervised


@torch.no_grad()
def measured_sums(
    model: nn.Module, batch: TokenBatch, wanted: Wanted, *, head: Head | None = None
) -> tuple[Tensor, Tensor, int]:
    """The two parts of the loss apart, without gradient: cross-entropy, divergence, supervised tokens.

    Args:
        model: As for `token_loss_sum`.
        batch: Token ids and labels.
        wanted: What the teacher says at the batch's supervised tokens.
        head: The model's two pieces; None computes all logits through the model itself.
    """
    device = next(model.parameters()).device
    inputs = on_device(batch.inputs(), device)
    kept = Kept.of(batch, device)
    if head is None:
        states, rows = kept.rows(model(**inputs).logits), max(1, len(kept.places))
    else:
        states = kept.rows(head.base(**inputs).last_hidden_state)
        rows = max(1, CHUNK_LOGITS // _vocabulary(head.projection))
    entropy, divergence = _zero(states), _zero(states)
    for start in range(0, len(states), rows):
        part = states[start : start + rows]
        logits = wide(part if head is None else head.logits(part))
        entropy += _cross_entropy_sum(logits, kept.labels[start : start + rows])
        divergence += wanted[start : start + rows].divergence_sum(logits)
    return entropy, divergence, kept.supervised


def divergence_sum(head: Head, hidden: Tensor, wanted: Tensor) -> Tensor:
    """KL(p || q) summed over tokens, in nats: p from the hidden states `wanted`, q from `hidden`, through one head.

    Args:
        head: Of both models; not trained.
        hidden: [tokens, hidden], with gradient where the graph is wanted.
        wanted: [tokens, hidden], without.

    Returns:
        A scalar, fp32 or fp64. At most `CHUNK_LOGITS` logits of each model are there at a time.
    """
    rows = max(1, CHUNK_LOGITS // _vocabulary(head.projection))
    return _through_head(hidden, wanted, head, rows, _divergence_loss)


class _HeadLoss(torch.autograd.Function):
    """The loss through the head, its gradients found in the forward pass, chunk by chunk, and scaled in the backward.

    No logits are computed twice: two products a chunk where the head is frozen, three where it is trained.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Any, head: Head, rows: int, loss_of: _LossOf, *trained: Tensor
    ) -> Tensor:
        gradient = torch.empty_like(hidden)
        sums: list[Tensor] = []
        total = _zero(hidden)
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows].detach().requires_grad_()
            with torch.enable_grad():
                loss, found = loss_of(head, part, targets[start : start + rows], [part, *trained])
            gradient[start : start + rows] = found[0]
            sums = [one.add_(more) for one, more in zip(sums, found[1:], strict=True)] if sums else list(found[1:])
            total += loss
        if not len(hidden):
            sums = [torch.zeros_like(one) for one in trained]
        ctx.save_for_backward(gradient, *sums)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("the loss in chunks")
        gradient, *sums = (saved * upstream[0] for saved in ctx.saved_tensors)  # a scalar's dtype is not taken on
        return gradient, None, None, None, None, *sums


def _through_head(hidden: Tensor, targets: Any, head: Head, rows: int, loss_of: _LossOf) -> Tensor:
    trained = [parameter for parameter in head.projection.parameters() if parameter.requires_grad]
    return _HeadLoss.apply(hidden, targets, head, rows, loss_of, *trained)


def _targets_loss(
    head: Head, hidden: Tensor, targets: _Targets, wanted: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor]]:
    """The loss of some tokens and its gradients; by a native kernel where it is cross-entropy on a CPU."""
    logits = head.logits(hidden)
    if (targets.wanted is not None and targets.share != 0.0) or not _fits_kernel(logits):
        loss = targets.loss_sum(logits)
        return loss.detach(), torch.autograd.grad(loss, wanted) if wanted else ()
    gradient = logits.detach()  # overwritten: the head's own product does not read it again, what follows it may
    if head.finish is not unchanged or not is_linear(head.projection):
        gradient = gradient.clone()
    losses = kernels.cross_entropy(gradient, targets.labels)
    return losses.sum(), torch.autograd.grad(logits, wanted, gradient) if wanted else ()


def _fits_kernel(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.is_contiguous() and kernels.available(logits.dtype)


def _divergence_loss(
    head: Head, hidden: Tensor, expected: Tensor, wanted: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor]]:
    with torch.no_grad():
        aimed = torch.log_softmax(wide(head.logits(expected)), dim=-1)
    found = torch.log_softmax(wide(head.logits(hidden)), dim=-1)  # the logits themselves are gone by now
    loss = functional.kl_div(found, aimed, log_target=True, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, wanted)


def logits_divergence_sum(expected: Tensor, found: Tensor) -> Tensor:
    """KL(softmax(expected) || softmax(found)) summed over tokens; both logits [tokens, vocabulary], fp32 or fp64."""
    with torch.no_grad():
        wanted = torch.log_softmax(expected, dim=-1)
    return functional.kl_div(torch.log_softmax(found, dim=-1), wanted, log_target=True, reduction="sum")


def _zero(states: Tensor) -> Tensor:
    return states.new_zeros((), dtype=torch.float64 if states.dtype == torch.float64 else torch.float32)


def _of_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows


def _cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [tokens, vocabulary], targets [tokens] -> scalar, computed in fp32 at least."""
    return functional.cross_entropy(wide(logits), targets, ignore_index=IGNORED, reduction="sum")


def wide(logits: Tensor) -> Tensor:
    """In fp32, or fp64 where they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _vocabulary(projection: nn.Module) -> int:
    weight = getattr(projection, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else 1


def on_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A forward pass's keyword arguments, their tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}

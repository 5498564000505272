"""The loss of a micro-batch: cross-entropy summed over supervised tokens, never a mean.

    loss_sum = - sum over supervised positions t of log p(token_t | tokens before t)        [nats]

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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

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


_LossOf: TypeAlias = "Callable[[Head, Tensor, Tensor], Tensor]"
"""(head, hidden states, targets) to a sum."""

Finish: TypeAlias = Callable[[Tensor], Tensor]
"""What a model does to its logits after the head."""


@dataclass(frozen=True)
class Head:
    """A model in pieces: logits = finish(projection(base(...).last_hidden_state))."""

    base: nn.Module
    projection: nn.Module
    finish: Finish

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [tokens, vocabulary] of hidden states [tokens, hidden]."""
        return self.finish(self.projection(hidden))

    @property
    def trained(self) -> bool:
        """Whether the projection has a parameter with gradient."""
        return any(parameter.requires_grad for parameter in self.projection.parameters())


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
    yield lambda logits: logits


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
            inputs = _on(batch.inputs(), next(model.parameters()).device)
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


def token_loss_sum(model: nn.Module, batch: TokenBatch, *, head: Head | None = None) -> tuple[Tensor, int]:
    """Cross-entropy of one micro-batch, summed over its supervised tokens.

    Args:
        model: A causal language model whose forward returns `.logits` [rows, length, vocabulary].
        batch: Token ids and labels.
        head: The model's two pieces from `find_head`; None computes all logits through the model itself.

    Returns:
        The sum (a scalar with gradient, fp32 or fp64) and the number of supervised tokens. With no supervised token
        the sum is zero, still attached to the graph.
    """
    device = next(model.parameters()).device
    inputs = _on(batch.inputs(), device)
    targets = batch.labels[:, 1:].reshape(-1).to(device)  # [rows, length] -> [rows * (length - 1)]
    kept = (targets != IGNORED).nonzero().flatten()
    supervised, added = len(kept), round_up(len(kept), smallest_step=16) - len(kept)
    if supervised:  # a common number of rows (see shapes.py); the added ones carry no label
        kept = functional.pad(kept, (0, added), value=int(kept[0]))
    targets = functional.pad(targets[kept[:supervised]], (0, len(kept) - supervised), value=IGNORED)
    if head is None:
        logits = model(**inputs).logits[:, :-1]
        return _cross_entropy_sum(logits.reshape(-1, logits.shape[-1])[kept], targets), supervised
    hidden = head.base(**inputs).last_hidden_state[:, :-1]
    hidden = hidden.reshape(-1, hidden.shape[-1])[kept]  # [rows, length - 1, hidden] -> [tokens, hidden]
    rows = max(1, CHUNK_LOGITS // _vocabulary(head.projection))
    if hidden.requires_grad and torch.is_grad_enabled() and not head.trained:
        return _FrozenHeadLoss.apply(hidden, targets, head, rows, _labelled_sum), supervised
    if len(kept) <= rows:
        return _cross_entropy_sum(head.logits(hidden), targets), supervised

    def chunk_sum(part: Tensor, part_targets: Tensor) -> Tensor:
        return _cross_entropy_sum(head.logits(part), part_targets)

    total = hidden.new_zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    for start in range(0, len(kept), rows):
        part, part_targets = hidden[start : start + rows], targets[start : start + rows]
        total = total + checkpoint(chunk_sum, part, part_targets, use_reentrant=False, preserve_rng_state=False)
    return total, supervised


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
    return _FrozenHeadLoss.apply(hidden, wanted, head, rows, _divergence_sum)


class _FrozenHeadLoss(torch.autograd.Function):
    """The loss of a head that is not trained: two products a chunk in place of three.

    The gradient for the hidden states is found in the forward pass, chunk by chunk, and scaled in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, rows: int, loss_of: _LossOf) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows].detach().requires_grad_()
            with torch.enable_grad():
                loss = loss_of(head, part, targets[start : start + rows])
            gradient[start : start + rows] = torch.autograd.grad(loss, part)[0]
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None


def _labelled_sum(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    return _cross_entropy_sum(head.logits(hidden), targets)


def _divergence_sum(head: Head, hidden: Tensor, wanted: Tensor) -> Tensor:
    with torch.no_grad():
        expected = torch.log_softmax(_wide(head.logits(wanted)), dim=-1)
    found = torch.log_softmax(_wide(head.logits(hidden)), dim=-1)
    return functional.kl_div(found, expected, log_target=True, reduction="sum")


def _of_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows


def _cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [tokens, vocabulary], targets [tokens] -> scalar, computed in fp32 at least."""
    return functional.cross_entropy(_wide(logits), targets, ignore_index=IGNORED, reduction="sum")


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _vocabulary(projection: nn.Module) -> int:
    weight = getattr(projection, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else 1


def _on(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}

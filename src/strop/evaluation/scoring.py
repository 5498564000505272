"""One forward pass over the rows, its logits handed piece by piece to whatever measures them.

A `Piece` holds the logits of some supervised tokens, in the dtype that the model gave them: [tokens, vocabulary]. A
token is supervised where its label is not -100; label t is predicted by the logits at t - 1, so the first position of
a row never counts. Likelihood, divergence and exact match are `Measure`s and share one pass. Pieces come in the same
order for the same samples and batch size, whatever the model.

With a rounded cache of keys and values the text is read in strides (`kv_cache`), so that every token meets the keys and
values that it would meet if the text were written token by token.

Nothing is sampled and no gradient is kept. Only the logits that are needed are computed where the model can leave out
the rest, and at most `PIECE_NUMBERS` of them are worked on at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from strop.data.batches import Batch, eval_batches
from strop.data.templates import Sample
from strop.errors import DataError, ModelError
from strop.evaluation.kv_cache import STRIDE, KVFormat, new_cache
from strop.progress import SILENT, Reporter

PIECE_NUMBERS: Final = 1 << 18
"""Logits in one piece: 1 MiB as fp32, a few times that while a measure works on them, so that measuring needs little
memory beside the model's own."""


@dataclass(frozen=True)
class Piece:
    """Logits of consecutive supervised tokens.

    Attributes:
        logits: As the model gave them [tokens, vocabulary].
        targets: The token that stands there [tokens], int64.
        rows: The sample each belongs to, its place in the list that is scored [tokens], int64.
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor

    @cached_property
    def log_probabilities(self) -> Tensor:
        """The log softmax of the logits, fp32 [tokens, vocabulary]."""
        return torch.log_softmax(self.logits.float(), dim=-1)

    @cached_property
    def choices(self) -> Tensor:
        """The token that greedy decoding takes [tokens]; in fp32, as generation chooses."""
        return self.logits.float().argmax(dim=-1)


class Measure(Protocol):
    """What can listen to a pass."""

    def add(self, piece: Piece) -> None:
        """Take the next piece."""
        ...


def score(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    measures: Sequence[Measure],
    *,
    batch_size: int = 8,
    kv_cache: KVFormat | None = None,
    reporter: Reporter = SILENT,
) -> None:
    """Run `model` once over `samples` and give every measure all supervised logits, sample after sample.

    Args:
        model: A causal language model; it is left in the mode it came in.
        samples: Token ids and labels (-100: not supervised) per row.
        measures: What listens.
        batch_size: Rows per forward pass.
        kv_cache: How keys and values are rounded that attention looks back at; None leaves them as they are.
        reporter: Told the rows done; the caller starts and ends the step.

    Raises:
        DataError: A row has no supervised token.
        ModelError: The logits are not finite.
    """
    training = model.training
    model.eval()
    run = None if kv_cache is None else _in_strides(model, kv_cache)
    try:
        with torch.inference_mode():
            done = 0
            for batch in eval_batches(samples, batch_size):
                for piece in pieces(model, batch, run):
                    for measure in measures:
                        measure.add(piece)
                done += len(batch.rows)
                reporter.advance(done)
    finally:
        model.train(training)


def supervised_counts(samples: Sequence[Sample]) -> Tensor:
    """Supervised tokens of each row [rows], int64: the labels after the first position that are not -100.

    Raises:
        DataError: A row has none; all such rows are named.
    """
    counts = torch.tensor([sum(int(label) != -100 for label in sample.labels[1:]) for sample in samples])
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        shown = ", ".join(str(row) for row in empty[:10])
        more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
        raise DataError(
            f"no token to score in rows {shown}{more}: every row needs an answer that fits the length limit"
        )
    return counts


def pieces(model: PreTrainedModel, batch: Batch, run: Callable[..., Any] | None = None) -> Iterator[Piece]:
    """The supervised logits of one batch.

    Args:
        model: The model.
        batch: Padded rows.
        run: Takes the place of the model's own call, with the same arguments and output.

    Raises:
        ModelError: The logits are not finite.
    """
    run = run or model
    labels = batch.labels  # [rows, length]
    supervised = torch.zeros_like(labels, dtype=torch.bool)
    supervised[:, :-1] = labels[:, 1:] != -100
    positions = supervised.any(dim=0).nonzero().flatten()  # every position that some row needs
    inputs = batch.to(model.device).inputs()
    if _keeps_chosen_positions(model):
        logits = run(**inputs, logits_to_keep=positions.to(model.device)).logits  # [rows, positions, vocabulary]
    else:
        logits = run(**inputs).logits[:, positions.to(model.device)]
    row, column = supervised[:, positions].nonzero(as_tuple=True)  # row after row, left to right
    targets = labels[row, positions[column] + 1]
    samples = torch.tensor([places[0] for places in batch.rows])[row]
    step = max(1, PIECE_NUMBERS // logits.shape[-1])
    for start in range(0, len(row), step):
        part = slice(start, start + step)
        taken = logits[row[part], column[part]].cpu()
        if not torch.isfinite(taken).all():
            raise ModelError(
                f"the model's logits hold NaN or infinity (first seen on sample {int(samples[part][0])}): its weights "
                "or scales are broken, or its dtype overflows; check the file, or open it in float32"
            )
        yield Piece(taken, targets[part], samples[part])


def _in_strides(model: PreTrainedModel, kv_cache: KVFormat) -> Callable[..., CausalLMOutput]:
    """The model's call, `STRIDE` tokens being read at a time through a rounded cache."""

    def run(
        input_ids: Tensor, attention_mask: Tensor, logits_to_keep: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        cache = new_cache(model, kv_cache)
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device) if logits_to_keep is None else logits_to_keep
        found: list[Tensor] = []
        for start in range(0, length, STRIDE):
            end = start + STRIDE
            ids, mask = input_ids[:, start:end], attention_mask[:, :end]
            output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            inside = positions[(positions >= start) & (positions < end)]
            found.append(output.logits[:, inside - start])
        return CausalLMOutput(logits=torch.cat(found, dim=1))  # type: ignore[arg-type]  # any float tensor

    return run


def _keeps_chosen_positions(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters

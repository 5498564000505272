"""`merge`: an adapter and its base made into one model, and shown to be the pair that was trained.

    W = W0 + scaling * B @ A, W0 dequantized where the base is quantized, W in the base's dtype (or rounded to `format`)

The arithmetic is done in fp32; what is checked is the file. It is opened again, and on prompts its logits are compared
with those of base plus adapter: the largest difference, and the share of the adapter's effect that survived,

    effect = <merged - base, pair - base> / ||pair - base||^2        (1: all of it, 0: none)

Rounding a merged weight back to the base's own low-bit grid can lose the adapter whole, with a small divergence to
show for it; that is why the effect is the gate. Below it nothing is kept. The whole model is held in fp32 meanwhile.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from strop.data.records import Message
from strop.data.samples import prepare
from strop.data.templates import prompt_ids
from strop.errors import GateError, UsageError
from strop.files.folders import atomic_folder, write_json
from strop.files.saving import skeleton, write_model
from strop.layers.base import dense_weight, linear_bias
from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import detach_lora, linear_modules, lora_modules, quantize_linears, replace
from strop.models import OpenedModel, load
from strop.models.sources import find_folder, read_config
from strop.numerics.scheme import Scheme, parse_scheme
from strop.progress import SILENT, Reporter
from strop.recipes.rows import Rows, held_out_records

EFFECT_GATES: Final = {"quantized": 0.95, "bfloat16": 0.99, "float16": 0.99, "float32": 0.999}
"""Least share of the adapter's effect that a merged model keeps, by how its weights are stored."""

PROMPTS: Final = (
    "What can you do for me?",
    "Write one sentence about the weather.",
    "wake me at half past six on weekdays",
    "Name three colours and say which you like best.",
    "How much is 12 times 7?",
    "Translate to French: good morning",
    "List the files in this folder.",
    "Tell me a short story about a dog and a lamp.",
)
"""What is asked where no data are given."""

MAX_PROMPTS: Final = 16
MAX_TOKENS: Final = 256
LAST_TOKENS: Final = 16
"""Logits are compared at so many last positions of each prompt."""


@dataclass(frozen=True)
class MergeResult:
    """A merged model and how near it is to the pair that was trained.

    Attributes:
        path: the merged model's folder.
        stored: format or dtype of its linear layers.
        layers: adapted layers that were merged.
        prompts: prompts compared.
        arithmetic_error: largest logit difference between the pair and the sum in fp32, before it is stored.
        max_logit_difference: largest logit difference between the pair and the saved file, both computed in fp32.
        effect: share of the adapter's effect that the saved file keeps; None for an adapter that changes nothing.
        gate: least effect that was accepted.
    """

    path: Path
    stored: str
    layers: int
    prompts: int
    arithmetic_error: float
    max_logit_difference: float
    effect: float | None
    gate: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"path": str(self.path)}

    def lines(self) -> list[str]:
        """The result in sentences."""
        effect = (
            "the adapter changes nothing" if self.effect is None else f"{self.effect:.4f} of the adapter's effect kept"
        )
        return [
            f"{self.layers} layers merged, stored as {self.stored}; {effect} (gate {self.gate:g})",
            f"largest logit difference from base plus adapter on {self.prompts} prompts: "
            f"{self.max_logit_difference:.2e} as stored, {self.arithmetic_error:.2e} in fp32",
            f"the model: {self.path}",
        ]


@dataclass
class _Probe:
    """Prompts, and what a model answers to them in logits."""

    prompts: list[list[int]]
    vocabulary: int = field(default=0)

    def logits(self, model: PreTrainedModel) -> Tensor:
        """Logits at the last positions of every prompt, fp32 [tokens, vocabulary]."""
        model.eval()
        parts: list[Tensor] = []
        with torch.inference_mode():
            for prompt in self.prompts:
                logits = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits
                parts.append(logits[0, -LAST_TOKENS:].float().cpu())
        return torch.cat(parts)


def merge(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str | None = None,
    data: Rows | None = None,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> MergeResult:
    """Merge an adapter into its base.

    Args:
        run: a run's folder, or an adapter's.
        output: the folder to write.
        format: round the merged linear layers to this, instead of the dtype that the base is stored in.
        data: rows whose prompts are compared; a few built-in ones without it.
        overwrite: replace what stands at `output`.
        reporter: told what happens.

    Raises:
        UsageError: `run` is no adapter.
        GateError: the merged model keeps too little of the adapter's effect; nothing was written.
        MissingInputError, ModelError, FormatError, FileFormatError: as `load` and the writer raise them.
    """
    scheme = parse_scheme(format) if format is not None else None
    opened = load(run, dtype="float32")
    if opened.adapter is None:
        raise UsageError(f"{run}: holds a whole model, and a merge takes an adapter; there is nothing to merge")
    stored = _stored_dtype(opened)
    probe = _Probe(_prompts(opened, data))
    reporter.start("merge", 4, "steps")
    try:
        pair = probe.logits(opened.model)
        base = _base_logits(opened.model, probe)
        reporter.advance(1)
        layers = _add(opened.model)
        arithmetic_error = _largest(probe.logits(opened.model), pair)
        reporter.advance(2)
        kind = str(stored).removeprefix("torch.")
        if scheme is not None:
            quantize_linears(opened.model, scheme)
        _store(opened.model, stored)
        gate = EFFECT_GATES["quantized" if scheme is not None else kind]
        with atomic_folder(output, overwrite=overwrite) as temporary:
            write_model(opened.model, opened.tokenizer, temporary)
            reporter.advance(3)
            saved = probe.logits(load(temporary, dtype="float32", tokenizer=False).model)
            effect = _effect(base, pair, saved)
            name = scheme.name if scheme is not None else kind
            if effect is not None and not effect >= gate:
                raise GateError(_lost(output, scheme, name, effect, gate))
            result = MergeResult(
                path=Path(output),
                stored=name,
                layers=layers,
                prompts=len(probe.prompts),
                arithmetic_error=arithmetic_error,
                max_logit_difference=_largest(saved, pair),
                effect=effect,
                gate=gate,
            )
            write_json(temporary / "merge.json", result.to_dict() | {"path": "."})
            reporter.advance(4)
    finally:
        reporter.finish()
    return result


def _stored_dtype(opened: OpenedModel) -> torch.dtype:
    """The dtype that the base's dense weights are stored in."""
    assert opened.adapter is not None
    config, _ = read_config(find_folder(opened.adapter.base))
    dtype = getattr(config.get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _prompts(opened: OpenedModel, data: Rows | None) -> list[list[int]]:
    """Token ids of what is asked: rows of `data`, else built-in prompts; without a tokenizer a walk over the ids."""
    tokenizer = opened.tokenizer
    if tokenizer is None:
        size = int(opened.model.config.get_text_config().vocab_size)
        return [[(97 * at + 31 * row) % size for at in range(24)] for row in range(8)]
    if data is not None:
        limit = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None) or MAX_TOKENS
        records = held_out_records(data)[:MAX_PROMPTS]
        samples = prepare(records, tokenizer, max_length=min(MAX_TOKENS, limit)).samples
        return [list(sample.input_ids) for sample in samples]
    return [_asked(text, tokenizer) for text in PROMPTS]


def _asked(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.chat_template:
        return prompt_ids([Message("user", text)], tokenizer)
    return list(tokenizer(text)["input_ids"])


def _base_logits(model: PreTrainedModel, probe: _Probe) -> Tensor:
    """What the base answers without its adapters, which are put back afterwards."""
    adapters = detach_lora(model)
    try:
        return probe.logits(model)
    finally:
        for name, module in adapters.items():
            replace(model, name, module)


def _add(model: PreTrainedModel) -> int:
    """Exchange every adapted and every quantized layer for a dense fp32 one; returns the number of adapted ones."""
    adapted = lora_modules(model)
    plain = skeleton(model)
    for name, module in linear_modules(model).items():
        if name in adapted or isinstance(module, QuantLinear):
            replace(model, name, _dense(dense_weight(module), linear_bias(module), like=plain.get_submodule(name)))
    return len(adapted)


def _dense(weight: Tensor, bias: Tensor | None, *, like: nn.Module) -> nn.Module:
    """A dense layer of the kind that stands in the plain model: Conv1D holds its weight as [in, out]."""
    rows, columns = weight.shape
    with torch.device("meta"):
        made = Conv1D(rows, columns) if isinstance(like, Conv1D) else nn.Linear(columns, rows, bias=bias is not None)
    made.weight = nn.Parameter(weight.t().contiguous() if isinstance(like, Conv1D) else weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made


def _store(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round dense weights to the dtype that is saved; codes and scales stay as they are."""
    nn.Module.to(model, dtype)
    model.config.dtype = dtype


def _largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _effect(base: Tensor, pair: Tensor, merged: Tensor) -> float | None:
    """The projection of the merged model's change on the adapter's; None where the adapter changes no logit."""
    change = (pair - base).double()
    size = float(change.square().sum())
    return float(((merged - base).double() * change).sum()) / size if size > 0 and math.isfinite(size) else None


def _lost(output: str | os.PathLike[str], scheme: Scheme | None, stored: str, effect: float, gate: float) -> str:
    advice = (
        "merge without a format and quantize with data, or train through the grid: strop tune --method qat "
        f"--format {scheme.name}"
        if scheme is not None
        else "the change is too small for the base's dtype; keep the adapter apart, or train longer"
    )
    return (
        f"{output}: stored as {stored}, the merged model keeps {effect:.3f} of the adapter's effect, and {gate:g} is "
        f"needed; nothing was written. {advice}"
    )


__all__: Sequence[str] = ("EFFECT_GATES", "MergeResult", "merge")

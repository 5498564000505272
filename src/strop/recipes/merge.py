"""`merge`: an adapter and its base made into one model, and shown to be the pair that was trained.

    W = W0 + scaling * B @ A, W0 dequantized where the base is quantized, W in the base's dtype (or rounded to `format`)

Each layer is added in fp32 and stored at once, so that memory holds the model in its own dtype and one layer. What is
checked is the file: it is opened again, and on prompts its logits are compared, all computed in fp32, with those of
base plus adapter: the largest difference, and the share of the adapter's effect that survived,

    effect = <merged - base, pair - base> / ||pair - base||^2        (1: all of it, 0: none)

where with a `format` the base that is subtracted from `merged` is rounded to it too, so that what rounding alone does
is not counted. Rounding a merged weight back to a low-bit grid can lose the adapter whole, with a small divergence to
show for it; that is why the effect is the gate. Below it nothing is kept.

An adapter belongs to the base it was trained on: where the base's files are not those that were recorded, that is said.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from strop.data.samples import prepare
from strop.errors import FormatError, GateError, ModelError, UsageError
from strop.files import compressed_tensors
from strop.files.folders import atomic_folder, check_target, write_json
from strop.files.peft_adapter import AdapterConfig, base_digest
from strop.files.saving import check_expressible, skeleton, write_model
from strop.layers.base import dense_weight, linear_bias, linear_shape
from strop.layers.lora_linear import LoraLinear
from strop.layers.quant_embedding import restore_embedding
from strop.layers.quant_experts import quant_experts, restore_experts
from strop.layers.quantized import QUANTIZED, QuantizedLinear, quantized_linear
from strop.layers.surgery import detach_lora, linear_modules, lora_modules, plan_linears, replace
from strop.models import OpenedModel, load
from strop.models.sources import find_folder
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.reductions import all_finite
from strop.numerics.scheme import Scheme, parse_format
from strop.progress import SILENT, Reporter
from strop.recipes.manifest import adapter_digest
from strop.recipes.probing import PROMPTS, asked_ids, computing_in_fp32, rows_of_run
from strop.recipes.rows import Rows, held_out_records
from strop.training.exporting import ADAPTER

EFFECT_GATES: Final = {"quantized": 0.95, "bfloat16": 0.99, "float16": 0.99, "float32": 0.999}
"""Least share of the adapter's effect that a merged model keeps, by how its weights are stored."""

MAX_PROMPTS: Final = 16
MAX_TOKENS: Final = 256
LAST_TOKENS: Final = 16
"""Logits are compared at so many last positions of each prompt, at the most."""

MAX_LOGITS: Final = 1 << 24
"""Numbers kept of each model's logits (64 MiB in fp32); fewer positions are compared where the vocabulary is large."""


@dataclass(frozen=True)
class MergeResult:
    """A merged model and how near it is to the pair that was trained.

    Attributes:
        path: the merged model's folder.
        stored: format or dtype of its linear layers.
        layers: adapted layers that were merged.
        prompts: prompts compared.
        asked: where the prompts came from.
        arithmetic_error: largest logit difference between the pair and the sum in fp32, before it is stored.
        max_logit_difference: largest logit difference between the pair and the saved file, both computed in fp32.
        effect: share of the adapter's effect that the saved file keeps; None for an adapter that changes nothing.
        gate: least effect that is accepted.
        forced: whether it was kept although it lost more.
        warnings: what was noticed about adapter and base.
    """

    path: Path
    stored: str
    layers: int
    prompts: int
    asked: str
    arithmetic_error: float
    max_logit_difference: float
    effect: float | None
    gate: float
    forced: bool = False
    warnings: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"path": str(self.path), "warnings": list(self.warnings)}

    def lines(self) -> list[str]:
        """The result in sentences."""
        effect = (
            "the adapter changes nothing" if self.effect is None else f"{self.effect:.4f} of the adapter's effect kept"
        )
        return [
            *(f"warning: {warning}" for warning in self.warnings),
            f"{self.layers} layers merged, stored as {self.stored}; {effect} (gate {self.gate:g}"
            + (", not reached: kept because it was forced)" if self.forced else ")"),
            f"largest logit difference from base plus adapter on {self.prompts} prompts ({self.asked}): "
            f"{self.max_logit_difference:.2e} as stored, {self.arithmetic_error:.2e} before",
            f"the model: {self.path}",
        ]


def merge(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str | None = None,
    data: Rows | None = None,
    force: bool = False,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> MergeResult:
    """Merge an adapter into its base.

    Args:
        run: a run's folder, or an adapter's.
        output: the folder to write.
        format: round the linear layers to this, instead of storing them in the base's dtype.
        data: rows that are compared; without it the run's own validation rows, else a few built-in prompts.
        force: keep the merged model although it lost more of the adapter's effect than the gate allows.
        overwrite: replace what stands at `output`.
        reporter: told what happens.

    Raises:
        UsageError: `run` is no adapter, or something stands at `output`.
        FormatError: the format is unknown, needs a container, or cannot hold the layers; all are named.
        GateError: the merged model keeps too little of the adapter's effect; nothing was kept.
        MissingInputError, ModelError, FileFormatError: as `load` and the writer raise them.
    """
    scheme = None if format is None else _scheme(format)
    check_target(output, overwrite=overwrite)
    opened = load(run, to_merge=True)
    if opened.adapter is None:
        raise UsageError(f"{run}: holds a whole model, and a merge takes an adapter; there is nothing to merge")
    trained = _check_rounding(Path(opened.source), opened.adapter, scheme)
    warnings = (*_warnings(opened.adapter), *opened.warnings)
    for warning in warnings:
        reporter.note(f"warning: {warning}")
    model = opened.model
    plain = skeleton(model)
    if scheme is not None:
        names = list(linear_modules(model))
        plan_linears(model, scheme, names)
        check_expressible(scheme, {name: linear_shape(model.get_submodule(name)) for name in names}, plain)
    probe = _Probe.of(opened, Path(run), data)
    layers = len(lora_modules(model))
    reporter.start("merge", 4, "steps")
    try:
        pair, unmerged = probe.logits(model), _without_adapters(model, probe, None)
        rounded = unmerged if scheme is None else _without_adapters(model, probe, scheme)
        reporter.advance(1)
        arithmetic_error = _largest(_added_on_the_fly(model, probe), pair)
        reporter.advance(2)
        stored = _store(model, plain, scheme)
        with atomic_folder(output, overwrite=overwrite) as temporary:
            write_model(model, opened.tokenizer, temporary)
            opened.model = model = None  # type: ignore[assignment]  # the file is opened again, and one model fits
            reporter.advance(3)
            saved = probe.logits(load(temporary, tokenizer=False).model)
            effect = _effect(pair - unmerged, saved - rounded)
            gate = EFFECT_GATES["quantized" if scheme is not None else stored]
            lost = effect is not None and not effect >= gate and not trained  # what was trained loses nothing
            if lost and not force:
                raise GateError(_lost(output, scheme, stored, effect or 0.0, gate))
            result = MergeResult(
                path=Path(output),
                stored=stored,
                layers=layers,
                prompts=len(probe.prompts),
                asked=probe.asked,
                arithmetic_error=arithmetic_error,
                max_logit_difference=_largest(saved, pair),
                effect=effect,
                gate=gate,
                forced=lost,
                warnings=warnings,
            )
            source = {"source": os.path.abspath(opened.source), "source_sha256": adapter_digest(Path(opened.source))}
            write_json(temporary / "merge.json", result.to_dict() | {"path": "."} | source)
            reporter.advance(4)
    finally:
        reporter.finish()
    return result


def _scheme(format: str) -> Scheme:
    spec = parse_format(format)
    if spec.scheme.super_size is not None:
        compressed_tensors.check_scheme(spec.scheme)  # refuses it: no file that is written now holds the grid
    if spec.container is not None:
        raise FormatError(
            f"{format!r}: a GGUF file is written by `strop export ADAPTER --format {spec} -o FILE.gguf`, which merges "
            f"first; the same grid in a model's folder is {spec.scheme}"
        )
    if spec.scheme.activations is not None and spec.scheme.activations.is_static:
        raise FormatError(
            f"{spec}: the scale of the activations is fixed from data; merge without a format first, then strop "
            f"quantize --format {spec} --data FILE, or merge as int8-a8, which needs none"
        )
    return spec.scheme


def _check_rounding(folder: Path, adapter: AdapterConfig, scheme: Scheme | None) -> bool:
    """Whether an adapter is merged in the very rounding that it was trained through.

    Raises:
        UsageError: it was trained through another one, or one that is not made again from the sum alone.
    """
    record = adapter.record
    if record is None or record.rounded_to is None:
        return False
    beside = f"; the merged model that was trained lies in {folder.parent}" if folder.name == ADAPTER else ""
    if not record.remade:
        raise UsageError(
            f"{folder}: was rounded to {record.rounded_to} in training by codes or scales that the adapter does not "
            f"hold, and a merge cannot make them again{beside}"
        )
    if scheme is None or scheme.name != record.rounded_to:
        raise UsageError(
            f"{folder}: its sum with the base was rounded to {record.rounded_to} in training, and answers otherwise "
            f"when it is not; merge it with --format {record.rounded_to}{beside}"
        )
    return True


def _warnings(adapter: AdapterConfig) -> Iterator[str]:
    """What does not fit between the base that is there and the one that was recorded."""
    if adapter.record is None:
        yield (
            f"nothing records which files of {adapter.base} the adapter was trained on; if it was another precision, "
            "the merged model is not the one that was trained"
        )
    elif adapter.record.digest is not None and base_digest(find_folder(adapter.base)) != adapter.record.digest:
        yield (
            f"{adapter.base} holds other files than the base that the adapter was trained on (SHA-256 differs); the "
            "merged model is not the one that was trained"
        )


@dataclass(frozen=True)
class _Probe:
    """Token ids of what is asked, how many last positions of each are compared, and where they came from."""

    prompts: list[list[int]]
    positions: int
    asked: str

    @classmethod
    def of(cls, opened: OpenedModel, run: Path, data: Rows | None) -> _Probe:
        vocabulary = _embedding(opened.model).shape[0]
        prompts, asked = _prompts(opened, run, data, vocabulary)
        return cls(prompts, max(1, min(LAST_TOKENS, MAX_LOGITS // vocabulary // len(prompts))), asked)

    def logits(self, model: PreTrainedModel) -> Tensor:
        """Logits at the last positions of every prompt, computed in fp32 [tokens, vocabulary].

        All prompts are one batch, filled up on the right, so that every weight is widened once; the head, if it is a
        layer, is given the compared positions alone.

        Raises:
            ModelError: they are not finite.
        """
        lengths = [len(prompt) for prompt in self.prompts]
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for row, prompt in zip(ids, self.prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        real = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        compared = real & (torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None] - self.positions)
        head = model.get_output_embeddings()
        with torch.no_grad(), computing_in_fp32(model.eval()), contextlib.ExitStack() as stack:
            if head is not None:
                hook = head.register_forward_pre_hook(lambda _, given: given[0][compared.to(given[0].device)])
                stack.callback(hook.remove)
            device = model.device
            found = model(input_ids=ids.to(device), attention_mask=real.long().to(device), use_cache=False).logits
        logits = (found[compared.to(found.device)] if found.dim() == 3 else found).float().cpu()
        if not all_finite(logits):
            raise ModelError("the model's logits hold NaN or infinity, so nothing can be compared; check its weights")
        return logits


def _prompts(opened: OpenedModel, run: Path, data: Rows | None, vocabulary: int) -> tuple[list[list[int]], str]:
    tokenizer = opened.tokenizer
    if tokenizer is None:
        return [[(97 * at + 31 * row) % vocabulary for at in range(24)] for row in range(8)], "token ids in turn"
    records = held_out_records(data) if data is not None else rows_of_run(run, MAX_PROMPTS)
    if records:
        context = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None) or MAX_TOKENS
        samples = prepare(records[:MAX_PROMPTS], tokenizer, max_length=min(MAX_TOKENS, context)).samples
        name = "the run's own rows" if data is None else "rows of the data"
        return [list(sample.input_ids) for sample in samples[:MAX_PROMPTS]], name
    return [asked_ids(text, tokenizer) for text in PROMPTS], "built-in prompts"


def _without_adapters(model: PreTrainedModel, probe: _Probe, scheme: Scheme | None) -> Tensor:
    """What the base answers alone, with its linear layers rounded to `scheme` where one is given; all is put back."""
    adapters = detach_lora(model)
    stood: dict[str, nn.Module] = {}
    try:
        if scheme is not None:
            for name, module in linear_modules(model).items():
                if not _is_held_in(module, scheme):
                    stood[name] = replace(model, name, _rounded(name, dense_weight(module), module, scheme))
        return probe.logits(model)
    finally:
        for name, module in (stood | adapters).items():
            replace(model, name, module)


def _is_held_in(module: nn.Module, scheme: Scheme) -> bool:
    """Whether a layer's codes are the scheme's, in an order that files of ours can hold."""
    ordered = getattr(module, "group_index", None) is not None
    return isinstance(module, QUANTIZED) and module.scheme == scheme and not ordered


def _rounded(name: str, weight: Tensor, module: nn.Module, scheme: Scheme) -> QuantizedLinear:
    return quantized_linear(quantize_tensor(weight, scheme, where=name), linear_bias(module))


class _Added(nn.Module):
    """An adapted layer that computes with its merged weight, made in fp32 for each call."""

    def __init__(self, module: LoraLinear) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        bias = linear_bias(self.module)
        return functional.linear(x, dense_weight(self.module).to(x.dtype), None if bias is None else bias.to(x.dtype))


def _added_on_the_fly(model: PreTrainedModel, probe: _Probe) -> Tensor:
    """What the merged weights answer before they are stored; the model is as it was afterwards."""
    adapters: Mapping[str, LoraLinear] = lora_modules(model)
    try:
        for name, module in adapters.items():
            replace(model, name, _Added(module))
        return probe.logits(model)
    finally:
        for name, module in adapters.items():
            replace(model, name, module)


def _store(model: PreTrainedModel, plain: nn.Module, scheme: Scheme | None) -> str:
    """Exchange every adapted layer, and every one in another format, for its merged weight; returns how it is
    stored.
    """
    dtype = _embedding(model).dtype
    restore_embedding(model)
    for name, held in quant_experts(model).items():
        if held.scheme != scheme:
            restore_experts(model, name, dtype)
    for name, module in linear_modules(model).items():
        if scheme is not None:
            if not _is_held_in(module, scheme):
                replace(model, name, _rounded(name, dense_weight(module), module, scheme))
        elif isinstance(module, (LoraLinear, *QUANTIZED)):
            replace(model, name, _dense(dense_weight(module).to(dtype), module, like=plain.get_submodule(name)))
    return scheme.name if scheme is not None else str(dtype).removeprefix("torch.")


def _dense(weight: Tensor, module: nn.Module, *, like: nn.Module) -> nn.Module:
    """The layer that the plain model has in this place, with a weight [out, in] and the bias of `module`."""
    bias = linear_bias(module)
    weight = weight.t().contiguous() if isinstance(like, Conv1D) else weight
    like.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    like.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    return like


def _embedding(model: PreTrainedModel) -> Tensor:
    """The input embedding [vocabulary, hidden]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def _largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _effect(change: Tensor, merged: Tensor) -> float | None:
    """The projection of the merged model's change on the adapter's; None where the adapter changes no logit."""
    change = change.double()
    size = float(change.square().sum())
    return float((merged.double() * change).sum()) / size if size > 0 else None


def _lost(output: str | os.PathLike[str], scheme: Scheme | None, stored: str, effect: float, gate: float) -> str:
    advice = (
        "Merge without a format and quantize with data, or train through the grid: strop tune --method qat "
        f"--format {scheme.name}"
        if scheme is not None
        else "The change is too small for the base's dtype; keep the adapter apart, or train longer"
    )
    return (
        f"{output}: stored as {stored}, the merged model keeps {effect:.3f} of the adapter's effect, and {gate:g} is "
        f"needed; nothing was kept. {advice}"
    )

"""A base opened as a method needs it, and the layers put in place that the method trains.

    full      every weight, fp32 masters
    lora      an adapter over the base as it is saved
    qlora     an adapter over a base that is rounded while it loads
    qat       every weight, the linear ones through their rounding
    qat-lora  an adapter, through the rounding of its sum with the base

What does not go together is refused before any weight is read: whole weights of a quantized model, an adapter under
`full`, a quantized base under `lora`. Data and the loop are not here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strop.config import ALL_LINEAR, Full, Lora, Method, Qat, QatLora, QLora
from strop.errors import ConfigError, UsageError
from strop.files.peft_adapter import AdapterConfig, BaseRecord, base_digest, load_adapter, read_adapter_config
from strop.files.saving import check_expressible
from strop.layers.base import linear_shape
from strop.layers.grids import LearnedGrid
from strop.layers.quant_experts import quant_experts
from strop.layers.quantized import QUANTIZED
from strop.layers.scale_linear import ScaleLinear
from strop.layers.surgery import attach_lora, coverage, experts, lora_modules, select
from strop.models import load
from strop.models.adapter_base import base_precision, precision_notes
from strop.models.sources import find_folder, is_adapter, read_config
from strop.numerics.scheme import Scheme, parse_format, parse_scheme
from strop.progress import SILENT, Reporter
from strop.training.exporting import export_adapter, export_merged, export_model
from strop.training.optimizers import trained_parameters, widen_trained
from strop.training.preparing_qat import HELD_IN_8_BITS, put_qat, put_qat_lora

DEFAULT_QLORA_FORMAT: Final = "nf4-dq"


@dataclass(frozen=True)
class Base:
    """A model that is open for training.

    Attributes:
        model: on its device.
        tokenizer: its tokenizer.
        adapter: the adapter that is on it already, to be trained further; None where a new one comes.
        record: what an adapter's folder will say of its base.
        stored_dtype: of the base's weights on disk.
        scheme: how its linear layers are quantized; None where they are dense.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: AdapterConfig | None
    record: BaseRecord
    stored_dtype: torch.dtype
    scheme: Scheme | None

    def exporter(self, method: Method) -> Callable[[Path], None]:
        """Writes the model as it stands to a folder, in the form that the method ends in."""
        if isinstance(method, Lora | QLora):
            return lambda folder: export_adapter(self.model, self.tokenizer, folder, base=self.record)
        if isinstance(method, QatLora):
            return lambda folder: export_merged(
                self.model, self.tokenizer, folder, dtype=self.stored_dtype, base=self.record
            )
        return lambda folder: export_model(self.model, self.tokenizer, folder, dtype=self.stored_dtype)


@dataclass(frozen=True)
class Trained:
    """What is trained of a model.

    Attributes:
        layers: the linear layers that the method adapts or rounds.
        parameters: how many numbers are trained.
        total_parameters: how many the model has, counted before any packing.
        scheme: the grid of the linear layers; None where they are dense.
    """

    layers: list[str]
    parameters: int
    total_parameters: int
    scheme: Scheme | None

    @property
    def share(self) -> float:
        """Trained parameters over all parameters."""
        return self.parameters / self.total_parameters


def open_base(
    model: str | os.PathLike[str],
    method: Method,
    *,
    device: torch.device,
    dtype: torch.dtype,
    reporter: Reporter = SILENT,
) -> Base:
    """Open the base, and the adapter to be trained further if there is one.

    Args:
        model: a folder or a hub id; an adapter's folder stands for its base with that adapter on it.
        method: what is to be trained.
        device: where the model is put.
        dtype: of a frozen base; what is trained is fp32 in any case.
        reporter: told where the adapter was trained on another base.

    Raises:
        UsageError: the method cannot train such a model.
        ConfigError, FormatError, MissingInputError, ModelError, FileFormatError: as `load` and `load_adapter`.
    """
    folder = find_folder(model)
    adapter_folder = folder if is_adapter(folder) else None
    if isinstance(method, Lora | QLora) and method.adapter is not None:
        if adapter_folder is not None:
            raise ConfigError(f"adapter: the model {model} is an adapter itself; name its base as the model")
        adapter_folder = find_folder(method.adapter)
        if not is_adapter(adapter_folder):
            raise ConfigError(f"adapter: {method.adapter} holds no adapter_config.json; name an adapter's folder")
    if adapter_folder is not None and isinstance(method, Full | Qat | QatLora):
        raise UsageError(
            f"{model}: is an adapter, and {method.name} trains a whole model; merge it first (strop merge)"
        )
    adapter = read_adapter_config(adapter_folder) if adapter_folder is not None else None
    name = str(model)
    if adapter is not None and adapter_folder == folder:
        name, folder = adapter.base, find_folder(adapter.base)
    config, quantization = read_config(folder)
    scheme = _rounding(folder, method, adapter, quantized=quantization is not None)
    masters = isinstance(method, Full | Qat)
    opened = load(folder, scheme, dtype=torch.float32 if masters else dtype, device=device)
    for note in opened.notes:
        reporter.note(note)
    if adapter_folder is not None:
        adapter = load_adapter(opened.model, adapter_folder)
        for note in precision_notes(opened.model, adapter, adapter_folder, folder):
            reporter.note(f"warning: {note}")
    record = BaseRecord(
        base=str(folder) if os.path.exists(name) else name,
        format=scheme.name if scheme is not None and quantization is None else None,
        digest=None if masters else base_digest(folder),  # a checkpoint holds every weight of a whole model
        precision=None if masters else base_precision(opened.model),
    )
    if adapter is not None and adapter.record is not None:
        _tell_of_another_base(adapter.record, record, reporter)
    stored = getattr(config.get_text_config(), "dtype", None)
    return Base(
        model=opened.model,
        tokenizer=opened.require_tokenizer(),
        adapter=adapter,
        record=record,
        stored_dtype=stored if isinstance(stored, torch.dtype) else torch.float32,
        scheme=opened.scheme,
    )


def put_layers(base: Base, method: Method, *, seed: int, reporter: Reporter = SILENT) -> Trained:
    """Put the method's layers into the model and make trainable, in fp32, what the method trains.

    Args:
        base: what `open_base` gave; its model is changed in place.
        method: what is to be trained.
        seed: of a new adapter's first values.
        reporter: told how much is trained, and what is left out.

    Raises:
        TargetError: a target matches no layer.
        FormatError: the format does not fit a layer's shape, or cannot be saved.
    """
    model, scheme = base.model, base.scheme
    names: list[str] = []
    if isinstance(method, Lora | QLora):
        names = _put_adapters(base, method, seed=seed, reporter=reporter)
    elif isinstance(method, Qat | QatLora):
        scheme = parse_format(method.format).scheme
        shapes = {name: linear_shape(model.get_submodule(name)) for name in select(model, _targets(method))}
        if scheme.super_size is None:
            check_expressible(scheme, shapes, model)
        elif method.targets != (ALL_LINEAR,):
            raise UsageError(
                f"targets: {method.format} is written as a GGUF file, where other layers would be rounded untrained; "
                "leave targets out"
            )
        if isinstance(method, Qat):
            names = put_qat(model, scheme, method, _targets(method))
        else:
            names = put_qat_lora(model, scheme, method, _targets(method), seed=seed)
    else:
        model.requires_grad_(requires_grad=True)
    widen_trained(model)
    parameters = sum(parameter.numel() for parameter in trained_parameters(model).values())
    trained = Trained(names, parameters, _count_parameters(model), scheme)
    reporter.note(f"{parameters:,} of {trained.total_parameters:,} parameters are trained ({trained.share:.2%})")
    if names:
        what = f"trained through {scheme}" if isinstance(method, Qat | QatLora) else "adapted"
        reporter.note(f"{len(names)} linear layers, {coverage(model, names):.1%} of the weights, are {what}")
        left = [*experts(model), *quant_experts(model)]
        if left:
            reporter.note(f"{len(left)} tensors of experts are no linear layers and stay as they are ({left[0]}, ...)")
    return trained


def _rounding(folder: Path, method: Method, adapter: AdapterConfig | None, *, quantized: bool) -> Scheme | None:
    """What the base is rounded to while it is loaded; None: it is opened as it is."""
    if isinstance(method, QatLora):
        return _held(folder, method, quantized=quantized)
    if not isinstance(method, QLora):
        if quantized:
            raise UsageError(
                f"{folder}: its weights are quantized, and {method.name} needs them dense; train an adapter over it "
                "(--method qlora), or start from the full-precision model"
            )
        return None
    if method.format is not None:
        return parse_scheme(method.format)
    if quantized:
        return None
    record = adapter.record if adapter is not None else None
    return parse_scheme(record.format if record is not None and record.format else DEFAULT_QLORA_FORMAT)


def _held(folder: Path, method: QatLora, *, quantized: bool) -> Scheme | None:
    """What the base of an adapter that is rounded with it is held in."""
    if method.hold in ("codes", "zero-points"):
        return None if quantized else parse_format(method.format).scheme
    if quantized:
        raise UsageError(
            f"{folder}: its weights are quantized, and hold: {method.hold} adds to dense ones; use hold: codes, which "
            "moves the codes, or start from the full-precision model"
        )
    return parse_scheme(HELD_IN_8_BITS) if method.hold == "int8" else None


def _tell_of_another_base(before: BaseRecord, now: BaseRecord, reporter: Reporter) -> None:
    """Another precision is `precision_notes`' part."""
    if before.digest is not None and before.digest != now.digest:
        reporter.note(f"the adapter was trained on other weights ({before.base}) than those of {now.base}")


def _put_adapters(base: Base, method: Lora | QLora, *, seed: int, reporter: Reporter) -> list[str]:
    if base.adapter is None:
        if method.rank == "auto" or method.alpha is None:
            raise ConfigError("rank: got auto, which `strop tune` turns into a number; name the number here")
        return attach_lora(
            base.model,
            _targets(method),
            rank=method.rank,
            alpha=method.alpha,
            dropout=method.dropout,
            rank_stabilised=method.rank_stabilised,
            generator=torch.Generator().manual_seed(seed),
        )
    adapters = lora_modules(base.model)
    for module in adapters.values():
        module.dropout = method.dropout
    reporter.note(f"an adapter of rank {base.adapter.rank} is trained further")
    return list(adapters)


def _targets(method: Lora | QLora | Qat | QatLora) -> str | tuple[str, ...]:
    return ALL_LINEAR if method.targets == (ALL_LINEAR,) else method.targets


def _count_parameters(model: PreTrainedModel) -> int:
    """Parameters as they are counted before any packing; scales are none."""
    quantized = [module for module in model.modules() if isinstance(module, QUANTIZED)]
    experts = quant_experts(model).values()
    scaled = [module for module in model.modules() if isinstance(module, ScaleLinear)]
    grids = [module for module in model.modules() if isinstance(module, LearnedGrid)]
    packed = {id(value) for part in [*quantized, *experts, *scaled, *grids] for value in part.parameters()}
    count = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in packed)
    for module in [*quantized, *scaled]:
        count += module.in_features * module.out_features + (0 if module.bias is None else module.bias.numel())
    return count + sum(module.count * module.in_features * module.out_features for module in experts)

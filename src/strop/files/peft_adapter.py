"""LoRA adapters in PEFT's layout: ours open in PEFT, PEFT's open here.

    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight [r, in], base_model.model.<layer>.lora_B.weight
    [out, r] adapter_config.json         peft_type, r, lora_alpha, use_rslora, target_modules, base_model_name_or_path,
    ... strop_base.json             what PEFT has no field for: the base's format and the SHA-256 of its files

Reading is strict: every tensor must land on a linear layer of the model, every layer must get both halves, shapes and
ranks must fit, and no layer that `target_modules` asks for may go without. What makes an adapter more than `W + scaling
* B @ A` (DoRA, initialisations that change the base such as PiSSA, saved modules, biases, experts) is refused by name,
as is any setting this module does not know and that is not at its default: such an adapter read as plain LoRA computes
something else, in silence.

An adapter belongs to the base that it was trained on, in the precision that it was trained on. `strop_base.json`
records both; opening it says where the precision differs (`models.adapter_base`), `merge` where the files do. An
adapter that was trained to be merged into a quantized base carries `"merge_only": true` there and in
adapter_config.json, and is refused unmerged, where it would answer worse than the base alone.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from strop.errors import FileFormatError, FormatError, MissingInputError, ModelError
from strop.files.folders import atomic_folder, read_json, sha256_files, write_json
from strop.files.peft_fields import by_pattern, not_plain, targeted
from strop.files.shards import Header, Part, read_header, read_tensor, write_file
from strop.layers.base import linear_shape
from strop.layers.lora_linear import LoraLinear
from strop.layers.surgery import linear_modules, lora_modules, replace

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECORD = "strop_base.json"
MERGE_ONLY = "merge_only"
"""The mark of an adapter that serves only merged, in both files: either may be lost."""

_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<half>[AB])\.weight")


@dataclass(frozen=True)
class BaseRecord:
    """What an adapter was trained on.

    Attributes:
        base: a folder or a hub id.
        format: the scheme that the base's linear layers were rounded to while loading; None where they were used as
            saved.
        digest: `base_digest` of the base's folder; None where it is not known.
        precision: what its layers were held in, however that came about: the format, that of a folder which is stored
            quantized, or "full precision"; None where it is not known.
    """

    base: str
    format: str | None = None
    digest: str | None = None
    precision: str | None = None


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's folder says of it.

    Attributes:
        base: the base's folder (relative ones resolved against the adapter's folder) or hub id; empty where PEFT knew
            none.
        rank: r of the layers that `ranks` does not name; `alpha` likewise.
        rank_stabilised: scaled by alpha / sqrt(r) instead of alpha / r.
        dropout: on the adapter's input, in training.
        targets: `target_modules` as PEFT holds it.
        fields: the whole of adapter_config.json.
        record: what `strop_base.json` says; None where there is none.
        merge_only: the adapter was trained to be merged into its quantized base.
    """

    base: str
    rank: int
    alpha: float
    rank_stabilised: bool
    dropout: float
    targets: str | tuple[str, ...]
    fields: Mapping[str, Any]
    record: BaseRecord | None
    merge_only: bool

    def rank_of(self, layer: str) -> int:
        """Rank of one layer, by its full name."""
        return int(by_pattern(self.fields.get("rank_pattern") or {}, layer, self.rank))

    def alpha_of(self, layer: str) -> float:
        """Numerator of one layer's scaling, by its full name."""
        return float(by_pattern(self.fields.get("alpha_pattern") or {}, layer, self.alpha))


def base_digest(folder: str | os.PathLike[str]) -> str:
    """Return the SHA-256 that stands for a base's weights: of its config.json and every safetensors file, or of its
    GGUF file.

    Raises:
        MissingInputError: there is no such folder, or no such file in it.
    """
    folder = Path(folder)
    if folder.is_file():
        return sha256_files({"model.gguf": folder})  # whatever it is called
    files = {path.name: path for path in [*folder.glob("config.json"), *folder.glob("*.safetensors")]}
    if not any(name.endswith(".safetensors") for name in files):
        raise MissingInputError(f"{folder}: holds no safetensors files to take a digest of")
    return sha256_files(files)


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base: BaseRecord,
    tokenizer: PreTrainedTokenizerBase | None = None,
    merge_only: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a model's adapters, and nothing of its base, to a folder that stands whole or not at all.

    Args:
        model: holds `LoraLinear` layers.
        folder: where to.
        base: what the adapters were trained on.
        tokenizer: saved beside them, with its chat template.
        merge_only: mark that they serve only merged into a quantized base.
        overwrite: replace what stands there.

    Raises:
        UsageError: as `atomic_folder`.
        ModelError: as `write_adapter`.
    """
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        write_adapter(model, temporary, base=base, merge_only=merge_only)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def write_adapter(model: nn.Module, folder: Path, *, base: BaseRecord, merge_only: bool = False) -> None:
    """Write a model's adapters into an existing folder, such as a checkpoint that is being written.

    Raises:
        ModelError: the model has no adapter, adapters that differ in dropout or stabilisation, or values that are not
            finite.
    """
    adapters = lora_modules(model)
    if not adapters:
        raise ModelError(f"{type(model).__name__} has no LoRA layer, so there is no adapter to save")
    broken = [
        name
        for name, module in adapters.items()
        if not (torch.isfinite(module.lora_A).all() and torch.isfinite(module.lora_B).all())
    ]
    if broken:
        raise ModelError(
            f"the adapters of {len(broken)} layer(s) hold NaN or infinite values ({', '.join(broken[:3])}); training "
            "went wrong, "
            "and nothing was saved"
        )
    parts = []
    for name, module in adapters.items():
        halves = {"lora_A": module.lora_A.detach(), "lora_B": module.lora_B.detach()}
        parts.append(Part.of({f"base_model.model.{name}.{half}.weight": tensor for half, tensor in halves.items()}))
    write_file(folder / WEIGHTS, parts, metadata={"format": "pt"})
    mark = {MERGE_ONLY: True} if merge_only else {}  # PEFT says that it does not know the key, and so that there is one
    write_json(folder / CONFIG, _config(model, adapters, base) | mark)
    record = {"base": _absolute(base.base), "format": base.format, "digest": base.digest, "precision": base.precision}
    record["merge_only"] = merge_only
    write_json(folder / RECORD, record)


def read_adapter_config(folder: str | os.PathLike[str]) -> AdapterConfig:
    """Read and check what an adapter's folder says of it; no tensor is read.

    Raises:
        MissingInputError: the folder holds no adapter_config.json.
        FileFormatError: a field has the wrong type or value.
        FormatError: the adapter is of a kind that strop does not compute; every reason is named.
    """
    folder = Path(folder)
    path = folder / CONFIG
    fields = read_json(path)
    reasons = not_plain(fields)
    if reasons:
        raise FormatError(
            f"{path}: this adapter is more than W + scaling * B @ A: {'; '.join(reasons)}. strop reads plain LoRA"
        )
    rank, alpha, dropout = fields.get("r"), fields.get("lora_alpha"), fields.get("lora_dropout", 0.0)
    base, targets = fields.get("base_model_name_or_path"), fields.get("target_modules")
    problems = []
    if type(rank) is not int or rank < 1:
        problems.append(f"r is {rank!r}, a rank of at least 1 is needed")
    if not _is_number(alpha):
        problems.append(f"lora_alpha is {alpha!r}, a number is needed")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout is {dropout!r}, a number from 0 to below 1 is needed")
    if not isinstance(fields.get("use_rslora") or False, bool):
        problems.append(f"use_rslora is {fields['use_rslora']!r}, true or false is needed")
    if base is not None and not isinstance(base, str):
        problems.append(f"base_model_name_or_path is {base!r}, a folder or hub id is needed")
    if not isinstance(targets, str) and not (
        isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    ):
        problems.append(f"target_modules is {targets!r}, a text or a list of texts is needed")
    for name, accepts in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        given = fields.get(name) or {}
        if not isinstance(given, dict) or not all(accepts(value) for value in given.values()):
            problems.append(f"{name} is {given!r}, patterns with numbers are needed")
    if problems:
        raise FileFormatError(f"{path}: {'; '.join(problems)}")
    record, merge_only = _read_record(folder)
    if not isinstance(fields.get(MERGE_ONLY) or False, bool):
        raise FileFormatError(f"{path}: {MERGE_ONLY} is {fields[MERGE_ONLY]!r}, true or false is needed")
    return AdapterConfig(
        base=_resolve(folder, base) if base else "",
        rank=int(fields["r"]),
        alpha=float(fields["lora_alpha"]),
        rank_stabilised=bool(fields.get("use_rslora") or False),
        dropout=float(dropout),
        targets=targets if isinstance(targets, str) else tuple(fields["target_modules"]),
        fields=fields,
        record=record,
        merge_only=merge_only or bool(fields.get(MERGE_ONLY)),
    )


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], *, to_merge: bool = False) -> AdapterConfig:
    """Put the adapter in `folder` over the model's linear layers, which are frozen.

    Args:
        model: the adapter's base, dense or quantized.
        folder: an adapter in PEFT's layout.
        to_merge: the adapter will be merged; allows one that serves in no other way.

    Raises:
        MissingInputError, FormatError: as `read_adapter_config`.
        FileFormatError: the file is no safetensors file.
        ModelError: a tensor has no place in the model, a layer lacks its half or its adapter, a shape or rank does not
            fit, or a value is not finite; everything is listed, and the model is as it was.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    if config.merge_only and not to_merge:
        raise ModelError(
            f"{folder}: this adapter was trained to be merged into its quantized base, and answers worse than that "
            "base when "
            "it is not; merge it (strop merge), then use the merged model"
        )
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (
            ", which strop does not open (a pickle runs the code in it)"
            if (folder / "adapter_model.bin").is_file()
            else ""
        )
        raise ModelError(f"{folder}: holds no {WEIGHTS}" + (f", only adapter_model.bin{pickled}" if pickled else ""))
    header = read_header(path)
    linears = linear_modules(model)
    problems = _misfits(config, header, linears)
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ModelError(
            f"{path}: this adapter does not fit {type(model).__name__}:\n  " + "\n  ".join(shown) + "\n"
            f"It names {config.base or 'nothing'} as its base; open it on the model that it was trained on"
        )
    made: dict[str, LoraLinear] = {}
    adapted = {match["layer"] for key in header.entries if (match := _KEY.fullmatch(key))}
    for name in [name for name in linears if name in adapted]:
        halves = {half: read_tensor(path, _key(name, half), header=header).float() for half in "AB"}
        if not all(torch.isfinite(half).all() for half in halves.values()):
            raise ModelError(f"{path}: {name}: the adapter holds NaN or infinite values; it cannot be used")
        module = LoraLinear(
            linears[name],
            config.rank_of(name),
            config.alpha_of(name),
            dropout=config.dropout,
            rank_stabilised=config.rank_stabilised,
            generator=torch.Generator(),
        )
        with torch.no_grad():
            module.lora_A.copy_(halves["A"])
            module.lora_B.copy_(halves["B"])
        made[name] = module
    model.requires_grad_(requires_grad=False)
    for name, module in made.items():
        module.requires_grad_(requires_grad=False)
        module.lora_A.requires_grad = True
        module.lora_B.requires_grad = True
        replace(model, name, module)
    return config


def _key(layer: str, half: str) -> str:
    return f"base_model.model.{layer}.lora_{half}.weight"


def _misfits(config: AdapterConfig, header: Header, linears: Mapping[str, nn.Module]) -> list[str]:
    """Everything about the file's tensors that does not fit the model, from names and shapes alone."""
    problems = []
    layers: dict[str, set[str]] = {}
    for key in header.entries:
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"{key}: is not the name of a LoRA tensor")
        elif match["layer"] not in linears:
            problems.append(f"{key}: the model has no linear layer {match['layer']} inside its blocks")
        else:
            layers.setdefault(match["layer"], set()).add(match["half"])
    for layer, halves in layers.items():
        if isinstance(linears[layer], LoraLinear):
            problems.append(f"{layer}: has an adapter already; strop opens one at a time")
            continue
        problems += [f"{_key(layer, half)}: missing" for half in sorted({"A", "B"} - halves)]
        rows, columns = linear_shape(linears[layer])
        rank = config.rank_of(layer)
        for half, needed in (("A", (rank, columns)), ("B", (rows, rank))):
            entry = header.entries.get(_key(layer, half))
            if entry is not None and entry.shape != needed:
                problems.append(f"{_key(layer, half)}: shape {list(entry.shape)}, the layer and r need {list(needed)}")
            if entry is not None and not entry.dtype.is_floating_point:
                problems.append(f"{_key(layer, half)}: dtype {entry.dtype}, a float is needed")
    wanted = targeted(config.targets, config.fields, linears)
    problems += [
        f"{layer}: target_modules asks for it, the file holds nothing for it" for layer in wanted if layer not in layers
    ]
    if not layers and not problems:
        problems.append("the file holds no tensors")
    return problems


def _config(model: nn.Module, adapters: Mapping[str, LoraLinear], base: BaseRecord) -> dict[str, Any]:
    shared = {}
    for what in ("dropout", "rank_stabilised"):
        values = {getattr(module, what) for module in adapters.values()}
        if len(values) > 1:
            raise ModelError(f"the adapters differ in {what} ({sorted(values)}); PEFT's layout holds one for all")
        shared[what] = values.pop()
    rank = Counter(module.rank for module in adapters.values()).most_common(1)[0][0]
    alpha = Counter(module.alpha for module in adapters.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": _absolute(base.base),
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": shared["dropout"],
        "use_rslora": shared["rank_stabilised"],
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": all(isinstance(module.base, Conv1D) for module in adapters.values()),
        "init_lora_weights": True,
        "target_modules": _target_modules(model, list(adapters)),
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {re.escape(name): module.rank for name, module in adapters.items() if module.rank != rank},
        "alpha_pattern": {
            re.escape(name): _plain(module.alpha) for name, module in adapters.items() if module.alpha != alpha
        },
    }


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of the names where those reach these layers and no other module, else the full names."""
    last = sorted({name.rpartition(".")[2] for name in names})
    own = {name + inner for name in names for inner in ("", ".base")}  # what a LoraLinear holds is not another module
    reached = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return last if reached <= own else sorted(names)


def _read_record(folder: Path) -> tuple[BaseRecord | None, bool]:
    path = folder / RECORD
    if not path.is_file():
        return None, False
    fields = read_json(path)
    texts = {name: fields.get(name) for name in ("base", "format", "digest", "precision")}
    wrong = [
        name for name, value in texts.items() if not isinstance(value, str) and (name == "base" or value is not None)
    ]
    if wrong or not isinstance(fields.get("merge_only") or False, bool):
        raise FileFormatError(
            f"{path}: {', '.join(wrong or ['merge_only'])} is not what the file must hold (texts; merge_only: true or "
            "false)"
        )
    record = BaseRecord(str(texts["base"]), texts["format"], texts["digest"], texts["precision"])
    return record, bool(fields.get("merge_only") or False)


def _absolute(base: str) -> str:
    """A folder's or file's full path, since an adapter may be opened from anywhere; a hub id as it is."""
    return os.path.abspath(base) if os.path.exists(base) else base


def _resolve(folder: Path, base: str) -> str:
    """A relative base is looked for beside the adapter first; what is no folder there is left for the opener."""
    beside = folder / base
    return str(beside.resolve()) if not os.path.isabs(base) and beside.exists() else base


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number

"""`load`: opens a causal language model, its tokenizer and its adapter through transformers' own loader.

    full precision            folder with config.json and safetensors       -> dense layers
    the same, with `format`   rounded while it is read, one weight at a time -> `QuantLinear`, `QuantExperts`
    compressed-tensors,       codes taken over bit for bit                   -> `QuantLinear`
    GPTQ, AWQ, bitsandbytes                                                     (8-bit bitsandbytes: `Int8Linear`)
    a GGUF file               its codes bit for bit, the rest decoded        -> `QuantLinear`, `QuantExperts`, dense
    adapter (PEFT's layout)   its base by any of the above, then the adapter -> `LoraLinear` over it, fp32
    a run of strop            its best part, else its last                   -> as that part says

Every tensor of the files must have a place in the model and every place a tensor, heads tied to the embedding aside. No
pickle is opened and no code that a model brings along is run.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from strop.errors import ConfigError, FormatError, ModelError, StropError, nearest
from strop.files.gguf import is_gguf
from strop.files.peft_adapter import AdapterConfig, load_adapter, read_adapter_config
from strop.files.shards import tensor_files
from strop.layers.quant_experts import QuantExperts
from strop.layers.quantized import QUANTIZED
from strop.models.adapter_base import precision_notes
from strop.models.containers import Container, container_for
from strop.models.gguf_base import GgufBase, gguf_tokenizer, open_gguf
from strop.models.hook import Plan, ReadingPlan, Rounding, RoundingPlan, SkeletonPlan
from strop.models.quantizer import StropConfig, detach, register
from strop.models.sources import find_folder, first_line, has_tokenizer, is_adapter, read_config
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scheme import Scheme, parse_format

_QUANTIZED = (*QUANTIZED, QuantExperts)

_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@dataclass
class OpenedModel:
    """A model that is open, with what is known of it.

    Attributes:
        model: transformers' model in evaluation mode; quantized layers are `QuantLinear`, adapted ones `LoraLinear`.
        tokenizer: None where the folder brings none, or none was asked for.
        source: the folder that was opened (for a hub id, the one in the local cache).
        scheme: how the linear layers are quantized; None in full precision, and where they differ.
        adapter: the adapter's configuration; None without an adapter.
        notes: what is held otherwise than the file has it.
        warnings: where an adapter lies over another precision than it was trained on, or may.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: str
    scheme: Scheme | None
    adapter: AdapterConfig | None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def format(self) -> str:
        """What the linear layers are held in: a scheme, several ("mixed: ..."), or the dtype."""
        names = sorted({module.scheme.name for module in self.model.modules() if isinstance(module, _QUANTIZED)})
        if not names:
            return str(self.model.dtype).removeprefix("torch.")
        return names[0] if len(names) == 1 else f"mixed: {', '.join(names)}"

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ModelError: there is none.
        """
        if self.tokenizer is None:
            raise ModelError(
                f"{self.source}: holds no tokenizer, and text is needed here; save the base model's tokenizer into it"
            )
        return self.tokenizer


def load(
    path_or_id: str | os.PathLike[str],
    format: str | Scheme | Mapping[str, Scheme] | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    tokenizer: bool = True,
    rounding: Rounding | None = None,
    keep: Collection[str] = (),
    to_merge: bool = False,
) -> OpenedModel:
    """Open a model.

    Args:
        path_or_id: a folder (model, adapter or run), a GGUF file, or a hub id.
        format: round the linear layers and experts to this while loading (`int4-g32`, `nf4-dq`, ...). Over an adapter
            it says how its base is rounded, instead of how it was in training. A scheme for each layer, by full name
            (an expert's is that of its parameter and its number, `...experts.down_proj.3`), rounds those
            layers and no others.
        dtype: of the weights that stay dense, and of the activations; `"auto"` is the checkpoint's own. A weight that
        is to
            be rounded is cast to it first, so that loading with a format is loading and then rounding, bit for bit.
        device: where the model is put.
        tokenizer: whether to open the tokenizer too.
        rounding: how a weight becomes a `QuantizedTensor` of the format; rounding to nearest by default.
        keep: full names of linear layers that are not rounded.
        to_merge: the adapter is opened to be merged; allows one that was trained to serve in no other way.

    Raises:
        MissingInputError: no such folder or hub id.
        ModelError: no weights, no configuration, missing or unexpected tensors, a kind of model that strop does not
        open. FileFormatError: a file is not what its format demands (truncated, corrupt). FormatError: the format is
        unknown, does not fit a shape, or the model is quantized already. ConfigError: an unknown dtype or device.
    """
    scheme = parse_format(format).scheme if isinstance(format, str) else format
    torch_dtype, torch_device = _dtype(dtype), _device(device)
    folder = find_folder(path_or_id)
    if not is_adapter(folder):
        opened = _open_model(folder, scheme, torch_dtype, torch_device, rounding, keep)
        homes = [folder]
    else:
        adapter = read_adapter_config(folder)
        base = _find_base(folder, adapter)
        if scheme is None and adapter.record is not None and adapter.record.format is not None:
            scheme = parse_format(adapter.record.format).scheme  # the precision that it was trained on
        opened = _open_model(base, scheme, torch_dtype, torch_device, rounding, keep)
        opened.adapter = load_adapter(opened.model, folder, to_merge=to_merge)
        opened.warnings += precision_notes(opened.model, opened.adapter, folder, base)
        opened.source = str(folder)
        homes = [folder, base]
    if tokenizer:
        opened.tokenizer = next((open_tokenizer(home) for home in homes if has_tokenizer(home)), None)
    return opened


def open_skeleton(folder: Path) -> PreTrainedModel:
    """The model in float32 with the big weights of its blocks left on the meta device; see `models.blocks`.

    Raises:
        As `load`; ModelError too where the folder is an adapter, FormatError where it is quantized.
    """
    if is_adapter(folder):
        raise ModelError(f"{folder}: is an adapter; merge it first (strop merge)")
    config, quantization = read_config(folder)
    if quantization is not None:
        raise FormatError(f"{folder}: is quantized already ({quantization.get('quant_method')})")
    tensor_files(folder)
    return _through_transformers(folder, config, SkeletonPlan(torch.device("cpu")), torch.float32).eval()


def _find_base(folder: Path, adapter: AdapterConfig) -> Path:
    if not adapter.base:
        raise ModelError(
            f"{folder}: adapter_config.json names no base (base_model_name_or_path); write the folder or hub id of the "
            "model "
            "that it was trained on there"
        )
    try:
        base = find_folder(adapter.base)
    except StropError as error:
        raise type(error)(
            f"{folder}: the adapter's base (base_model_name_or_path) cannot be opened. {error}"
        ) from error
    if is_adapter(base):
        raise ModelError(f"{folder}: the adapter's base {base} is an adapter too; merge that one first (strop merge)")
    return base


def _open_model(
    folder: Path,
    scheme: Scheme | Mapping[str, Scheme] | None,
    dtype: torch.dtype | str,
    device: torch.device,
    rounding: Rounding | None,
    keep: Collection[str],
) -> OpenedModel:
    if is_gguf(folder):
        return _open_gguf(folder, scheme, dtype, device, rounding, keep)
    config, quantization = read_config(folder)
    tensor_files(folder)  # every header is checked before transformers opens a file
    container = None if quantization is None else container_for(folder, quantization)
    plan = _plan(folder, container, scheme, device, rounding, keep)
    model = _through_transformers(folder, config, plan, dtype)
    return OpenedModel(model.to(device), None, str(folder), _true_scheme(model), None)  # type: ignore[arg-type]


def _open_gguf(
    path: Path,
    scheme: Scheme | Mapping[str, Scheme] | None,
    dtype: torch.dtype | str,
    device: torch.device,
    rounding: Rounding | None,
    keep: Collection[str],
) -> OpenedModel:
    base = open_gguf(path)
    plan = _plan(path, base if base.is_quantized else None, scheme, device, rounding, keep)
    held = dtype if isinstance(dtype, torch.dtype) else base.dtype
    base.config.dtype = held
    model = _through_transformers(path, base.config, plan, held, state=base.state(held, codes=base.is_quantized))
    return OpenedModel(model.to(device), None, str(path), _true_scheme(model), None, base.notes())  # type: ignore[arg-type]


def _plan(
    where: Path,
    held: Container | GgufBase | None,
    scheme: Scheme | Mapping[str, Scheme] | None,
    device: torch.device,
    rounding: Rounding | None,
    keep: Collection[str],
) -> Plan | None:
    """What becomes of the weights while they are read: codes that are held are taken over, others may be rounded."""
    if held is not None:
        _check_not_twice(where, scheme, held.scheme)
        return ReadingPlan(held, device)
    return None if scheme is None else _rounding_plan(where, scheme, device, rounding, keep)


def _check_not_twice(folder: Path, scheme: Scheme | Mapping[str, Scheme] | None, held: Scheme | None) -> None:
    if scheme is not None and scheme != held:
        raise FormatError(
            f"{folder}: is quantized already, as {held or 'several formats'}; it cannot be rounded to {scheme} on top. "
            "Open it without a format, or round the model that it came from"
        )


def _rounding_plan(
    folder: Path,
    scheme: Scheme | Mapping[str, Scheme],
    device: torch.device,
    rounding: Rounding | None,
    keep: Collection[str],
) -> RoundingPlan:
    if rounding is None:
        _check_no_static(folder, scheme)
    return RoundingPlan(scheme, rounding or (lambda name, weight: _nearest(name, weight, scheme)), device, keep=keep)


def _through_transformers(
    folder: Path,
    config: Any,
    plan: Plan | None,
    dtype: torch.dtype | str,
    *,
    state: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The model as transformers' loader opens it: from the folder's files, or from `state` instead."""
    opener: Any = AutoModelForCausalLM
    options: dict[str, Any] = {}
    if state is not None:
        opener, options = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], {"state_dict": state}
    if plan is not None:
        register()
        options["quantization_config"] = StropConfig(plan)
    problems = [] if plan is None else plan.problems
    try:
        with quiet():
            opened: Any = opener.from_pretrained(
                folder if state is None else None,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported below, with the other problems
                output_loading_info=True,
                **options,
            )
            model, info = opened
    except StropError as error:
        raise type(error)(f"{folder}: {error}") from error
    except Exception as error:
        if problems:
            raise _collected(folder, problems) from error
        raise ModelError(f"{folder}: transformers cannot open it: {first_line(error)}") from error
    if problems:
        raise _collected(folder, problems)
    _check_keys(folder, model, info, plan)
    if plan is not None:
        detach(model)
    return model


def _check_keys(folder: Path, model: PreTrainedModel, info: Mapping[str, Any], plan: Plan | None) -> None:
    kinds = {
        "missing (the model needs them, the files do not hold them)": sorted(info["missing_keys"]),
        "unexpected (the files hold them, the model has no place for them)": sorted(info["unexpected_keys"]),
        "of another shape than config.json says": [
            f"{name} {tuple(held)}, needed {tuple(needed)}" for name, held, needed in sorted(info["mismatched_keys"])
        ],
    }
    lines = [f"  {len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    if not lines:
        left_out = plan.weights if isinstance(plan, SkeletonPlan) else set[str]()
        lost = [name for name, part in model.named_parameters() if part.is_meta and name not in left_out]
        lines = [f"  {len(lost)} never arrived: {_listed(lost)}"] if lost else []
    if lines:
        raise ModelError(
            "\n".join([f"{folder}: the weights do not fit {type(model).__name__}; tensors are", *lines])
            + "\nOpen a folder whose weights and config.json belong together"
        )


def _listed(names: list[str], most: int = 12) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"


def _collected(folder: Path, problems: list[StropError]) -> StropError:
    texts = [str(problem) for problem in problems]
    return type(problems[0])("\n".join([f"{folder}: {texts[0]}", *texts[1:]]))


def _check_no_static(folder: Path, scheme: Scheme | Mapping[str, Scheme]) -> None:
    for wanted in [scheme] if isinstance(scheme, Scheme) else scheme.values():
        if wanted.activations is not None and wanted.activations.is_static:
            raise FormatError(
                f"{folder}: {wanted} has one scale for all activations of a layer, which calibration fixes; quantize "
                f"with data first (strop quantize --format {wanted} --data FILE), or open as int8-a8"
            )


def _nearest(name: str, weight: torch.Tensor, scheme: Scheme | Mapping[str, Scheme]) -> QuantizedTensor:
    return quantize_tensor(weight, scheme if isinstance(scheme, Scheme) else scheme[name], where=name)


def _true_scheme(model: nn.Module) -> Scheme | None:
    """The scheme of the quantized layers: their tensors know the scales' dtype, a configuration may not say it."""
    schemes = {module.scheme for module in model.modules() if isinstance(module, _QUANTIZED)}
    return schemes.pop() if len(schemes) == 1 else None


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder, or in a GGUF file.

    Raises:
        ModelError: it cannot be opened.
        FormatError: a GGUF file's is of a kind that strop does not know.
    """
    if is_gguf(folder):
        made = gguf_tokenizer(folder)
        if made is None:
            raise ModelError(f"{folder}: holds no tokenizer")
        return made
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{folder}: its tokenizer cannot be opened: {first_line(error)}") from error


def _dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    if dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise ConfigError(f"dtype {dtype!r} is unknown{nearest(str(dtype), _DTYPES)}; there are auto, {', '.join(_DTYPES)}")


def _device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used here: {first_line(error)}") from error
    return chosen


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Set transformers' bars and reports aside: what matters of them is raised as an error here."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()

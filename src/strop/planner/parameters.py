"""How many parameters a fine-tuning trains: the square-matrix approximation, and the true count of an architecture.

Two figures exist for "the trainable parameters of LoRA at rank r", and they are not the same:

- the **approximation** takes all N parameters of a model as one square matrix of side sqrt(N). Its two factors B and
  A hold 2 * r * sqrt(N) numbers. It needs no architecture, and it is low: for Llama-2-7B at rank 16 by a factor of
  15;
- the **true count** is the sum over the adapted linear layers of r * (in_features + out_features).

True counts come from the model that transformers builds from the configuration on the meta device: shapes without
storage, so a model of 180 thousand million parameters is counted in a tenth of a second. Nothing is downloaded beyond
a `config.json`, no weight is read and no code that comes with a model is run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strop.errors import MissingInputError, ModelError, UsageError, nearest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[KMBT]?)", re.ASCII)
_WHOLE_LOGITS = ("lm_head_multiplier", "output_multiplier")
"""Numbers by which logits are scaled and whose names `training.losses.find_head` does not look at."""
_BLOCK = re.compile(r"^(.*?\.)?\d+(?=\.)")

# --- the approximation ------------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Read a parameter count as people write it: `7B`, `1.5B`, `350M`, `260K`, `124439808`.

    Raises:
        UsageError: the text is no such count, or is not above zero, or is not a whole number of parameters.

    >>> parse_size("1.5B")
    1500000000
    """
    found = _SIZE.fullmatch(text.strip().upper())
    try:
        count = Decimal(found["number"]) * _UNITS[found["unit"]] if found else Decimal(0)
    except InvalidOperation:  # more digits than a Decimal takes
        count = Decimal(0)
    if count <= 0 or count != count.to_integral_value() or count > 10**18:
        raise UsageError(f"size {text!r} is not a parameter count; write it as 7B, 1.5B, 350M or 124439808.")
    return int(count)


def parse_rank(text: str | int) -> int:
    """Read a rank: a whole number of at least 1.

    Raises:
        UsageError: it is anything else.
    """
    try:
        rank = int(str(text).strip())
    except ValueError:
        rank = 0
    if rank < 1:
        raise UsageError(f"rank {text!r} is not a whole number of at least 1; usual ranks are 8, 16 and 64.")
    return rank


def square_matrix_parameters(parameters: int, rank: int) -> int:
    """Return 2 * rank * sqrt(parameters), to the nearest whole number: LoRA on a model taken as one square matrix.

    A matrix of side n = sqrt(parameters) is changed by B [n, rank] times A [rank, n]. The root is taken on integers,
    so the result is exact for any size.

    >>> square_matrix_parameters(7_000_000_000, 1)
    167332
    >>> square_matrix_parameters(70_000_000_000, 512)
    270924934
    """
    square = 4 * rank * rank * parameters
    root = math.isqrt(square)
    return root + (square - root * root > root)  # above (root + 1/2)^2 exactly when the remainder passes the root


def abbreviate(count: int, *, digits: int = 0) -> str:
    """Shorten a count as notes do, rounding to the nearest: 167332 -> `167K`, 2677312 -> `3M`.

    >>> abbreviate(167_332), abbreviate(85_673_600), abbreviate(6_738_415_616, digits=2)
    ('167K', '86M', '6.74B')
    >>> abbreviate(529_150), abbreviate(999_999)
    ('529K', '1M')
    """
    if count < 1000:
        return str(count)
    for unit, size in (("K", 10**3), ("M", 10**6), ("B", 10**9)):
        # Compared after rounding, so that 999,999 is 1M and not 1000K.
        if round(count / size, digits) < 1000:
            return f"{count / size:.{digits}f}{unit}"
    return f"{count / 10**12:.{digits}f}T"


# --- the architecture -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearShape:
    """One linear layer: weight [out_features, in_features]."""

    name: str
    in_features: int
    out_features: int

    @property
    def weights(self) -> int:
        """The number of weights, the bias left out."""
        return self.in_features * self.out_features

    def adapter_parameters(self, rank: int) -> int:
        """What LoRA of this rank adds: A [rank, in] and B [out, rank]."""
        return rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class ExpertShape:
    """The weights of all experts of one layer, held as one tensor [experts, ., .].

    `linear` is the shape (out, in) of one expert where formats reach it; None where the model computes experts its own
    way, and they stay as they are.
    """

    name: str
    shape: tuple[int, int, int]
    linear: tuple[int, int] | None = None

    @property
    def weights(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """What planning needs to know of a model.

    `linears` are the linear layers inside the blocks, as `strop.layers.surgery.linear_modules` finds them; embeddings
    and output head are not among them. `experts` are a mixture's fused expert weights, which adapters leave alone;
    `active_experts` of them work on each token. `norms` stand in all blocks together, on
    the full hidden size; `query_features` is heads * head size, `key_value_features` the same of the key-value heads.
    `whole_logits` says that the logits are scaled behind the head in a way that the loss does not find, so that it
    cannot compute them piece by piece. All counts are of parameters; a tied head is counted once.
    """

    source: str
    architecture: str
    parameters: int
    embedding_parameters: int
    head_parameters: int
    tied: bool
    hidden_size: int
    layers: int
    norms: int
    vocabulary: int
    heads: int
    query_features: int
    key_value_features: int
    whole_logits: bool
    positions: int | None
    linears: tuple[LinearShape, ...]
    experts: tuple[ExpertShape, ...]
    active_experts: int

    @property
    def linear_weights(self) -> int:
        """The weights of all linear layers in the blocks."""
        return sum(linear.weights for linear in self.linears)

    @property
    def expert_weights(self) -> int:
        """The weights of all experts."""
        return sum(expert.weights for expert in self.experts)


def block_of(name: str) -> str:
    """Return the block of a layer: `model.layers.3` for `model.layers.3.mlp.up_proj`; empty outside any."""
    found = _BLOCK.match(name)
    return found[0] if found else ""


def lora_parameters(linears: Iterable[LinearShape], rank: int) -> int:
    """Return the true count of LoRA: the sum of rank * (in_features + out_features) over the adapted layers.

    >>> lora_parameters([LinearShape("q_proj", 4096, 4096)], 16)
    131072
    """
    return sum(linear.adapter_parameters(rank) for linear in linears)


def read_shape(source: str | Path | PreTrainedConfig | nn.Module) -> ModelShape:
    """Return the shape of a model: from a `config.json`, a model folder, a hub id, a configuration or a model in
    memory.

    Raises:
        MissingInputError: the path is not there, or the folder holds no config.json.
        ModelError: the configuration is not one that transformers can build a causal language model from.
    """
    shape, _ = open_shape(source)
    return shape


def open_shape(source: str | Path | PreTrainedConfig | nn.Module) -> tuple[ModelShape, nn.Module]:
    """Return the shape and the model it was read from (on the meta device unless `source` is a model), for `select`."""
    from torch import nn

    if isinstance(source, nn.Module):
        return _shape_of(source, getattr(getattr(source, "config", None), "_name_or_path", "") or "model"), source
    name = str(source) if isinstance(source, str | Path) else (source._name_or_path or source.model_type)
    config = _read_config(source) if isinstance(source, str | Path) else source
    model = meta_model(config, where=name)
    return _shape_of(model, name), model


def meta_model(config: PreTrainedConfig, *, where: str) -> nn.Module:
    """Build the causal language model of a configuration on the meta device: shapes and names, no storage.

    Raises:
        ModelError: transformers cannot build a causal language model from it.
    """
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        # Counted as the model it stands for: packed weights have other shapes.
        delattr(config, "quantization_config")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"{where}: transformers cannot build a causal language model from this configuration "
            f"(model_type {config.model_type!r}): {_first_line(error)}"
        ) from error
    model.tie_weights()
    return model


def _read_config(source: str | Path) -> PreTrainedConfig:
    from strop.files.gguf import is_gguf
    from strop.files.peft_adapter import read_adapter_config
    from strop.models.sources import BUNDLED, find_folder, is_adapter, read_config

    path = Path(source)
    if path.is_dir() or str(source) == BUNDLED:
        folder = find_folder(source)
        if is_adapter(folder):
            base = read_adapter_config(folder).base
            if Path(base).is_dir() and is_adapter(find_folder(base)):
                raise ModelError(f"{folder}: its base {base} is an adapter too; name the model below both.")
            return _read_config(base)
        return read_config(folder)[0] if is_gguf(folder) else _config_from_file(folder / "config.json")
    if path.is_file():
        return read_config(path)[0] if is_gguf(path) else _config_from_file(path)
    return _config_from_hub(str(source))


def _config_from_file(file: Path) -> PreTrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        fields: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not a JSON file: {_first_line(error)}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ModelError(f"{file}: no model configuration: it needs a field 'model_type' with the architecture's name.")
    kind = fields.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{file}: model_type {kind!r} is not an architecture of the installed transformers"
            f"{nearest(kind, CONFIG_MAPPING.keys())}; code that comes with a model is not run."
        )
    try:
        config = AutoConfig.for_model(kind, **fields)
    except Exception as error:  # the fields are a stranger's: transformers raises whatever its checks raise
        raise ModelError(f"{file}: transformers refuses this configuration: {_first_line(error)}") from error
    config._name_or_path = str(file.parent)
    return config


def _config_from_hub(name: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) or name in {".", ".."}:
        raise MissingInputError(f"{name}: no such file or folder, and not a hub id (owner/name).")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise MissingInputError(
            f"{name}: no such file or folder, nor a model in the local cache or on the hub ({_first_line(error)}). "
            "Name a folder, its config.json, or a hub id that can be reached."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _shape_of(model: nn.Module, name: str) -> ModelShape:
    from strop.layers.base import linear_shape
    from strop.layers.quant_experts import expert_weights
    from strop.layers.surgery import experts, linear_modules

    linears = []
    for path, module in linear_modules(model).items():
        out_features, in_features = linear_shape(module)
        linears.append(LinearShape(path, in_features, out_features))
    weights = dict(model.named_parameters())
    reached = {path: found.shape for path, found in expert_weights(model).items()}
    fused = tuple(ExpertShape(path, _three(weights[path].shape), reached.get(path)) for path in experts(model))
    text = model.config.get_text_config()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    embedding = model.get_input_embeddings().weight  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    head = model.get_output_embeddings()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    heads = int(getattr(text, "num_attention_heads", 1))
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    blocks = {block_of(linear.name) for linear in linears}
    # A norm of the residual stream: the one kind of leaf in a block whose weight is a vector of the hidden size.
    norms = [
        path
        for path, module in model.named_modules()
        if block_of(path) in blocks and getattr(getattr(module, "weight", None), "shape", None) == (text.hidden_size,)
    ]
    return ModelShape(
        source=name,
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embedding_parameters=embedding.numel(),
        head_parameters=0 if head is None else head.weight.numel(),
        tied=head is not None and head.weight is embedding,
        hidden_size=int(text.hidden_size),
        layers=int(text.num_hidden_layers),
        norms=len(norms),
        vocabulary=int(embedding.shape[0]),
        heads=heads,
        query_features=heads * int(head_size),
        key_value_features=int(_key_value_heads(text) or heads) * int(head_size),
        whole_logits=any(getattr(text, field, None) not in (None, 1, 1.0) for field in _WHOLE_LOGITS),
        positions=getattr(text, "max_position_embeddings", None),
        linears=tuple(linears),
        experts=fused,
        active_experts=int(getattr(text, "num_experts_per_tok", None) or 0) if fused else 0,
    )


def _key_value_heads(config: PreTrainedConfig) -> int | None:
    """Return the number of key-value heads; None where every head has its own."""
    for field in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, field, None):
            return int(getattr(config, field))
    return None


def _three(shape: Sequence[int]) -> tuple[int, int, int]:
    experts, rows, columns = shape
    return int(experts), int(rows), int(columns)

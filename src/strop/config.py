"""What a user may set for `tune`: typed, strict, with the names of the field accepted, every problem reported at once.

In a YAML file and as keyword arguments the settings are flat (`method: lora`, `rank: 8`, `epochs: 2`). Inside they are
grouped, so that no invalid combination can be held: `TuneConfig.method` is one of `Full`, `Lora`, `QLora`, `Qat`, each
with its own settings, and `TuneConfig.length` one of `Steps`, `Epochs`, `Minutes`. A setting of another method, an
unknown key, a wrong type, a key given twice under two names: all of them are collected into one `ConfigError`.

Keyword arguments (the command line's flags) beat the file, which beats the defaults below. `to_yaml` writes what
`load_config` reads back to an equal `TuneConfig`. What only the model can tell (does the format fit its shapes, do the
targets match anything) is checked by the recipes. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from strop.errors import ConfigError, MissingInputError, nearest

ALL_LINEAR: Final = "all-linear"
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _exponent_text(value: object) -> object:
    """Read `2e-5`, which YAML 1.1 takes for text because it has no dot, as the number that was meant."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _targets(value: object) -> object:
    """Accept a list of names, or one text with commas; `all` is LLaMA-Factory's word for `all-linear`."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list | tuple):
        names = cast("list[object] | tuple[object, ...]", value)
        if not names:
            raise ValueError("name at least one layer, or 'all-linear'")
        if "all" in names or ALL_LINEAR in names:
            if len(names) > 1:
                raise ValueError("'all-linear' stands alone")
            return (ALL_LINEAR,)
        return tuple(names)
    return value


def _dtype(value: object) -> object:
    return {"fp32": "float32", "bf16": "bfloat16"}.get(value, value) if isinstance(value, str) else value


Real: TypeAlias = Annotated[float, BeforeValidator(_exponent_text)]
Targets: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_targets)]


class _Settings(BaseModel):
    """Base of every group: unknown fields refused, types strict, frozen once made."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Full(_Settings):
    """Every weight is trained."""

    name: Literal["full"] = "full"


class _LowRank(_Settings):
    """What `Lora` and `QLora` share: W = W0 + scale * B A, with W0 frozen."""

    rank: int = Field(16, ge=1, description="Rank of B and A.")
    alpha: Real = Field(32.0, gt=0, description="The update is scaled by alpha / rank. Default: twice the rank.")
    dropout: Real = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: Targets = Field((ALL_LINEAR,), description="all-linear, or names, suffixes and patterns of layers.")
    rank_stabilised: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead (rsLoRA).")
    adapter: str | None = Field(None, description="Folder of an adapter to train further; it brings its own rank.")


class Lora(_LowRank):
    """A low-rank adapter over the base in 16 or 32 bits."""

    name: Literal["lora"] = "lora"


class QLora(_LowRank):
    """A low-rank adapter over a base that is quantized while it is loaded."""

    name: Literal["qlora"] = "qlora"
    format: str | None = Field(
        None, description="Grid of the frozen base. Default: the model's own if it is quantized, else nf4-dq."
    )


class Qat(_Settings):
    """Every weight is trained through the quantizer, and the linear layers are stored quantized."""

    name: Literal["qat"] = "qat"
    format: str = Field(description="Grid that the weights are trained for, for example int3-g32.")
    targets: Targets = Field((ALL_LINEAR,), description="Which linear layers are quantized.")


Method: TypeAlias = Full | Lora | QLora | Qat


class Steps(_Settings):
    """Stop after so many optimizer steps."""

    max_steps: int = Field(ge=1, description="Optimizer steps.")


class Epochs(_Settings):
    """Stop after so many passes over the training rows."""

    epochs: Real = Field(1.0, gt=0, description="Passes over the training rows; fractions are allowed.")


class Minutes(_Settings):
    """Stop after about so many minutes: the steps are counted out from a few timed ones, then fixed."""

    minutes: Real = Field(gt=0, description="Minutes of training; the number of steps is estimated at the start.")


Length: TypeAlias = Steps | Epochs | Minutes


class Samples(_Settings):
    """How records become token batches."""

    train_on: Literal["answers", "all"] = Field("answers", description="Which tokens carry the loss.")
    max_length: int | None = Field(
        None, ge=2, description="Tokens in a row; longer ones are truncated. Default: 1024, or the model's limit."
    )
    packing: bool = Field(default=False, description="Several rows in one sequence, isolated from each other.")
    chat_template: str | None = Field(None, description="chatml, plain, or a jinja file, for bases that have none.")
    valid_fraction: Real = Field(
        0.05, ge=0, lt=1, description="Share of the training rows held out where the data name no valid split."
    )


class Optimization(_Settings):
    """AdamW, its schedule, and how many rows make a step."""

    learning_rate: Real | None = Field(
        None,
        gt=0,
        description="Peak. Default: 2e-5 * 4096 / hidden size; for adapters ten times that.",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="How the rate falls after warm-up.")
    warmup_ratio: Real = Field(0.03, ge=0, lt=1, description="Share of the steps that warms up.")
    weight_decay: Real = Field(0.0, ge=0, description="AdamW's decay; norms, biases and other vectors are left out.")
    clip_norm: Real = Field(1.0, ge=0, description="Clips the gradient's norm; 0 does not clip.")
    batch_size: int = Field(8, ge=1, description="Rows (or packed sequences) in a micro-batch.")
    accumulation: int = Field(1, ge=1, description="Micro-batches in an optimizer step.")


class Watch(_Settings):
    """When the run is evaluated, saved and stopped early."""

    eval_steps: int | None = Field(None, ge=1, description="Steps between evaluations. Default: a tenth of the run.")
    save_steps: int | None = Field(None, ge=1, description="Steps between checkpoints. Default: every ten minutes.")
    patience: int | None = Field(None, ge=1, description="Stop after so many evaluations without a better one.")


class Machine(_Settings):
    """Where and in which precision it is computed. Adapters and trained weights are kept in float32 in any case."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto takes cuda where there is one.")
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], BeforeValidator(_dtype)] = Field(
        "auto", description="Precision of the products; auto takes bfloat16 where the processor has it."
    )
    checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass, to save memory."
    )


class _Top(_Settings):
    """The settings of `TuneConfig` that stand in no group, to be checked even where a group fails."""

    model: str = Field(min_length=1, description="The base: a folder, a hub id, or 'demo'.")
    data: str = Field(min_length=1, description="A file, a folder of train, valid and test, or a hub id.")
    output: str | None = Field(
        None, min_length=1, description="The run's folder. Default: runs/MODEL-METHOD, numbered."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of row order, initial adapters, dropout and the split.")
    resume: bool = Field(default=False, description="Go on from the run's newest valid checkpoint, bit for bit.")


class TuneConfig(_Top):
    """Everything that decides a training run. Build it with `load_config` or `TuneConfig.from_flat`."""

    method: Method
    length: Length
    samples: Samples
    optimization: Optimization
    watch: Watch
    machine: Machine

    @classmethod
    def from_flat(cls, values: Mapping[str, object], *, origin: str = "settings") -> TuneConfig:
        """Build a configuration from flat settings; aliases are accepted, None means "not given".

        Args:
            values: For example `{"model": "m", "data": "d.jsonl", "method": "lora", "lora_r": 8}`.
            origin: Where the values come from, for the messages.

        Raises:
            ConfigError: naming every unknown key, wrong type, forbidden combination and missing setting.
        """
        return _build([(origin, values)])

    def flat(self) -> dict[str, object]:
        """The settings as one flat mapping in canonical names, without those that are None.

        `TuneConfig.from_flat(config.flat())` equals `config`.
        """
        result: dict[str, object] = {}
        for name in _TOP:
            result[name] = getattr(self, name)
        result["method"] = self.method.name
        for group in (self.method, self.length, self.samples, self.optimization, self.watch, self.machine):
            brought = _SHAPE if isinstance(group, _LowRank) and group.adapter is not None else ()
            for key, value in group.model_dump(exclude={"name", *brought}).items():
                result[key] = list(cast("tuple[str, ...]", value)) if isinstance(value, tuple) else value
        return {key: value for key, value in result.items() if value is not None}

    def replace(self, **changes: object) -> TuneConfig:
        """The same configuration with some flat settings changed; None takes a setting back to its default."""
        values = {key: value for key, value in self.flat().items() if key not in changes}
        return TuneConfig.from_flat(values | {key: value for key, value in changes.items() if value is not None})


_SHAPE: Final = ("rank", "alpha", "targets", "rank_stabilised")  # what an existing adapter has decided already
_TOP: Final = ("model", "data", "output", "seed", "resume")
_METHODS: Final[Mapping[str, type[_Settings]]] = {"full": Full, "lora": Lora, "qlora": QLora, "qat": Qat}
_LENGTHS: Final[Mapping[str, type[_Settings]]] = {"max_steps": Steps, "epochs": Epochs, "minutes": Minutes}
_GROUPS: Final[Mapping[str, type[_Settings]]] = dict(
    samples=Samples, optimization=Optimization, watch=Watch, machine=Machine
)
DEFAULT_METHOD: Final = "lora"

_OTHER_NAMES: Final[Mapping[str, str]] = {
    "model": "base_model model_name_or_path model_name",
    "data": "dataset data_path dataset_name train_file",
    "output": "output_dir",
    "method": "finetuning_type fine_tune_type",
    "rank": "lora_r lora_rank r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "lora_target lora_target_modules target_modules",
    "rank_stabilised": "use_rslora",
    "adapter": "adapter_name_or_path resume_adapter_file",
    "max_steps": "iters",
    "epochs": "num_train_epochs num_epochs",
    "max_length": "cutoff_len max_seq_length max_seq_len sequence_len",
    "packing": "sample_packing",
    "chat_template": "template",
    "valid_fraction": "val_size val_set_size",
    "learning_rate": "lr",
    "schedule": "lr_scheduler_type lr_scheduler",
    "clip_norm": "max_grad_norm",
    "batch_size": "per_device_train_batch_size micro_batch_size",
    "accumulation": "gradient_accumulation_steps grad_accumulation_steps",
    "eval_steps": "steps_per_eval",
    "save_steps": "save_every",
    "patience": "early_stopping_patience",
    "checkpointing": "gradient_checkpointing grad_checkpoint",
    "dtype": "compute_dtype torch_dtype",
    "seed": "random_seed",
}
ALIASES: Final[Mapping[str, str]] = {other: key for key, names in _OTHER_NAMES.items() for other in names.split()}
"""Names that other trainers use, with ours."""


def _fields(group: type[BaseModel]) -> list[str]:
    return [name for name in group.model_fields if name != "name"]


def _owners() -> dict[str, str]:
    """Every flat key with the words that say whose it is."""
    owners = {name: "" for name in (*_TOP, "method", *_LENGTHS)}
    owners |= {name: "" for group in _GROUPS.values() for name in _fields(group)}
    for method, group in _METHODS.items():
        for name in _fields(group):
            owners[name] = f"{owners[name]}, {method}" if owners.get(name) else method
    return owners


KEYS: Final[Mapping[str, str]] = _owners()
"""Every setting's canonical name, with the methods that have it (empty: all of them)."""

Layer: TypeAlias = tuple[str, Mapping[str, object]]


def _canonical(layer: Layer, problems: list[str]) -> dict[str, object]:
    """One layer's values under canonical names; unknown keys and keys given twice become problems."""
    origin, values = layer
    result: dict[str, object] = {}
    names: dict[str, str] = {}
    for given, value in values.items():
        key = ALIASES.get(given, given)
        if key not in KEYS:
            problems.append(f"{origin}: {given}: unknown setting{nearest(given, [*KEYS, *ALIASES])}")
            continue
        if value is None:
            continue
        if key in result:
            problems.append(f"{origin}: {given} and {names[key]} both set {key}; keep one")
            continue
        result[key] = os.fspath(cast("os.PathLike[str]", value)) if isinstance(value, os.PathLike) else value
        names[key] = given
    lengths = [names[key] for key in _LENGTHS if key in result]
    if len(lengths) > 1:
        problems.append(f"{origin}: {' and '.join(lengths)} both set how long to train; keep one")
    return result


def _explain(group: type[BaseModel], values: Mapping[str, object], origins: Mapping[str, str]) -> tuple[Any, list[str]]:
    """Validate one group; returns it, or None with a line per problem."""
    try:
        return group.model_validate(dict(values)), []
    except ValidationError as error:
        lines: dict[str, str] = {}
        for item in error.errors():
            key = str(item["loc"][0]) if item["loc"] else "settings"
            message = item["msg"].removeprefix("Value error, ")
            message = re.sub(r"^(Input|String) should (be|have)", r"needs", message)
            if item["type"] == "missing":
                hint = " (for example int4-g32)" if key == "format" else ""
                lines.setdefault(key, f"{key}: missing; it has no default{hint}")
                continue
            got = values.get(key)
            text = f"{origins.get(key, 'settings')}: {key}: got {got!r} ({type(got).__name__}); {message}"
            lines.setdefault(key, text)
        return None, list(lines.values())


def _build(layers: Iterable[Layer]) -> TuneConfig:
    """Merge layers, the later ones winning, and validate every group, collecting all problems."""
    problems: list[str] = []
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        named = _canonical(layer, problems)
        if any(key in named for key in _LENGTHS):  # a later layer's length replaces the earlier one, whatever its kind
            values = {key: value for key, value in values.items() if key not in _LENGTHS}
        values |= named
        origins |= dict.fromkeys(named, layer[0])

    method = values.pop("method", DEFAULT_METHOD)
    group = _METHODS.get(method) if isinstance(method, str) else None
    if group is None:
        hint = nearest(method, _METHODS) if isinstance(method, str) else ""
        problems.append(f"{origins['method']}: method: got {method!r}; needs one of {', '.join(_METHODS)}{hint}")
    else:
        for key in [key for key in values if KEYS[key] and key not in _fields(group)]:
            del values[key]
            problems.append(
                f"{origins[key]}: {key}: a setting of {KEYS[key]}, and the method is {method}; "
                f"leave it out or choose another method"
            )

    parts: dict[str, Any] = {}

    def take(name: str, kind: type[BaseModel], fields: Iterable[str]) -> None:
        chosen = {key: values[key] for key in fields if key in values}
        parts[name], found = _explain(kind, chosen, origins)
        problems.extend(found)

    if group is not None:
        if issubclass(group, _LowRank):
            _complete_low_rank(values, origins, problems)
        take("method", group, _fields(group))
    length = next((kind for key, kind in _LENGTHS.items() if key in values), Epochs)
    take("length", length, _fields(length))
    for name, kind in _GROUPS.items():
        take(name, kind, _fields(kind))
    top = {key: values[key] for key in _TOP if key in values}
    _, found = _explain(_Top, top, origins)
    problems.extend(found)
    if problems:
        raise ConfigError(_sentence(problems))
    return TuneConfig.model_validate(top | parts)


def _complete_low_rank(values: dict[str, object], origins: Mapping[str, str], problems: list[str]) -> None:
    """Fill in alpha from the rank, and refuse a shape beside an adapter that brings its own."""
    if values.get("adapter") is not None:
        for key in _SHAPE:
            if key in values:
                problems.append(f"{origins[key]}: {key}: the adapter to train further brings its own; leave it out")
                del values[key]
        return
    rank = values.get("rank")
    if "alpha" not in values and isinstance(rank, int) and not isinstance(rank, bool):
        values["alpha"] = 2.0 * rank


def _sentence(problems: list[str]) -> str:
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return problems[0] if len(problems) == 1 else f"{len(problems)} settings are wrong:\n{lines}"


def read_yaml(path: str | Path) -> dict[str, object]:
    """Read a YAML file of flat settings with `yaml.safe_load`: no tags that run code, no key twice.

    Raises:
        MissingInputError: there is no such file.
        ConfigError: it is not YAML, not UTF-8, not a mapping of names, or a key stands twice.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise MissingInputError(f"{file}: cannot read the configuration ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        loaded: object = yaml.safe_load(text)
        node = cast("object", yaml.compose(text, Loader=yaml.SafeLoader))  # pyright: ignore[reportUnknownMemberType]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not a valid YAML file: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file}: got {type(loaded).__name__}, needs lines of the kind `method: lora`")
    values = cast("dict[object, object]", loaded)
    problems = [f"{file}: {key!r}: a setting's name is a word" for key in values if not isinstance(key, str)]
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key_node, _ in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
            name, line = str(cast("object", key_node.value)), key_node.start_mark.line + 1
            if name in first:
                problems.append(f"{file}: {name}: given twice, in lines {first[name]} and {line}; keep one")
            first.setdefault(name, line)
    if problems:
        raise ConfigError(_sentence(problems))
    return cast("dict[str, object]", values)


def load_config(path: str | Path | None = None, overrides: Mapping[str, object] | None = None) -> TuneConfig:
    """Read a YAML file (or none), lay the overrides over it, and check everything at once.

    Args:
        path: A YAML file of flat settings, or None.
        overrides: Flat settings that beat the file's; None values are ignored. A length (`max_steps`, `epochs`,
            `minutes`) replaces the file's length of any kind.

    Raises:
        MissingInputError: the file is not there.
        ConfigError: naming every problem.
    """
    file: list[Layer] = [] if path is None else [(str(path), read_yaml(path))]
    return _build([*file, ("arguments", overrides or {})])


def to_yaml(config: TuneConfig) -> str:
    """The configuration as YAML text that `load_config` reads back to an equal `TuneConfig`."""
    return yaml.safe_dump(config.flat(), sort_keys=False, allow_unicode=True)


def _names(key: str) -> list[str]:
    return [key, *_OTHER_NAMES.get(key, "").split()]


def json_schema() -> dict[str, object]:
    """A JSON schema (draft 2020-12) of the YAML file, for editors: every key, alias and forbidden pair."""
    properties: dict[str, object] = {}
    for group in (_Top, *_METHODS.values(), *_LENGTHS.values(), *_GROUPS.values()):
        fields = group.model_json_schema()["properties"]
        for key in _fields(group):
            properties[key] = {name: value for name, value in fields[key].items() if name != "title"}
    names_or_text = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    properties["targets"] = names_or_text | {"description": "all-linear, or names, suffixes and patterns of layers."}
    properties["method"] = {
        "enum": list(_METHODS),
        "default": DEFAULT_METHOD,
        "description": "Trained: every weight, an adapter, one over a quantized base, or a quantized model.",
    }
    for alias, key in ALIASES.items():
        properties[alias] = cast("dict[str, object]", properties[key]) | {"description": f"The same as {key}."}
    rules: list[object] = []
    for method, group in _METHODS.items():
        foreign = [key for key, owner in KEYS.items() if owner and key not in _fields(group)]
        matches: dict[str, object] = {"properties": {"method": {"const": method}}}
        if method != DEFAULT_METHOD:
            matches["required"] = ["method"]
        refused = [{"required": [name]} for key in foreign for name in _names(key)]
        rules.append({"if": matches, "then": {"not": {"anyOf": refused}}})
    lengths = [name for key in _LENGTHS for name in _names(key)]
    one_length = [{"required": [name]} for name in lengths]
    rules.append({"oneOf": [*one_length, {"not": {"anyOf": one_length}}]})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "strop tune",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "allOf": rules,
    }

"""The groups of settings: what each holds, its type, its limits and its default. Nothing here imports torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal, TypeAlias, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

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


def _checkpointing(value: object) -> object:
    """Other trainers say true or false."""
    words = {"true": "all", "false": "none"}
    if isinstance(value, bool):
        return "all" if value else "none"
    return words.get(value.lower(), value) if isinstance(value, str) else value


_UNITS: Final = {"": 1, "b": 1} | {
    f"{prefix}{end}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for end, base in (("b", 1000), ("ib", 1024))
}


def _size(value: object) -> object:
    """As `size_in_bytes`; numbers stay as they are."""
    return size_in_bytes(value) if isinstance(value, str) else value


def size_in_bytes(value: str) -> int:
    """Read `2GB` (10^9), `1.5GiB` (2^30) or plain bytes as a number of bytes.

    Raises:
        ValueError: it is none of them.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise ValueError("needs a size: 2GB, 1.5GiB, 800MB, or bytes")
    return int(float(found[1]) * _UNITS[found[2]])


def _optimizer(value: object) -> object:
    """Other trainers' names for the two optimizers."""
    if not isinstance(value, str):
        return value
    eight = ("adamw_8bit", "adamw_bnb_8bit", "adamw8bit", "adamw_torch_8bit")
    return "adamw-8bit" if value in eight else "adamw" if value in ("adamw_torch", "adamw_torch_fused") else value


def _rank(value: object) -> object:
    """Refuse in one sentence what is neither a number of columns nor `auto`."""
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("needs a whole number of at least 1, or auto, which tries three and takes one")


Real: TypeAlias = Annotated[float, BeforeValidator(_exponent_text)]
Rank: TypeAlias = Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], BeforeValidator(_rank)]
Targets: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_targets)]


class Settings(BaseModel):
    """Base of every group: unknown fields refused, types strict, frozen once made."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Full(Settings):
    """Every weight is trained."""

    name: Literal["full"] = "full"


class LowRank(Settings):
    """What `Lora` and `QLora` share: W = W0 + scale * B A, with W0 frozen."""

    rank: Rank = Field(16, description="Rank of B and A; auto races three and takes the smallest that is good enough.")
    alpha: Annotated[Real, Field(gt=0)] | None = Field(
        32.0, description="The update is scaled by alpha / rank. Default: twice the rank."
    )
    dropout: Real = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: Targets = Field((ALL_LINEAR,), description="all-linear, or names, suffixes and patterns of layers.")
    rank_stabilised: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead (rsLoRA).")
    adapter: str | None = Field(None, description="Folder of an adapter to train further; it brings its own rank.")


class Lora(LowRank):
    """A low-rank adapter over the base in 16 or 32 bits."""

    name: Literal["lora"] = "lora"


class QLora(LowRank):
    """A low-rank adapter over a base that is quantized while it is loaded."""

    name: Literal["qlora"] = "qlora"
    format: str | None = Field(
        None, description="Grid of the frozen base. Default: the model's own if it is quantized, else nf4-dq."
    )


def _share(value: object) -> object:
    """Read `2%` as 0.02."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(\s*%)?", value.strip())
    return float(found[1]) / (100 if found[2] else 1) if found else _exponent_text(value)


Share: TypeAlias = Annotated[float, BeforeValidator(_share)]


class Rounded(Settings):
    """What `Qat` and `QatLora` share: weights, and inputs where asked, rounded in training as they will be in use."""

    format: str = Field(description="Grid that the weights are trained for, for example int3-g32 or gguf:q4_0.")
    activations: Literal["int8", "q8_0"] | None = Field(
        None, description="Round the layers' inputs in training: int8 per token, or as llama.cpp does (q8_0)."
    )
    delay: Share = Field(0.0, ge=0, lt=1, description="Share of the steps before the rounding begins.")
    freeze: Share = Field(0.0, ge=0, lt=1, description="Share of the steps at the end in which the scales stay.")

    @model_validator(mode="after")
    def _rounds_at_all(self) -> Rounded:
        if self.delay + self.freeze > 1:
            raise ValueError(
                f"delay {self.delay:g} and freeze {self.freeze:g} are more than the run; make them smaller"
            )
        return self


class Qat(Rounded):
    """Every weight is trained through the quantizer, and the linear layers are stored quantized."""

    name: Literal["qat"] = "qat"
    targets: Targets = Field((ALL_LINEAR,), description="Which linear layers are quantized.")
    scales: Literal["range", "learned", "fixed"] = Field(
        "range",
        description="Scales cover the weights on every step, learn with them (LSQ), or stay at the start's.",
    )
    scale_rate: Annotated[Real, Field(gt=0)] | None = Field(
        None, description="Peak rate of learned scales, as a share of where they start. Default: 0.001."
    )
    start: str | None = Field(
        None, description="Where codes and scales start: a folder of this model quantized to the format."
    )
    train: str = Field(
        "all", pattern=r"^(all|scales|last:[1-9]\d*)$", description="all weights, scales alone, or last:N blocks."
    )
    max_moved: Share | None = Field(
        None, gt=0, le=1, description="Share of a layer's codes that may differ from the start's; scales stay."
    )

    @model_validator(mode="after")
    def _together(self) -> Qat:
        problems: list[str] = []
        if self.max_moved is not None and self.scales == "learned":
            problems.append("max_moved keeps the start's scales; leave out scales: learned")
        if self.train == "scales":
            for name, given in (("max_moved", self.max_moved), ("delay", self.delay)):
                if given:
                    problems.append(f"train: scales moves no code, so {name} means nothing; leave it out")
            if self.scales != "range":
                problems.append(f"train: scales learns them in any case; leave out scales: {self.scales}")
        elif self.start is not None and self.scales == "range" and self.max_moved is None:
            problems.append("start: its scales are to be learned or kept; add scales: learned, or fixed")
        if self.freeze and (self.scales == "fixed" or self.max_moved is not None):
            problems.append("freeze: the scales stay from the start in any case; leave it out")
        learns = self.scales == "learned" or self.train == "scales"
        if self.scale_rate is not None and not learns:
            problems.append("scale_rate: no scale is learned; add scales: learned, or leave it out")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class QatLora(Rounded):
    """An adapter whose sum with its base goes through the quantizer: merging is exact by construction."""

    name: Literal["qat-lora"] = "qat-lora"
    rank: int = Field(16, ge=1, description="Rank of B and A.")
    alpha: Annotated[Real, Field(gt=0)] = Field(
        32.0, description="The update is scaled by alpha / rank. Default: twice the rank."
    )
    targets: Targets = Field((ALL_LINEAR,), description="all-linear, or names, suffixes and patterns of layers.")
    rank_stabilised: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead (rsLoRA).")
    hold: Literal["bf16", "int8", "codes", "zero-points"] = Field(
        "bf16",
        description="The frozen base in 16 or 8 bits, or as the format's own codes, whose codes or zero points move.",
    )
    max_moved: Share | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of a layer's codes that may differ from the base's. Default: all.",
    )

    @model_validator(mode="after")
    def _together(self) -> QatLora:
        problems: list[str] = []
        if self.hold != "bf16" and self.targets != (ALL_LINEAR,):
            problems.append(f"hold: {self.hold} holds every layer of the base so; leave targets out, or hold: bf16")
        if self.freeze and (self.max_moved is not None or self.hold in ("codes", "zero-points")):
            problems.append("freeze: the scales stay from the start in any case; leave it out")
        if problems:
            raise ValueError("; ".join(problems))
        return self


Method: TypeAlias = Full | Lora | QLora | Qat | QatLora


class Auto(Settings):
    """No method but a choice among them: rounding first, training only where a measured drop asks for it."""

    name: Literal["auto"] = "auto"
    format: str = Field(description="Grid that the model ends on, for example int3-g32 or gguf:q4_0.")
    max_drop: Real = Field(
        0.01, gt=0, lt=1, description="Largest drop allowed: in the share of right answers, or in nats per token."
    )
    task: Literal["exact-match", "perplexity"] | None = Field(
        None, description="What is judged. Default: exact-match where every row ends in an answer, else perplexity."
    )
    rank: int = Field(16, ge=1, description="Rank of B and A, where an adapter is trained.")
    alpha: Annotated[Real, Field(gt=0)] = Field(
        32.0, description="The update is scaled by alpha / rank. Default: twice the rank."
    )


class Steps(Settings):
    """Stop after so many optimizer steps."""

    max_steps: int = Field(ge=1, description="Optimizer steps.")


class Epochs(Settings):
    """Stop after so many passes over the training rows."""

    epochs: Real = Field(1.0, gt=0, description="Passes over the training rows; fractions are allowed.")


class Minutes(Settings):
    """Stop after about so many minutes: the steps are counted out from a few timed ones, then fixed."""

    minutes: Real = Field(gt=0, description="Minutes of training; the number of steps is estimated at the start.")


Length: TypeAlias = Steps | Epochs | Minutes


class Samples(Settings):
    """How records become token batches."""

    train_on: Literal["answers", "last", "all", "custom"] = Field(
        "answers",
        description="Which tokens carry the loss: the answers, a conversation's last one, all, or what the data mark.",
    )
    max_length: int | None = Field(
        None, ge=2, description="Tokens in a row; longer ones are truncated. Default: 1024, or the model's limit."
    )
    packing: bool = Field(default=False, description="Several rows in one sequence, isolated from each other.")
    group_by_length: bool = Field(
        default=False, description="Rows of like length share a step, which saves padding without packing."
    )
    chat_template: str | None = Field(None, description="chatml, plain, or a jinja file, for bases that have none.")
    valid_fraction: Real = Field(
        0.05, ge=0, lt=1, description="Share of the training rows held out where the data name no valid split."
    )

    @model_validator(mode="after")
    def _one_way_to_save_padding(self) -> Samples:
        if self.packing and self.group_by_length:
            raise ValueError("packing and group_by_length both save padding, each in its own way; set one of them")
        return self


class Optimization(Settings):
    """AdamW, its schedule, and how many rows make a step."""

    learning_rate: Real | None = Field(
        None,
        gt=0,
        description="Peak. Default: 2e-5 * 4096 / hidden size; for adapters ten times that.",
    )
    optimizer: Annotated[Literal["adamw", "adamw-8bit"], BeforeValidator(_optimizer)] = Field(
        "adamw", description="AdamW with moments in fp32, or in 8 bits: 10 bytes a trained weight in place of 16."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="How the rate falls after warm-up.")
    warmup_ratio: Real = Field(0.03, ge=0, lt=1, description="Share of the steps that warms up.")
    weight_decay: Real = Field(0.0, ge=0, description="AdamW's decay; norms, biases and other vectors are left out.")
    clip_norm: Real = Field(1.0, ge=0, description="Clips the gradient's norm; 0 does not clip.")
    batch_size: int = Field(8, ge=1, description="Rows (or packed sequences) in a micro-batch.")
    accumulation: int = Field(1, ge=1, description="Micro-batches in an optimizer step.")


class Distillation(Settings):
    """A teacher: loss = (1 - distill) * cross-entropy + distill * KL(teacher || student)."""

    teacher: str | None = Field(
        None,
        min_length=1,
        description="A model to learn from: a folder, a hub id, or base (the model itself before training).",
    )
    distill: Real | None = Field(
        None,
        ge=0,
        le=1,
        description="With a teacher: its share of the loss, 0 to 1; 1 uses no labels. Default: 1.",
    )
    teacher_logits: Literal["auto", "memory", "disk"] | None = Field(
        None,
        description="With a teacher: beside the student in memory, or its top logits on disk. Default: auto, the less.",
    )


class Serving(Settings):
    """How the model will be served, computed so in training already."""

    kv_cache: Literal["int8", "int4"] | None = Field(
        None, description="Round keys and values in training as --kv-cache of chat and compare does: int8 or int4."
    )


class Watch(Settings):
    """When the run is evaluated, saved and stopped early."""

    eval_steps: int | None = Field(None, ge=1, description="Steps between evaluations. Default: a tenth of the run.")
    save_steps: int | None = Field(None, ge=1, description="Steps between checkpoints. Default: every ten minutes.")
    patience: int | None = Field(None, ge=1, description="Stop after so many evaluations without a better one.")
    tensorboard: bool = Field(default=False, description="Write the metrics to RUN/tensorboard as well.")


class Machine(Settings):
    """Where and in which precision it is computed. Adapters and trained weights are kept in float32 in any case."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto takes cuda where there is one.")
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], BeforeValidator(_dtype)] = Field(
        "auto", description="Precision of the products; auto takes bfloat16 where the processor has it."
    )
    compute: Literal["bf16", "int8"] = Field(
        "bf16",
        description="Products of an adapter's frozen base on a CPU: in dtype, or approximated in int8 where that is "
        "good enough (gradient cosine of at least .99).",
    )
    checkpointing: Annotated[Literal["none", "all", "auto"], BeforeValidator(_checkpointing)] = Field(
        "none", description="Blocks recomputed in the backward pass, to save memory; auto: as many as max_memory asks."
    )
    max_memory: Annotated[int | None, BeforeValidator(_size)] = Field(
        None, gt=0, description="With checkpointing auto: the most that a step may hold, as 2GB, 1.5GiB or bytes."
    )

    @model_validator(mode="after")
    def _together(self) -> Machine:
        if (self.checkpointing == "auto") != (self.max_memory is not None):
            raise ValueError("checkpointing: auto and max_memory go together; give both or neither")
        return self


class DataPart(Settings):
    """One of several data sets."""

    path: str = Field(min_length=1, description="A file, a folder of train, valid and test, or a hub id.")
    weight: Real = Field(1.0, gt=0, description="How often an epoch takes its training rows.")


def _data(value: object) -> object:
    """One data set as text; a list of paths and of {path, weight} as parts, or as that path if it is only one."""
    if not isinstance(value, list | tuple):
        if value == "":
            raise ValueError("name a file, a folder or a hub id")
        return value
    parts: list[DataPart] = []
    for item in cast("list[object] | tuple[object, ...]", value):
        entry: object = {"path": os.fspath(cast("str", item))} if isinstance(item, str | os.PathLike) else item
        if isinstance(entry, Mapping):
            entry = dict(cast("Mapping[str, object]", entry))
            if isinstance(entry.get("path"), os.PathLike):
                entry["path"] = os.fspath(cast("os.PathLike[str]", entry["path"]))
        try:
            parts.append(DataPart.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "entry"
            raise ValueError(f"{item!r}: {where}: {first['msg']}; needs a path, or {{path, weight}}") from None
    paths = [part.path for part in parts]
    doubled = sorted({path for path in paths if paths.count(path) > 1})
    if doubled:
        raise ValueError(f"names {', '.join(doubled)} more than once; give it a weight instead")
    if not parts:
        raise ValueError("name at least one file, folder or hub id")
    return parts[0].path if len(parts) == 1 and parts[0].weight == 1 else tuple(parts)


def data_name(data: str | Sequence[DataPart]) -> str:
    """What the data of a run are called: `a.jsonl`, or `a.jsonl + b.jsonl=2`."""
    if isinstance(data, str):
        return data
    return " + ".join(part.path + (f"={part.weight:g}" if part.weight != 1 else "") for part in data)


class Top(Settings):
    """The settings of `TuneConfig` that stand in no group, to be checked even where a group fails."""

    model: str = Field(min_length=1, description="The base: a folder, a hub id, or 'demo'.")
    data: Annotated[str | tuple[DataPart, ...], BeforeValidator(_data)] = Field(
        description="A file, a folder of train, valid and test, or a hub id; or a list of them and of {path, weight}."
    )
    output: str | None = Field(
        None, min_length=1, description="The run's folder. Default: runs/MODEL-METHOD, numbered."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of row order, initial adapters, dropout and the split.")
    resume: bool = Field(default=False, description="Go on from the run's newest valid checkpoint, bit for bit.")

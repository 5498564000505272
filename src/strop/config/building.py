"""Flat settings checked and grouped, from keyword arguments and YAML, and written back."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

import yaml
from pydantic import BaseModel, ValidationError

from strop.config.names import ALIASES, DEFAULT_METHOD, GROUPS, KEYS, LENGTHS, METHODS, SHAPE, TOP, fields_of
from strop.config.settings import (
    Auto,
    Distillation,
    Epochs,
    Length,
    LowRank,
    Machine,
    Method,
    Optimization,
    Samples,
    Serving,
    Top,
    Watch,
)
from strop.errors import ConfigError, MissingInputError, nearest


class _Groups(Top):
    """What the settings of a run and those of a choice among runs have alike."""

    length: Length
    samples: Samples
    optimization: Optimization
    distillation: Distillation
    serving: Serving
    watch: Watch
    machine: Machine

    def _flat(self, method: Method | Auto) -> dict[str, object]:
        result: dict[str, object] = {}
        for name in TOP:
            result[name] = getattr(self, name)
        if not isinstance(self.data, str):
            result["data"] = [part.model_dump() for part in self.data]
        result["method"] = method.name
        shared = (self.samples, self.optimization, self.distillation, self.serving, self.watch, self.machine)
        for group in (method, self.length, *shared):
            brought = SHAPE if isinstance(group, LowRank) and group.adapter is not None else ()
            for key, value in group.model_dump(exclude={"name", *brought}).items():
                result[key] = list(cast("tuple[str, ...]", value)) if isinstance(value, tuple) else value
        return {key: value for key, value in result.items() if value is not None}


class TuneConfig(_Groups):
    """Everything that decides a training run. Build it with `load_config` or `TuneConfig.from_flat`."""

    method: Method

    @classmethod
    def from_flat(cls, values: Mapping[str, object], *, origin: str = "settings") -> TuneConfig:
        """Build a configuration from flat settings; aliases are accepted, None means "not given".

        Args:
            values: For example `{"model": "m", "data": "d.jsonl", "method": "lora", "lora_r": 8}`.
            origin: Where the values come from, for the messages.

        Raises:
            ConfigError: naming every unknown key, wrong type, forbidden combination and missing setting.
        """
        return _one_run([(origin, values)])

    def flat(self) -> dict[str, object]:
        """The settings as one flat mapping in canonical names, without those that are None.

        `TuneConfig.from_flat(config.flat())` equals `config`.
        """
        return self._flat(self.method)

    def replace(self, **changes: object) -> TuneConfig:
        """The same configuration with some flat settings changed; None takes a setting back to its default."""
        values = {key: value for key, value in self.flat().items() if key not in changes}
        return TuneConfig.from_flat(values | {key: value for key, value in changes.items() if value is not None})


class AutoConfig(_Groups):
    """Everything that decides a choice among runs (`method: auto`). Build it with `load_auto`."""

    method: Auto

    def flat(self) -> dict[str, object]:
        """The settings as one flat mapping; `load_auto(None, config.flat())` equals the configuration."""
        return self._flat(self.method)

    def run(self, method: str, **settings: object) -> TuneConfig:
        """The settings of one of its runs: what is common to all, with the method's own laid over it.

        Args:
            method: A method that trains through the format.
            **settings: Flat settings of that run; None values are ignored.

        Raises:
            ConfigError: As `TuneConfig.from_flat`.
        """
        own = {"output", "resume"} | {key for key in fields_of(Auto) if key != "format"}
        common = {key: value for key, value in self.flat().items() if key not in own}
        given = {key: value for key, value in settings.items() if value is not None}
        return TuneConfig.from_flat(common | {"method": method} | given, origin="auto")


Layer: TypeAlias = tuple[str, Mapping[str, object]]


def _canonical(layer: Layer, problems: list[str]) -> dict[str, object]:
    """One layer's values under canonical names; unknown keys and keys given twice become problems."""
    origin, values = layer
    result: dict[str, object] = {}
    names: dict[str, str] = {}
    for given, value in values.items():
        key = ALIASES.get(given, given)
        if key not in KEYS:
            problems.append(f"{origin}: {given}: unknown setting{nearest(given, [*KEYS, *ALIASES, 'stages'])}")
            continue
        if value is None:
            continue
        if key in result:
            problems.append(f"{origin}: {given} and {names[key]} both set {key}; keep one")
            continue
        result[key] = os.fspath(cast("os.PathLike[str]", value)) if isinstance(value, os.PathLike) else value
        names[key] = given
    lengths = [names[key] for key in LENGTHS if key in result]
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
            if not item["loc"]:  # settings that each are right and do not go together
                lines.setdefault(message, f"settings: {message}")
                continue
            got = values.get(key)
            text = f"{origins.get(key, 'settings')}: {key}: got {got!r} ({type(got).__name__}); {message}"
            lines.setdefault(key, text)
        return None, list(lines.values())


def _one_run(layers: Iterable[Layer]) -> TuneConfig:
    """As `_build`; a choice among runs is refused."""
    built = _build(layers)
    if isinstance(built, AutoConfig):
        raise ConfigError(
            "method: auto is a choice among several runs, and one run is asked for here; name its method "
            f"({', '.join(name for name in METHODS if name != built.method.name)})"
        )
    return built


def _build(layers: Iterable[Layer]) -> TuneConfig | AutoConfig:
    """Merge layers, the later ones winning, and validate every group, collecting all problems."""
    problems: list[str] = []
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        named = _canonical(layer, problems)
        if any(key in named for key in LENGTHS):  # a later layer's length replaces the earlier one, whatever its kind
            values = {key: value for key, value in values.items() if key not in LENGTHS}
        values |= named
        origins |= dict.fromkeys(named, layer[0])

    method = values.pop("method", DEFAULT_METHOD)
    group = METHODS.get(method) if isinstance(method, str) else None
    if group is None:
        hint = nearest(method, METHODS) if isinstance(method, str) else ""
        problems.append(f"{origins['method']}: method: got {method!r}; needs one of {', '.join(METHODS)}{hint}")
    else:
        for key in [key for key in values if KEYS[key] and key not in fields_of(group)]:
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
        if issubclass(group, LowRank):
            _complete_low_rank(values, origins, problems)
        elif "alpha" in fields_of(group):
            _complete_alpha(values)
        if values.get("rank") == "auto" and "kv_cache" in values:
            problems.append(f"{origins['kv_cache']}: kv_cache: rank auto races without it; name the rank")
        if values.get("compute") == "int8" and not issubclass(group, LowRank):
            problems.append(
                f"{origins['compute']}: compute: int8 approximates the products of a base that is frozen, and {method} "
                "trains it, or its rounding; leave it out, or train an adapter (lora, qlora)"
            )
        _complete_teacher(values, cast("str", method), origins, problems)
        take("method", group, fields_of(group))
    length = next((kind for key, kind in LENGTHS.items() if key in values), Epochs)
    take("length", length, fields_of(length))
    for name, kind in GROUPS.items():
        take(name, kind, fields_of(kind))
    top = {key: values[key] for key in TOP if key in values}
    _, found = _explain(Top, top, origins)
    problems.extend(found)
    if problems:
        raise ConfigError(_sentence(problems))
    return (AutoConfig if group is Auto else TuneConfig).model_validate(top | parts)


def _complete_low_rank(values: dict[str, object], origins: Mapping[str, str], problems: list[str]) -> None:
    """Fill in alpha from the rank, and refuse a shape beside an adapter that brings its own."""
    if values.get("adapter") is not None:
        for key in SHAPE:
            if key in values:
                problems.append(f"{origins[key]}: {key}: the adapter to train further brings its own; leave it out")
                del values[key]
        return
    _complete_alpha(values)
    if "alpha" not in values and values.get("rank") == "auto":
        values["alpha"] = None  # twice the rank that will be chosen


def _complete_alpha(values: dict[str, object]) -> None:
    rank = values.get("rank")
    if "alpha" not in values and isinstance(rank, int) and not isinstance(rank, bool) and rank > 0:
        values["alpha"] = 2.0 * rank


def _complete_teacher(values: dict[str, object], method: str, origins: Mapping[str, str], problems: list[str]) -> None:
    """Fill in what a teacher needs; refuse its settings without one, and one from whom nothing could be learned."""
    teacher = values.get("teacher")
    if teacher is None:
        for key in [key for key in fields_of(Distillation) if key in values]:
            del values[key]
            problems.append(f"{origins[key]}: {key}: says how to learn from a teacher; name one (teacher: base)")
        return
    values.setdefault("distill", 1.0)
    values.setdefault("teacher_logits", "auto")
    origin = origins["teacher"]
    if values.get("rank") == "auto":
        problems.append(f"{origin}: teacher: rank auto races on the labels alone, without it; name the rank")
    if teacher != "base":
        return
    if values.get("adapter") is not None:
        problems.append(
            f"{origin}: teacher: base is the model without the adapter that is trained further; name that adapter's "
            "folder as the teacher"
        )
    if method == "lora" and values["teacher_logits"] == "disk":
        problems.append(
            f"{origins['teacher_logits']}: teacher_logits: base under lora is the model itself with its adapters "
            "switched off, which takes no memory beside it; set auto or memory"
        )
    if method in ("full", "lora") and values["distill"] == 1:
        problems.append(
            f"{origin}: teacher: base answers as the model does before training, so that with distill 1 {method} has "
            "nothing to learn; set distill below 1, which holds the training near the base, or name another teacher"
        )


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
    waiting = [node]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, yaml.SequenceNode):
            waiting.extend(cast("list[object]", inner.value))
        if not isinstance(inner, yaml.MappingNode):
            continue
        first: dict[str, int] = {}
        for key_node, value_node in cast("list[tuple[yaml.Node, yaml.Node]]", inner.value):
            name, line = str(cast("object", key_node.value)), key_node.start_mark.line + 1
            if name in first:
                problems.append(f"{file}: {name}: given twice, in lines {first[name]} and {line}; keep one")
            first.setdefault(name, line)
            waiting.append(value_node)
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
        ConfigError: naming every problem; `method: auto`, which `load_auto` reads.
    """
    return _one_run(_layers(path, overrides))


def load_auto(path: str | Path | None = None, overrides: Mapping[str, object] | None = None) -> AutoConfig | None:
    """Read and check settings as `load_config` does; None where their method is not auto.

    Raises:
        MissingInputError: the file is not there.
        ConfigError: naming every problem of settings whose method is auto.
    """
    layers = _layers(path, overrides)
    named = [values[key] for _, values in layers for key in values if ALIASES.get(key, key) == "method"]
    if [method for method in named if method is not None][-1:] != ["auto"]:
        return None
    built = _build(layers)
    assert isinstance(built, AutoConfig)
    return built


def _layers(path: str | Path | None, overrides: Mapping[str, object] | None) -> list[Layer]:
    file: list[Layer] = [] if path is None else [(str(path), read_yaml(path))]
    return [*file, ("arguments", overrides or {})]


def to_yaml(config: TuneConfig | AutoConfig) -> str:
    """The configuration as YAML text that `load_config` (or `load_auto`) reads back to an equal one."""
    return yaml.safe_dump(config.flat(), sort_keys=False, allow_unicode=True)

"""`stages:` in the YAML of `tune`: a list of stages, each with its own data and method, one after the other.

    model: demo
    output: runs/assistant
    stages:
      - {name: domain, data: notes.txt, method: full, max_steps: 40}
      - {name: task, data: chats.jsonl, method: lora, rank: 8}

What stands beside `stages` holds for every stage that has such a setting; a stage's own beats it, and the command
line's flags beat both. `model`, `output` and `resume` belong to the whole. Every problem of every stage is collected
into one `ConfigError` that names the stage. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import yaml

from strop.config.building import TuneConfig, read_yaml
from strop.config.names import ALIASES, DEFAULT_METHOD, KEYS, LENGTHS, METHODS, SHAPE, fields_of
from strop.config.settings import LowRank
from strop.errors import ConfigError

_WHOLE: Final = ("model", "output", "resume")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        number: its place, from 1.
        name: what it is called.
        values: its flat settings, the defaults taken in; without model and output.
        continues: whether it trains the adapter of the stage before it further: both train one, and the stage gives no
            shape (rank, alpha, targets) of its own.
    """

    number: int
    name: str
    values: Mapping[str, object]
    continues: bool

    @property
    def folder(self) -> str:
        """The name of its run's folder."""
        return f"{self.number}-{self.name}"

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.values["method"])

    def config(self, model: str, **more: object) -> TuneConfig:
        """The settings of its run, which starts from `model`."""
        given = {key: value for key, value in more.items() if value is not None}
        return TuneConfig.from_flat({"model": model, **self.values, **given}, origin=f"stage {self.name}")


@dataclass(frozen=True)
class StagesConfig:
    """A run in stages.

    Attributes:
        model: what the first stage starts from.
        output: the folder of the whole.
        resume: go on at the unfinished stage.
        stages: the stages in their order.
    """

    model: str
    output: str | None
    resume: bool
    stages: tuple[Stage, ...]

    def flat(self) -> dict[str, object]:
        """Plain values for YAML and JSON; `load_stages` reads them back to an equal configuration."""
        top: dict[str, object] = {"model": self.model}
        if self.output is not None:
            top["output"] = self.output
        return {**top, "stages": [{"name": stage.name, **stage.values} for stage in self.stages]}

    def names(self) -> list[str]:
        """The stages' names, in their order."""
        return [stage.name for stage in self.stages]

    def to_yaml(self) -> str:
        """The configuration as YAML text."""
        return yaml.safe_dump(self.flat(), sort_keys=False, allow_unicode=True)


def load_stages(
    source: str | Path | Mapping[str, object], overrides: Mapping[str, object] | None = None
) -> StagesConfig | None:
    """Read a configuration with `stages:`; None where it has none.

    Args:
        source: a YAML file, or its content.
        overrides: flat settings that beat the file's in every stage that has them; None values are ignored.

    Raises:
        MissingInputError: the file is not there.
        ConfigError: naming every problem of every stage.
    """
    name = "stages" if isinstance(source, Mapping) else str(source)
    values = dict(source) if isinstance(source, Mapping) else read_yaml(source)
    if "stages" not in values:
        return None
    listed = values.pop("stages")
    flags = {key: value for key, value in (overrides or {}).items() if value is not None}
    top = _over(values, flags)
    whole = {key: value for given, value in top.items() if (key := ALIASES.get(given, given)) in _WHOLE}
    defaults = {key: value for key, value in values.items() if ALIASES.get(key, key) not in _WHOLE}
    flags = {key: value for key, value in flags.items() if ALIASES.get(key, key) not in _WHOLE}
    problems: list[str] = []
    if not isinstance(listed, list) or not listed:
        problems.append(f"{name}: stages: needs a list of stages, each with name, data and method")
        listed = []
    if not isinstance(whole.get("model"), str):
        problems.append(f"{name}: model: missing; it is what the first stage starts from")
    stages: list[Stage] = []
    for number, entry in enumerate(cast("list[object]", listed), 1):
        if not isinstance(entry, Mapping):
            problems.append(f"{name}: stage {number}: got {type(entry).__name__}, needs settings: {{name: ..., ...}}")
            continue
        own = {str(key): value for key, value in cast("Mapping[object, object]", entry).items()}
        stage = _stage(number, own, defaults, flags, stages[-1] if stages else None, problems)
        if stage is not None:
            stages.append(stage)
    problems += _told_apart(stages) + _unused(defaults | flags, cast("list[object]", listed), defaults | flags)
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(problems[0] if len(problems) == 1 else f"{len(problems)} settings are wrong:\n{lines}")
    output = whole.get("output")
    return StagesConfig(
        str(whole["model"]), None if output is None else str(output), bool(whole.get("resume")), tuple(stages)
    )


def _over(lower: Mapping[str, object], upper: Mapping[str, object]) -> dict[str, object]:
    """`lower` under `upper`, under the names as given: a setting, or a length of whatever kind, replaces its like."""
    taken = {ALIASES.get(key, key) for key, value in upper.items() if value is not None}
    if taken & set(LENGTHS):
        taken |= set(LENGTHS)
    return {key: value for key, value in lower.items() if ALIASES.get(key, key) not in taken} | dict(upper)


def _stage(
    number: int,
    own: dict[str, object],
    defaults: Mapping[str, object],
    flags: Mapping[str, object],
    before: Stage | None,
    problems: list[str],
) -> Stage | None:
    """One stage, or None with its problems noted."""
    asked = own.pop("name", None)
    method = next(
        (layer[key] for layer in (flags, own, defaults) for key in layer if ALIASES.get(key, key) == "method"),
        DEFAULT_METHOD,
    )
    name = str(asked if asked is not None else method)
    where = f"stage {number} ({name})"
    if not _NAME.fullmatch(name):
        problems.append(f"{where}: name: got {asked!r}; needs letters, digits, - and _, at most 40 of them")
    for key in [key for key in own if ALIASES.get(key, key) in (*_WHOLE, "adapter")]:
        del own[key]
        problems.append(
            f"{where}: {key}: belongs beside stages, not into one; a stage starts from the last one's result"
            if ALIASES.get(key, key) != "adapter"
            else f"{where}: {key}: a stage starts from the last one's result; name the first adapter as the model"
        )
    group = METHODS.get(method) if isinstance(method, str) else None
    given = _over(_fitting(defaults, group), own)
    shape = {ALIASES.get(key, key) for key in own} & set(SHAPE)
    given = _over(given, _fitting(flags, group))
    low_rank = group is not None and issubclass(group, LowRank)
    continues = before is not None and low_rank and issubclass(METHODS[before.method], LowRank) and not shape
    try:
        values = TuneConfig.from_flat({"model": "model", **given}, origin=where).flat()
    except ConfigError as error:
        lines = str(error).splitlines()
        found = [line.removeprefix("  - ") for line in lines if line.startswith("  - ")] or [str(error)]
        problems += [line if line.startswith(where) else f"{where}: {line}" for line in found]
        return None
    left = {*_WHOLE, *(SHAPE if continues else ())}
    return Stage(number, name, {key: value for key, value in values.items() if key not in left}, continues)


def _fitting(values: Mapping[str, object], group: type | None) -> dict[str, object]:
    """The settings without those that belong to other methods than this one."""
    fields = [] if group is None else fields_of(group)
    return {
        key: value
        for key, value in values.items()
        if not (KEYS.get(ALIASES.get(key, key)) and ALIASES.get(key, key) not in fields)
    }


def _told_apart(stages: list[Stage]) -> list[str]:
    seen: dict[str, int] = {}
    problems: list[str] = []
    for stage in stages:
        if stage.name in seen:
            problems.append(
                f"stage {stage.number} ({stage.name}): name: stage {seen[stage.name]} is called so already; give each "
                "its own"
            )
        seen.setdefault(stage.name, stage.number)
    return problems


def _unused(values: Mapping[str, object], entries: list[object], top: Mapping[str, object]) -> list[str]:
    """Settings of methods that no stage has, and so would be dropped in silence."""
    methods: set[object] = set()
    default = next((value for key, value in top.items() if ALIASES.get(key, key) == "method"), DEFAULT_METHOD)
    for entry in entries:
        if isinstance(entry, Mapping):
            known = cast("Mapping[str, object]", entry)
            methods.add(next((value for key, value in known.items() if ALIASES.get(key, key) == "method"), default))
    fields = {
        name
        for method in methods
        if isinstance(method, str) and method in METHODS
        for name in fields_of(METHODS[method])
    }
    owned = {key: KEYS.get(ALIASES.get(key, key), "") for key in values}
    return [
        f"{key}: a setting of {owner}, and no stage has such a method; leave it out"
        for key, owner in owned.items()
        if owner and ALIASES.get(key, key) not in fields and entries
    ]

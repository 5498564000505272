"""Whether a run in stages can be run, asked before anything is trained, and its held-out rows rendered.

What follows on what (an adapter on a quantized base, whole weights over an adapter), formats and targets against the
base's shapes, the data of every stage, every held-out row through the chat template: the problems of all stages are
collected into one `ConfigError`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer

from strop.config import ALL_LINEAR, Full, Lora, LowRank, QLora, Rounded, Stage, StagesConfig, TuneConfig, data_name
from strop.data.mixing import Mixture, open_mixture
from strop.data.records import Record
from strop.data.samples import prepare
from strop.data.templates import set_chat_template
from strop.errors import ConfigError, ModelError, StropError
from strop.evaluation.statistics import MINIMUM_DOCUMENTS
from strop.files.peft_adapter import read_adapter_config
from strop.files.saving import check_expressible
from strop.layers.base import linear_shape
from strop.layers.surgery import plan_linears, select
from strop.models.sources import find_folder, has_tokenizer, is_adapter, read_config
from strop.numerics.scheme import parse_format, parse_scheme
from strop.planner.parameters import open_shape
from strop.progress import SILENT, Reporter
from strop.recipes.forgetting import HeldOut
from strop.recipes.rank import LEAST_ROWS, too_few_rows
from strop.recipes.teacher import BASE, check_teacher, row_length
from strop.training.shapes import positions_of


@dataclass(frozen=True)
class Ready:
    """A run in stages that can begin.

    Attributes:
        held_out: every stage's held-out rows, by its name.
        plans: how every stage starts, by its name.
        notes: what should be known of the data.
    """

    held_out: dict[str, HeldOut]
    plans: dict[str, str]
    notes: list[str]


@dataclass
class _State:
    """What a stage starts from."""

    adapter: bool
    quantized: str | None
    whose: str = "the model"


@dataclass
class _Check:
    problems: list[str] = field(default_factory=list)

    def trying(self, stage: Stage, work: Any) -> Any:
        """What `work` gives; None with the problem noted where it refuses."""
        try:
            return work()
        except StropError as error:
            self.problems.append(f"stage {stage.number} ({stage.name}): {error}")
            return None


def check_stages(config: StagesConfig, *, reporter: Reporter = SILENT) -> Ready:
    """Check all stages and render their held-out rows.

    Raises:
        ConfigError: naming every problem of every stage.
        MissingInputError, ModelError: the model cannot be opened at all.
    """
    folder = find_folder(config.model)
    adapter = is_adapter(folder)
    home = find_folder(read_adapter_config(folder).base) if adapter else folder
    _, quantization = read_config(home)
    _, skeleton = open_shape(str(home))
    check, state = _Check(), _State(adapter, "quantized" if quantization is not None else None)
    tokenizer = _tokenizer(folder, home)
    plans: dict[str, str] = {}
    held_out: dict[str, HeldOut] = {}
    splits: dict[str, Mixture] = {}
    for stage in config.stages:
        settings = stage.config(config.model)
        check.trying(stage, lambda settings=settings: _check_named_teacher(settings, home))
        plan = _start(stage, settings, state, check.problems)
        plans[stage.name] = plan
        check.trying(stage, lambda settings=settings: _check_layers(settings, skeleton))
        read = check.trying(stage, lambda settings=settings: _read(settings))
        if read is None:
            continue
        splits[stage.name] = read
        check.trying(stage, lambda settings=settings, read=read: _check_race(settings, read))
        length = check.trying(stage, lambda settings=settings: _length(settings, skeleton))
        if length is not None:
            made = check.trying(
                stage, lambda settings=settings, read=read, length=length: _render(settings, read, tokenizer, length)
            )
            held_out |= {} if made is None else {stage.name: made}
    if check.problems:
        lines = "\n".join(f"  - {problem}" for problem in check.problems)
        count = len(check.problems)
        raise ConfigError(check.problems[0] if count == 1 else f"the stages cannot be run, {count} problems:\n{lines}")
    notes = [*_few(held_out), *_leaks(config, splits)]
    for note in notes:
        reporter.note(f"warning: {note}")
    return Ready(held_out, plans, notes)


def _start(stage: Stage, settings: TuneConfig, state: _State, problems: list[str]) -> str:
    """How a stage starts from the state before it; the state becomes that after it."""
    where, method, whose = f"stage {stage.number} ({stage.name})", settings.method, state.whose
    low_rank = isinstance(method, Lora | QLora)
    plan = f"{method.name} over the whole model of {whose}" if stage.number > 1 else f"{method.name} over the model"
    if state.adapter and low_rank and (stage.continues or stage.number == 1):
        plan = f"the adapter of {whose} trained further ({method.name})"
    elif state.adapter:
        plan = f"merged: the adapter of {whose} into its base, then {method.name}"
        if state.quantized:
            problems.append(
                f"{where}: {method.name} starts from a merged model, and the adapter of {whose} lies over a base that "
                f"is stored quantized ({state.quantized}), which merging would take out of its grid; train that "
                "adapter further (leave rank, alpha and targets out), or quantize in a later stage"
            )
        state.adapter = False
    if settings.distillation.teacher == BASE and (state.adapter or state.quantized):
        lies = "an adapter that is trained further" if state.adapter else f"quantized weights ({state.quantized})"
        problems.append(
            f"{where}: teacher: base is a model in full precision before training, and {whose} ends in {lies}; name "
            "the teacher's folder"
        )
    if state.quantized and not state.adapter and not isinstance(method, QLora) and not plan.startswith("merged"):
        problems.append(
            f"{where}: {method.name} needs dense weights, and {whose} ends in quantized ones ({state.quantized}); use "
            "qlora, or put the stage that quantizes last"
        )
    elif state.quantized and not state.adapter and isinstance(method, QLora) and method.format is not None:
        problems.append(
            f"{where}: format {method.format}: {whose} ends in weights that are quantized already "
            f"({state.quantized}); leave format out"
        )
    state.adapter = low_rank
    if isinstance(method, Full | Rounded):
        state.quantized = method.format if isinstance(method, Rounded) else None
    state.whose = stage.name
    return plan


def _check_named_teacher(settings: TuneConfig, student: Path) -> None:
    """Whether a teacher that has a name reads the tokens that the model reads."""
    name = settings.distillation.teacher
    if name not in (None, BASE):
        check_teacher(find_folder(name), student)


def _check_layers(settings: TuneConfig, skeleton: nn.Module) -> None:
    """Targets and formats against the model's shapes, no weight read."""
    method = settings.method
    if isinstance(method, Full):
        return
    names = list(select(skeleton, ALL_LINEAR if method.targets == (ALL_LINEAR,) else method.targets))
    if isinstance(method, Rounded):
        shapes = {name: linear_shape(skeleton.get_submodule(name)) for name in names}
        check_expressible(parse_format(method.format).scheme, shapes, skeleton)
        plan_linears(skeleton, parse_format(method.format).scheme, names)
    elif isinstance(method, QLora) and method.format is not None:
        plan_linears(skeleton, parse_scheme(method.format), list(select(skeleton, ALL_LINEAR)))


def _read(settings: TuneConfig) -> Mixture:
    splits = open_mixture(settings.data, seed=settings.seed, valid_fraction=settings.samples.valid_fraction)
    if not splits.valid:
        raise ConfigError(
            f"{data_name(settings.data)}: leaves no row to hold out, and what later stages forget is measured on "
            "held-out rows; raise valid_fraction, or give a valid split"
        )
    return splits


def _check_race(settings: TuneConfig, splits: Mixture) -> None:
    """Whether `rank: auto` has rows enough; a plain text may become many, so that only the stage itself can tell."""
    raced = isinstance(settings.method, LowRank) and settings.method.rank == "auto"
    few = len(splits.train) < LEAST_ROWS
    if raced and few and all(record.messages is not None for record in splits.train):
        raise too_few_rows(len(splits.train), data_name(settings.data))


def _length(settings: TuneConfig, skeleton: Any) -> int:
    limit, length = positions_of(skeleton), settings.samples.max_length
    if length is not None and limit is not None and length > limit:
        raise ConfigError(f"max_length: got {length}; the model has {limit} positions; set {limit} or less")
    return row_length(settings, limit)


def _render(settings: TuneConfig, splits: Mixture, tokenizer: Any, length: int) -> HeldOut:
    if settings.samples.chat_template is not None:
        set_chat_template(tokenizer, settings.samples.chat_template)  # as the stage does, and those after it inherit
    rendered = prepare(splits.valid, tokenizer, max_length=length, train_on=settings.samples.train_on)
    return HeldOut.of(rendered.samples, tokenizer)


def _tokenizer(*folders: Path) -> Any:
    for folder in folders:
        if has_tokenizer(folder):
            try:
                return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{folder}: its tokenizer cannot be opened: {error}") from error
    raise ModelError(f"{folders[-1]}: holds no tokenizer, and rows are rendered with it; save the base's into it")


def _few(held_out: dict[str, HeldOut]) -> list[str]:
    return [
        f"{name} holds out {held.rows} {'row' if held.rows == 1 else 'rows'}, and fewer than {MINIMUM_DOCUMENTS} "
        "decide nothing: raise valid_fraction, or give a valid split"
        for name, held in held_out.items()
        if held.rows < MINIMUM_DOCUMENTS
    ]


def _leaks(config: StagesConfig, splits: dict[str, Mixture]) -> list[str]:
    """Held-out rows of one stage that another stage trains on: there it is memory that is measured."""
    notes: list[str] = []
    for held in config.stages:
        rows = [_said(record) for record in splits[held.name].valid]
        for other in config.stages:
            trained = {_said(record) for record in splits[other.name].train}
            shared = sum(row in trained for row in rows)
            if shared and other is held:
                notes.append(
                    f"{shared:,} of the {len(rows):,} held-out rows of {held.name} stand in its training rows too"
                )
            elif shared:
                notes.append(
                    f"{shared:,} of the {len(rows):,} held-out rows of {held.name} are training rows of {other.name}: "
                    "losses there are too good; use the same seed and valid_fraction, or a valid split"
                )
    return notes


def _said(record: Record) -> tuple[object, ...]:
    return (tuple((turn.role, turn.content) for turn in record.messages or ()), record.text)

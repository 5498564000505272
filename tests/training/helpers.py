"""Random samples, a stream over them, models as each method trains them, and a run of the loop in a folder."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from strop.config import Steps
from strop.data.batches import BatchStream
from strop.data.packing import packed_attention
from strop.data.templates import IGNORED, Sample
from strop.files.shards import Part, read_file, write_file
from strop.layers.grids import LearnedGrid, RangeGrid
from strop.layers.surgery import attach_fake_quant, attach_lora, attach_rounding, quantize_linears
from strop.methods import search
from strop.numerics.scheme import parse_scheme
from strop.training.loop import train
from strop.training.objective import LABELS, Objective
from strop.training.settings import TrainResult, TrainSettings
from tests.tiny import tiny_model

KINDS = ["full", "lora", "qlora", "qat", "qat-learned", "qat-lora"]


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


class Notes:
    """A reporter that remembers, and calls `at_step` after each step."""

    def __init__(self, at_step: Callable[[int], None] | None = None) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[float, dict[str, Any]]] = []
        self.finished = 0
        self._at_step = at_step

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, title: str, total: float | None, unit: str) -> None:
        self.title, self.total = title, total

    def advance(self, done: float, **fields: float | int | str) -> None:
        self.steps.append((done, fields))
        if self._at_step is not None:
            self._at_step(int(done))

    def finish(self) -> None:
        self.finished += 1


def ragged_samples(count: int = 12, *, seed: int = 0, longest: int = 20, vocabulary: int = 300) -> list[Sample]:
    """Random token rows of different lengths with different shares of supervised tokens."""
    draw = random.Random(seed)
    samples = []
    for index in range(count):
        ids = [draw.randrange(5, vocabulary) for _ in range(draw.randint(4, longest))]
        begin = draw.randint(1, len(ids) - 1)
        labels = [IGNORED] * begin + ids[begin:]
        samples.append(Sample(ids, labels, index, ((begin, len(ids)),)))
    return samples


def stream_of(
    samples: list[Sample], model: nn.Module | None = None, *, packing: bool = False, **changes: Any
) -> BatchStream:
    settings: dict[str, Any] = {"batch_size": 2, "accumulation": 2, "max_length": 64, "seed": 0} | changes
    attention = packed_attention(model, settings["max_length"]) if packing else None
    return BatchStream(samples, packing=packing, attention=attention, **settings)


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def run_loop(
    model: nn.Module,
    run_dir: Path,
    *,
    samples: list[Sample] | None = None,
    valid: list[Sample] | None = None,
    packing: bool = False,
    resume: bool = False,
    reporter: Notes | None = None,
    stream: BatchStream | None = None,
    batch: dict[str, Any] | None = None,
    objective: Objective = LABELS,
    **changes: Any,
) -> TrainResult:
    """Train with small defaults; RUN/best and RUN/last hold the trained tensors."""
    run_dir.mkdir(parents=True, exist_ok=True)

    def export(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        write_file(folder / "weights.safetensors", [Part.of(trained_tensors(model))])

    settings = TrainSettings(**({"length": Steps(max_steps=6), "learning_rate": 1e-2} | changes))
    return train(
        model,
        stream or stream_of(samples or ragged_samples(), model, packing=packing, **(batch or {})),
        ragged_samples(4, seed=9) if valid is None else valid,
        settings,
        run_dir,
        export=export,
        objective=objective,
        resume=resume,
        reporter=reporter or Notes(),
    )


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return read_file(folder / "weights.safetensors")


def prepared(kind: str, *, dropout: float = 0.0, rank: int = 4) -> nn.Module:
    """A tiny model as each method trains it."""
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(3)
    if kind == "full":
        model.requires_grad_(True)
    elif kind == "qat":
        model.requires_grad_(True)
        attach_fake_quant(model, parse_scheme("int3-g32"))
    elif kind == "qat-learned":
        model.requires_grad_(True)
        scheme = parse_scheme("int3-g32-asym")
        attach_fake_quant(model, scheme, grid=lambda name, weight: LearnedGrid(search(weight, scheme, None)))
    elif kind == "qat-lora":
        attach_lora(model, "all-linear", rank=rank, alpha=8, generator=generator)
        scheme = parse_scheme("int3-g32")
        attach_rounding(model, lambda name, adapter: RangeGrid(scheme, (adapter.out_features, adapter.in_features)))
    else:
        if kind == "qlora":
            quantize_linears(model, parse_scheme("nf4-dq"))
        attach_lora(model, "all-linear", rank=rank, alpha=8, dropout=dropout, generator=generator)
    return model


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def goes_on_after_a_kill(run: Callable[..., nn.Module], folder: Path, *, step: int = 3) -> None:
    """Assert that a run which is killed after a step and resumed ends in the bits of the run in one go.

    Args:
        run: takes the name of the run's folder and what `run_loop` takes beside it; returns the model.
        folder: where those folders lie.
        step: after which it is killed.
    """

    def kill(done: int) -> None:
        if done == step:
            raise Killed

    straight = run("straight")
    with pytest.raises(Killed):
        run("killed", reporter=Notes(kill))
    resumed = run("killed", resume=True)
    assert_equal(trained_tensors(resumed), trained_tensors(straight))
    for name in ("best", "last"):
        assert_equal(exported(folder / "killed" / name), exported(folder / "straight" / name))

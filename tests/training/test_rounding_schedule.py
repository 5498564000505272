"""Delayed starts and frozen scales: phases of the step alone, gone on with bit for bit, evaluated as stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from strop.layers.fake_quant_linear import FakeQuantLinear
from strop.layers.grids import CodeMoves, LearnedGrid, RangeGrid
from strop.layers.scale_linear import ScaleLinear
from strop.layers.surgery import attach_fake_quant, attach_lora, attach_rounding, linear_modules, replace
from strop.methods import search
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from strop.training.rounding_schedule import RoundingSchedule
from strop.training.settings import Progress
from strop.training.watchdog import forget
from tests.tiny import tiny_model
from tests.training.helpers import Notes, goes_on_after_a_kill, run_loop

ASYM = parse_scheme("int3-g32-asym")


def _model(kind: str) -> torch.nn.Module:
    model = tiny_model("llama")
    model.requires_grad_(True)
    if kind == "codes":
        scheme = parse_scheme("int4-g32")
        attach_lora(model, "all-linear", rank=4, alpha=8, generator=torch.Generator().manual_seed(0))
        attach_rounding(
            model, lambda name, adapter: CodeMoves(quantize_tensor(adapter.base.weight.detach(), scheme), 0.2)
        )
        return model
    if kind == "range":
        attach_fake_quant(
            model, ASYM, grid=lambda name, weight: RangeGrid(ASYM, (weight.shape[0], weight.shape[1]), holds=True)
        )
    else:
        attach_fake_quant(model, ASYM, grid=lambda name, weight: LearnedGrid(search(weight, ASYM, None)))
    if kind == "scales":
        for name, module in linear_modules(model).items():
            if isinstance(module, FakeQuantLinear):
                replace(model, name, ScaleLinear(module.to_quant_linear()))
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.endswith(".factor") or parameter.ndim == 1
    return model


def _scales(model: torch.nn.Module) -> list[torch.Tensor]:
    return [
        module.to_quant_linear().qtensor.scales()
        for module in model.modules()
        if isinstance(module, FakeQuantLinear | ScaleLinear)
    ]


def test_phases_follow_the_step():
    model = _model("range")
    schedule = RoundingSchedule(model, delay=0.3, freeze=0.2)
    layers = [module for module in model.modules() if isinstance(module, FakeQuantLinear)]
    seen = []
    for step in range(10):
        schedule.before_step(step, 10)
        seen.append((all(layer.rounds for layer in layers), all(layer.grid.held for layer in layers)))
    assert seen == [(False, False)] * 3 + [(True, False)] * 5 + [(True, True)] * 2


def test_without_delay_and_freeze_every_step_rounds_and_no_scale_is_held():
    model = _model("learned")
    schedule = RoundingSchedule(model)
    for step in range(4):
        schedule.before_step(step, 4)
        assert all(module.rounds for module in model.modules() if isinstance(module, FakeQuantLinear))
        assert all(grid.factor.requires_grad for grid in model.modules() if isinstance(grid, LearnedGrid))


def test_what_is_evaluated_is_rounded_before_the_rounding_begins():
    model = _model("range")
    schedule = RoundingSchedule(model, delay=0.5)
    schedule.before_step(0, 10)
    layer = next(module for module in model.modules() if isinstance(module, FakeQuantLinear))
    with schedule.rounding():
        assert layer.rounds
    assert not layer.rounds


@pytest.mark.parametrize("kind", ["range", "learned", "scales"])
def test_frozen_scales_stay_to_the_end_and_others_do_not(tmp_path, kind):
    frozen, free = _model(kind), _model(kind)
    at: list[list[torch.Tensor]] = []

    def look(step: int) -> None:
        if step in (4, 6):
            at.append(_scales(frozen))

    run_loop(frozen, tmp_path / "frozen", freeze=0.5, reporter=Notes(look), learning_rate=1e-2)
    for before, after in zip(*at, strict=True):
        assert torch.equal(before, after)
    run_loop(free, tmp_path / "free", learning_rate=1e-2)
    assert any(not torch.equal(one, other) for one, other in zip(_scales(free), at[1], strict=True))


@pytest.mark.parametrize("step", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["range", "learned", "scales", "codes"])
def test_a_run_killed_in_any_phase_goes_on_bit_for_bit(tmp_path, kind, step):
    settings = {"save_steps": 1, "delay": 0.0 if kind == "scales" else 0.4, "freeze": 0.4, "learning_rate": 1e-2}

    def run(name: str, **more: Any) -> torch.nn.Module:
        model = _model(kind)
        run_loop(model, tmp_path / name, **settings, **more)
        return model

    goes_on_after_a_kill(run, tmp_path, step=step)


def test_a_learned_scale_that_is_driven_out_of_its_bounds_is_told_once(tmp_path):
    notes = Notes()
    run_loop(_model("learned"), tmp_path / "run", scale_rate=50.0, reporter=notes)
    told = [note for note in notes.notes if "learned scales" in note]
    assert len(told) == 1
    assert "lower scale_rate" in told[0]


def test_the_loss_before_the_rounding_is_no_measure_for_what_comes_after():
    progress = Progress(losses=[0.1] * 8, high=4, worse_evaluations=2)
    schedule = RoundingSchedule(_model("range"), delay=0.5)
    assert [schedule.before_step(step, 4) for step in range(4)] == [False, False, True, False]
    forget(progress)
    assert (progress.losses, progress.high, progress.worse_evaluations) == ([], 0, 0)
    assert not any(RoundingSchedule(_model("range")).before_step(step, 4) for step in range(4))

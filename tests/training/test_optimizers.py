"""AdamW against its formula, its groups, its precision, and the rates that methods start from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from strop.layers.surgery import attach_lora
from strop.training.optimizers import (
    BETAS,
    EPSILON,
    default_learning_rate,
    gradient_norm,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    trained_parameters,
    widen_trained,
)
from tests.tiny import tiny_model


def test_steps_follow_the_formula_with_decay_on_matrices_only():
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 4), "vector": (4,)}
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    parameters = {name: nn.Parameter(value.clone()) for name, value in weights.items()}
    optimizer = make_optimizer("adamw", parameters, learning_rate=0.1, weight_decay=0.5)
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step in range(1, 5):
        for name, parameter in parameters.items():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient**2
            mean, square = first[name] / (1 - BETAS[0] ** step), second[name] / (1 - BETAS[1] ** step)
            decay = 0.5 if name == "matrix" else 0.0
            weights[name] = weights[name] - 0.1 * (mean / (square.sqrt() + EPSILON) + decay * weights[name])
        optimizer.step()
        for name, parameter in parameters.items():
            assert torch.allclose(parameter, weights[name], rtol=1e-12), (step, name)


def test_norms_and_biases_do_not_decay():
    parameters = trained_parameters(tiny_model("gpt2").requires_grad_(True))
    decaying, others = make_optimizer("adamw", parameters, learning_rate=0.1, weight_decay=0.5).param_groups
    names = {id(parameter): name for name, parameter in parameters.items()}
    assert decaying["weight_decay"] == 0.5
    assert others["weight_decay"] == 0.0
    assert all(
        "weight" in names[id(parameter)] and "ln" not in names[id(parameter)] for parameter in decaying["params"]
    )
    assert all("bias" in names[id(parameter)] or "ln" in names[id(parameter)] for parameter in others["params"])
    assert len(decaying["params"]) + len(others["params"]) == len(parameters)


def test_trained_weights_become_fp32_and_frozen_ones_stay():
    model = tiny_model("llama", dtype=torch.bfloat16)
    attach_lora(model, "q_proj", rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    model.model.norm.requires_grad_(True)
    widen_trained(model)
    assert {parameter.dtype for parameter in trained_parameters(model).values()} == {torch.float32}
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_widening_keeps_ties():
    model = tiny_model("llama", tied=True, dtype=torch.bfloat16).requires_grad_(True)
    widen_trained(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32


def test_small_updates_vanish_in_bf16_and_not_in_fp32_masters():
    """Why the masters are fp32: an update of a thousandth of a weight is rounded away in bf16."""
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        weight = nn.Parameter(torch.ones(1000, 2, dtype=dtype))
        optimizer = make_optimizer("adamw", {"weight": weight}, learning_rate=1e-3, weight_decay=0.0)
        for _ in range(10):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[dtype] = (weight != 1).double().mean().item()
    assert moved == {torch.bfloat16: 0.0, torch.float32: 1.0}


def test_state_put_back_goes_on_to_the_same_bits():
    def run(stop: int | None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        parameters = {"a": nn.Parameter(torch.ones(4, 4)), "b": nn.Parameter(torch.ones(4))}
        optimizer = make_optimizer("adamw", parameters, learning_rate=0.1, weight_decay=0.1)
        for step in range(6):
            if step == stop:
                saved = {name: value.clone() for name, value in optimizer_tensors(optimizer, parameters).items()}
                optimizer = make_optimizer("adamw", parameters, learning_rate=0.1, weight_decay=0.1)
                load_optimizer_tensors(optimizer, parameters, saved)
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in parameters.values()])

    assert torch.equal(run(None), run(3))


def test_state_of_unknown_parameters_is_refused():
    parameters = {"a": nn.Parameter(torch.ones(2))}
    with pytest.raises(ValueError, match=r"b\.exp_avg"):
        load_optimizer_tensors(
            make_optimizer("adamw", parameters, learning_rate=1.0, weight_decay=0.0),
            parameters,
            {"b.exp_avg": torch.ones(2)},
        )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_the_norm_is_that_of_all_gradients_together(values):
    parameters = {}
    for index, value in enumerate(values):
        parameters[str(index)] = nn.Parameter(torch.zeros(1))
        parameters[str(index)].grad = torch.tensor([value])
    assert float(gradient_norm(parameters)) == pytest.approx(math.hypot(*values), rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_number_shows_in_the_norm(value):
    parameter = nn.Parameter(torch.zeros(100))
    parameter.grad = torch.ones(100)
    parameter.grad[37] = value
    assert not math.isfinite(float(gradient_norm({"x": parameter})))


def test_default_rates_follow_the_width():
    assert default_learning_rate(4096, adapters=False) == 2e-5
    assert default_learning_rate(4096, adapters=True) == pytest.approx(2e-4)
    assert default_learning_rate(8192, adapters=True) == pytest.approx(1e-4)
    assert default_learning_rate(16, adapters=True) == default_learning_rate(128, adapters=True)

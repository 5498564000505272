"""Inputs rounded in training are the values that the runtime computes with."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from strop.errors import ConfigError
from strop.layers.input_rounding import input_rounding, q8_0_values, rounding_inputs
from strop.numerics.activations import Activations, rounded


def _x() -> torch.Tensor:
    return torch.randn(7, 96, generator=torch.Generator().manual_seed(0)) * 3


def test_q8_0_values_are_those_of_the_gguf_package():
    x = _x()
    blocks = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)
    theirs = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0).astype(np.float32))
    assert torch.equal(q8_0_values(x), theirs)


def test_zeros_stay_and_a_last_block_that_is_not_full_is_rounded_alone():
    assert torch.equal(q8_0_values(torch.zeros(2, 64)), torch.zeros(2, 64))
    x = _x()[:, :40]
    assert torch.equal(q8_0_values(x)[:, :32], q8_0_values(x[:, :32]))
    assert torch.equal(q8_0_values(x)[:, 32:], q8_0_values(x[:, 32:]))


@pytest.mark.parametrize("name", ["int8", "q8_0"])
def test_the_gradient_passes_straight_through(name):
    x = _x().bfloat16().requires_grad_()
    y = input_rounding(name)(x)
    assert y.dtype == torch.bfloat16
    assert not torch.equal(y, x)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, torch.ones_like(x))


def test_int8_inputs_are_those_of_dynamic_activations():
    assert torch.equal(input_rounding("int8")(_x()), rounded(_x(), Activations()))


def test_named_layers_of_a_model_round_their_inputs_for_a_while():
    model = nn.Sequential(nn.Linear(96, 32), nn.Linear(32, 32))
    plain = model(_x())
    with rounding_inputs(model, ["0"], "q8_0"):
        inside = model(_x())
    assert torch.equal(inside, model[1](model[0](q8_0_values(_x()))))
    assert torch.equal(model(_x()), plain)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="q8_0"):
        input_rounding("q80")
    assert input_rounding(None) is None

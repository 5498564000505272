"""Mean squares of the layers' inputs against a slow count of them, padding left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strop.calibrate import gather_activation_scales, gather_statistics
from strop.data.batches import eval_batches
from strop.data.templates import Sample
from strop.errors import DataError
from strop.layers.surgery import linear_modules
from strop.numerics.activation_observers import ACTIVATION_OBSERVERS, MinMax
from tests.tiny import tiny_input, tiny_model


def samples(lengths: list[int]) -> list[Sample]:
    ids = tiny_input(rows=len(lengths), length=max(lengths)).tolist()
    return [Sample(ids[row][:length], ids[row][:length], index=row) for row, length in enumerate(lengths)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral"])
def test_mean_squares_are_those_of_the_real_tokens(family: str) -> None:
    model = tiny_model(family)
    rows = samples([12, 5, 9, 3])
    found = gather_statistics(model, eval_batches(rows, 2))
    seen: dict[str, list[Tensor]] = {name: [] for name in linear_modules(model)}
    hooks = [
        module.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0].reshape(-1, x[0].shape[-1])))
        for name, module in linear_modules(model).items()
    ]
    for row in rows:  # one at a time: no padding
        with torch.no_grad():
            model(torch.tensor([row.input_ids]))
    for hook in hooks:
        hook.remove()
    assert found.keys() == seen.keys()
    for name, statistics in found.items():
        inputs = torch.cat(seen[name]).double()
        assert statistics.rows == 12 + 5 + 9 + 3
        assert statistics.mean_square.dtype == torch.float32
        torch.testing.assert_close(statistics.mean_square.double(), inputs.square().mean(0), rtol=1e-4, atol=1e-7)


def test_nothing_stays_attached_and_the_mode_is_kept() -> None:
    model = tiny_model("llama").train()
    gather_statistics(model, eval_batches(samples([4, 4]), 2))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_rows_and_inputs_that_overflow_are_errors() -> None:
    model = tiny_model("llama")
    with pytest.raises(DataError, match="no rows"):
        gather_statistics(model, [])
    model.get_submodule("model.layers.0.input_layernorm").weight.data.fill_(float("inf"))
    with pytest.raises(DataError, match=r"not finite .*layers\.0\.self_attn\.q_proj"):
        gather_statistics(model, eval_batches(samples([4]), 1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral"])
def test_activation_scales_cover_the_real_tokens_alone(family: str) -> None:
    model, rows = tiny_model(family), samples([12, 5, 9, 3])
    found = gather_activation_scales(model, eval_batches(rows, 2), MinMax)
    largest: dict[str, float] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, x, name=name: largest.update({name: max(largest.get(name, 0.0), x[0].abs().max().item())})
        )
        for name, module in linear_modules(model).items()
    ]
    for row in rows:  # one at a time: no padding
        with torch.no_grad():
            model(torch.tensor([row.input_ids]))
    for hook in hooks:
        hook.remove()
    assert found.keys() == largest.keys()
    assert all(scale == pytest.approx(largest[name] / 127.5, rel=1e-3) for name, scale in found.items())


def test_no_rows_and_inputs_that_overflow_fix_no_scale() -> None:
    model = tiny_model("llama")
    for make in ACTIVATION_OBSERVERS.values():
        with pytest.raises(DataError, match="no rows"):
            gather_activation_scales(model, [], make)
    model.get_submodule("model.layers.0.input_layernorm").weight.data.fill_(float("inf"))
    with pytest.raises(DataError, match=r"layers\.0\.self_attn\.q_proj: .*NaN or infinite"):
        gather_activation_scales(model, eval_batches(samples([4]), 1), MinMax)

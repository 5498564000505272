"""Few rows through dense bfloat16 layers: the exact product rounded once, and layers left as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from strop.evaluation import few_rows as module
from strop.evaluation.few_rows import MOST_ROWS, few_rows, linear
from strop.evaluation.generation import generate_answers
from tests.tiny import tiny_input, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize(("width", "height"), [(64, 96), (33, 7), (1, 5), (257, 1)])
def test_the_product_is_the_exact_one_rounded(rows: int, width: int, height: int, *, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(width, height, bias=bias).bfloat16()
    x = torch.randn(1, rows, width).bfloat16()
    with torch.no_grad():
        found = linear(layer, x)
        product = x.double() @ layer.weight.double().t()
        exact = product + layer.bias.double() if bias else product
    assert found.shape == (1, rows, height)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
    # Half a step of bfloat16 at each rounding, and what float32 sums lose before: values are of the order of one.
    rounded = exact.abs() + product.abs() if bias else exact.abs()
    assert ((found.double() - exact).abs() <= rounded * 2**-8 + 1e-5).all()


def test_layers_come_back_as_they_were_and_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_tiles", lambda: True)  # on this machine or not, the context is the same
    model = tiny_model("llama", dtype=torch.bfloat16)
    linears = [each for each in model.modules() if isinstance(each, nn.Linear)]
    hooked, own = linears[0], linears[0].forward
    hooked.forward = own
    with few_rows(model):
        assert hooked.forward is own
        assert all("forward" in vars(each) for each in linears[1:])
    assert hooked.forward is own
    assert not any("forward" in vars(each) for each in linears[1:])
    wide = tiny_model("llama")
    with few_rows(wide):
        assert not any("forward" in vars(each) for each in wide.modules())


def test_gradients_pass_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_tiles", lambda: True)
    model = tiny_model("llama", dtype=torch.bfloat16)
    with few_rows(model):
        model(input_ids=tiny_input(rows=1, length=3)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_listener_that_fails_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16).train()

    def fail(done: int) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        generate_answers(
            model, tiny_tokenizer(), tiny_input(rows=3).tolist(), stop_ids=[], max_new_tokens=4, on_batch=fail
        )
    assert caught.value.__traceback__ is not None  # its frames are still there
    assert model.training
    assert not any("forward" in vars(each) for each in model.modules())

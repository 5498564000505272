"""A model written while it is trained: stored as it will be served, and left exactly as it was."""

from __future__ import annotations

import math

import pytest
import torch

from strop.errors import ModelError
from strop.layers.fake_quant_linear import FakeQuantLinear
from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import attach_fake_quant
from strop.numerics.scheme import parse_scheme
from strop.training.exporting import as_stored, export_model
from tests.tiny import tiny_input, tiny_model


def qat_model():
    model = tiny_model("llama", tied=True).requires_grad_(True)
    attach_fake_quant(model, parse_scheme("int3-g32"))
    return model


def test_inside_it_is_what_will_be_served_and_outside_what_it_was():
    model = qat_model()
    before = {name: (value, value.data, value.detach().clone()) for name, value in model.named_parameters()}
    logits = model(tiny_input()).logits
    with as_stored(model, dtype=torch.bfloat16):
        assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
        assert not any(isinstance(module, FakeQuantLinear) for module in model.modules())
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16
        assert model.lm_head.weight is model.model.embed_tokens.weight
        scales = {module.qtensor.scale.dtype for module in model.modules() if isinstance(module, QuantLinear)}
        assert scales == {torch.float16}
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, data, copy) in before.items():
        assert after[name] is parameter
        assert after[name].data_ptr() == data.data_ptr()
        assert torch.equal(after[name], copy)
        assert after[name].requires_grad
    assert torch.equal(model(tiny_input()).logits, logits)


def test_a_failure_inside_puts_everything_back():
    model = qat_model()
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    with pytest.raises(RuntimeError, match="disk"), as_stored(model, dtype=torch.bfloat16):
        raise RuntimeError("disk")
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize(("value", "dtype"), [(math.nan, torch.float32), (1e30, torch.float16)])
def test_what_is_no_number_in_the_stored_dtype_is_not_saved(tmp_path, value, dtype):
    model = tiny_model("llama").requires_grad_(True)
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(ModelError, match=r"1 tensors hold NaN or infinite values .*model\.norm\.weight"):
        export_model(model, None, tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []
    assert model.model.norm.weight.dtype == torch.float32


def test_a_second_export_replaces_the_first(tmp_path):
    model = tiny_model("llama").requires_grad_(True)
    export_model(model, None, tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(2.0)
    export_model(model, None, tmp_path / "out", dtype=torch.float32)
    from strop.files.shards import iter_tensors

    assert torch.equal(dict(iter_tensors(tmp_path / "out"))["model.norm.weight"], torch.full((64,), 2.0))

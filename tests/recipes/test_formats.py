"""MXFP4, Q4_K and stochastic rounding where a user meets them: quantize, merge, explain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from strop.errors import FormatError
from strop.layers.base import dense_weight
from strop.layers.surgery import linear_modules
from strop.methods import METHODS, rtn, search
from strop.models import load
from strop.numerics import fake_quantize, parse_format
from strop.recipes.explain import explain_bits, explain_tensor
from strop.recipes.quantize import quantize
from tests.recipes.test_quantize import tiny_folder


@pytest.mark.parametrize(
    ("format", "method"), [("mxfp4", "rtn"), ("mxfp4", "search"), ("int4-g32", "stochastic"), ("mxfp4", "stochastic")]
)
def test_a_saved_model_has_the_weights_of_the_method(tmp_path: Path, format: str, method: str) -> None:
    source = tiny_folder(tmp_path, "llama")
    result = quantize(source, format, output=tmp_path / "out", method=method)
    original = load(source)
    for name, module in linear_modules(load(result.path).model).items():
        weight = dense_weight(original.model.get_submodule(name))
        expected = METHODS[method](weight, parse_format(format).scheme, where=name)
        assert dense_weight(module).equal(expected.dequantize()), name
    assert result.receipt["bits_per_weight"] == {"mxfp4": 4.25, "int4-g32": 4.5}[format]
    assert result.receipt["settings"]["method"] == method


def test_q4_k_is_refused_by_name_before_any_work(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "llama")
    with pytest.raises(FormatError, match=r"q4_k: is a grid of GGUF files.*the nearest that one does is int4-g32-asym"):
        quantize(source, "gguf:q4_k", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_may_have_q4_k(tmp_path: Path) -> None:
    """What `compare` and calibration work on before a file is written."""
    from tests.tiny import tiny_model, tiny_tokenizer

    tiny_model("llama", hidden_size=256, intermediate_size=512).save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    original, opened = load(tmp_path / "wide"), load(tmp_path / "wide", format="gguf:q4_k")
    for name, module in linear_modules(opened.model).items():
        weight = dense_weight(original.model.get_submodule(name))
        assert dense_weight(module).equal(rtn(weight, parse_format("gguf:q4_k").scheme).dequantize())
    with torch.no_grad():
        assert opened.model(torch.arange(1, 9)[None]).logits.isfinite().all()


def test_explain_shows_the_element_of_mxfp4_and_sends_grids_elsewhere() -> None:
    shown = explain_bits(7.3, "mxfp4")
    assert (shown.bits, shown.stored, shown.below, shown.above) == ("0111", 6.0, 4.0, None)
    assert explain_bits(-0.3, "MXFP4").bits == "1001"
    with pytest.raises(FormatError, match="finite numbers only"):
        explain_bits(float("nan"), "mxfp4")
    assert explain_bits(float("inf"), "mxfp4").stored == 6.0
    with pytest.raises(FormatError, match="its codes are uint4"):
        explain_bits(1.0, "gguf:q4_k")
    with pytest.raises(FormatError, match="its codes are int4"):
        explain_bits(1.0, "int4-g32")


def test_explain_draws_a_weight_in_q4_k(tmp_path: Path) -> None:
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(0)) * 0.1
    weight[3, :256] = 0.0  # superblocks without a step
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 0}))
    save_file({"layer.weight": weight}, tmp_path / "model.safetensors")
    shown = explain_tensor(tmp_path, "layer", "gguf:q4_k", tmp_path / "picture.png")
    difference = (fake_quantize(weight, parse_format("gguf:q4_k").scheme) - weight).double()
    relative = (difference.square().sum() / weight.double().square().sum()).item()
    assert shown.relative_squared_error == pytest.approx(relative, rel=1e-9)
    assert (shown.bits_per_weight, shown.format) == (4.5, "gguf:q4_k")
    assert shown.largest_error_steps is not None
    assert 0.45 < shown.largest_error_steps < 1.0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    searched = search(weight, parse_format("gguf:q4_k").scheme).dequantize()
    assert (searched - weight).square().sum() < difference.square().sum()

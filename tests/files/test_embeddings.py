"""Quantized embeddings in folders: one weight with a tied head, opened bit for bit by strop and transformers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from strop.errors import FileFormatError, FormatError, ModelError
from strop.files import compressed_tensors
from strop.files.saving import save_model
from strop.layers.quant_embedding import QuantEmbedding, find_ends, install_embedding
from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import quantize_linears
from strop.models import load
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from strop.recipes.export_source import open_source
from tests.tiny import tiny_input, tiny_model

TIED = {False: "untied", True: "tied"}.get


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """compressed-tensors and transformers draw bars otherwise."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def made(family: str = "llama", *, tied: bool, layers: str = "int4-g32", grid: str = "int8-g32", **options: Any) -> Any:
    model = tiny_model(family, tied=tied, **options)
    quantize_linears(model, parse_scheme(layers))
    ends = find_ends(model)
    assert ends.embedding is not None
    weight = model.get_input_embeddings().weight
    install_embedding(model, ends.embedding, quantize_tensor(weight, parse_scheme(grid), where="embedding"))
    if not tied:
        head = model.get_output_embeddings()
        model.set_submodule("lm_head", QuantLinear(quantize_tensor(head.weight, parse_scheme("int3-g32-full"))))
    return model


def logits(model: Any) -> Tensor:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(tiny_input()).logits.float()


@pytest.mark.parametrize("tied", [False, True], ids=TIED)
@pytest.mark.parametrize(
    ("layers", "grid"),
    [("int4-g32", "int8-g32"), ("int8-g32", "int8-g32"), ("int3-g32-full", "int8"), ("int8", "int8")],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_strop_and_transformers_open_it_bit_for_bit(
    tmp_path: Path, family: str, layers: str, grid: str, *, tied: bool
) -> None:
    model = made(family, tied=tied, layers=layers, grid=grid)
    save_model(model, None, tmp_path / "out")
    again = load(tmp_path / "out").model
    one, other = model.state_dict(), again.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(part, other[name]) for name, part in one.items())
    assert isinstance(again.get_input_embeddings(), QuantEmbedding)
    assert find_ends(again).tied is tied
    assert again.config.tie_word_embeddings is tied
    assert torch.equal(logits(again), logits(model))
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert {name: keys for name, keys in info.items() if keys} == {}
    assert torch.equal(logits(theirs), logits(model))
    assert torch.equal(theirs.get_input_embeddings().weight, model.get_input_embeddings().weight)
    if tied:
        assert torch.equal(theirs.get_output_embeddings().weight, model.get_input_embeddings().weight)
    save_model(again, None, tmp_path / "twice")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "twice"))
    assert first.keys() == second.keys()
    assert all(torch.equal(part, second[name]) for name, part in first.items())


def test_a_tied_embedding_is_in_the_file_once_but_for_its_scales(tmp_path: Path) -> None:
    save_model(made(tied=True, dtype=torch.bfloat16), None, tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert held["model.embed_tokens.weight"].dtype == torch.int8
    assert "lm_head.weight" not in held
    assert torch.equal(held["lm_head.weight_scale"], held["model.embed_tokens.weight_scale"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == []
    group = config["config_groups"]["int8-g32@embeddings"]
    assert group["format"] == "naive-quantized"
    assert group["targets"] == ["model.embed_tokens", "lm_head"]
    names = open_source(tmp_path / "out").names
    assert "model.embed_tokens.weight" in names
    assert not [name for name in names if "lm_head" in name]


def test_a_packed_embedding_is_what_transformers_cannot_open(tmp_path: Path) -> None:
    """Why embeddings have 8 bits and no fewer: the day this fails, they can have any."""
    model = made(tied=False)
    save_model(model, None, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    held = {name: part for name, part in load_file(path).items() if not name.startswith("model.embed_tokens")}
    weight = quantize_tensor(tiny_model("llama", tied=False).get_input_embeddings().weight, parse_scheme("int4-g32"))
    save_file(held | compressed_tensors.encode(weight, "model.embed_tokens"), path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    del groups["int8-g32@embeddings"]
    groups["int4-g32"]["targets"].append("model.embed_tokens")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert load(tmp_path / "out").model.get_input_embeddings().scheme.name == "int4-g32"


def test_scales_of_a_tied_head_that_are_others_are_refused(tmp_path: Path) -> None:
    save_model(made(tied=True), None, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    held = load_file(path)
    held["lm_head.weight_scale"] = held["lm_head.weight_scale"] * 2
    save_file(held, path, metadata={"format": "pt"})
    with pytest.raises(FileFormatError, match=r"model\.embed_tokens: the scales that its tied head has are others"):
        load(tmp_path / "out")
    del held["model.embed_tokens.weight_scale"]
    save_file(held, path, metadata={"format": "pt"})
    with pytest.raises(ModelError):
        load(tmp_path / "out")


@pytest.mark.parametrize("grid", ["int4-g32", "int8-g32-asym", "int6"])
def test_formats_that_files_cannot_hold_an_embedding_in_are_refused_with_the_nearest(tmp_path: Path, grid: str) -> None:
    layers = "int8-g32-asym" if "asym" in grid else "int4-g32"
    with pytest.raises(FormatError, match="int8-g32"):
        save_model(made(tied=True, layers=layers, grid=grid), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_embedding_alone_and_one_beside_layers_of_another_class_are_refused(tmp_path: Path) -> None:
    alone = tiny_model("llama", tied=True)
    weight = alone.get_input_embeddings().weight
    install_embedding(alone, "model.embed_tokens", quantize_tensor(weight, parse_scheme("int8-g32")))
    with pytest.raises(FormatError, match="beside quantized linear layers only"):
        save_model(alone, None, tmp_path / "out")
    with pytest.raises(FormatError, match=r"FalconLinear.*by the first format"):
        save_model(made("falcon", tied=True), None, tmp_path / "out")


def test_layers_of_another_class_than_linear_cannot_have_formats_of_their_own(tmp_path: Path) -> None:
    model = tiny_model("falcon")
    quantize_linears(model, parse_scheme("int4-g32"), "mlp.*")
    quantize_linears(model, parse_scheme("int8-g32"), "self_attention.*")
    with pytest.raises(FormatError, match=r"cannot mix int4-g32, int8-g32: .*FalconLinear"):
        save_model(model, None, tmp_path / "out")

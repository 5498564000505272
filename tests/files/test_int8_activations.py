"""Models with int8 activations on disk: in strop bit for bit, and in transformers with compressed-tensors alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from strop.errors import FileFormatError, FormatError, ModelError
from strop.files.compressed_tensors import config_for, decode, encode, scheme_from_config
from strop.files.saving import save_model
from strop.layers.quantized import QUANTIZED
from strop.layers.surgery import linear_modules, quantize_linears
from strop.models import load
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from tests.tiny import tiny_folder, tiny_input, tiny_model

FORMATS = ("int8-a8", "int8-a8-asym", "int8-a8-static", "int8-a8-over6", "int8-tensor-a8", "int8-full-a8")
THEIRS = [
    ("llama", "int8-a8"),
    ("llama", "int8-a8-asym"),
    ("llama", "int8-a8-static"),
    ("falcon", "int8-a8"),
    ("mixtral", "int8-a8"),
]


def saved(folder: Path, family: str, text: str) -> Path:
    model = tiny_model(family)
    scales = {name: 0.02 + 0.001 * place for place, name in enumerate(linear_modules(model))}
    quantize_linears(model, parse_scheme(text), activation_scales=scales)
    return save_model(model, None, folder / "saved")


@pytest.mark.parametrize("text", FORMATS)
def test_what_is_encoded_decodes_to_the_same(text: str) -> None:
    weight = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    qtensor = quantize_tensor(weight, parse_scheme(text)).with_activation_scale(0.25)
    config = config_for(qtensor.scheme, ["lm_head"])
    tensors = {key.removeprefix("a."): tensor for key, tensor in encode(qtensor, "a").items()}
    assert ("weight" in tensors) == (text != "int8-a8-over6")
    assert ("input_scale" in tensors) == (text == "int8-a8-static")
    read = decode(tensors, config)
    assert read.scheme == qtensor.scheme
    assert all(read.tensors()[name].equal(tensor) for name, tensor in qtensor.tensors().items())


@pytest.mark.parametrize(("family", "text"), [*(("llama", text) for text in FORMATS), ("falcon", "int8-a8-static")])
def test_a_saved_model_opens_again_bit_for_bit(tmp_path: Path, family: str, text: str) -> None:
    model = tiny_model(family)
    scales = dict.fromkeys(linear_modules(model), 0.03)
    quantize_linears(model, parse_scheme(text), activation_scales=scales)
    opened = load(save_model(model, None, tmp_path / "saved"), tokenizer=False)
    opened.model.set_attn_implementation("eager")  # as the tiny model computes
    assert opened.scheme == parse_scheme(text)
    for name, module in linear_modules(opened.model).items():
        assert isinstance(module, QUANTIZED)
        kept = model.get_submodule(name).qtensor.tensors()
        assert all(kept[part].equal(tensor) for part, tensor in module.qtensor.tensors().items())
    with torch.inference_mode():
        assert opened.model(tiny_input()).logits.equal(model(tiny_input()).logits)


@pytest.mark.parametrize(("family", "text"), THEIRS)
def test_transformers_opens_it_and_rounds_activations_to_the_same_codes(tmp_path: Path, family: str, text: str) -> None:
    folder = saved(tmp_path, family, text)
    theirs: Any
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    ours = load(folder, tokenizer=False).model
    weights_only = load(folder, tokenizer=False).model
    for module in linear_modules(weights_only).values():
        dense = module.dense_weight()
        module.forward = lambda x, dense=dense, bias=module.bias: torch.nn.functional.linear(x, dense, bias)
    with torch.inference_mode():
        mine, other = ours(tiny_input()).logits, theirs(tiny_input()).logits
        without = weights_only(tiny_input()).logits
    name, module = next(iter(linear_modules(ours).items()))
    assert theirs.get_submodule(name).weight.float().sub(module.dense_weight()).abs().max() < 1e-6
    assert (mine - other).norm() < 0.2 * (mine - without).norm()  # they round the same activations to the same codes


def test_transformers_opens_outlier_layers_as_plain_int8_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", "int8-a8-over6")
    theirs: Any
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    ours = load(folder, tokenizer=False).model
    with torch.inference_mode():
        mine, other = ours(tiny_input()).logits, theirs(tiny_input()).logits
    assert (mine - other).norm() < 0.03 * other.norm()


def test_a_folder_of_another_writer_is_read_by_its_fields(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", "int8-a8-static")
    config = json.loads((folder / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    config["quantization_config"]["config_groups"] = {"group_0": group}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale")]:
        tensors[name] = tensors[name].bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    opened = load(folder, tokenizer=False)
    assert opened.scheme is not None
    assert opened.scheme.name == "int8-sbf16-a8-static"
    with torch.inference_mode():
        assert opened.model(tiny_input()).logits.isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_bits": 4},
        {"type": "float"},
        {"strategy": "group", "group_size": 32},
        {"dynamic": "local"},
        {"dynamic": False, "strategy": "tensor", "symmetric": False},
        {"dynamic": False, "strategy": "token"},
    ],
    ids=str,
)
def test_other_activations_are_refused_by_name(changes: dict[str, Any]) -> None:
    config = config_for(parse_scheme("int8-a8"), [])
    (group,) = config["config_groups"].values()
    group["input_activations"] |= changes
    with pytest.raises(FormatError, match=r"input activations of .* is read"):
        scheme_from_config(config)


def test_int4_weights_with_int8_activations_are_refused() -> None:
    config = config_for(parse_scheme("int4"), [])
    (group,) = config["config_groups"].values()
    group["input_activations"] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    with pytest.raises(FormatError, match="go with int8 weights"):
        scheme_from_config(config)


@pytest.mark.parametrize(
    "scale", [torch.tensor([0.0]), torch.tensor([-1.0]), torch.tensor([float("nan")]), torch.ones(2)]
)
def test_a_broken_static_scale_is_refused(scale: torch.Tensor) -> None:
    scheme = parse_scheme("int8-a8-static")
    qtensor = quantize_tensor(torch.ones(4, 32), scheme).with_activation_scale(1.0)
    tensors = {key.removeprefix("a."): tensor for key, tensor in encode(qtensor, "a").items()}
    with pytest.raises(FileFormatError, match="input_scale"):
        decode(tensors | {"input_scale": scale}, config_for(scheme, []))
    del tensors["input_scale"]
    with pytest.raises(FileFormatError, match="input_scale"):
        decode(tensors, config_for(scheme, []))


@pytest.mark.parametrize("text", ["int8-a8", "int8-a8-over6", "llm.int8"])
def test_any_model_opens_rounded_without_data_but_for_a_static_scale(tmp_path: Path, text: str) -> None:
    folder = tiny_folder(tmp_path, "llama")
    opened = load(folder, format=text, tokenizer=False)
    assert opened.scheme == parse_scheme(text)
    with pytest.raises((FormatError, ModelError), match="strop quantize --format int8-a8-static --data"):
        load(folder, format="int8-a8-static", tokenizer=False)

"""Folders for the tests of `strop.models`: quantized ones, adapters and comparisons of opened models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from strop.files import bnb4, compressed_tensors
from strop.layers import surgery
from strop.layers.quant_experts import install_experts
from strop.layers.quant_linear import QuantLinear
from strop.numerics.formats import CodebookFormat
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from tests.tiny import tiny_input, tiny_model


def logits(model: nn.Module, *, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_input(seed=seed)).logits


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same tensors, bit for bit, under the same names."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def rounded(family: str, scheme: str, *, experts: bool = True, **changes: object) -> nn.Module:
    """The tiny model with its linear layers and experts rounded in place: what every other way to it must equal."""
    model = tiny_model(family, **changes)
    grid = parse_scheme(scheme)
    surgery.quantize_linears(model, grid)
    for name in surgery.experts(model) if experts else []:
        install_experts(model, name, [quantize_tensor(weight, grid) for weight in model.get_parameter(name)])
    return model


def edit_json(path: Path, **changes: object) -> None:
    """Set fields of a JSON file; None removes one."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def edit_weights(folder: Path, edit: object) -> None:
    """Rewrite model.safetensors after `edit(tensors)` has changed the dictionary of its tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def quantized_copy(folder: Path, model: nn.Module, target: Path) -> Path:
    """Write `model`, whose layers are quantized, in its file format, with the rest of the files of `folder`."""
    shutil.copytree(folder, target)
    layers = quant_linears(model)
    scheme = next(iter(layers.values())).scheme
    form = bnb4 if isinstance(scheme.format, CodebookFormat) else compressed_tensors

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, layer in layers.items():
            del tensors[f"{name}.weight"]
            tensors.update({key: tensor.clone() for key, tensor in form.encode(layer.qtensor, name).items()})

    edit_weights(target, edit)
    edit_json(target / "config.json", quantization_config=form.config_for(scheme, ["lm_head"]))
    return target

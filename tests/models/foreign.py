"""Folders quantized as other tools do it: a tiny model's layers packed by the tests' own slow packers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from strop.layers.surgery import linear_modules
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from tests.files.packing_oracle import awq_layer, awq_weight, gptq_layer, gptq_weight
from tests.tiny import tiny_folder, tiny_model

FIELDS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    "gptq-asym": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False},
    "gptq-v2": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": False,
        "desc_act": False,
        "checkpoint_format": "gptq_v2",
    },
    "gptq-order": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
}
"""The `quantization_config` of each kind of folder."""


def foreign_folder(folder: Path, kind: str, family: str = "llama", **options: Any) -> tuple[Path, nn.Module]:
    """A tiny model's folder in one of `FIELDS`' layouts, and the dense model that a slow decoder makes of it."""
    path = tiny_folder(folder, family, **options)
    model = tiny_model(family, **options)
    fields = FIELDS[kind]
    symmetric = fields.get("sym") is True
    grid = parse_scheme("int4-g32" if symmetric else "int4-g32-asym")
    generator = torch.Generator().manual_seed(3)
    packed: dict[str, Tensor] = {}
    for name in linear_modules(model):
        module = model.get_submodule(name)
        transposed = not isinstance(module, nn.Linear)
        weight = module.weight.detach().t() if transposed else module.weight.detach()
        order = torch.randperm(weight.shape[1], generator=generator)
        index = None
        if fields.get("desc_act"):
            weight = weight[:, order]
            index = [int(place) // 32 for place in order.argsort()]
        rounded = quantize_tensor(weight.contiguous(), grid)
        codes = rounded.stored_codes() if index is None else rounded.stored_codes()[:, order.argsort()]
        zero = torch.full_like(rounded.scale, 8, dtype=torch.uint8) if symmetric else rounded.zero_point
        if fields["quant_method"] == "awq":
            tensors = awq_layer(codes.tolist(), zero.tolist(), rounded.scale)
            dense = awq_weight(tensors, 32)
        else:
            version = fields.get("checkpoint_format", "gptq")
            tensors = gptq_layer(codes.tolist(), zero.tolist(), rounded.scale, 4, version=version, index=index)
            dense = gptq_weight(tensors, 4, version=version)
        packed |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
        with torch.no_grad():
            module.weight.copy_(dense.t() if transposed else dense)
    stored = load_file(path / "model.safetensors")
    prefix = next(name for name in linear_modules(model)).split(".")[0] + "."
    kept = {}
    for key, tensor in stored.items():
        layer = key.removesuffix(".weight")
        known = layer in linear_modules(model) or f"{prefix}{layer}" in linear_modules(model)
        if not (known and key.endswith(".weight")):
            kept[key] = tensor
    save_file(kept | packed, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {"quantization_config": fields}
    (path / "config.json").write_text(json.dumps(config))
    return path, model

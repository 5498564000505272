"""torchao's QAT on the rows, steps and rates of the study; runs in the environment that `setup.sh` makes.

Rows, order, optimizer, schedule, loss and scorer are strop's, as are the weights it begins with; the linear layers
inside the blocks are torchao's fake quantizers, and what is scored is the model after torchao's own conversion.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import torch
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig, initialize_fake_quantizers
from torchao.quantization.qat.linear import FakeQuantizedLinear

from strop.config import TuneConfig
from strop.recipes.session import open_session
from strop.training.loop import train

PACKAGES = ("torch", "torchao", "transformers")


def base_config(grid: str, activations: str | None) -> Any:
    """torchao's name for a grid: its conversion. Its scales are float32, strop's float16 where a group has one."""
    found = re.fullmatch(r"int(\d)(?:-g(\d+))?", grid)
    if found is None:
        raise SystemExit(f"{grid}: torchao's QAT has no such grid")
    dtype = getattr(torch, f"int{found[1]}")
    granularity = PerAxis(0) if found[2] is None else PerGroup(int(found[2]))
    if activations == "int8":
        return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)


def prepare_layers(model: Any, config: Any, *, range_learning: bool) -> None:
    """Put torchao's fake quantizers into the blocks."""
    if not range_learning:
        quantize_(model.model.layers, QATConfig(config, step="prepare"))
        return
    weight = IntxFakeQuantizeConfig(
        config.weight_dtype, config.granularity, is_symmetric=True, is_dynamic=False, range_learning=True
    )
    quantize_(model.model.layers, QATConfig(weight_config=weight, step="prepare"))
    initialize_fake_quantizers(model, (torch.arange(8)[None],))


def tuned_by_torchao(
    grid: str, settings: dict[str, Any], run: Path, *, activations: str | None, range_learning: bool
) -> tuple[Any, dict[str, Any]]:
    """Train as `settings` (of `tune`, method full) say, and convert: the model, and what is known of it."""
    session = open_session(TuneConfig.from_flat(settings | {"method": "full", "output": str(run)}))
    model, config = session.model, base_config(grid, activations)
    prepare_layers(model, config, range_learning=range_learning)
    layers = sum(isinstance(module, FakeQuantizedLinear) for module in model.modules())
    run.mkdir(parents=True, exist_ok=True)
    train(model, session.stream, [], session.train_settings(), run, export=lambda folder: None)
    ids = torch.arange(3, 67)[None]
    model.eval()
    with torch.no_grad():
        trained = model(ids).logits
        quantize_(model.model.layers, QATConfig(config, step="convert"))
        moved = float((model(ids).logits - trained).abs().max())
    if any(isinstance(module, FakeQuantizedLinear) for module in model.modules()):
        raise SystemExit("torchao converted only a part of the layers")
    return model, {
        "layers": layers,
        "logits_moved_by_conversion": moved,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }

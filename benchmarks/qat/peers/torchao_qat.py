"""torchao's QAT on the rows, steps and rates of the study: `torchao_qat.py JOB`, a file that `study.py` writes.

Rows, order, optimizer, schedule, loss and scorer are strop's, as are the weights it begins with; the linear layers
inside the blocks are torchao's fake quantizers, and what is scored is the model after torchao's own conversion.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import time
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
from strop.data.records import read_records
from strop.data.samples import prepare
from strop.evaluation.tasks import exact_match
from strop.recipes.session import open_session
from strop.training.loop import train

sys.path.insert(0, str(Path(__file__).parents[1]))
from store import to_hex


def base_config(grid: str, activations: str | None) -> Any:
    """torchao's name for a grid: its conversion."""
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


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    began = time.process_time()
    settings = {"model": job["model"], "data": job["train"], "method": "full", "output": job["run"], **job["tune"]}
    session = open_session(TuneConfig.from_flat(settings))
    model, config = session.model, base_config(job["grid"], job["activations"])
    prepare_layers(model, config, range_learning=job["range_learning"])
    layers = sum(isinstance(module, FakeQuantizedLinear) for module in model.modules())
    run = Path(job["run"])
    run.mkdir(parents=True, exist_ok=True)
    train(model, session.stream, [], session.train_settings(), run, export=lambda folder: None)
    ids = torch.arange(3, 67)[None]
    model.eval()
    with torch.no_grad():
        trained = model(ids).logits
        quantize_(model.model.layers, QATConfig(config, step="convert"))
        if any(isinstance(module, FakeQuantizedLinear) for module in model.modules()):
            raise SystemExit("torchao converted only a part of the layers")
        moved = float((model(ids).logits - trained).abs().max())
    seconds = time.process_time() - began
    samples = prepare(read_records(Path(job["test"])), session.tokenizer, max_length=256).samples
    right = exact_match(model, samples, batch_size=64).tolist()
    found = {
        "cpu_seconds": round(seconds, 1),
        "rows": len(right),
        "score": sum(right) / len(right),
        "right": to_hex(right),
        "layers": layers,
        "logits_moved_by_conversion": moved,
        "rows_digest": session.rows_digest(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchao", "transformers")},
    }
    Path(job["output"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

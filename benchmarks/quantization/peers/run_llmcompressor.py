"""GPTQ (static activation order, damping 0.01) and AWQ (20-point grid, no clipping), both as llm-compressor ships them.

AWQ changes the layers before the linears too; what comes back is the whole smoothed model, its linears through
compressed-tensors' own `fake_quantize`.
"""

from __future__ import annotations

import torch
from common import Job, Outcome, Unsupported, grid_bits, run
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache

# AWQ pins memory for copies to a GPU, which raises where there is none; no number depends on it.
IntermediatesCache.pin_memory = lambda *_, **__: None


def quantize(job: Job) -> Outcome:
    rows, length = job.calibration.shape
    weights = QuantizationArgs(
        num_bits=job.bits, type="int", symmetric=job.symmetric, strategy="group", group_size=job.group
    )
    grid = {"group": QuantizationScheme(targets=["Linear"], weights=weights)}
    if job.method == "gptq":
        recipe = [GPTQModifier(config_groups=grid, ignore=["lm_head"])]
    elif job.method == "awq":
        recipe = [AWQModifier(), QuantizationModifier(config_groups=grid, ignore=["lm_head"])]
    else:
        raise Unsupported(f"{job.method}: llm-compressor is entered with gptq and awq")
    ids = job.calibration.tolist()
    oneshot(
        model=job.model,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * length] * rows}),
        recipe=recipe,
        num_calibration_samples=rows,
        shuffle_calibration_samples=False,
        max_seq_length=length,
    )
    kept = {name: tensor for name, tensor in job.model.state_dict().items() if name.endswith("norm.weight")}
    with torch.no_grad():
        for name, linear in job.linears().items():
            scale, zero = linear.weight_scale.half().float(), getattr(linear, "weight_zero_point", None)
            kept[f"{name}.weight"] = fake_quantize(linear.weight, scale, zero, weights)
    zero_bits = 0 if job.symmetric else job.bits
    return Outcome(kept, grid_bits(job.bits, job.group, zero=zero_bits))


if __name__ == "__main__":
    run(quantize, "llmcompressor", "compressed-tensors")

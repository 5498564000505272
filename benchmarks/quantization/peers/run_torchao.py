"""Round to nearest by torchao: weight-only integers in groups; float16 scales, int8 zero points where asymmetric."""

from __future__ import annotations

import torch
from common import Job, Outcome, grid_bits, run
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_


def quantize(job: Job) -> Outcome:
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{job.bits}"),
        granularity=PerGroup(job.group),
        mapping_type=MappingType.SYMMETRIC if job.symmetric else MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
    )
    linears = job.linears()
    quantize_(job.model.model.layers, config)
    # In memory the codes lie in int8; its files for ExecuTorch pack them, which is what is counted here.
    zero = 0 if job.symmetric else 8
    tensors = {f"{name}.weight": linear.weight.dequantize() for name, linear in linears.items()}
    return Outcome(tensors, grid_bits(job.bits, job.group, zero=zero))


if __name__ == "__main__":
    run(quantize, "torchao")

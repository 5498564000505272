"""HQQ by hqq: half-quadratic zero points, no data; its float16 scale and zero point per group, along the inputs."""

from __future__ import annotations

import torch
from common import Job, Outcome, run
from hqq.core.quantize import BaseQuantizeConfig, Quantizer


def quantize(job: Job) -> Outcome:
    settings = BaseQuantizeConfig(nbits=job.bits, group_size=job.group, axis=1)["weight_quant_params"]
    tensors, stored, weights = {}, 0, 0
    for name, linear in job.linears().items():
        codes, meta = Quantizer.quantize(linear.weight.data, device="cpu", compute_dtype=torch.float16, **settings)
        scale, zero = meta["scale"].half(), meta["zero"].half()
        tensors[f"{name}.weight"] = Quantizer.dequantize(
            codes, {**meta, "scale": scale.float(), "zero": zero.float(), "compute_dtype": torch.float32}
        )
        stored += codes.nbytes + scale.nbytes + zero.nbytes
        weights += linear.weight.numel()
    return Outcome(tensors, 8 * stored / weights)


if __name__ == "__main__":
    run(quantize, "hqq")

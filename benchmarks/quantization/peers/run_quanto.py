"""Round to nearest (max) and HQQ by optimum-quanto: float16 scale and shift per group."""

from __future__ import annotations

from common import Job, Outcome, Unsupported, grid_bits, run
from optimum.quanto import HqqOptimizer, MaxOptimizer, qint2, qint4, quantize_weight

TYPES = {2: qint2, 4: qint4}
OPTIMIZERS = {"rtn": MaxOptimizer, "hqq": HqqOptimizer}


def quantize(job: Job) -> Outcome:
    if job.bits not in TYPES:
        raise Unsupported(f"{job.format}: optimum-quanto has integers of 2, 4 and 8 bits")
    optimizer, qtype = OPTIMIZERS[job.method](), TYPES[job.bits]
    tensors = {}
    for name, linear in job.linears().items():
        weight = linear.weight.data
        scale, shift = optimizer(weight, qtype, 0, job.group)
        quantized = quantize_weight(weight, qtype, 0, scale.half().float(), shift.half().float(), job.group)
        tensors[f"{name}.weight"] = quantized.dequantize()
    return Outcome(tensors, grid_bits(job.bits, job.group, zero=16))


if __name__ == "__main__":
    run(quantize, "optimum-quanto")

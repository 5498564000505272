"""NF4 and FP4 by bitsandbytes, blocks of 64, with double quantization where the format says -dq."""

from __future__ import annotations

from bitsandbytes import functional
from common import Job, Outcome, Unsupported, run

FORMATS = ("nf4", "nf4-dq", "fp4", "fp4-dq")


def quantize(job: Job) -> Outcome:
    if job.format not in FORMATS:
        raise Unsupported(f"{job.format}: bitsandbytes stores 4-bit codebooks only: {', '.join(FORMATS)}")
    kind, _, double = job.format.partition("-")
    tensors, stored, weights = {}, 0, 0
    for name, linear in job.linears().items():
        codes, state = functional.quantize_4bit(
            linear.weight.data, blocksize=64, quant_type=kind, compress_statistics=bool(double)
        )
        tensors[f"{name}.weight"] = functional.dequantize_4bit(codes, state)
        stored += codes.nbytes + state.absmax.nbytes
        if double:
            stored += state.state2.absmax.nbytes + state.offset.nbytes
        weights += linear.weight.numel()
    return Outcome(tensors, 8 * stored / weights)


if __name__ == "__main__":
    run(quantize, "bitsandbytes")

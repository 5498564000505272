"""AutoRound by auto-round: signed gradient descent on rounding and clips; its defaults of 200 iterations, batches of 8.

Without torch.compile: for models of this size compiling takes longer than all iterations.
"""

from __future__ import annotations

from auto_round import AutoRound
from common import Job, Outcome, grid_bits, run
from transformers import AutoTokenizer


def quantize(job: Job) -> Outcome:
    rows, length = job.calibration.shape
    rounding = AutoRound(
        job.model,
        tokenizer=AutoTokenizer.from_pretrained(job.folder),
        bits=job.bits,
        group_size=job.group,
        sym=job.symmetric,
        dataset=[{"input_ids": row[None]} for row in job.calibration],
        nsamples=rows,
        seqlen=length,
        device_map="cpu",
        enable_torch_compile=False,
    )
    model, _ = rounding.quantize()
    tensors = {f"{name}.weight": model.get_submodule(name).weight for name in job.linears()}
    zero = 0 if job.symmetric else job.bits
    return Outcome(tensors, grid_bits(job.bits, job.group, zero=zero))


if __name__ == "__main__":
    run(quantize, "auto-round")

"""strop's own methods by name, through the function behind `strop quantize`: opening and the receipt are in its time.

The calibration windows go in as text, special tokens included, and come out as the same tokens. Development windows
stand beside them as the validation split: they are what the receipt is about and calibrate nothing. `gptq+scales` is
gptq with scales trained end to end afterwards.
"""

from __future__ import annotations

import json

from common import Job, Outcome, Unsupported, run
from safetensors.torch import load_file
from transformers import AutoTokenizer

import strop
from strop.layers.base import dense_weight
from strop.layers.surgery import linear_modules

SCALE_STEPS = 100
"""Each over a batch of eight windows."""


def quantize(job: Job) -> Outcome:
    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    data = job.output / "data"
    data.mkdir(exist_ok=True)
    held_out = load_file(job.windows)["development"].clamp(min=tokenizer.pad_token_id)
    for split, rows in (("train", job.calibration), ("valid", held_out)):
        lines = [json.dumps({"text": tokenizer.decode(row).replace(tokenizer.pad_token, "")}) for row in rows]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    method, _, after = job.method.partition("+")
    if after not in ("", "scales"):
        raise Unsupported(f"{job.method}: what follows a method is +scales")
    result = strop.quantize(
        job.folder,
        job.format,
        method=method,
        data=None if job.method == "rtn" else data,
        scale_steps=SCALE_STEPS if after else 0,
        max_rows=round(len(job.calibration) / 0.75),  # a quarter of them are taken from the validation split
        output=job.output / "packed",
        overwrite=True,
    )
    opened = strop.load(result.path, dtype="float32")
    tensors = {name: tensor for name, tensor in opened.model.state_dict().items() if "norm" in name}
    tensors |= {f"{name}.weight": dense_weight(module) for name, module in linear_modules(opened.model).items()}
    return Outcome(tensors, result.receipt["bits_per_weight"])


if __name__ == "__main__":
    run(quantize, "strop")

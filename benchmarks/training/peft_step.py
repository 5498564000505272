"""A rival's training steps, each when it is told to: `peft_step.py KIND MODEL ROWS RUN STEPS --length N [--answers]`.

    peft:nf4   peft:lora   transformers:full

The loop is the usual one: forward with labels, backward, clipped, AdamW. `peft:nf4` is bitsandbytes' NF4 under PEFT's
adapters, bf16 products; `transformers:full` is autocast to bf16 over fp32 weights. With `--answers` the rows are alpaca
records, eight to a batch, padded to the longest. Prints what `../qat/cost_step.py` prints.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes  # noqa: F401  imports are no part of what is measured
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from strop.data.records import read_records
from strop.data.samples import prepare
from strop.memory import PeakMemory

BATCH = 8


def windows(tokenizer, path: Path, length: int) -> Iterator[dict[str, Tensor]]:
    ids = tokenizer(json.loads(path.read_text(encoding="utf-8").splitlines()[0])["text"])["input_ids"]
    for start in range(0, len(ids) - length, length):
        window = torch.tensor([ids[start : start + length]])
        yield {"input_ids": window, "labels": window}


def answers(tokenizer, path: Path, length: int) -> Iterator[dict[str, Tensor]]:
    samples = prepare(read_records(path), tokenizer, max_length=length).samples
    while True:
        for start in range(0, len(samples) - BATCH + 1, BATCH):
            rows = samples[start : start + BATCH]
            width = max(len(row.input_ids) for row in rows)
            batch = torch.zeros(BATCH, width, dtype=torch.int64)
            labels, mask = torch.full_like(batch, -100), torch.zeros_like(batch)
            for place, row in enumerate(rows):
                count = len(row.input_ids)
                batch[place, :count], labels[place, :count] = torch.tensor(row.input_ids), torch.tensor(row.labels)
                mask[place, :count] = 1
            yield {"input_ids": batch, "labels": labels, "attention_mask": mask}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("kind", "model", "rows", "run", "steps"):
        parser.add_argument(name)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--answers", action="store_true")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    asked = parser.parse_args()
    full, computed = asked.kind == "transformers:full", getattr(torch, asked.dtype)
    with PeakMemory() as memory:
        quantization = (
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed)
            if asked.kind == "peft:nf4"
            else None
        )
        dtype = torch.float32 if full else computed
        model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=dtype, quantization_config=quantization)
        if not full:
            model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        tokenizer = AutoTokenizer.from_pretrained(asked.model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        model.train()
        source = answers if asked.answers else windows
        print(json.dumps({"peak_bytes": memory.peak_bytes}), flush=True)
        for batch in source(tokenizer, Path(asked.rows), asked.length):
            if not sys.stdin.readline():
                break
            cpu, wall = time.process_time(), time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=full and computed == torch.bfloat16):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen = {
                "cpu_seconds": time.process_time() - cpu,
                "seconds": time.perf_counter() - wall,
                "loss": float(loss),
                "tokens": int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()),
                "peak_bytes": memory.peak_bytes,
            }
            print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()

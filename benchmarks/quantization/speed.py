"""Opening and quantizing a Llama shape of 1.1 billion parameters: strop against bitsandbytes, seconds and peak memory.

    python benchmarks/quantization/speed.py FOLDER [--runs 3] [--layers 22]

Writes random bf16 weights of TinyLlama's shape to FOLDER (2.2 GB, deleted at the end). Each measurement is a fresh
process that imports first, then opens the folder quantized; the contenders take turns, so that a busy machine slows all
alike. Memory is the peak of anonymous and shared pages above the value after imports. bitsandbytes goes through
transformers, as its users open it; it has no 4-bit integers, so strop's int4-g128 is held against its NF4.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

CONTENDERS = ("strop nf4", "bitsandbytes nf4", "strop int4-g128", "strop int8", "bitsandbytes int8")


def write_model(folder: Path, layers: int) -> int:
    """Random weights in transformers' layout, in shards; returns the number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="500MB")
    return sum(parameter.numel() for parameter in model.parameters())


def measure(contender: str, folder: Path) -> dict[str, float]:
    """Open and quantize in this process."""
    from strop.memory import PeakMemory

    package, format = contender.split()
    if package == "strop":
        import strop.models  # imports are no part of what is measured

        def work() -> object:
            return strop.models.load(folder, format, tokenizer=False)
    else:
        import bitsandbytes  # noqa: F401  transformers imports it when a model is opened
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        chosen = {"load_in_8bit": True} if format == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": format}

        def work() -> object:
            settings = BitsAndBytesConfig(**chosen)
            return AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=settings, device_map="cpu", dtype=torch.bfloat16
            )

    with PeakMemory() as memory:
        began, cpu_began = time.monotonic(), time.process_time()
        opened = work()
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
        held = memory.sample()
    del opened
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": memory.peak_bytes, "held_bytes": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the fresh process of one run
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.measure, chosen.folder)))
        return
    try:
        print(f"{write_model(chosen.folder, chosen.layers):,} parameters", flush=True)
        seen: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for run in range(chosen.runs):
            for name in CONTENDERS:
                command = [sys.executable, __file__, str(chosen.folder), "--measure", name]
                done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ, check=True, text=True)
                seen[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"run {run + 1}, {name}: {seen[name][-1]}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(chosen.folder, ignore_errors=True)
    print("| opened as | seconds, median (least to most) | CPU seconds | peak, MB (least to most) | held, MB |")
    print("|---|---|---|---|---|")
    for name, runs in seen.items():
        seconds, cpu, peak, held = (
            [run[key] for run in runs] for key in ("seconds", "cpu_seconds", "peak_bytes", "held_bytes")
        )
        print(
            f"| {name} | {statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) "
            f"| {statistics.median(cpu):.1f} ({min(cpu):.1f} to {max(cpu):.1f}) "
            f"| {statistics.median(peak) / 1e6:.0f} ({min(peak) / 1e6:.0f} to {max(peak) / 1e6:.0f}) "
            f"| {statistics.median(held) / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()

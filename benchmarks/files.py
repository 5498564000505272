"""How near are quantize, merge and export to the rate at which files can be read and written? Beside their rivals.

    python -m benchmarks.files FOLDER [--runs 7] [--layers 22]

Writes a Llama shape of 1.1 billion random parameters (bf16), an adapter of rank 16 over it and a GGUF file of it to
FOLDER, which is deleted at the end. Each measurement is a process of its own, which imports first, then does what the
verb does from the folder to the finished, flushed output: strop, a rival (bitsandbytes and PEFT through
`save_pretrained`, llama.cpp's own quantizer from the GGUF file), and the floor, which reads as many bytes and writes as
many as strop's output has. They take turns, so that a busy machine slows all alike. strop's outputs are checked as they
always are; proofs in llama.cpp (`--no-verify`) are left out of exports, since the rival proves nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

QUANTIZED: Final = ("int8", "int4-g128", "nf4")
EXPORTED: Final = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15}
"""Types and mixtures of GGUF files, and llama.cpp's numbers of them (`llama_ftype`)."""
CASES: Final = (*(f"quantize {name}" for name in QUANTIZED), "merge", *(f"export {name}" for name in EXPORTED))
RIVALS: Final = {
    "quantize int8": "bitsandbytes",
    "quantize nf4": "bitsandbytes",
    "merge": "PEFT",
    "export q8_0": "llama.cpp",
    "export q4_0": "llama.cpp",
    "export q4_k_m": "llama.cpp",
}

Work = Callable[[], object]


def write_inputs(folder: Path, layers: int) -> None:
    """The model, the adapter, and the model as a GGUF file."""
    import torch
    from benchmarks.quantization.speed import write_model
    from transformers import AutoTokenizer

    import strop
    from strop.demo import model_path
    from strop.files.peft_adapter import BaseRecord, save_adapter
    from strop.layers.surgery import attach_lora, lora_modules
    from strop.models import load

    write_model(folder / "model", layers)
    torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder / "model")
    opened = load(folder / "model")
    generator = torch.Generator().manual_seed(1)
    attach_lora(opened.model, "all-linear", rank=16, alpha=32.0, generator=generator)
    for module in lora_modules(opened.model).values():
        module.lora_B.data.normal_(std=0.05, generator=generator)
    base = BaseRecord(str(folder / "model"), None, None)
    save_adapter(opened.model, folder / "adapter", base=base, tokenizer=opened.tokenizer)
    strop.export(folder / "model", folder / "model.gguf", format="gguf:bf16", verify=False)


def bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)


def by_strop(case: str, folder: Path, output: Path) -> Work:
    import strop.models
    import strop.recipes.export
    import strop.recipes.merge
    import strop.recipes.quantize

    verb, _, name = case.partition(" ")
    if verb == "quantize":
        return lambda: strop.quantize(folder / "model", name, output=output)
    if verb == "merge":
        return lambda: strop.merge(folder / "adapter", output)
    return lambda: strop.export(folder / "model", output, format=f"gguf:{name}", verify=False)


def by_rival(case: str, folder: Path, output: Path) -> Work:
    verb, _, name = case.partition(" ")
    if verb == "export":
        import llama_cpp

        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = EXPORTED[name], int(os.environ.get("OMP_NUM_THREADS", "1"))
        source, target = str(folder / "model.gguf").encode(), str(output).encode()
        return lambda: llama_cpp.llama_model_quantize(source, target, ctypes.byref(settings))
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if verb == "merge":
        from peft import PeftModel

        def merged() -> None:
            base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
            PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(output)

        return merged
    import bitsandbytes  # noqa: F401  transformers imports it when a model is opened

    chosen = {"load_in_8bit": True} if name == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": name}

    def quantized() -> None:
        settings = BitsAndBytesConfig(**chosen)
        model = AutoModelForCausalLM.from_pretrained(
            folder / "model", quantization_config=settings, device_map="cpu", dtype=torch.bfloat16
        )
        model.save_pretrained(output)

    return quantized


def floor(folder: Path, case: str, output: Path, written: int) -> Work:
    """Read the inputs once, write as many bytes as strop's output has."""
    sources = [folder / "model", *([folder / "adapter"] if case == "merge" else [])]
    files = [each for source in sources for each in source.rglob("*") if each.is_file()]

    def copied() -> None:
        buffer, left = bytearray(16 << 20), written
        with output.open("wb", buffering=0) as out:
            for path in files:
                with path.open("rb", buffering=0) as file:
                    while count := file.readinto(buffer):
                        left -= out.write(memoryview(buffer)[: min(count, left)])
            while left > 0:
                left -= out.write(memoryview(buffer)[: min(len(buffer), left)])

    return copied


def flush(path: Path) -> None:
    for each in [path] if path.is_file() else path.rglob("*"):
        if each.is_file():
            with each.open("rb") as file:
                os.fsync(file.fileno())


def measure(case: str, contender: str, folder: Path, written: int) -> dict[str, float]:
    """One contender's work in this process, until its bytes are on the disk."""
    from strop.memory import PeakMemory

    output = folder / ("made.gguf" if case.startswith("export") and contender != "floor" else "made")
    if contender == "strop":
        work = by_strop(case, folder, output)
    else:
        work = floor(folder, case, output, written) if contender == "floor" else by_rival(case, folder, output)
    with PeakMemory() as memory:
        began, cpu_began = time.monotonic(), time.process_time()
        work()
        flush(output)
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
    size = bytes_of(output)
    for made in folder.glob("made*"):
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": memory.peak_bytes, "bytes": size}


def turns(folder: Path, runs: int, cases: list[str]) -> Iterator[tuple[str, str, list[dict[str, float]]]]:
    """Case, contender, its runs."""
    for case in cases:
        names = ["strop", "floor", *([RIVALS[case]] if case in RIVALS else [])]
        seen: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(runs):
            for name in names:
                written = int(seen["strop"][0]["bytes"]) if seen["strop"] else 0
                command = [sys.executable, "-m", "benchmarks.files", str(folder), "--measure", case, name, str(written)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                seen[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{case}, {name}: {seen[name][-1]}", file=sys.stderr, flush=True)
        yield from ((case, name, seen[name]) for name in names)


def table(found: Iterator[tuple[str, str, list[dict[str, float]]]], read: int) -> Iterator[str]:
    yield "| | by | seconds, median (least to most) | CPU seconds | read and written, GB/s | peak, MB | strop's time |"
    yield "|---|---|---|---|---|---|---|"
    ours: list[dict[str, float]] = []
    for case, name, runs in found:
        ours = runs if name == "strop" else ours
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(ours, runs, strict=True)]
        seconds = [run["seconds"] for run in runs]
        rate = (read + runs[0]["bytes"]) / statistics.median(seconds) / 1e9
        beside = "" if name == "strop" else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        yield (
            f"| {case} | {name} | {statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) "
            f"| {statistics.median(run['cpu_seconds'] for run in runs):.1f} | {rate:.2f} "
            f"| {statistics.median(run['peak_bytes'] for run in runs) / 1e6:.0f} | {beside} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything is written; must not exist")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # the process of one measurement
    chosen = parser.parse_args()
    if chosen.measure:
        case, contender, written = chosen.measure
        print(json.dumps(measure(case, contender, chosen.folder, int(written))))
        return
    chosen.folder.mkdir(parents=True)
    try:
        write_inputs(chosen.folder, chosen.layers)
        read = bytes_of(chosen.folder / "model")
        print("\n".join(table(turns(chosen.folder, chosen.runs, chosen.cases), read)))
    finally:
        shutil.rmtree(chosen.folder, ignore_errors=True)


if __name__ == "__main__":
    main()

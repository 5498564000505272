"""Writing, reading and scoring at 4 bits beside other libraries: `python -m benchmarks.decoding.run --work FOLDER`

Random weights in the shape of a Llama of 135 million parameters, or of 1.1 billion (22 layers, hidden 2048, 32 heads
over 4 of keys, vocabulary 32000), rounded by strop (nf4, int4-g32), by bitsandbytes (NF4), by torchao (int4, groups of
128) and by llama.cpp (Q4_0), and left in bf16. All run in one process, in turns: what else the machine does falls on
all alike.

    write1, write8   greedy, one text and eight at a time, after prompts of 8 tokens
    read             one prompt of 512 tokens, up to the next token's logits
    score            the likelihood of wikitext-2's first texts of 512 tokens ($STROP_MATERIAL), by our tokenizer's ids

CPU seconds of all threads together count. The table gives tokens per CPU second (median and quartiles), and the median
of the paired ratio to the fastest library that is run by Python. llama.cpp writes one text at a time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from benchmarks.decoding.rivals import Prompts, Way, ways
from benchmarks.generation import SHAPES, in_turns, random_folder, rate
from benchmarks.kernels import processor
from transformers.utils import logging

import strop
from strop import kernels

WAYS = (
    *("strop nf4", "strop nf4 by generate", "strop int4-g32", "strop int4-g32 by generate", "strop bf16"),
    *("bitsandbytes nf4", "torchao int4", "transformers bf16", "llama.cpp Q4_0"),
)
PROMPT, READ, TEXTS = 8, 512, 8


def texts_to_score() -> Prompts:
    text = (Path(os.environ["STROP_MATERIAL"]) / "data" / "wikitext2_test.txt").read_text(encoding="utf-8")
    ids = strop.load("demo").require_tokenizer()(text[: 16 * TEXTS * READ])["input_ids"]
    return [ids[at * READ : (at + 1) * READ] for at in range(TEXTS)]


def calls_of(case: str, found: dict[str, Way], new: int) -> dict[str, Callable[[], int]]:
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(5, 1024, (8, READ), generator=generator).tolist()
    calls: dict[str, Callable[[], int]] = {}
    for name, way in found.items():
        if case == "read" and (read := way.read) is not None:
            calls[name] = lambda read=read: read(prompts[0])
        elif case == "score" and (score := way.score) is not None:
            texts = texts_to_score()
            calls[name] = lambda score=score, texts=texts: score(texts)
        elif case.startswith("write") and (write := way.write) is not None:
            short = [prompt[:PROMPT] for prompt in prompts[: int(case.removeprefix("write"))]]
            calls[name] = lambda write=write, short=short: write(short, new)
    return calls


def table(case: str, rates: dict[str, list[float]]) -> list[str]:
    rivals = [name for name in rates if not name.startswith(("strop", "llama.cpp"))]
    best = max(rivals, key=lambda name: statistics.median(rates[name]), default=next(iter(rates)))
    lines = []
    for name, found in rates.items():
        ratio = statistics.median(own / other for own, other in zip(found, rates[best], strict=True))
        lines.append(f"| {case} | {name} | {rate(found)} | {ratio:.2f}{' (the best)' if name == best else ''} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, required=True, help="models are made here once, and found again")
    options.add_argument("--shape", choices=tuple(SHAPES), default="1.1B")
    options.add_argument("--cases", default="write1,write8,read,score")
    options.add_argument("--ways", default=",".join(WAYS))
    options.add_argument("--new", type=int, default=16, help="tokens written after each prompt")
    options.add_argument("--pairs", type=int, default=5, help="runs of each, in turns, after one that warms up")
    options.add_argument("--threads", type=int, default=1)
    asked = options.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    logging.disable_progress_bar()
    versions = [
        f"{package} {importlib.metadata.version(package)}"
        for package in ("torch", "transformers", "bitsandbytes", "torchao", "llama_cpp_python")
    ]
    print(f"{processor()}, {asked.threads} threads; {', '.join(versions)}; kernels: {kernels.in_use().name}")
    print(f"{asked.shape}, {asked.new} new tokens, {asked.pairs} pairs\n")
    asked.work.mkdir(parents=True, exist_ok=True)
    folder = asked.work / asked.shape
    found = ways(folder if folder.exists() else random_folder(folder, asked.shape), asked.ways.split(","))
    print("| case | way | tokens per CPU second (quartiles) | to the best rival in Python |")
    print("|---|---|---|---|")
    for case in asked.cases.split(","):
        print("\n".join(table(case, in_turns(calls_of(case, found, asked.new), asked.pairs))), flush=True)


if __name__ == "__main__":
    main()

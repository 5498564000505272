"""How fast are answers written beside transformers' generate and llama.cpp? `python -m benchmarks.generation`

Two models: the bundled one, and random weights in the shape of a Llama of 135 million parameters (30 layers, hidden
576, vocabulary 49152), made on the fly. Each stands in bf16 and, rounded by `strop.quantize`, in nf4 and int4-g32. The
same network writes greedily by our own loop and by transformers' generate, in turns, at batch 1 and at batch 8;
llama.cpp writes from a Q4_0 file of the same weights, one text at a time. Then what `predict` does: many prompts with a
beginning alike, eight at a time; those of the bundled model are answered to their stop token.

CPU seconds of all threads together count, so that what else the machine does falls out. The table gives tokens per CPU
second (median and quartiles) and the median of the paired ratio. Before anything is timed, the two ways must agree in
float32, token for token.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.kernels import processor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import strop
from strop import demo, kernels
from strop.errors import StropError
from strop.evaluation import by_transformers
from strop.evaluation.decoding import decodes
from strop.evaluation.few_rows import few_rows
from strop.evaluation.steps import in_steps
from strop.evaluation.writing import Manner, write_texts

FORMATS = ("bf16", "nf4", "int4-g32")
PROMPT, NEW = 64, 32

Prompts = Sequence[Sequence[int]]
Answers = dict[int, list[int]]


def by_our_loop(model: PreTrainedModel, prompts: Prompts, manner: Manner) -> Answers:
    found: Answers = {}
    with few_rows(model), in_steps(model):
        for step in write_texts(model, prompts, manner):
            for written in step:
                found.setdefault(written.place, []).append(written.token)
    return found


def by_generate(model: PreTrainedModel, prompts: Prompts, manner: Manner) -> Answers:
    """Transformers' answers, cut after their stop token: what stands behind it is filling."""
    found: Answers = {}
    for batch in by_transformers.write_batches(model, prompts, manner, None, pad_id=0):
        for place, tokens in batch:
            end = next((at + 1 for at, token in enumerate(tokens) if token in manner.stop_ids), len(tokens))
            found[place] = tokens[:end]
    return found


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}


def random_folder(folder: Path, shape: str = "135M") -> Path:
    """A Llama of random weights with the bundled tokenizer; logits spread as a trained model's do."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, initializer_range=0.05)
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for file in demo.model_path().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def in_turns(calls: dict[str, Callable[[], int]], pairs: int) -> dict[str, list[float]]:
    """Tokens per CPU second of each, `pairs` times after one time that warms up; calls return their tokens."""
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(pairs + 1):
        for name, call in calls.items():
            tokens: list[int] = []
            seconds = cpu_seconds(lambda call=call, tokens=tokens: tokens.append(call()))
            rates[name].append(tokens[0] / seconds)
    return {name: found[1:] for name, found in rates.items()}


def rate(found: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(found, n=4)
    return f"{middle:,.1f} ({low:,.1f} to {high:,.1f})"


def count(answers: Answers) -> int:
    return sum(len(tokens) for tokens in answers.values())


def row(name: str, model: PreTrainedModel, prompts: Prompts, manner: Manner, pairs: int) -> str:
    longest = max(len(prompt) for prompt in prompts) + manner.max_new_tokens
    assert decodes(model, longest), f"{name}: our loop does not run this model"
    rates = in_turns(
        {
            "ours": lambda: count(by_our_loop(model, prompts, manner)),
            "generate": lambda: count(by_generate(model, prompts, manner)),
        },
        pairs,
    )
    ratio = statistics.median(ours / other for ours, other in zip(rates["ours"], rates["generate"], strict=True))
    return f"| {name} | {rate(rates['ours'])} | {rate(rates['generate'])} | {ratio:.2f} |"


def check(model: PreTrainedModel, prompts: Prompts, manner: Manner) -> None:
    """Both ways write the same in float32."""
    model.float()
    ours, other = by_our_loop(model, prompts, manner), by_generate(model, prompts, manner)
    assert ours == other, "the answers differ"
    model.bfloat16()


def llama_cpp(file: Path, prompt: Sequence[int], pairs: int) -> str:
    try:
        from strop.runtime.llama_cpp import GgufModel, require_runtime

        require_runtime()
    except (ImportError, StropError) as error:
        return f"not measured: {error}"
    with GgufModel.open(file, threads=torch.get_num_threads()) as model:
        found = in_turns({"llama.cpp": lambda: len(list(model.stream(prompt, max_tokens=NEW, stop_ids=[])))}, pairs)
    return rate(found["llama.cpp"])


def spoken_prompts(rows: int) -> tuple[list[list[int]], tuple[int, ...]]:
    """Requests of the bundled task as its template writes them behind a system message, and where answers end."""
    from strop.data.templates import prompt_ids, stop_ids

    opened = strop.load("demo")
    tokenizer = opened.require_tokenizer()
    chooser = random.Random(0)
    system = "answer with the action that the request asks for, as lines of keys and values, and with nothing else"
    things = ["the lights", "an alarm", "a timer", "the music", "my list", "the heating", "a message", "the weather"]
    asked = [f"{chooser.choice(['set', 'stop', 'start', 'show'])} {chooser.choice(things)} {at}" for at in range(rows)]
    turns: list[list[dict[str, Any]]] = [
        [{"role": "system", "content": system}, {"role": "user", "content": text}] for text in asked
    ]
    return [prompt_ids(each, tokenizer) for each in turns], tuple(stop_ids(tokenizer))


def measure(name: str, source: str, work: Path, pairs: int, formats: Sequence[str], batches: Sequence[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    vocabulary = 1024
    prompts = torch.randint(5, vocabulary, (max(batches), PROMPT), generator=generator).tolist()
    for form in formats:
        folder = source
        if form != "bf16":
            folder = str(work / f"{name}-{form}")
            strop.quantize(source, form, output=folder)
        model = strop.load(folder).model.eval()
        if form == "bf16":
            check(model, prompts[:3], Manner((), NEW, None, 2))
        for batch in batches:
            asked = Manner((), NEW, None, batch)
            print(row(f"{name} {form}, batch {batch}", model, prompts[:batch], asked, pairs), flush=True)
        if name == "bundled":
            spoken, stops = spoken_prompts(32)
            many = Manner(stops, 48, model.config.max_position_embeddings, 8)
            print(row(f"{name} {form}, 32 requests", model, spoken, many, pairs), flush=True)
        else:
            beginning = prompts[0]
            shared = [[*beginning, *rest[:8]] for rest in itertools.islice(itertools.cycle(prompts), 16)]
            many = Manner((), 8, None, 8)
            print(row(f"{name} {form}, 16 prompts alike", model, shared, many, pairs), flush=True)
    file = work / f"{name}.gguf"
    strop.export(source, file, format="gguf:q4_0", verify=False)
    print(f"| {name} llama.cpp Q4_0, batch 1 | {llama_cpp(file, prompts[0], pairs)} | | |", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=7, help="runs of each, in turns (at least 7)")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--models", default="bundled,random")
    options.add_argument("--formats", default=",".join(FORMATS))
    options.add_argument("--batches", default="1,8")
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    versions = [f"{package} {importlib.metadata.version(package)}" for package in ("torch", "transformers")]
    print(f"{processor()}, {asked.threads} threads; {', '.join(versions)}; kernels: {kernels.in_use().name}")
    print(f"prompts of {PROMPT} tokens, {NEW} new ones; {asked.pairs} pairs\n")
    print("| case | our loop, tokens per CPU second (quartiles) | transformers' generate | ours / generate |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in asked.models.split(","):
            source = "demo" if name == "bundled" else str(random_folder(work / "random"))
            batches = [int(size) for size in asked.batches.split(",")]
            measure(name, source, work, asked.pairs, asked.formats.split(","), batches)


if __name__ == "__main__":
    main()

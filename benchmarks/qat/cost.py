"""What a step costs: quantization-aware training, torchao's, and the full fine-tuning step, in turns.

One shape for all: 135 million parameters (30 layers, hidden 576, vocabulary 49152, random weights), fp32 masters, bf16
products, 1 x 512 tokens. Each contender is a fresh process that does a step when it is its turn. Its peak is that of
what its allocator kept too; "freed at once" is measured in another process, where freed memory leaves at once, which
is what the tensors take and repeats within a few hundredths.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from store import Cell, Store

HERE = Path(__file__).parent
WARM_UP: Final = 2
"""Steps that make kernels and optimizer state, and are not counted."""
MEMORY_STEPS: Final = 3
SHAPE: Final = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
KEY = ("what", "kind", "pair")


class Contender:
    """A process that does one step at a time."""

    def __init__(
        self,
        kind: str,
        work: Path,
        steps: int,
        *,
        script: Path = HERE / "cost_step.py",
        rows: Path | None = None,
        options: Sequence[str] = (),
    ) -> None:
        run = work / "run" / kind.replace(":", "-")
        shutil.rmtree(run, ignore_errors=True)
        command: list[str | Path] = [
            sys.executable,
            script,
            kind,
            work / "model",
            rows or work / "rows.jsonl",
            run,
        ]
        command += [str(steps), *options]
        environment = os.environ | {"PYTHONPATH": str(HERE.parents[1] / "src"), "PYTHONWARNINGS": "ignore"}
        self.kind = kind
        self.log = (work / f"{kind.replace(':', '-')}.log").open("w")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self._read()

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.kind}: ended early; see {self.log.name}")


def write_model(folder: Path, shape: Mapping[str, Any] = SHAPE) -> None:
    """Random bf16 weights of a shape, with the bundled model's tokenizer beside them."""
    if (folder / "config.json").exists():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from strop.demo import model_path

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**shape, dtype="bfloat16")).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(model_path()) / name, folder / name)


def write_rows(path: Path) -> None:
    """Texts of which each fills more than a window; the short ones at their ends are few and are drawn late."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnoprstuw", k=6)) for _ in range(500)]
    text = " ".join(generator.choices(words, k=40_000))
    path.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")


def measure(work: Path, store: Store, kinds: Sequence[str], pairs: int) -> None:
    """Time in turns, then memory one by one."""
    work.mkdir(parents=True, exist_ok=True)
    write_model(work / "model")
    write_rows(work / "rows.jsonl")
    if any(store.find({"what": "step", "kind": kind, "pair": pairs - 1}) is None for kind in kinds):
        contenders = [Contender(kind, work, WARM_UP + pairs) for kind in kinds]
        for number in range(-WARM_UP, pairs):
            for one in contenders if number % 2 else contenders[::-1]:
                seen = one.step()
                if number >= 0:
                    store.once({"what": "step", "kind": one.kind, "pair": number}, lambda seen=seen: seen)
                    print(f"pair {number + 1} {one.kind}: {seen['cpu_seconds']:.2f} CPU s", flush=True)
        for one in contenders:
            one.close()
    for kind in kinds:

        def peak(kind: str = kind) -> Cell:
            one = Contender(kind, work, MEMORY_STEPS, options=["--steady"])
            seen = [one.step() for _ in range(MEMORY_STEPS)]
            one.close()
            return {"peak_bytes": seen[-1]["peak_bytes"]}

        found = store.once({"what": "memory", "kind": kind, "pair": 0}, peak)
        print(f"memory {kind}: {found['peak_bytes'] / 1e6:.0f} MB", flush=True)


def cost_table(cells: Sequence[Cell]) -> list[str]:
    """Medians (least to most); ratios are of pairs, to the full fine-tuning step."""
    kinds = list(dict.fromkeys(cell["kind"] for cell in cells))
    steps = {kind: {c["pair"]: c for c in cells if c["kind"] == kind and c["what"] == "step"} for kind in kinds}
    lines = [
        "| step | CPU s | seconds | CPU s, times full | peak, MB | times full | peak, freed at once, MB | times full |",
        "|---" * 8 + "|",
    ]
    for kind in kinds:
        own = steps[kind]
        pairs = sorted(own.keys() & steps["full"].keys())
        cpu, wall = ([own[pair][name] for pair in pairs] for name in ("cpu_seconds", "seconds"))
        ratios = [own[pair]["cpu_seconds"] / steps["full"][pair]["cpu_seconds"] for pair in pairs]
        cells_of = [kind, *(_middle(values) for values in (cpu, wall, ratios))]
        for what in ("step", "memory"):
            peak = {c["kind"]: c["peak_bytes"] for c in cells if c["what"] == what}  # the last step's
            known = kind in peak and "full" in peak
            cells_of += [f"{peak[kind] / 1e6:.0f}", f"{peak[kind] / peak['full']:.2f}"] if known else ["", ""]
        lines.append(f"| {' | '.join(cells_of)} |")
    return lines


def _middle(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""

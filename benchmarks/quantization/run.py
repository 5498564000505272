"""The whole table of a model: every point, every method, every peer, judged on held-out windows.

    setup_peers.sh ENVIRONMENTS
    python benchmarks/quantization/run.py demo runs/demo --model src/strop/demo/model --windows runs/demo.safetensors \
        --environments ENVIRONMENTS
    ... the same with --test, once every choice is made

Each entry runs in a process of its own and leaves a folder `FORMAT.PEER.METHOD` in the output; `results.jsonl` gets one line
for it, and what has a line is not run again (delete the line to repeat it). Development figures come first; `--test` judges what
is there on the test split, each once. Both print the table. A candidate whose bits per weight are more than 1% above those of
the grid it is entered for is marked, and never counts as the best peer of that grid.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
UNSUPPORTED = 3  # as in peers/common.py, which only the peers' environments import
BITS = {"int4-g128": 4.125, "int4-g32": 4.5, "int3-g32": 3.5, "int2-g32": 2.5}
"""The points, and what a code, and a float16 scale per group, take."""
ZERO_POINTS = {name: bits + 8 / int(name.rpartition("g")[2]) for name, bits in BITS.items()}
"""The same with a zero point of at most 8 bits per group (-asym)."""
CODEBOOKS = {"nf4-dq": 4.127, "fp4-dq": 4.127, "nf4": 4.5, "fp4": 4.5}
TOLERANCE = 1.01


@dataclass(frozen=True)
class Peer:
    """A rival: its environment's name, its runner, its methods, and the grids that it is entered for."""

    environment: str
    runner: str
    methods: tuple[str, ...]
    symmetric: bool = True
    asymmetric: bool = False
    codebooks: bool = False

    def formats(self) -> list[str]:
        chosen = list(BITS) if self.symmetric else []
        if self.asymmetric:
            chosen += [f"{name}-asym" for name in BITS]
        return chosen + (list(CODEBOOKS) if self.codebooks else [])


PEERS = {
    "torchao": Peer("torchao", "run_torchao.py", ("rtn",), asymmetric=True),
    "hqq": Peer("hqq", "run_hqq.py", ("hqq",), symmetric=False, asymmetric=True),
    "quanto": Peer("optimum-quanto", "run_quanto.py", ("rtn", "hqq"), symmetric=False, asymmetric=True),
    "bitsandbytes": Peer("bitsandbytes", "run_bitsandbytes.py", ("rtn",), symmetric=False, codebooks=True),
    "llmcompressor": Peer("llmcompressor", "run_llmcompressor.py", ("gptq", "awq"), asymmetric=True),
    "auto-round": Peer("auto-round", "run_autoround.py", ("autoround",), asymmetric=True),
}


def allowed_bits(format: str) -> float:
    """What a candidate may take at most to be compared at this grid."""
    if format in CODEBOOKS:
        return CODEBOOKS[format] * TOLERANCE
    name = format.removesuffix("-asym")
    return (ZERO_POINTS if format.endswith("-asym") else BITS)[name] * TOLERANCE


def run_entry(command: list[str], folder: Path) -> dict[str, Any]:
    """Run one entry; its figures, or why there are none."""
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1] / "src"), "PYTHONWARNINGS": "ignore"}
    with (folder / "log.txt").open("w") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    last = (folder / "log.txt").read_text(errors="replace").strip().rpartition("\n")[2][-300:]
    if status == UNSUPPORTED:
        return {"status": "unsupported", "reason": last}
    if status:
        return {"status": "failed", "reason": last}
    record = json.loads((folder / "run.json").read_text())
    return {"status": "done", "whole_seconds": round(time.monotonic() - began, 1), **record}


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: list[dict[str, Any]], output: Path, split: str) -> list[str]:
    """The markdown table, and below it one line for each entry without figures."""
    lines = [
        "| grid | by | method | bits per weight | KL, 1e-3 nats (95% interval) | KL, 99% | same top-1, % | perplexity | seconds | CPU seconds | peak, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    missing, order = [], [*BITS, *(f"{name}-asym" for name in BITS), *CODEBOOKS]
    for result in sorted(results, key=lambda result: order.index(result["format"])):
        if result["status"] != "done":
            missing.append(
                f"- {result['peer']} {result['method']} {result['format']}: {result['status']}: {result['reason']}"
            )
            continue
        path = output / result["folder"] / f"{split}.json"
        if not path.exists():
            continue
        seen = json.loads(path.read_text())
        mark = "*" if result["bits_per_weight"] > allowed_bits(result["format"]) else ""
        lines.append(
            f"| {result['format']} | {result['peer']} | {result['method']} | {result['bits_per_weight']:.3f}{mark} "
            f"| {1e3 * seen['kl']:.3f} ({1e3 * seen['kl_low']:.3f} to {1e3 * seen['kl_high']:.3f}) | {seen['kl_99th']:.4f} "
            f"| {100 * seen['top1_agreement']:.1f} | {seen['perplexity']:.3f} | {result['seconds']} | {result['cpu_seconds']} "
            f"| {result['peak_bytes'] / 1e6:.0f} |"
        )
    return [*lines, "", "\\* more than 1% above the bits of the grid", *missing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="what the model is called in the results")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="dense Hugging Face folder")
    parser.add_argument("--windows", type=Path, required=True, help="what texts.py wrote")
    parser.add_argument("--environments", type=Path, required=True, help="what setup_peers.sh made")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--own", nargs="*", default=["rtn", "search"], help="strop's methods")
    parser.add_argument("--formats", nargs="*", help="only these grids")
    parser.add_argument("--test", action="store_true", help="judge on the test split too")
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    log = chosen.output / "results.jsonl"
    done = {result["folder"] for result in read_results(log)}
    own = Peer("", "run_strop.py", tuple(chosen.own), asymmetric=True, codebooks=True)
    for name, peer in {"strop": own, **{name: PEERS[name] for name in chosen.peers}}.items():
        python = Path(sys.executable) if name == "strop" else chosen.environments / peer.environment / "bin" / "python"
        for method in peer.methods:
            for format in peer.formats():
                folder = f"{format}.{name}.{method}"
                if folder in done or (chosen.formats and format not in chosen.formats):
                    continue
                (chosen.output / folder).mkdir(exist_ok=True)
                runner = HERE / "peers" / peer.runner
                arguments = [chosen.model, chosen.windows, format, method, chosen.output / folder]
                entry = run_entry([str(part) for part in (python, runner, *arguments)], chosen.output / folder)
                entry = {
                    "model": chosen.name,
                    "peer": name,
                    "method": method,
                    "format": format,
                    "folder": folder,
                    **entry,
                }
                with log.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                print(f"{folder}: {entry['status']} {entry.get('reason', '')}", flush=True)
    results = read_results(log)
    ready = [str(chosen.output / result["folder"]) for result in results if result["status"] == "done"]
    for split in ("development", "test") if chosen.test else ("development",):
        if ready:
            judge = [sys.executable, str(HERE / "judge.py"), str(chosen.model), str(chosen.windows), split, *ready]
            subprocess.run(judge, check=True)
    print("\n".join(table(results, chosen.output, "test" if chosen.test else "development")))


if __name__ == "__main__":
    main()

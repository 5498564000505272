"""The whole table of a model: every point, every method, every peer, judged on held-out windows.

    setup_peers.sh ENVIRONMENTS
    python benchmarks/quantization/run.py runs/demo --model src/strop/demo/model --windows runs/demo.safetensors \\
        --environments ENVIRONMENTS
    ... the same with --test, once every choice is made

Each peer and method runs in a process of its own, which forks for each grid, and leaves PEER.METHOD/GRID in the output
with its `run.json`; what has one is not run again (delete it to repeat). Development figures come first; `--test`
judges everything there on the test split, each once. Both print the table. A candidate whose bits per weight are more
than 1% above those of the grid that it is entered for is marked: it does not count as a rival there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BITS = {"int4-g128": 4.125, "int4-g32": 4.5, "int3-g32": 3.5, "int2-g32": 2.5}
"""The points, and what a code, and a float16 scale per group, take."""
FULL_RANGE = {f"{name}-full": bits for name, bits in BITS.items()}
"""The same bits, and grids that spend the sign of a scale: what auto-round means by symmetric. Strop's own alone."""
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
    full_range: bool = False
    asymmetric: bool = False
    codebooks: bool = False

    def formats(self) -> list[str]:
        chosen = list(BITS) if self.symmetric else []
        if self.full_range:
            chosen += list(FULL_RANGE)
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
    if format in FULL_RANGE:
        return FULL_RANGE[format] * TOLERANCE
    name = format.removesuffix("-asym")
    return (ZERO_POINTS if format.endswith("-asym") else BITS)[name] * TOLERANCE


def run_method(python: Path, runner: str, arguments: list[str | Path], log: Path) -> None:
    """Run a runner; the forks write their own logs, this one is of the imports."""
    command = [str(part) for part in (python, HERE / "peers" / runner, *arguments)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1] / "src"), "PYTHONWARNINGS": "ignore"}
    with log.open("w") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)


def read_results(output: Path) -> list[dict[str, Any]]:
    """Every entry that has run, with its place."""
    results = []
    for path in sorted(output.glob("*/*/run.json")):
        peer, _, method = path.parts[-3].partition(".")
        named = {"peer": peer, "method": method, "format": path.parts[-2], "folder": path.parent}
        results.append(named | json.loads(path.read_text()))
    return results


HEADINGS = (
    "grid",
    "by",
    "method",
    "bits per weight",
    "KL, 1e-3 nats (95% interval)",
    "KL, 99%",
    "same top-1, %",
    "perplexity",
    "seconds",
    "CPU seconds",
    "peak, MB",
)


def table(results: list[dict[str, Any]], split: str) -> list[str]:
    """The markdown table, and below it one line for each entry without figures."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    missing: list[str] = []
    order = [
        *(form for name in BITS for form in (name, f"{name}-full")),
        *(f"{name}-asym" for name in BITS),
        *CODEBOOKS,
    ]
    for result in sorted(results, key=lambda result: order.index(result["format"])):
        name = [result["format"], result["peer"], result["method"]]
        figures = result["folder"] / f"{split}.json"
        if result["status"] != "done":
            missing.append(f"- {' '.join(name)}: {result['status']}: {result['reason']}")
        elif figures.exists():
            seen = json.loads(figures.read_text())
            mark = "*" if result["bits_per_weight"] > allowed_bits(result["format"]) else ""
            kl, low, high = (1e3 * seen[key] for key in ("kl", "kl_low", "kl_high"))
            cells = [
                *name,
                f"{result['bits_per_weight']:.3f}{mark}",
                f"{kl:.3f} ({low:.3f} to {high:.3f})",
                f"{seen['kl_99th']:.4f}",
                f"{100 * seen['top1_agreement']:.1f}",
                f"{seen['perplexity']:.3f}",
                f"{result['seconds']}",
                f"{result['cpu_seconds']}",
                f"{result['peak_bytes'] / 1e6:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "\\* more than 1% above the bits of the grid", *missing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="dense Hugging Face folder")
    parser.add_argument("--windows", type=Path, required=True, help="what texts.py wrote")
    parser.add_argument("--environments", type=Path, required=True, help="what setup_peers.sh made")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--own", nargs="*", default=["rtn", "search"], help="strop's methods")
    parser.add_argument("--formats", nargs="*", help="only these grids")
    parser.add_argument("--test", action="store_true", help="judge on the test split too")
    parser.add_argument("--save", type=Path, help="write the figures, without those per document, as JSON")
    chosen = parser.parse_args()
    own = Peer("", "run_strop.py", tuple(chosen.own), full_range=True, asymmetric=True, codebooks=True)
    for name, peer in {**{name: PEERS[name] for name in chosen.peers}, "strop": own}.items():
        python = Path(sys.executable) if name == "strop" else chosen.environments / peer.environment / "bin" / "python"
        for method in peer.methods:
            place = chosen.output / f"{name}.{method}"
            place.mkdir(parents=True, exist_ok=True)
            formats = [one for one in peer.formats() if not chosen.formats or one in chosen.formats]
            waiting = [one for one in formats if not (place / one / "run.json").exists()]
            if waiting:
                print(f"{name} {method}: {', '.join(waiting)}", flush=True)
                arguments = [chosen.model, chosen.windows, method, place, *waiting]
                run_method(python, peer.runner, arguments, place / "log.txt")
    results = read_results(chosen.output)
    ready = [str(result["folder"]) for result in results if result["status"] == "done"]
    splits = ("development", "test") if chosen.test else ("development",)
    for split in splits if ready else ():
        judge = [sys.executable, str(HERE / "judge.py"), str(chosen.model), str(chosen.windows), split, *ready]
        subprocess.run(judge, check=True)
    print("\n".join(table(results, splits[-1])))
    if chosen.save:
        chosen.save.write_text("\n".join(json.dumps(saved(result, splits)) for result in results) + "\n")


def saved(result: dict[str, Any], splits: tuple[str, ...]) -> dict[str, Any]:
    """One entry's figures without those per document."""
    record = {key: value for key, value in result.items() if key != "folder"}
    for split in splits:
        figures = result["folder"] / f"{split}.json"
        if figures.exists():
            whole = json.loads(figures.read_text())
            record[split] = {key: value for key, value in whole.items() if not isinstance(value, list)}
    return record


if __name__ == "__main__":
    main()

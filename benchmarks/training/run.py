"""Training on a CPU beside PEFT with bitsandbytes and beside transformers' own loop: speed, memory, losses.

    python benchmarks/training/run.py step --shape 135m --pairs 7
    python benchmarks/training/run.py step --shape 1.1b --pairs 7 --kinds peft:nf4 qlora:nf4 peft:lora lora
    python benchmarks/training/run.py rows --pairs 7 --data lf_alpaca_en_demo.json --tokenizer FOLDER
    python benchmarks/training/run.py table

`step`: one row of tokens (512 at 135m, 256 at 1.1b), every token supervised; each contender is a process that does a
step when it is its turn (`../qat/cost_step.py` for strop, its whole loop; `peft_step.py` for the rivals, the usual bare
loop). `rows`: a file of short rows, the loss on the answers; the rivals pad eight rows to the longest, strop packs. Any
tokenizer of at most as many tokens as the shape has will do (by default the bundled model's, whose rows are long).
Products are in bfloat16 where the processor has them, else in float32 (torch's bf16 product is 7 times slower there),
for all alike; results in float32 are kept apart. What is in `results/` is not measured again; models lie in `--work`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from strop.precision import compute_dtype

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "qat"))

import cost  # noqa: E402  the neighbour's contenders, shapes and store
from store import Cell, Store  # noqa: E402

SHAPES: Final = {
    "135m": (cost.SHAPE, 512),
    "1.1b": (
        {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        },
        256,
    ),
}
RIVALS: Final = {  # what each kind is held against; int8 multiplies by the frozen base in 8 bits
    "qlora:nf4": "peft:nf4",
    "qlora:nf4+int8": "peft:nf4",
    "lora": "peft:lora",
    "lora+int8": "peft:lora",
    "full": "transformers:full",
}
KEY: Final = ("what", "shape", "kind", "pair")
DTYPE: Final = str(compute_dtype("auto", torch.device("cpu"))).removeprefix("torch.")


def script(kind: str) -> Path:
    """What runs a contender."""
    return HERE.parent / "qat/cost_step.py" if kind in RIVALS else HERE / "peft_step.py"


def measure(
    work: Path, store: Store, shape: str, kinds: Sequence[str], pairs: int, data: Path | None, tokenizer: Path | None
) -> None:
    """Every kind in turns; with `data`, on its rows."""
    widths, length = SHAPES[shape]
    what = "step" if data is None else "rows"
    work.mkdir(parents=True, exist_ok=True)
    cost.write_model(work / "model", widths if data is None else widths | {"vocab_size": 50304})
    for file in tokenizer.iterdir() if tokenizer is not None else ():
        if file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            shutil.copy(file, work / "model" / file.name)
    if data is None:
        cost.write_rows(work / "rows.jsonl")
    options = ["--dtype", DTYPE, "--length", *((str(length),) if data is None else ("512", "--answers"))]
    for rival in dict.fromkeys(RIVALS[kind] for kind in kinds):  # all that have one rival take turns with it
        group = [*(kind for kind in kinds if RIVALS[kind] == rival), rival]
        if all(store.find({"what": what, "shape": shape, "kind": k, "pair": pairs - 1}) for k in group):
            continue
        contenders = [
            cost.Contender(
                kind, work, cost.WARM_UP + pairs, script=script(kind), rows=data or work / "rows.jsonl", options=options
            )
            for kind in group
        ]
        for number in range(-cost.WARM_UP, pairs):
            for one in contenders if number % 2 else contenders[::-1]:
                seen = one.step()
                if number < 0:
                    continue
                key = {"what": what, "shape": shape, "kind": one.kind, "pair": number}
                store.once(key, lambda seen=seen: seen)
                print(f"{shape} {what} {number + 1} {one.kind}: {seen['cpu_seconds']:.2f} CPU s", flush=True)
        for one in contenders:
            one.close()


def table(cells: Sequence[Cell]) -> list[str]:
    """Medians (least to most); times and memory against the rival of the same pair. Tokens are those of real text."""
    lines = [
        "| case | by | CPU s a step | tokens a CPU second | times as fast | peak, MB | of the rival's |",
        "|---" * 7 + "|",
    ]
    for what, shape in dict.fromkeys((cell["what"], cell["shape"]) for cell in cells):
        for kind, rival in RIVALS.items():
            both = [
                {c["pair"]: c for c in cells if (c["what"], c["shape"], c["kind"]) == (what, shape, name)}
                for name in (rival, kind)
            ]
            pairs = sorted(both[0].keys() & both[1].keys())
            if not pairs:
                continue
            rates = [[side[pair]["tokens"] / side[pair]["cpu_seconds"] for pair in pairs] for side in both]
            ratios = [ours / theirs for theirs, ours in zip(*rates, strict=True)]
            peaks = [max(side[pair]["peak_bytes"] for pair in pairs) for side in both]
            for place, name in enumerate((rival, kind)):
                seconds = [both[place][pair]["cpu_seconds"] for pair in pairs]
                row = [f"{shape}, {what}", name, middle(seconds), middle(rates[place], 1)]
                row += [middle(ratios) if place else "", f"{peaks[place] / 1e6:.0f}"]
                lines.append(f"| {' | '.join([*row, f'{peaks[1] / peaks[0]:.2f}' if place else ''])} |")
    return lines


def middle(values: Sequence[float], digits: int = 2) -> str:
    """The median and the range."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "rows", "table"])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--work", type=Path, default=Path("runs/training"))
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--kinds", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--data", type=Path, help="of rows: a file of alpaca records")
    parser.add_argument("--tokenizer", type=Path, help="of rows: the folder of another tokenizer")
    chosen = parser.parse_args()
    store = Store(chosen.results / ("training.jsonl" if DTYPE == "bfloat16" else f"training-{DTYPE}.jsonl"), KEY)
    if chosen.what == "rows" and chosen.data is None:
        parser.error("rows needs --data FILE, a file of alpaca records")
    if chosen.what != "table":
        data = chosen.data if chosen.what == "rows" else None
        work = chosen.work / f"{chosen.what}-{chosen.shape}"
        measure(work, store, chosen.shape, chosen.kinds, chosen.pairs, data, chosen.tokenizer)
    print("\n".join(table(store.cells)))


if __name__ == "__main__":
    main()

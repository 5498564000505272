"""Does `rank: auto` choose well? `python -m benchmarks.rank --banking77 DATA/banking77_train.csv -o runs/rank`

Two tasks for the bundled model, three seeds each: ten intents of banking77 (easy) and the demo's requests (hard). A
full sweep trains every rank for the whole run and measures it on the same test rows; the sweep's choice is the smallest
rank within one standard error of the best. Beside it: what `rank: auto` chooses from its race on the training rows, and
what the spectrum of the whole weights' gradient at the base would advise. One line of JSON a result, so that a study
that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.rank_probe import energy_rank, entropy_rank, probe_gradients

from strop.config import TuneConfig
from strop.data.records import read_records
from strop.data.samples import prepare
from strop.demo import task
from strop.evaluation.likelihood import likelihood
from strop.evaluation.smallest import best_of, smallest_good, standings
from strop.layers.surgery import detach_lora
from strop.models import load
from strop.recipes.rank import choose_rank
from strop.recipes.session import open_session
from strop.recipes.tune import tune

RANKS = (1, 2, 4, 8, 16, 32, 64)
TEST_ROWS = 300


def write_easy(folder: Path, source: Path, *, intents: int = 10) -> None:
    with source.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    chosen = sorted({row["category"] for row in rows})[:intents]
    rows = [row for row in rows if row["category"] in chosen]
    random.Random(0).shuffle(rows)
    _write(folder, rows[TEST_ROWS:], rows[:TEST_ROWS])


def write_hard(folder: Path) -> None:
    splits = task.generate(rows={**dict.fromkeys(task.ROWS, 1), "train": 4000, "test_combinations": TEST_ROWS})
    _write(folder, splits["train"], splits["test_combinations"])


def _write(folder: Path, train: Any, test: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Study:
    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.file, self.steps = folder, folder / "results.jsonl", steps
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done = {tuple(row["key"]): row for row in map(json.loads, lines)}

    def once(self, key: tuple[Any, ...], work: Any) -> dict[str, Any]:
        if key not in self.done:
            start = time.perf_counter()
            row = {"key": list(key), **work(), "seconds": time.perf_counter() - start}
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.done[key] = row
        return self.done[key]

    def settings(self, name: str, seed: int) -> dict[str, Any]:
        train = str(self.folder / name / "train.jsonl")
        shape = {"batch_size": 16, "learning_rate": 5e-3, "max_length": 256, "group_by_length": True}
        return {"model": "demo", "data": train, "method": "lora", "max_steps": self.steps, "seed": seed} | shape

    def swept(self, name: str, seed: int, rank: int) -> dict[str, Any]:
        output = self.folder / "runs" / f"{name}-{seed}-{rank}"
        resume = True if (output / "config.yaml").is_file() else None
        run = tune(**self.settings(name, seed), rank=rank, output=output, eval_steps=self.steps, resume=resume)
        opened = load(run.last_path)
        samples = prepare(read_records(self.folder / name / "test.jsonl"), opened.tokenizer, max_length=256).samples
        measured = likelihood(opened.model, samples, batch_size=32)
        return {"nll_sums": measured.nll_sums.tolist(), "tokens": [sample.supervised for sample in samples]}

    def chosen(self, name: str, seed: int) -> dict[str, Any]:
        choice = choose_rank(TuneConfig.from_flat({**self.settings(name, seed), "rank": "auto"}))
        told = choice.to_dict()
        return {name: told[name] for name in ("rank", "verdict", "candidates", "steps", "steps_used", "rounds", "why")}

    def advised(self, name: str, seed: int) -> dict[str, Any]:
        session = open_session(TuneConfig.from_flat({**self.settings(name, seed), "rank": 1}))
        batches = [batch for _ in range(8) for batch in session.stream.next_step()]
        detach_lora(session.model)
        session.model.requires_grad_(requires_grad=False)
        found = probe_gradients(session.model, session.trained.layers, batches, compute_dtype=torch.float32)
        spectra = {layer: torch.linalg.svdvals(gradient) for layer, gradient in found.items()}
        return {
            "energy_90": {layer: energy_rank(values, 0.9) for layer, values in spectra.items()},
            "entropy": {layer: entropy_rank(values) for layer, values in spectra.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--banking77", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args()
    write_easy(chosen.output / "easy", chosen.banking77)
    write_hard(chosen.output / "hard")
    study = Study(chosen.output, chosen.steps)
    print(
        "| task | seed | "
        + " | ".join(f"rank {rank}" for rank in RANKS)
        + " | sweep | auto | auto's loss - best | race, s |"
    )
    print("|---|---|" + "---|" * (len(RANKS) + 4))
    for seed in chosen.seeds:
        for name in ("easy", "hard"):
            auto = study.once((name, seed, "auto"), lambda name=name, seed=seed: study.chosen(name, seed))
            sweep = {
                rank: study.once((name, seed, rank), lambda n=name, s=seed, r=rank: study.swept(n, s, r))
                for rank in RANKS
            }
            tokens = next(iter(sweep.values()))["tokens"]
            board = standings({rank: np.array(row["nll_sums"]) for rank, row in sweep.items()}, tokens, seed=seed)
            cells = [f"{each.loss:.4f} ± {each.error:.4f}" for each in board]
            taken = next((each for each in board if each.size == auto["rank"]), None)
            worse = "-" if taken is None else f"{taken.loss - best_of(board).loss:+.4f}"
            print(
                f"| {name} | {seed} | "
                + " | ".join(cells)
                + f" | {smallest_good(board).size} | {auto['rank']} | {worse} | "
                f"{auto['seconds']:.0f} |",
                flush=True,
            )
    for name in ("easy", "hard"):
        for seed in chosen.seeds:
            advice = study.once((name, seed, "spectrum"), lambda name=name, seed=seed: study.advised(name, seed))
            print(
                f"{name}, seed {seed}: directions with 90% of the gradient's energy, median over layers "
                f"{statistics.median(advice['energy_90'].values()):.0f}; effective rank "
                f"{statistics.median(advice['entropy'].values()):.1f}"
            )


if __name__ == "__main__":
    main()

"""Does `rank: auto` choose well? `python -m benchmarks.rank --material MATERIAL -o runs/rank`

Four tasks, three seeds each (others by `--seeds`: what is chosen on some is judged on others). For the bundled model:
ten intents of banking77 (easy) and the demo's requests (hard). For stories260K, a teller of children's stories: the
same kind of story in lower case (lower) and Shakespeare (plays). A full sweep trains every rank for the whole run and
measures it on the same test rows; the sweep's choice is the smallest rank within one standard error of the best. Beside
it: what `rank: auto` chooses from its race on the training rows, and what the spectrum of the whole weights' gradient
at the base would advise. One line of JSON a result, so that a study that was stopped goes on where it was.
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
from benchmarks.rank_probe import energy_rank, entropy_rank, probe_gradients, reproduced_energy

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

RANKS = {"easy": (1, 2, 4, 8, 16, 32, 64), "hard": (1, 2, 4, 8, 16, 32, 64)}
RANKS |= {"lower": (1, 2, 4, 8, 16, 32), "plays": (1, 2, 4, 8, 16, 32)}  # its narrowest layers have 32 rows
TEST_ROWS = 300
PIECE = 240  # characters of a row of plain text


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


def write_text(folder: Path, source: Path, *, rows: int = 3000) -> None:
    text = source.read_text(encoding="utf-8")
    pieces = [{"text": text[start : start + PIECE]} for start in range(0, rows * PIECE, PIECE)]
    pieces = [piece for piece in pieces if piece["text"].strip()]
    random.Random(0).shuffle(pieces)
    _write(folder, pieces[TEST_ROWS:], pieces[:TEST_ROWS])


def _write(folder: Path, train: Any, test: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Study:
    def __init__(self, folder: Path, steps: int, material: Path) -> None:
        self.folder, self.file, self.steps, self.material = folder, folder / "results.jsonl", steps, material
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
        stories = str(self.material / "models" / "stories260K")
        model = stories if name in ("lower", "plays") else "demo"
        return {"model": model, "data": train, "method": "lora", "max_steps": self.steps, "seed": seed} | shape

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
        detach_lora(session.model)
        session.model.requires_grad_(requires_grad=False)
        halves = []
        for _ in range(2):
            batches = [batch for _ in range(4) for batch in session.stream.next_step()]
            found = probe_gradients(session.model, session.trained.layers, batches, compute_dtype=torch.float32)
            halves.append(found)
        first, second = halves
        spectra = {layer: torch.linalg.svdvals(first[layer] + second[layer]) for layer in first}
        repeated = {layer: reproduced_energy(first[layer], second[layer]).clamp(min=0).sqrt() for layer in first}
        return {
            "energy_90": {layer: energy_rank(values, 0.9) for layer, values in spectra.items()},
            "entropy": {layer: entropy_rank(values) for layer, values in spectra.items()},
            "repeated_90": {
                layer: energy_rank(values.sort(descending=True).values, 0.9) for layer, values in repeated.items()
            },
        }


def table(study: Study, names: list[str], seeds: list[int]) -> None:
    print("| task | seed | sweep, held-out loss by rank | sweep | auto | auto's loss - best | race, steps | race, s |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in seeds:
        for name in names:
            auto = study.once((name, seed, "auto"), lambda name=name, seed=seed: study.chosen(name, seed))
            sweep = {
                rank: study.once((name, seed, rank), lambda n=name, s=seed, r=rank: study.swept(n, s, r))
                for rank in RANKS[name]
            }
            tokens = next(iter(sweep.values()))["tokens"]
            board = standings({rank: np.array(row["nll_sums"]) for rank, row in sweep.items()}, tokens, seed=seed)
            cells = ", ".join(f"{each.size}: {each.loss:.3f}" for each in board)
            taken = next(each for each in board if each.size == auto["rank"])
            best = best_of(board)
            print(
                f"| {name} | {seed} | {cells}; ± {best.error:.3f} | {smallest_good(board).size} | {auto['rank']} "
                f"({auto['verdict']}) | {taken.loss - best.loss:+.4f} | {auto['steps_used']} | {auto['seconds']:.0f} |",
                flush=True,
            )


def spectra(study: Study, names: list[str], seeds: list[int]) -> None:
    print("\nSpectra of the whole weights' gradient at the base, 8 steps' rows; medians over layers (least to most)\n")
    print("| task | seed | directions with 90% of the energy | of what both halves repeat | effective rank |")
    print("|---|---|---|---|---|")
    for name in names:
        for seed in seeds:
            advice = study.once((name, seed, "spectrum"), lambda name=name, seed=seed: study.advised(name, seed))
            cells = [advice[kind].values() for kind in ("energy_90", "repeated_90", "entropy")]
            shown = [f"{statistics.median(held):.0f} ({min(held):.0f} to {max(held):.0f})" for held in cells]
            print(f"| {name} | {seed} | " + " | ".join(shown) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--material", type=Path, required=True, help="Folder with data/ and models/stories260K.")
    parser.add_argument("--tasks", nargs="+", choices=list(RANKS), default=list(RANKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--spectra-only", action="store_true", help="No runs: the gradients' spectra alone.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args()
    data = chosen.material / "data"
    writers = {
        "easy": lambda folder: write_easy(folder, data / "banking77_train.csv"),
        "hard": write_hard,
        "lower": lambda folder: write_text(folder, data / "tinystories_4M_lowercase.txt"),
        "plays": lambda folder: write_text(folder, data / "tinyshakespeare.txt"),
    }
    for name in chosen.tasks:
        writers[name](chosen.output / name)
    study = Study(chosen.output, chosen.steps, chosen.material)
    if not chosen.spectra_only:
        table(study, chosen.tasks, chosen.seeds)
    spectra(study, chosen.tasks, chosen.seeds)


if __name__ == "__main__":
    main()

"""Eight tasks as patches of one Q4_0 file: an adapter for each task beside the few codes that its patch moves.

    base      the bundled model on Q4_0's grid, written once as a GGUF file that all tasks share
    adapter   LoRA over the bundled model in 16 bits, the rival of its task
    patch     `qat` that may move `max_moved` of the codes, exported; `diff` against the base, `apply` back

Scores are exact match in float32 on 500 rows that trained nothing; the model of the patch is the file itself, opened.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path
from typing import Any, Final

from store import Cell, Store, cpu_seconds, from_hex, to_hex
from tasks import TASKS

import strop
from strop.data.records import read_records
from strop.data.samples import prepare
from strop.demo import model_path
from strop.evaluation.statistics import compare_proportions
from strop.evaluation.tasks import exact_match
from strop.models import load

FORMAT: Final = "gguf:q4_0"
KEY = ("seed", "task", "arm", "settings", "split")
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "adapter": {"method": "lora", "max_steps": 100, "learning_rate": 5e-3, "rank": 16},
    "patch": {"method": "qat", "max_steps": 100, "learning_rate": 3e-3, "max_moved": 0.03},
}


def shared_base(work: Path) -> tuple[Path, Path]:
    """The bundled model's codes as a folder, and the file of them; made once."""
    folder, file = work / "base", work / "base.gguf"
    if not file.exists():
        shutil.rmtree(folder, ignore_errors=True)
        strop.quantize(model_path(), "int4-g32-full", output=folder)
        strop.export(folder, file, format=FORMAT, embeddings="f16", verify=False)  # as a tuned model has them
    return folder, file


def measure(
    work: Path, store: Store, tasks: dict[str, Path], seed: int, task: str, arm: str, settings: Any, split: str
) -> Cell:
    """One arm of one task."""
    wanted = {"seed": seed, "task": task, "arm": arm, "settings": settings, "split": split}

    def found() -> Cell:
        begin, base = shared_base(work)
        folder = work / f"seed-{seed}" / task / arm
        shutil.rmtree(folder, ignore_errors=True)
        own = {"format": FORMAT, "start": str(begin)} if arm == "patch" else {}
        with cpu_seconds() as taken:
            run = strop.tune(
                model_path(),
                tasks[task] / "train.jsonl",
                output=folder / "run",
                batch_size=32,
                max_length=256,
                valid_fraction=0.0,
                seed=seed,
                **own,
                **settings,
            )
            seconds = taken()
        cell: Cell = {"cpu_seconds": seconds}
        model: Path = run.best_path
        if arm == "patch":
            model = folder / "tuned.gguf"
            strop.export(run.best_path, model, format=FORMAT, verify=False)
            cell |= _patched(base, model, folder)
        samples = prepare(
            read_records(tasks[task] / f"{split}.jsonl"), load(model_path()).require_tokenizer(), max_length=256
        ).samples
        right = exact_match(load(model, dtype="float32").model, samples, batch_size=64).tolist()
        return cell | {"rows": len(right), "score": sum(right) / len(right), "right": to_hex(right)}

    return store.once(wanted, found)


def _patched(base: Path, tuned: Path, folder: Path) -> Cell:
    made = strop.diff(base, tuned, folder / "task.patch")
    began = time.perf_counter()
    strop.apply(base, folder / "task.patch", folder / "again.gguf")
    seconds = time.perf_counter() - began
    return {
        "patch_bytes": made.patch_bytes,
        "file_bytes": tuned.stat().st_size,
        "apply_seconds": seconds,
        "byte_exact": _digest(folder / "again.gguf") == _digest(tuned),
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def patch_table(cells: list[Cell], split: str, seed: int) -> list[str]:
    """By task: the adapter, the patch, their paired difference, and the patch's size."""
    lines = [
        "| task | adapter, % | patch, % | patch - adapter, points (95%) | bytes | of the file | applied, s | exact |",
        "|---" * 8 + "|",
    ]
    for task in TASKS:
        arms = {
            cell["arm"]: cell
            for cell in cells
            if (cell["task"], cell["split"], cell["seed"]) == (task, split, seed)
            and cell["settings"] == SETTINGS[cell["arm"]]
        }
        if set(arms) != {"adapter", "patch"}:
            continue
        adapter, patch = arms["adapter"], arms["patch"]
        one, other = (from_hex(cell["right"], cell["rows"]) for cell in (adapter, patch))
        gap = compare_proportions(one, other)
        assert gap.low is not None  # as there are rows
        assert gap.high is not None
        lines.append(
            f"| {task} | {100 * adapter['score']:.1f} | {100 * patch['score']:.1f} | {100 * gap.estimate:+.1f} "
            f"({100 * gap.low:+.1f} to {100 * gap.high:+.1f}) | {patch['patch_bytes']:,} | "
            f"{patch['patch_bytes'] / patch['file_bytes']:.1%} | {patch['apply_seconds']:.2f} | "
            f"{'yes' if patch['byte_exact'] else 'NO'} |"
        )
    return lines

"""The whole way on the bundled model: plan, score, tune four ways, quantize, train through the grid, compare, one page.

Every figure is measured here and now, and written to `demo.json` beside the page. The steps:

    base ── full ──┬── rounded to nearest: 8, 4, 3 and 2 bits in groups (kind grids), and the harsh grid
         │         ├── control: more steps in full precision, then rounded to the harsh grid
         │         └── qat: the same more steps through the harsh grid
         ├── lora
         └── qlora

The harsh grid is one that rounding breaks on this model; its figure counts only beside that of the control, which has
seen the same rows for the same number of steps: regained = (qat - control) / (full - control).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from strop import demo as bundled
from strop.data.records import read_records
from strop.data.samples import prepare
from strop.demo import task
from strop.errors import UsageError
from strop.evaluation.comparison import Comparison
from strop.evaluation.statistics import wilson_interval
from strop.evaluation.tasks import exact_match
from strop.models import load
from strop.progress import SILENT, Reporter
from strop.recipes.compare import compare
from strop.recipes.generate import answer
from strop.recipes.plan import plan_model
from strop.recipes.quantize import quantize
from strop.recipes.tune import tune

MAIN_SPLIT = "test_combinations"
OTHER_SPLITS = ("test_phrasings", "test_strings")


@dataclass(frozen=True)
class Recipe:
    """How much is trained, and on which grids. The defaults are the demo; tests use less.

    Attributes:
        rows: Training rows.
        test_rows: Rows of each test split.
        tuning: Settings of the first fine-tunings by method, as `tune` takes them.
        more: Settings that the control and QAT share: the same rows, order and number of steps.
        rounded: Formats that the tuned model is rounded to, kindest first.
        grid: The format that rounding breaks.
        questions: Requests whose answers are shown before and after.
    """

    rows: int = 12_000
    test_rows: int = 1_000
    tuning: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "full": {"max_steps": 160, "batch_size": 32, "learning_rate": 1e-3},
            "lora": {"max_steps": 180, "batch_size": 32, "learning_rate": 5e-3, "rank": 16},
            "qlora": {"max_steps": 180, "batch_size": 32, "learning_rate": 5e-3, "rank": 16},
        }
    )
    more: Mapping[str, Any] = field(default_factory=lambda: {"max_steps": 90, "batch_size": 32, "learning_rate": 5e-4})
    rounded: tuple[str, ...] = ("int8", "int4-g32", "int3-g32", "int2-g32")
    grid: str = "int3-tensor"
    questions: tuple[str, ...] = (
        "wake me at half past six on weekdays",
        "remind me to water the plants at a quarter to eight",
        "send a message to thaddeus saying the train is late",
    )


@dataclass(frozen=True)
class DemoResult:
    """Where everything lies, and every figure.

    Attributes:
        folder: The demo's folder.
        page: The page to look at.
        figures: What `demo.json` holds.
        comparison: The comparison on the split of new combinations.
    """

    folder: Path
    page: Path
    figures: dict[str, Any]
    comparison: Comparison

    def lines(self) -> list[str]:
        """What to print at the end."""
        scores, grid = self.figures["scores"], self.figures["grid"]
        lines = [
            "",
            f"exact match on {self.figures['test_rows']} rows each, %",
            f"{'':24}" + "".join(f"{s:>20}" for s in scores),
        ]
        names = list(dict.fromkeys(name for split in scores.values() for name in split))
        for name in names:
            cells = (scores[split].get(name) for split in scores)
            lines.append(f"{name:24}" + "".join(f"{_percent(cell):>20}" for cell in cells))
        regained = self.figures["regained"]
        lines += ["", *self.figures["comparison"]["verdicts"], ""]
        lines.append(
            f"QAT at {grid} regains "
            + (
                "nothing that was lost"
                if regained is None
                else f"{100 * regained:.0f}% of what the rounded control loses"
            )
        )
        for asked in self.figures["answers"]:
            lines += [
                "",
                f"> {asked['question']}",
                f"  base  {asked['base']}",
                f"  full  {asked['full']}",
                f"  qat   {asked['qat']}",
            ]
        lines += [
            "",
            f"{self.figures['minutes']:.1f} minutes",
            f"page    {self.page}",
            f"figures {self.folder / 'demo.json'}",
        ]
        lines.append(f"models  {self.folder / 'models'} and {self.folder / 'runs'}")
        return lines


def demo(
    output: str | os.PathLike[str], *, seed: int = 0, recipe: Recipe | None = None, reporter: Reporter = SILENT
) -> DemoResult:
    """Take the bundled model the whole way.

    Args:
        output: A folder that is made; one that an earlier demo made is replaced.
        seed: Of data order, adapters and bootstraps; the data themselves are the same for every seed.
        recipe: How much is trained.
        reporter: Told what happens.

    Raises:
        UsageError: `output` holds something that no demo made.
    """
    recipe = recipe or Recipe()
    folder = _fresh(Path(output))
    base, began, seconds = str(bundled.model_path()), time.monotonic(), {}
    runs, models, data = folder / "runs", folder / "models", folder / "data"

    @contextmanager
    def step(number: int, title: str) -> Iterator[None]:
        reporter.note(f"\n[{number}/8] {title}")
        start = time.monotonic()
        yield
        seconds[title] = round(time.monotonic() - start, 1)

    def tuned(name: str, start: str, method: str, **settings: Any) -> str:
        run = tune(start, data / "tune", method=method, output=runs / name, seed=seed, reporter=reporter, **settings)
        return str(run.best_path)

    def rounded(name: str, source: str, form: str) -> str:
        return str(quantize(source, form, output=models / name, reporter=reporter).path)

    with step(1, "write the data and plan"):
        splits = _write_data(data, recipe)
        for line in plan_model(base, rank=16, max_length=128).lines():
            reporter.note(line)
    with step(2, "fine-tune every weight (full)"):
        full = tuned("full", base, "full", **recipe.tuning["full"])
    with step(3, "fine-tune an adapter (lora)"):
        lora = tuned("lora", base, "lora", **recipe.tuning["lora"])
    with step(4, "fine-tune an adapter over 4 bits (qlora)"):
        qlora = tuned("qlora", base, "qlora", **recipe.tuning["qlora"])
    with step(5, "round the tuned model to nearest"):
        rounds = {form: rounded(form, full, form) for form in (*recipe.rounded, recipe.grid)}
    with step(6, f"train on, in full precision (control) and through {recipe.grid} (qat)"):
        longer = tuned("control", full, "full", **recipe.more)
        control = rounded("control", longer, recipe.grid)
        qat = tuned("qat", full, "qat", format=recipe.grid, **recipe.more)
    page = folder / "page.html"
    named = {"full": full, "base": base, "lora": lora, "qlora": qlora}
    named |= {form: rounds[form] for form in recipe.rounded}
    named |= {
        f"{recipe.grid} rounded": rounds[recipe.grid],
        f"{recipe.grid} control": control,
        f"{recipe.grid} qat": qat,
    }
    with step(7, "compare on new combinations"):
        comparison = compare(
            list(named.values()),
            splits[MAIN_SPLIT],
            names=list(named),
            task="exact-match",
            page=page,
            max_rows=recipe.test_rows,
            batch_size=64,
            seed=seed,
            reporter=reporter,
        )
    scores = {MAIN_SPLIT: {model.name: _interval(model.score) for model in comparison.models}}
    with step(8, "score new phrasings and new strings, ask a few questions"):
        chosen = {name: named[name] for name in ("base", "full", "lora", "qlora", f"{recipe.grid} qat")}
        answers: list[dict[str, str]] = [{"question": question} for question in recipe.questions]
        for name, path in chosen.items():
            opened = load(path)
            for split in OTHER_SPLITS:
                records = read_records(splits[split])
                right = exact_match(
                    opened.model, prepare(records, opened.tokenizer, max_length=256).samples, batch_size=64
                )
                interval = wilson_interval(int(right.sum()), len(right))
                scores.setdefault(split, {})[name] = _interval(interval)
            short = name.removeprefix(f"{recipe.grid} ")
            for asked in answers:
                asked[short] = answer(opened, asked["question"], max_new_tokens=80)
    train = _rows(data / "tune" / "train.jsonl")
    baseline = {split: task.nearest_copy_baseline(train, _rows(path)) for split, path in splits.items()}
    for split, share in baseline.items():
        scores[split]["copying the nearest row"] = {"estimate": share, "low": None, "high": None}

    points = {model.name: model.score.estimate for model in comparison.models if model.score is not None}
    lost = points["full"] - points[f"{recipe.grid} control"]
    figures: dict[str, Any] = {
        "seed": seed,
        "grid": recipe.grid,
        "test_rows": recipe.test_rows,
        "scores": scores,
        "regained": (points[f"{recipe.grid} qat"] - points[f"{recipe.grid} control"]) / lost if lost > 0 else None,
        "answers": answers,
        "comparison": comparison.to_dict(),
        "seconds": seconds,
        "minutes": (time.monotonic() - began) / 60,
        "machine": _machine(),
    }
    (folder / "demo.json").write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return DemoResult(folder, page, figures, comparison)


def _fresh(folder: Path) -> Path:
    """An empty folder with the mark by which the next demo knows that it may replace it."""
    mark = folder / ".strop-demo"
    if folder.exists():
        if not mark.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder}: holds files that no demo made; name another folder with -o")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    mark.touch()
    return folder


def _write_data(folder: Path, recipe: Recipe) -> dict[str, Path]:
    """Write every split; training and validation in a folder of their own, so that no test row can be trained on."""
    counts = (
        dict(task.ROWS) | {"train": recipe.rows} | {split: recipe.test_rows for split in (MAIN_SPLIT, *OTHER_SPLITS)}
    )
    task.write(folder, rows=counts)
    (folder / "tune").mkdir()
    for name in ("train.jsonl", "valid.jsonl"):
        (folder / name).rename(folder / "tune" / name)
    return {split: folder / f"{split}.jsonl" for split in (MAIN_SPLIT, *OTHER_SPLITS)}


def _rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _interval(interval: Any) -> dict[str, float | None]:
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}


def _percent(score: Mapping[str, float | None] | None) -> str:
    return "-" if score is None or score["estimate"] is None else f"{100 * score['estimate']:.1f}"


def _machine() -> dict[str, str | int]:
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("strop", "torch", "transformers")},
    }

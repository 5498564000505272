"""The study of scores: rows, the models that share their training, and what each arm makes of a grid.

    first    every weight, TOTAL - k steps at the demo's rate
    control  the same weights, k steps more                          full, rtn, gptq, blockwise: made of the control
    qat      the same k steps, the same rows in the same order, through the grid             (torchao: by its layers)

Every arm of a grid has so seen the same rows, in the same order, for the same number of steps. All are scored by
teacher-forced exact match in float32 on rows that trained nothing: `dev` chose the settings (seed 100), `test` judges.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from store import Cell, Store, cpu_seconds, to_hex

import strop
from strop.data.records import read_records
from strop.data.samples import prepare
from strop.demo import model_path, task
from strop.evaluation.tasks import exact_match
from strop.models import load

HERE = Path(__file__).parent
TOTAL: Final = 250
"""Optimizer steps of every arm, 32 rows each."""
LAST: Final = 90
"""The last of them: through the grid where an arm says no other number, and in full precision for the control."""
ROWS: Final = {"train": 12_000, "valid": 1_000, "test_combinations": 1_000}
GRIDS: Final = ("int4-g32", "int3-g32", "int3", "int2-g32", "int2")
POST_TRAINING: Final = ("rtn", "gptq", "blockwise")

Settings = Mapping[str, Any]


def write_rows(folder: Path) -> None:
    """train.jsonl, dev.jsonl (known wordings, new requests) and test.jsonl (new combinations), once."""
    if (folder / "test.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = task.generate(rows=ROWS | {"test_phrasings": 1, "test_strings": 1})
    for split, name in {"train": "train", "valid": "dev", "test_combinations": "test"}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows[split])
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Study:
    """Where the study works, and what it knows already.

    Attributes:
        work: Models and rows; may be deleted, and is made again.
        store: One line for each score.
        torchao: The interpreter of torchao's environment; None leaves its arms out.
    """

    work: Path
    store: Store
    torchao: Path | None

    @property
    def rows(self) -> Path:
        return self.work / "rows"

    def score(self, seed: int, grid: str, arm: str, settings: Settings, split: str) -> Cell:
        """The cell of one arm, measured if it is not there."""
        wanted = {"seed": seed, "grid": grid, "arm": arm, "settings": dict(settings), "split": split}
        return self.store.once(wanted, lambda: self._measure(seed, grid, arm, settings, split))

    def _measure(self, seed: int, grid: str, arm: str, settings: Settings, split: str) -> Cell:
        scratch = self.work / f"seed-{seed}" / "arm"
        shutil.rmtree(scratch, ignore_errors=True)
        control = None if arm.startswith(("qat", "torchao")) else self.control(seed)
        first = self.first(seed, TOTAL - settings.get("steps", LAST)) if control is None else None
        with cpu_seconds() as taken:
            if arm.startswith("torchao"):
                found = self._torchao(seed, grid, first, settings, split, scratch)
            else:
                if arm == "full":
                    made = control
                elif arm in POST_TRAINING:
                    made = self._rounded(arm, grid, control, settings, scratch)
                else:
                    made = self._trained(seed, grid, first, settings, scratch)
                seconds = taken()
                found = {"cpu_seconds": seconds} | self._judge(made, split)
        shutil.rmtree(scratch, ignore_errors=True)
        return found

    # --- models that arms share -------------------------------------------------------------------------------------

    def first(self, seed: int, steps: int) -> Path:
        """The bundled model after its first steps."""
        return self._tune(self.work / f"seed-{seed}" / f"first-{steps}", model_path(), seed, steps, 1e-3, "full")

    def control(self, seed: int) -> Path:
        """After all steps, in full precision."""
        start = self.first(seed, TOTAL - LAST)
        return self._tune(self.work / f"seed-{seed}" / "control", start, seed, LAST, 5e-4, "full")

    def _tune(
        self, folder: Path, model: Path, seed: int, steps: int, rate: float, method: str, **settings: Any
    ) -> Path:
        if (folder / "run.json").exists() and json.loads((folder / "run.json").read_text())["finished"]:
            return folder / "last"
        shutil.rmtree(folder, ignore_errors=True)
        taken = common_settings(seed, steps, rate) | settings
        return strop.tune(model, self.rows / "train.jsonl", method=method, output=folder, **taken).last_path

    # --- arms -------------------------------------------------------------------------------------------------------

    def _rounded(self, arm: str, grid: str, model: Path | None, settings: Settings, output: Path) -> Path:
        rows = {} if arm == "rtn" else {"data": self.rows / "train.jsonl"}
        strop.quantize(model, grid, output=output, method=arm, **rows, **settings)
        return output

    def _trained(self, seed: int, grid: str, model: Path | None, settings: Settings, output: Path) -> Path:
        assert model is not None
        chosen = dict(settings)
        steps, rate = chosen.pop("steps", LAST), chosen.pop("learning_rate")
        if "start" in chosen:  # a method of quantization, whose result of the same weights training begins with
            begin = output.with_name("start")
            shutil.rmtree(begin, ignore_errors=True)
            self._rounded(chosen["start"], grid, model, {"scale_steps": 100, "max_rows": 512}, begin)
            chosen["start"] = str(begin)
        return self._tune(output, model, seed, steps, rate, "qat", format=grid, **chosen)

    def _torchao(self, seed: int, grid: str, model: Path | None, settings: Settings, split: str, output: Path) -> Cell:
        if self.torchao is None:
            raise SystemExit("torchao's arms need --torchao PYTHON, the interpreter that setup.sh made")
        output.mkdir(parents=True)
        steps = settings.get("steps", LAST)
        job = {
            "model": str(model),
            "train": str(self.rows / "train.jsonl"),
            "test": str(self.rows / f"{split}.jsonl"),
            "grid": grid,
            "activations": settings.get("activations"),
            "range_learning": settings.get("range_learning", False),
            "tune": common_settings(seed, steps, settings["learning_rate"]),
            "run": str(output / "run"),
            "output": str(output / "found.json"),
        }
        (output / "job.json").write_text(json.dumps(job))
        run_peer(self.torchao, "torchao_qat.py", output / "job.json")
        return json.loads((output / "found.json").read_text())

    def _judge(self, model: Path | None, split: str) -> Cell:
        assert model is not None
        opened = load(model, dtype="float32")
        samples = prepare(
            read_records(self.rows / f"{split}.jsonl"), opened.require_tokenizer(), max_length=256
        ).samples
        return judged(exact_match(opened.model, samples, batch_size=64).tolist())


def common_settings(seed: int, steps: int, rate: float) -> dict[str, Any]:
    """What every training shares, as `tune` takes it."""
    return {
        "max_steps": steps,
        "learning_rate": rate,
        "batch_size": 32,
        "max_length": 256,
        "valid_fraction": 0.0,
        "seed": seed,
    }


def judged(right: list[bool]) -> Cell:
    """The part of a cell that the scorer finds."""
    return {"rows": len(right), "score": sum(right) / len(right), "right": to_hex(right)}


def run_peer(python: Path, script: str, *arguments: Path | str) -> None:
    """Run a peer's script in its own environment, with strop's sources beside it."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1] / "src"), "PYTHONWARNINGS": "ignore"}
    subprocess.run([python, HERE / "peers" / script, *arguments], env=environment, check=True)

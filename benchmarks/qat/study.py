"""The study of scores: rows, the models that share their training, and what each arm makes of a grid.

    first    every weight, TOTAL - k steps at the demo's rate
    control  the same weights, k steps more                          full, rtn, gptq, blockwise: made of the control
    qat      the same k steps, the same rows in the same order, through the grid          (torchao: by its own layers)

Every arm of a grid has so seen the same rows, in the same order, for the same number of steps; an arm whose teacher is
"control" learns from the model that saw them too, and costs that training more. All are scored by
teacher-forced exact match in float32 on rows that trained nothing: `dev` chose the settings (seed 100), `test` judges.
"""

from __future__ import annotations

import json
import shutil
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

TOTAL: Final = 160
"""Optimizer steps of every arm, 32 rows each."""
LAST: Final = 120
"""The last of them: through the grid where an arm says no other number, and in full precision for the control."""
CONTROL_RATE: Final = 1e-3
"""The control's peak rate in its last steps, chosen on the development rows like every arm's."""
ROWS: Final = {"train": 12_000, "valid": 1_000, "test_combinations": 1_000}
GRIDS: Final = ("int3", "int2-g32", "int2", "int4-g32", "int3-g32")
POST_TRAINING: Final = ("rtn", "gptq", "blockwise")
START: Final = {"max_rows": 256}

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
    """

    work: Path
    store: Store

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
        scratch.mkdir(parents=True)
        trains = arm.startswith(("qat", "torchao"))
        begin = self.first(seed, TOTAL - settings.get("steps", LAST)) if trains else None
        begin = begin or self.control(
            seed, settings.get("learning_rate", CONTROL_RATE) if arm == "full" else CONTROL_RATE
        )
        if settings.get("teacher") == "control":
            self.control(seed)  # shared with other arms, and so outside this arm's time
        known: Cell = {}
        with cpu_seconds() as taken:
            if arm.startswith("torchao"):
                model, known = self._torchao(seed, grid, begin, settings, scratch / "run")
            else:
                made = begin
                if arm in POST_TRAINING:
                    made = self._rounded(arm, grid, begin, settings, scratch / "rounded")
                elif trains:
                    made = self._trained(seed, grid, begin, settings, scratch)
                model = load(made, dtype="float32").model
            seconds = taken()
        found = known | {"cpu_seconds": seconds} | self._judge(model, split)
        shutil.rmtree(scratch)
        return found

    # --- models that arms share -------------------------------------------------------------------------------------

    def first(self, seed: int, steps: int) -> Path:
        """The bundled model after its first steps."""
        return self._tune(self.work / f"seed-{seed}" / f"first-{steps}", model_path(), seed, steps, 1e-3, "full")

    def control(self, seed: int, rate: float = CONTROL_RATE) -> Path:
        """After all steps, in full precision."""
        start = self.first(seed, TOTAL - LAST)
        return self._tune(self.work / f"seed-{seed}" / f"control-{rate:g}", start, seed, LAST, rate, "full")

    def _tune(
        self, folder: Path, model: Path, seed: int, steps: int, rate: float, method: str, **settings: Any
    ) -> Path:
        if (folder / "run.json").exists() and json.loads((folder / "run.json").read_text())["finished"]:
            return folder / "last"
        shutil.rmtree(folder, ignore_errors=True)
        shared = self._shared(model, seed, steps, rate) | {"method": method, "output": folder}
        return strop.tune(**shared, **settings).last_path

    def _shared(self, model: Path, seed: int, steps: int, rate: float) -> dict[str, Any]:
        """What every training shares, as `tune` takes it."""
        return {
            "model": str(model),
            "data": str(self.rows / "train.jsonl"),
            "max_steps": steps,
            "learning_rate": rate,
            "batch_size": 32,
            "max_length": 256,
            "valid_fraction": 0.0,
            "seed": seed,
        }

    # --- arms -------------------------------------------------------------------------------------------------------

    def _rounded(self, arm: str, grid: str, model: Path, settings: Settings, output: Path) -> Path:
        rows = {} if arm == "rtn" else {"data": self.rows / "train.jsonl"}
        strop.quantize(model, grid, output=output, method=arm, **rows, **settings)
        return output

    def _trained(self, seed: int, grid: str, model: Path, settings: Settings, scratch: Path) -> Path:
        chosen = dict(settings)
        steps, rate = chosen.pop("steps", LAST), chosen.pop("learning_rate")
        if "start" in chosen:  # a method of quantization, whose result of the same weights training begins with
            begin = self._rounded(chosen["start"], grid, model, START, scratch / "start")
            chosen["start"] = str(begin)
        if chosen.get("teacher") == "control":
            chosen["teacher"] = str(self.control(seed))
        return self._tune(scratch / "run", model, seed, steps, rate, "qat", format=grid, **chosen)

    def _torchao(self, seed: int, grid: str, model: Path, settings: Settings, run: Path) -> tuple[Any, Cell]:
        from torchao_qat import tuned_by_torchao  # only its own environment has it

        shared = self._shared(model, seed, settings.get("steps", LAST), settings["learning_rate"])
        return tuned_by_torchao(
            grid,
            shared,
            run,
            activations=settings.get("activations"),
            range_learning=settings.get("range_learning", False),
        )

    def _judge(self, model: Any, split: str) -> Cell:
        tokenizer = load(model_path()).require_tokenizer()
        rows = prepare(read_records(self.rows / f"{split}.jsonl"), tokenizer, max_length=256)
        right = exact_match(model, rows.samples, batch_size=64).tolist()
        return {"rows": len(right), "score": sum(right) / len(right), "right": to_hex(right)}

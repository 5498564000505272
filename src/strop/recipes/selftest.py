"""`selftest`: training killed at random moments, resumed each time, and compared bit for bit with a run left alone.

A small run of the bundled model is made once in peace. Then the same run is started in a process of its own, which is
ended by SIGKILL (where there is none, by the system's own hard end) after a random time, and started again with
`resume`, until it is done; when it is done before the kills are spent, another one begins. Every finished run must hold
the same bytes of weights and the same losses, step by step, as the one left alone.

The child processes come from a server that has imported everything already, so that most kills fall into the run and
not into its start.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

from strop.errors import TrainingError
from strop.files.folders import sha256_files
from strop.progress import SILENT, Reporter
from strop.training.metrics import NAME as METRICS_NAME
from strop.training.metrics import read_metrics

STEPS: Final = 12
"""Steps of each run; a checkpoint follows each of them."""

ROWS: Final = 48

LONGEST_SECONDS: Final = 600.0
"""A run that is left alone for so long hangs."""


@dataclass(frozen=True)
class SelftestResult:
    """What the kills came to.

    Attributes:
        method: what was trained.
        kills: processes ended.
        kills_by_step: steps that were complete when a kill came, with the number of kills.
        runs: runs that were finished in spite of them.
        identical: runs whose weights and losses are, bit for bit, those of the run left alone.
        seconds: all in all.
    """

    method: str
    kills: int
    kills_by_step: dict[int, int]
    runs: int
    identical: int
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every run survived unchanged."""
        return self.runs > 0 and self.identical == self.runs

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"passed": self.passed}

    def lines(self) -> list[str]:
        """The result in sentences."""
        spread = ", ".join(f"{step}: {count}" for step, count in sorted(self.kills_by_step.items()))
        return [
            f"{self.kills:,} kills in {self.seconds:.0f} s, by the steps that were complete: {spread}",
            f"{self.runs} runs of {STEPS} steps ({self.method}) were finished in spite of them",
            f"bit-equal to the run left alone: {'yes' if self.passed else 'NO'} ({self.identical} of {self.runs})",
        ]


def selftest(
    *, kills: int = 50, method: str = "lora", model: str = "demo", seed: int = 0, reporter: Reporter = SILENT
) -> SelftestResult:
    """Kill and resume a small training run, and compare what it ends in with the same run left alone.

    Args:
        kills: how many processes are ended.
        method: what is trained: full, lora, qlora or qat (at int3-g32).
        model: the base; a folder, or the bundled model.
        seed: of the moments at which they are ended.
        reporter: told of every kill.

    Raises:
        TrainingError: a run fails or hangs by itself, so that nothing can be compared.
    """
    began, draw = time.monotonic(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="strop-selftest-") as temporary:
        folder = Path(temporary)
        settings = _settings(folder, method, model)
        reporter.note("the run that is left alone")
        warm = _process(_nothing)  # from here on, a process starts with everything imported
        warm.join()
        start = time.monotonic()
        alone = folder / "alone"
        _finish(_started(settings, alone), alone)
        whole_seconds = time.monotonic() - start
        wanted = _outcome(alone)
        by_step: dict[int, int] = {}
        done = runs = identical = 0
        reporter.start("kills", kills, "kills")
        try:
            while done < kills or runs == 0:
                run_dir = folder / f"run-{runs}"
                while done < kills:
                    process = _started(settings, run_dir)
                    process.join(draw.uniform(0.0, whole_seconds))
                    if process.exitcode is not None:
                        break
                    process.kill()
                    process.join()
                    step = _steps_done(run_dir)
                    by_step[step] = by_step.get(step, 0) + 1
                    done += 1
                    reporter.advance(done, step=step, runs=runs)
                _finish(_started(settings, run_dir), run_dir)
                runs += 1
                identical += _outcome(run_dir) == wanted
                reporter.advance(done, runs=runs)
        finally:
            reporter.finish()
    return SelftestResult(method, done, by_step, runs, identical, time.monotonic() - began)


def _settings(folder: Path, method: str, model: str) -> dict[str, Any]:
    from strop.demo import task

    task.write(
        folder / "data", rows={"train": ROWS, "valid": 8} | dict.fromkeys(set(task.ROWS) - {"train", "valid"}, 1)
    )
    rows = folder / "rows"
    rows.mkdir()
    for name in ("train.jsonl", "valid.jsonl"):
        (folder / "data" / name).rename(rows / name)
    shape = {"format": "int3-g32"} if method == "qat" else {}
    length = {"max_steps": STEPS, "save_steps": 1, "eval_steps": STEPS // 3}
    return {"model": model, "data": str(rows), "method": method, "batch_size": 4, **shape, **length}


def _started(settings: Mapping[str, Any], run_dir: Path) -> BaseProcess:
    """A process that goes on with the run, or begins it."""
    return _process(_train, dict(settings), str(run_dir))


def _process(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        context.set_forkserver_preload(["strop.recipes.tune"])
    process = context.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def _nothing() -> None:
    pass


def _train(settings: dict[str, Any], run_dir: str) -> None:
    from strop.recipes.tune import tune

    resume = (Path(run_dir) / "config.yaml").is_file()
    tune(settings.pop("model"), settings.pop("data"), output=run_dir, resume=resume or None, **settings)


def _finish(process: BaseProcess, run_dir: Path) -> None:
    process.join(LONGEST_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TrainingError(f"{run_dir}: not finished after {LONGEST_SECONDS:.0f} s and left alone; it hangs")
    if process.exitcode != 0:
        raise TrainingError(
            f"{run_dir}: the run ended with exit code {process.exitcode} although nobody killed it; its message stands "
            "above"
        )


def _steps_done(run_dir: Path) -> int:
    rows = read_metrics(run_dir / METRICS_NAME)
    return rows[-1]["step"] if rows else 0


def _outcome(run_dir: Path) -> dict[str, Any]:
    """What must not depend on kills: the bytes of the weights, the losses of every step, the account's figures."""
    weights = {
        f"{part}/{path.name}": path for part in ("best", "last") for path in (run_dir / part).glob("*.safetensors")
    }
    measured = ("step", "loss", "valid_loss", "learning_rate", "gradient_norm", "tokens", "supervised_tokens")
    rows = [{name: row.get(name) for name in measured} for row in read_metrics(run_dir / METRICS_NAME)]
    result = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["result"]
    return {
        "weights": sha256_files(weights),
        "metrics": rows,
        "result": {name: value for name, value in result.items() if not name.endswith("seconds")},
    }

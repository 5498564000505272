"""`tune`: fine-tune a model, by every weight, by an adapter, over a quantized base, or through the quantizer.

    RUN/config.yaml      the resolved settings          RUN/best, RUN/last  adapter or model
    RUN/metrics.jsonl    one line a step                RUN/checkpoints     states to go on from
    RUN/run.json         what was trained on what, and what came of it
    RUN/manifest.json    hashes of all that went in and came out (`verify`)
    RUN/cache            the rendered rows, until the run is finished
    RUN/teacher          a teacher's top logits, as long
    RUN/rank.json, .png  how `rank: auto` chose (`rank.py`)

The steps: settings checked, model opened, data rendered and counted, layers put in place, the loop, the account. What
fails before the loop leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from strop.config import LowRank, Rounded, TuneConfig, load_config, to_yaml
from strop.errors import ConfigError, MissingInputError, UsageError
from strop.files.folders import MANIFEST, read_json, write_json
from strop.memory import PeakMemory, steady_allocation
from strop.progress import SILENT, Reporter
from strop.recipes import rank as rank_recipe
from strop.recipes.doctor import check_start
from strop.recipes.export_trained import gguf_exporter, only_gguf_holds
from strop.recipes.manifest import finish_manifest, run_manifest, save_manifest
from strop.recipes.rank import RankChoice, choose_rank
from strop.recipes.session import MAY_DIFFER, Session, open_session
from strop.training.checkpoints import RunLock, differences
from strop.training.loop import train
from strop.training.metrics import NAME as METRICS_NAME
from strop.training.metrics import read_metrics
from strop.training.recompute import blocks_to_recompute

CACHE: Final = "cache"
TEACHER: Final = "teacher"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder.
        report: what stands in run.json: method, base, data, parameters, steps, losses, versions.
    """

    path: Path
    report: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Open a run's folder.

        Raises:
            MissingInputError: there is no run.json.
        """
        folder = Path(path)
        return cls(folder, read_json(folder / "run.json"))

    @property
    def best_path(self) -> Path:
        """The adapter or model with the lowest loss on the validation rows; the last one where there were none."""
        best = self.path / "best"
        return best if best.is_dir() else self.last_path

    @property
    def last_path(self) -> Path:
        """The adapter or model after the last step."""
        return self.path / "last"

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """One mapping a step, as in metrics.jsonl."""
        return read_metrics(self.path / METRICS_NAME)

    @property
    def config(self) -> TuneConfig:
        """The resolved settings."""
        return load_config(self.path / "config.yaml")

    def merge(self, output: str | os.PathLike[str], **options: Any) -> Any:
        """Make one model of the adapter and its base; see `strop.merge`."""
        from strop.recipes.merge import merge

        return merge(str(self.best_path), output, **options)

    def export(self, output: str | os.PathLike[str], *, format: str | None = None, **options: Any) -> Any:
        """Write the run as a GGUF file, by default on the grid that it was trained for; see `strop.export`.

        Raises:
            UsageError: no format is given, and the run was not trained for one of GGUF's.
        """
        from strop.recipes.export import export

        method = self.config.method
        chosen = format or (
            method.format if isinstance(method, Rounded) and method.format.startswith("gguf:") else None
        )
        if chosen is None:
            raise UsageError(f"{self.path}: was trained for no GGUF format; say which to write: format='gguf:q8_0'")
        return export(self.path, output, format=chosen, **options)

    def prove(self, data: Any, **options: Any) -> Any:
        """Prove that the run keeps a task within a drop; see `strop.prove`."""
        from strop.recipes.prove import prove

        return prove(self.path, data, **options)

    def verify(self) -> Any:
        """Check the run's hashes again; see `strop.verify`."""
        from strop.recipes.verify import verify

        return verify(self.path)

    def to_dict(self) -> dict[str, Any]:
        """Path and report as JSON values."""
        return {"path": str(self.path), "best_path": str(self.best_path), **self.report}

    def lines(self) -> list[str]:
        """The run in a few sentences."""
        result, parameters = self.report["result"], self.report["parameters"]
        lines = [
            f"{self.report['method']}: {result['steps']:,} steps, {result['tokens']:,} tokens in "
            f"{result['train_seconds']:.1f} s; {parameters['trained']:,} parameters trained ({parameters['share']:.2%})"
        ]
        if result["best_valid_loss"] is not None:
            lines.append(
                f"validation loss {result['best_valid_loss']:.4f} at step {result['best_step']:,} (the best), "
                f"{result['valid_loss']:.4f} at the last"
            )
        if self.metrics and "valid_divergence" in self.metrics[-1]:
            last, share = self.metrics[-1], self.config.distillation.distill or 0.0
            lines.append(
                f"that loss is {1 - share:.0%} of the labels' and {share:.0%} of the divergence from the teacher; at "
                f"the last the labels' is {last['valid_label_loss']:.4f}, the divergence {last['valid_divergence']:.4f}"
            )
        lines.append(f"the model: {self.best_path}")
        return lines


def tune(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | Sequence[Any],
    *,
    method: str = "lora",
    format: str | None = None,
    output: str | os.PathLike[str] | None = None,
    reporter: Reporter = SILENT,
    **settings: Any,
) -> Run:
    """Fine-tune a model.

    Args:
        model: a folder, a hub id; an adapter or run folder to train that adapter further.
        data: a file, a folder of train, valid and test, or a hub id; or a list of them and of {path, weight}.
        method: full, lora, qlora or qat.
        format: the grid of the weights; qat needs it, qlora takes nf4-dq without it.
        output: the run's folder; runs/MODEL-METHOD by default, numbered.
        reporter: told of findings and progress.
        **settings: any other setting of `strop.config.TuneConfig`, flat and under any of its names.

    Raises:
        ConfigError: settings that are unknown, of a wrong type or contradict each other, all at once.
        MissingInputError, DataError, ModelError, FormatError, TargetError, TrainingError: as the steps raise them.
    """
    given = {"model": model, "data": data, "method": method, "format": format, "output": output}
    both = sorted(given.keys() & settings.keys())
    if both:
        raise ConfigError(f"{', '.join(both)}: given twice")
    return tune_from_config(TuneConfig.from_flat(given | settings, origin="arguments"), reporter=reporter)


def tune_from_config(config: TuneConfig, *, reporter: Reporter = SILENT) -> Run:
    """Fine-tune as `config` says; see `tune`."""
    run_dir = Path(config.output) if config.output is not None else _free_folder(config)
    config = config.replace(output=str(run_dir), resume=config.resume or None)
    if config.resume:
        config, done = _resumed(config, run_dir)
        if done is not None:
            if (run_dir / MANIFEST).is_file():  # killed between its last two files
                finish_manifest(run_dir, measured_bytes=done.report["peak_bytes"])
            reporter.note(f"{run_dir}: the run is finished; nothing is left to resume")
            return done
    else:
        _check_free(run_dir)
    with PeakMemory() as memory:
        with _leaving_nothing(run_dir):
            choice = None
            if isinstance(config.method, LowRank) and config.method.rank == "auto":
                choice = _raced(config, run_dir, reporter)
                config = config.replace(rank=choice.rank)
            session = open_session(config, reporter=reporter, cache=run_dir / CACHE, teacher_cache=run_dir / TEACHER)
            checks = check_start(session, run_dir, reporter=reporter)
        return _run(session, checks, run_dir, memory, reporter, choice)


# --- the run's folder -------------------------------------------------------------------------------------------------


def _free_folder(config: TuneConfig) -> Path:
    if config.resume:
        raise ConfigError("output: name the run's folder that is to be resumed (-o RUN)")
    stem = Path(config.model).name.lower() or "model"
    for number in range(1, 10_000):
        path = Path("runs") / (f"{stem}-{config.method.name}" + (f"-{number}" if number > 1 else ""))
        if not path.exists():
            return path
    raise UsageError("runs/: no free name; choose an output")


def _check_free(run_dir: Path) -> None:
    """Refuse to write over anything but the remains of a run that never got anywhere."""
    if run_dir.is_symlink() and not run_dir.exists():
        raise UsageError(f"{run_dir}: is a link to nothing; choose another output")
    if run_dir.exists() and not run_dir.is_dir():
        raise UsageError(f"{run_dir}: is a file, and a run is a folder; choose another output")
    if not run_dir.is_dir() or {path.name for path in run_dir.iterdir()} <= {CACHE, TEACHER}:
        return
    kept = [name for name in ("best", "last", "checkpoints") if (run_dir / name).exists()]
    if kept or not (run_dir / "run.json").is_file():
        raise UsageError(
            f"{run_dir}: already holds {', '.join(kept) or 'files that are no run'}; choose another output, or add "
            "--resume to go on with the run that is there"
        )


def _resumed(config: TuneConfig, run_dir: Path) -> tuple[TuneConfig, Run | None]:
    """The settings that the run in the folder began with, and the run itself where it is finished.

    Raises:
        MissingInputError: there is no run.
        ConfigError: a setting differs; all of them are listed.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise MissingInputError(f"{file}: there is no run to resume; leave --resume out, or check the output")
    saved, asked = load_config(file).flat(), config.flat()
    if asked.get("rank") == "auto" and (run_dir / rank_recipe.FILE).is_file():  # it was chosen when the run began
        asked = {"alpha": saved.get("alpha")} | asked | {"rank": saved.get("rank")}
    if asked.get("teacher_logits") == "auto":  # what it came to depends on the disk
        asked |= {"teacher_logits": saved.get("teacher_logits")}
    wrong = differences(
        {key: saved.get(key) for key in asked if key not in MAY_DIFFER},
        {key: value for key, value in asked.items() if key not in MAY_DIFFER},
    )
    if wrong:
        raise ConfigError(
            f"{run_dir}: the run cannot go on exactly with other settings:\n  "
            + "\n  ".join(wrong)
            + "\nLeave them as "
            f"they were (strop tune {file} --resume), or start a new run elsewhere."
        )
    saved |= {key: asked[key] for key in MAY_DIFFER if key in asked}
    report = read_json(run_dir / "run.json") if (run_dir / "run.json").is_file() else {}
    return TuneConfig.from_flat(saved), Run(run_dir, report) if report.get("finished") is True else None


# --- the run ----------------------------------------------------------------------------------------------------------


def _raced(config: TuneConfig, run_dir: Path, reporter: Reporter) -> RankChoice:
    """The rank that the race chooses; what a run of any rank is refused for is refused before it."""

    def check(session: Session) -> None:
        check_start(session, run_dir)

    choice = choose_rank(config, cache=run_dir / CACHE, check=check, reporter=reporter)
    for line in choice.lines():
        reporter.note(line)
    return choice


@contextmanager
def _leaving_nothing(run_dir: Path) -> Iterator[None]:
    """Rows that were rendered for a run that is refused are not left behind; what a teacher said of them may be."""
    there = run_dir.exists()
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt) and (run_dir / TEACHER).is_dir()
        if not there and not stopped:  # the same command again goes on where the teacher was stopped
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


def _run(
    session: Session,
    checks: list[dict[str, Any]],
    run_dir: Path,
    memory: PeakMemory,
    reporter: Reporter,
    choice: RankChoice | None,
) -> Run:
    """Train what the session holds, with its account beside it from the first moment on."""
    config, valid_set = session.config, session.valid_set
    report = session.report() | {"checks": checks}
    run_dir.mkdir(parents=True, exist_ok=True)
    with RunLock(run_dir):
        _replace_text(run_dir / "config.yaml", to_yaml(config.replace(resume=None)))
        _write_report(run_dir, report)
        if choice is not None:
            choice.write(run_dir)
        elif not config.resume:  # what a run left that never got anywhere
            for name in (rank_recipe.FILE, rank_recipe.PICTURE):
                (run_dir / name).unlink(missing_ok=True)
        settings = session.train_settings()
        if settings.checkpointing == "auto":
            with steady_allocation():
                blocks = blocks_to_recompute(
                    session.model, session.stream, settings, memory, reporter, session.objective
                )
            settings = replace(settings, checkpointing=blocks)
        tried = next((check["figures"]["shapes"] for check in checks if check["name"] == "accumulation"), 0)
        save_manifest(run_dir, run_manifest(session, run_dir, settings, tried=tried))
        result = train(
            session.model,
            session.stream,
            valid_set.samples if valid_set is not None else [],
            settings,
            run_dir,
            export=_exporter(session),
            objective=session.objective,
            resume=config.resume,
            memory=memory,
            reporter=reporter,
        )
        peak_bytes = memory.peak_bytes
        report |= {"finished": True, "result": asdict(result), "peak_bytes": peak_bytes}
        _write_report(run_dir, report)
        for name in (CACHE, TEACHER):  # nothing is left to resume
            shutil.rmtree(run_dir / name, ignore_errors=True)
        finish_manifest(run_dir, measured_bytes=peak_bytes)
    return Run(run_dir, report)


def _exporter(session: Session) -> Callable[[Path], None]:
    """Writes the model as it stands, in the form that the method ends in."""
    base, method = session.base, session.config.method
    if isinstance(method, Rounded) and only_gguf_holds(method):
        return gguf_exporter(base.model, method, source=session.config.model, base=base.record, dtype=base.stored_dtype)
    return base.exporter(method)


def _write_report(run_dir: Path, report: Mapping[str, Any]) -> None:
    part = run_dir / ".run.json.part"
    write_json(part, dict(report))
    os.replace(part, run_dir / "run.json")


def _replace_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)

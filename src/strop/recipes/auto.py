"""`tune --method auto`: the cheapest way to a quantized model that keeps its task, measured.

    OUT/config.yaml        the resolved settings           OUT/<number>-<way>/   a quantized folder, or a run
    OUT/auto.json          what each way cost and lost     OUT/best/             the model that was taken
    OUT/gate.jsonl         the rows that it was gated by   OUT/calibration.jsonl the training rows that calibrated
    OUT/manifest.json      hashes (`verify`)

Rounding comes first, then training, the cheapest way first (`auto_ways.py`), until the drop on the gating rows is at
most the one allowed (`auto_gate.py`). Where no way passes, the best so far is kept and the account says so. Finished
ways are not done again when a killed choice is resumed; an unfinished one goes on where it stood.

`OUT/best` shares its files with the way's own folder where the file system can (hard links), and is a copy elsewhere.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from strop.config import AutoConfig, load_auto, to_yaml
from strop.errors import ConfigError, DataError, DiskFullError, MissingInputError, StropError, TrainingError, UsageError
from strop.files.folders import MANIFEST, atomic_folder, clear_leftovers, read_json, sha256_file, write_json
from strop.files.peft_adapter import base_digest
from strop.files.receipts import RECEIPT
from strop.memory import PeakMemory, release_unused_memory
from strop.models.sources import find_folder
from strop.progress import SILENT, Reporter
from strop.recipes.auto_gate import Gate, GateRows, drop_words, write_rows
from strop.recipes.auto_result import AutoRun
from strop.recipes.auto_ways import Way, plan_ways, refuse_unknown_format, scheme_to_end_on
from strop.recipes.manifest import FORMAT, files_below, save_manifest
from strop.recipes.provenance import AUTO
from strop.recipes.quantize import quantize, require_fit
from strop.recipes.session import MAY_DIFFER
from strop.recipes.tune import free_folder, tune_from_config
from strop.scratch import Scratch
from strop.training.checkpoints import RunLock, differences

GATE: Final = "gate.jsonl"
CALIBRATION: Final = "calibration.jsonl"
BEST: Final = "best"


def tune_auto(config: AutoConfig, *, reporter: Reporter = SILENT) -> AutoRun:
    """Quantize, and train only where the gate asks for it, as `config` says.

    Raises:
        UsageError: the model is an adapter or quantized, something stands at the output.
        FormatError: no model's folder can hold the format, or a layer does not fit it.
        DataError: there are too few rows to choose by, or the model answers none of them.
        MissingInputError, ConfigError, ModelError, TrainingError: as the steps raise them.
    """
    refuse_unknown_format(config)
    out = Path(config.output) if config.output is not None else free_folder(config.model, config.method.name)
    if config.resume:
        _check_same(config, out)
    elif out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= {".lock"}):
        raise UsageError(
            f"{out}: already holds files; choose another output, or add --resume to go on with the choice that is there"
        )
    source = find_folder(config.model)
    ways = plan_ways(config, require_fit(source, scheme_to_end_on(config)))
    rows = GateRows(config)
    out.mkdir(parents=True, exist_ok=True)
    with RunLock(out):
        try:
            return _Choice(config, out, source, rows, reporter).go(ways)
        except KeyboardInterrupt:
            reporter.note(f"strop tune {out / 'config.yaml'} -o {out} --resume goes on at the unfinished way")
            raise


class _Choice:
    """One call of `tune_auto`."""

    def __init__(self, config: AutoConfig, out: Path, source: Path, rows: GateRows, reporter: Reporter) -> None:
        self.config, self.out, self.source, self.rows, self.reporter = config, out, source, rows, reporter
        self.task = rows.task
        self.report: dict[str, Any] = read_json(out / AUTO) if config.resume and (out / AUTO).is_file() else {}

    def go(self, ways: list[Way]) -> AutoRun:
        self._begin(ways)
        if self.report["finished"]:
            self.reporter.note(f"{self.out}: the choice is finished; nothing is left to resume")
            return AutoRun(self.out, self.report)
        clear_leftovers(self.out)
        for note in self.rows.notes:
            self.reporter.note(note)
        with Scratch() as scratch:
            gate = Gate(self.config, self.rows, scratch)
            try:
                reference = gate.reference(self.config.model)
            except StropError:
                self._leave_nothing()
                raise
            self.report["reference"] = reference
            self._save()
            self.reporter.note(f"gate: {self._gate_words(reference)}")
            for way, entry in zip(ways, self.report["ways"], strict=True):
                if entry["passed_over"]:
                    self.reporter.note(way.line())
                    continue
                if entry["drop"] is None and entry["failed"] is None:
                    self._take(way, entry, gate)
                if entry["met"]:
                    break
        return self._end()

    def _leave_nothing(self) -> None:
        """Take back what the account began with, where no way was taken yet."""
        if all(entry["model"] is None for entry in self.report["ways"]):
            for name in (AUTO, GATE, CALIBRATION, "config.yaml"):
                (self.out / name).unlink(missing_ok=True)

    # --- one way ------------------------------------------------------------------------------------------------------

    def _take(self, way: Way, entry: dict[str, Any], gate: Gate) -> None:
        """Carry a way out and measure what it made."""
        self.reporter.note(way.line())
        before = self._best()
        if entry["model"] is None:
            self._make(way, entry)
        if entry["failed"] is not None:
            return
        release_unused_memory()
        entry |= gate.measure(way.folder, self.out / str(entry["model"]))
        drop = entry["drop"]["estimate"]
        entry["gained"] = None if before is None else before["drop"]["estimate"] - drop
        entry["met"] = drop <= self.config.method.max_drop
        self._save()
        self.reporter.note(
            f"{way.folder}: {drop_words(entry['drop'], self.task)} lost: the gate is "
            f"{'passed' if entry['met'] else 'not passed'}"
        )

    def _make(self, way: Way, entry: dict[str, Any]) -> None:
        """Carry a way out; what it took is kept where it ends early too."""
        begun = time.monotonic()
        release_unused_memory()
        memory = PeakMemory()
        try:
            with memory:
                entry["model"] = self._run(way) if way.trains else self._quantize(way)
        except DiskFullError:
            raise
        except (TrainingError, DataError) as error:  # of this way's own: too few rows to calibrate, a loss that is NaN
            entry["failed"] = str(error)
            self.reporter.note(f"{way.folder}: failed: {error}")
        finally:
            entry["seconds"] = (entry["seconds"] or 0.0) + time.monotonic() - begun
            entry["peak_bytes"] = max(entry["peak_bytes"] or 0, memory.peak_bytes)
            self._save()

    def _quantize(self, way: Way) -> str:
        """Round the model; what a killed call made of the blocks is taken up by `quantize` itself."""
        folder = self.out / way.folder
        if not (folder / RECEIPT).is_file():  # it stands whole or not at all
            scheme = scheme_to_end_on(self.config)
            needs_rows = way.method != "search" or scheme.activations is not None
            quantize(
                self.config.model,
                scheme.name,
                output=folder,
                method=way.method,
                data=str(self.out / CALIBRATION) if needs_rows else None,
                chat_template=self.config.samples.chat_template,
                seed=self.config.seed,
                reporter=self.reporter,
                **way.settings,
            )
        return way.folder

    def _run(self, way: Way) -> str:
        folder = self.out / way.folder
        begun = (folder / "config.yaml").is_file()
        if folder.is_dir() and not begun:
            shutil.rmtree(folder)  # killed before it had written a line
        start = self._best(rounded=True)
        run = tune_from_config(
            way.run(
                self.config,
                output=str(folder),
                start=None if start is None else str(self.out / start["model"]),
                resume=begun,
            ),
            reporter=self.reporter,
        )
        return f"{way.folder}/{run.best_path.name}"

    def _best(self, *, rounded: bool = False) -> dict[str, Any] | None:
        """The way so far that loses least, of equals the nearest to full precision."""
        measured = [
            entry for entry in self.report["ways"] if entry["drop"] is not None and not (rounded and entry["trains"])
        ]
        return min(measured, key=lambda entry: (entry["drop"]["estimate"], _kl(entry)), default=None)

    # --- the account --------------------------------------------------------------------------------------------------

    def _begin(self, ways: list[Way]) -> None:
        """Write what the choice begins with, or find that it is the same.

        Raises:
            UsageError: the rows or the model are no longer those that the choice began with.
        """
        digests, digest = self.rows.digests(), base_digest(self.source)
        if self.report:
            changed = [
                words
                for words, before, now in (
                    ("its validation rows", self.report["gate"]["row_digests"], digests),
                    ("the model's weights", self.report["model_sha256"], digest),
                )
                if before != now
            ]
            if changed:
                raise UsageError(
                    f"{self.out}: {' and '.join(changed)} changed since the choice began, so that its ways do not "
                    "compare; put them back, or start again elsewhere"
                )
            return
        (self.out / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        write_rows(self.rows.gate, self.out / GATE)
        write_rows(self.rows.calibrating, self.out / CALIBRATION)
        self.report = {
            "format": FORMAT,
            "finished": False,
            "model": self.config.model,
            "model_sha256": digest,
            "grid": self.config.method.format,
            "max_drop": self.config.method.max_drop,
            "task": self.task,
            "data": self.config.flat()["data"],
            "gate": {"file": GATE, "rows": len(self.rows.gate), "row_digests": digests},
            "test": self.config.data if self.rows.test else None,
            "notes": self.rows.notes,
            "reference": None,
            "ways": [
                {
                    "number": way.number,
                    "name": way.name,
                    "folder": way.folder,
                    "method": way.method,
                    "does": way.does,
                    "trains": way.trains,
                    "passed_over": way.passed_over,
                    "failed": None,
                    "model": None,
                    "seconds": None,
                    "peak_bytes": None,
                    "drop": None,
                    "kl": None,
                    "gained": None,
                    "met": None,
                }
                for way in ways
            ],
            "met": None,
            "taken": None,
            "best": None,
        }
        self._save()

    def _gate_words(self, reference: Mapping[str, Any]) -> str:
        allowed = drop_words({"estimate": self.config.method.max_drop}, self.task)
        if reference["score"] is None:
            return f"at most {allowed} per token over {reference['loss']['estimate']:.4f} on {reference['rows']:,} rows"
        score = f"{100 * reference['score']['estimate']:.1f}%"
        return f"at most {allowed} below the {score} of {reference['rows']:,} rows that the model answers exactly"

    def _end(self) -> AutoRun:
        best = self._best()
        if best is None:
            failed = "; ".join(f"{entry['folder']}: {entry['failed']}" for entry in self.report["ways"])
            raise TrainingError(f"{self.out}: no way came to an end: {failed}")
        taken = next((entry for entry in self.report["ways"] if entry["met"]), None)
        chosen = taken or best
        _share(self.out / chosen["model"], self.out / BEST)
        self.report |= {
            "finished": True,
            "met": taken is not None,
            "taken": None if taken is None else taken["folder"],
            "best": chosen["model"],
        }
        self._save()
        folders = {
            entry["folder"]: sha256_file(self.out / entry["folder"] / MANIFEST)
            for entry in self.report["ways"]
            if (self.out / entry["folder"] / MANIFEST).is_file()
        }
        save_manifest(
            self.out,
            {
                "format": FORMAT,
                "kind": "auto",
                "finished": True,
                "inputs": {},
                "files": files_below(self.out, leave_out=folders),
                "runs": folders,
            },
        )
        return AutoRun(self.out, self.report)

    def _save(self) -> None:
        part = self.out / f".{AUTO}.part"
        write_json(part, self.report)
        os.replace(part, self.out / AUTO)


def _kl(entry: Mapping[str, Any]) -> float:
    return float("inf") if entry["kl"] is None else float(entry["kl"]["estimate"])


def _share(source: Path, target: Path) -> None:
    """Give a finished folder another name, its files shared where the file system can."""

    def link(file: str, to: str) -> None:
        try:
            os.link(file, to)
        except OSError:
            shutil.copy2(file, to)

    with atomic_folder(target, overwrite=True) as temporary:
        shutil.copytree(source, temporary, copy_function=link, dirs_exist_ok=True)


def _check_same(config: AutoConfig, out: Path) -> None:
    """Refuse to resume with other settings than the choice began with.

    Raises:
        MissingInputError: there is no such choice.
        ConfigError: a setting differs; all of them are listed.
    """
    file = out / "config.yaml"
    began = load_auto(file) if file.is_file() else None
    if began is None:
        raise MissingInputError(
            f"{file}: there is no choice of --method auto to resume; leave --resume out, or check the output"
        )
    wrong = differences(
        {key: value for key, value in began.flat().items() if key not in MAY_DIFFER},
        {key: value for key, value in config.flat().items() if key not in MAY_DIFFER},
    )
    if wrong:
        raise ConfigError(
            f"{out}: the choice cannot go on with other settings:\n  " + "\n  ".join(wrong) + "\n"
            f"Leave them as they were (strop tune {file} -o {out} --resume), or start a new one elsewhere."
        )

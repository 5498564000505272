"""`tune` in stages: each starts from the last one's result, and after each it is measured what it gained and forgot.

    RUN/config.yaml       the resolved stages             RUN/<number>-<name>/  an ordinary run each
    RUN/stages.json       the account, with every figure  RUN/held_out/         the rows that all models are measured on
    RUN/stages.html       the page                        RUN/merged/           adapters merged for the stage after
    RUN/manifest.json     hashes (`verify`)

A whole model is trained on as it is. An adapter is trained further by an adapter stage that gives no shape of its own;
before any other stage it is merged into its base, through `merge` and its gate. What cannot follow on what is refused
before anything is trained, the problems of all stages at once: settings, formats, data, rendered rows.

Every stage's held-out rows are rendered once, before the first stage, and kept; the base and the model after each stage
are measured on all of them (`forgetting.py`). Resumed, a run goes on at its unfinished stage; finished stages are
verified and left alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from strop.config import Lora, QLora, Stage, StagesConfig, TuneConfig, load_stages
from strop.errors import ConfigError, MissingInputError, UsageError
from strop.files.folders import MANIFEST, read_json, sha256_file, write_json
from strop.memory import release_unused_memory
from strop.pages.stages import set_labels, write_stages_page
from strop.progress import SILENT, Reporter
from strop.recipes.forgetting import account, held_out_file, measure, read_held_out
from strop.recipes.manifest import FORMAT, files_below, save_manifest
from strop.recipes.merge import merge
from strop.recipes.stages_check import check_stages
from strop.recipes.tune import Run, tune_from_config
from strop.recipes.verify import verify
from strop.training.checkpoints import RunLock, differences

ACCOUNT: Final = "stages.json"
PAGE: Final = "stages.html"


@dataclass(frozen=True)
class StagesRun:
    """A finished run in stages.

    Attributes:
        path: its folder.
        report: what stands in stages.json.
    """

    path: Path
    report: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> StagesRun:
        """Open the folder of a run in stages.

        Raises:
            MissingInputError: there is no stages.json.
        """
        return cls(Path(path), read_json(Path(path) / ACCOUNT))

    @property
    def runs(self) -> list[Run]:
        """The stages' runs, in their order."""
        return [Run.open(self.path / stage["folder"]) for stage in self.report["stages"]]

    def verify(self) -> Any:
        """Check the hashes of all stages again; see `strop.verify`."""
        return verify(self.path)

    def to_dict(self) -> dict[str, Any]:
        """Path and account as JSON values."""
        return {"path": str(self.path), **self.report}

    def headers(self) -> list[str]:
        """The table's columns."""
        return ["nats per token on the held-out rows of", *set_labels(self.report)]

    def rows(self) -> list[list[str]]:
        """The table's rows: the base, then the model after each stage."""
        return [
            [f"after {entry['model']}" if number else "base", *(f"{cell['estimate']:.4f}" for cell in entry["loss"])]
            for number, entry in enumerate(self.report["matrix"])
        ]

    def lines(self) -> list[str]:
        """What each stage gained and forgot, in sentences."""
        lines = [effect["sentence"] for effect in self.report["effects"]]
        lines += [f"note: {note}" for note in self.report["notes"]]
        last = self.report["stages"][-1]
        return [*lines, f"the model: {self.path / last['model']}", f"the page: {self.path / PAGE}"]


def tune_stages(
    config: str | os.PathLike[str] | Mapping[str, Any], *, reporter: Reporter = SILENT, **settings: Any
) -> StagesRun:
    """Fine-tune in stages.

    Args:
        config: a YAML file with `stages:`, or its content as a mapping.
        reporter: told of findings and progress.
        **settings: settings that beat those of every stage that has them.

    Raises:
        ConfigError: settings, formats, data or rows of any stage that cannot be used, all at once.
        GateError: merging an adapter for the next stage lost too much of it.
        MissingInputError, TrainingError, ModelError: as the stages raise them.
    """
    source = config if isinstance(config, Mapping) else os.fspath(config)
    stages = load_stages(source, settings)
    if stages is None:
        raise ConfigError(f"{'the mapping' if isinstance(config, Mapping) else config}: has no stages: list")
    return tune_stages_from_config(stages, reporter=reporter)


def tune_stages_from_config(config: StagesConfig, *, reporter: Reporter = SILENT) -> StagesRun:
    """Fine-tune in stages as `config` says; see `tune_stages`."""
    run_dir = _folder(config)
    if config.resume:
        _check_same(config, run_dir)
    elif run_dir.exists() and not (run_dir.is_dir() and all(path.name == ".lock" for path in run_dir.iterdir())):
        raise UsageError(
            f"{run_dir}: already holds files; choose another output, or add --resume to go on with the run that is "
            "there"
        )
    ready = check_stages(config, reporter=reporter)  # nothing is on the disk until all stages can be run
    run_dir.mkdir(parents=True, exist_ok=True)
    with RunLock(run_dir):
        try:
            return _Chain(config, run_dir, reporter).go(ready.held_out, ready.notes, ready.plans)
        except KeyboardInterrupt:
            reporter.note(f"strop tune {run_dir / 'config.yaml'} --resume goes on at the unfinished stage")
            raise


class _Chain:
    """One call of `tune_stages_from_config`."""

    def __init__(self, config: StagesConfig, run_dir: Path, reporter: Reporter) -> None:
        self.config, self.run_dir, self.reporter = config, run_dir, reporter
        file = run_dir / ACCOUNT
        self.report: dict[str, Any] = read_json(file) if config.resume and file.is_file() else {}

    def go(self, held_out: Mapping[str, Any], notes: list[str], plans: Mapping[str, str]) -> StagesRun:
        if not self.report:
            self._begin(held_out, notes)
        else:
            self._check_finished()
        if self.report["finished"]:
            self.reporter.note(f"{self.run_dir}: every stage is finished; nothing is left to resume")
            return StagesRun(self.run_dir, self.report)
        sets = {
            entry["name"]: read_held_out(self.run_dir / entry["file"])
            for entry in self.report["held_out"]
            if not entry["same_as"]
        }
        measured = self.report["measured"]
        if not measured:
            self._measure("base", self.config.model, sets)
        model, previous = self.config.model, None
        for stage in self.config.stages:
            done = next((entry for entry in self.report["stages"] if entry["name"] == stage.name), None)
            if done is None:
                done = self._run(stage, model, previous, plans[stage.name])
            model, previous = str(self.run_dir / done["model"]), Run.open(self.run_dir / stage.folder).config
            if len(measured) <= stage.number:
                self._measure(stage.name, model, sets)
        self.report["finished"] = True
        self._save()
        return StagesRun(self.run_dir, self.report)

    # --- one stage ----------------------------------------------------------------------------------------------------

    def _run(self, stage: Stage, model: str, previous: TuneConfig | None, start: str) -> dict[str, Any]:
        folder = self.run_dir / stage.folder
        self.reporter.note(f"stage {stage.number} of {len(self.config.stages)}, {stage.name}: {start}")
        merged = None
        if start.startswith("merged"):
            merged = f"merged/before-{stage.folder}"
            if not (self.run_dir / merged).is_dir():  # it stands whole or not at all
                for line in merge(model, self.run_dir / merged, reporter=self.reporter).lines():
                    self.reporter.note(line)
            model = str(self.run_dir / merged)
        shape: dict[str, object] = {}
        if stage.continues and previous is not None and isinstance(previous.method, Lora | QLora):
            method = previous.method
            shape = {
                "rank": method.rank,
                "alpha": method.alpha,
                "targets": list(method.targets),
                "rank_stabilised": method.rank_stabilised,
            }
        begun = (folder / "config.yaml").is_file()
        if folder.is_dir() and not begun:
            shutil.rmtree(folder)  # killed before it had written a line
        resume = True if begun else None
        release_unused_memory()  # so that the stage's peak is counted from what is held, not from what is kept free
        run = tune_from_config(stage.config(model, output=str(folder), resume=resume, **shape), reporter=self.reporter)
        entry = {
            "number": stage.number,
            "name": stage.name,
            "method": stage.method,
            "folder": stage.folder,
            "start": start,
            "merged": merged,
            "merged_files": None if merged is None else files_below(self.run_dir / merged),
            "model": f"{stage.folder}/{run.best_path.name}",
            "manifest_sha256": sha256_file(folder / MANIFEST),
            "format": run.report["format"],
            "parameters": run.report["parameters"],
            "result": run.report["result"],
        }
        self.report["stages"].append(entry)
        self._save()
        return entry

    def _measure(self, name: str, model: str, sets: Mapping[str, Any]) -> None:
        device = self.config.stages[0].config(self.config.model).machine.device
        sums = measure(model, sets, device=device, reporter=self.reporter, name=name)
        self.report["measured"].append({"model": name, "sets": sums})
        self._save()
        for effect in self.report["effects"]:
            if effect["stage"] == name:
                self.reporter.note(effect["sentence"])

    # --- the account --------------------------------------------------------------------------------------------------

    def _begin(self, held_out: Mapping[str, Any], notes: list[str]) -> None:
        (self.run_dir / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
        entries: list[dict[str, Any]] = []
        for stage in self.config.stages:
            path = held_out_file(self.run_dir, stage.folder)
            held_out[stage.name].write(path)
            rows, digest = held_out[stage.name], sha256_file(path)
            same = next((entry for entry in entries if entry["sha256"] == digest), None)
            if same is not None:  # measured once, under the first stage's name
                same["label"] += f", {stage.name}"
            entries.append(
                {
                    "name": stage.name,
                    "label": stage.name,
                    "same_as": None if same is None else same["name"],
                    "file": path.relative_to(self.run_dir).as_posix(),
                    "sha256": digest,
                    "rows": rows.rows,
                    "tokens": rows.tokens,
                }
            )
        self.report = {
            "format": FORMAT,
            "finished": False,
            "base": self.config.model,
            "held_out": entries,
            "stages": [],
            "measured": [],
            "notes": notes,
        }
        self._save()

    def _save(self) -> None:
        """Write account, page and manifest as they stand, each whole or not at all."""
        self.report |= account(self.report, seed=0)
        part = self.run_dir / f".{ACCOUNT}.part"
        write_json(part, self.report)
        os.replace(part, self.run_dir / ACCOUNT)
        if len(self.report["measured"]) > 1:
            write_stages_page(self.report, self.run_dir / PAGE, title=f"{self.run_dir.name}: what each stage changed")
        folders = {stage["folder"]: stage["manifest_sha256"] for stage in self.report["stages"]}
        every = [stage.folder for stage in self.config.stages]
        listed = files_below(self.run_dir, leave_out=every) if self.report["finished"] else {}
        content = {"format": FORMAT, "kind": "stages", "finished": self.report["finished"], "inputs": {}}
        save_manifest(self.run_dir, content | {"files": listed, "runs": folders})

    def _check_finished(self) -> None:
        """Refuse to go on from stages whose files are not what they were.

        Raises:
            UsageError: naming every file that differs.
        """
        wrong: list[str] = []
        for entry in self.report["held_out"]:
            file = self.run_dir / entry["file"]
            if not file.is_file() or sha256_file(file) != entry["sha256"]:
                wrong.append(f"{entry['file']}: not the rows that were held out")
        for stage in self.report["stages"]:
            folder = self.run_dir / stage["folder"]
            if not (folder / MANIFEST).is_file() or sha256_file(folder / MANIFEST) != stage["manifest_sha256"]:
                wrong.append(f"{stage['folder']}/{MANIFEST}: missing, or not the one that the stage wrote")
                continue
            wrong += [f"{stage['folder']}/{finding.name}: {finding.text}" for finding in verify(folder).run_findings]
            if stage["merged"] and files_below(self.run_dir / stage["merged"]) != stage["merged_files"]:
                wrong.append(f"{stage['merged']}: not the model that was merged")
        if wrong:
            raise UsageError(
                f"{self.run_dir}: finished stages changed since they ended, so the run cannot go on from them:\n  "
                + "\n  ".join(wrong)
                + "\nPut the files back, or start again elsewhere."
            )


def _folder(config: StagesConfig) -> Path:
    if config.output is not None:
        return Path(config.output)
    if config.resume:
        raise ConfigError("output: name the run's folder that is to be resumed (-o RUN)")
    stem = Path(config.model).name.lower() or "model"
    for number in range(1, 10_000):
        path = Path("runs") / (f"{stem}-stages" + (f"-{number}" if number > 1 else ""))
        if not path.exists():
            return path
    raise UsageError("runs/: no free name; choose an output")


def _check_same(config: StagesConfig, run_dir: Path) -> None:
    """Refuse to resume with other settings than the run began with.

    Raises:
        MissingInputError: there is no such run.
        ConfigError: a setting differs; all of them are listed.
    """
    file = run_dir / "config.yaml"
    began = load_stages(file) if file.is_file() else None
    if began is None:
        raise MissingInputError(f"{file}: there is no run in stages to resume; leave --resume out, or check the output")
    wrong = differences({"stages": began.names()}, {"stages": config.names()})
    for before, now in zip(began.stages, config.stages, strict=False):
        wrong += [f"stage {now.name}: {line}" for line in differences(_exact(before), _exact(now))]
    if wrong:
        raise ConfigError(
            f"{run_dir}: the run cannot go on exactly with other settings:\n  " + "\n  ".join(wrong) + "\n"
            f"Leave them as they were (strop tune {file} --resume), or start a new run elsewhere."
        )


def _exact(stage: Stage) -> dict[str, object]:
    """What may not differ when a stage goes on."""
    free = ("data", "save_steps", "device", "tensorboard")
    return {key: value for key, value in stage.values.items() if key not in free}

"""What `tune --method auto` came to: a table of the ways, and which was taken."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop.errors import UsageError
from strop.evaluation.comparison import mebibytes, significant
from strop.files.folders import read_json
from strop.recipes.auto_gate import drop_figures, drop_words, unit_of
from strop.recipes.provenance import AUTO


@dataclass(frozen=True)
class AutoRun:
    """A finished choice among ways.

    Attributes:
        path: its folder, which `load`, `chat`, `export` and `prove` open as the model that was taken.
        report: what stands in auto.json.
    """

    path: Path
    report: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> AutoRun:
        """Open the folder of a choice.

        Raises:
            MissingInputError: there is no auto.json.
        """
        return cls(Path(path), read_json(Path(path) / AUTO))

    @property
    def met(self) -> bool:
        """Whether a way passed the gate."""
        return bool(self.report["met"])

    @property
    def exit_code(self) -> int:
        """What the command line ends with: 0 where the gate was passed, else 1."""
        return 0 if self.met else 1

    @property
    def best_path(self) -> Path:
        """The model that was taken; the one that loses least where none passed."""
        return self.path / "best"

    def export(self, output: str | os.PathLike[str], *, format: str | None = None, **options: Any) -> Any:
        """Write the model as a GGUF file, by default on the grid that it was made for; see `strop.export`.

        Raises:
            UsageError: no format is given, and the grid was none of GGUF's.
        """
        from strop.recipes.export import export

        chosen = format or (self.report["grid"] if self.report["grid"].startswith("gguf:") else None)
        if chosen is None:
            raise UsageError(f"{self.path}: was made for no GGUF format; say which to write: format='gguf:q8_0'")
        return export(self.path, output, format=chosen, **options)

    def prove(self, data: Any, **options: Any) -> Any:
        """Prove on rows that chose nothing that the drop is at most the one allowed; see `strop.prove`."""
        from strop.recipes.prove import prove

        given = {key: self.report[key] for key in ("max_drop", "task")} | {"against": self.report["model"]}
        return prove(self.path, data, **(given | options))

    def to_dict(self) -> dict[str, Any]:
        """Path and account as JSON values."""
        return {"path": str(self.path), "best_path": str(self.best_path), **self.report}

    def headers(self) -> list[str]:
        """The table's columns."""
        return ["way", "seconds", "peak MiB", f"{unit_of(self.report['task'])} lost", "gained", "KL", "met"]

    def rows(self) -> list[list[str]]:
        """The table's rows: what each way cost, what its model lost, and what it gained on the best before."""
        return [self._cells(entry) for entry in self.report["ways"]]

    def _cells(self, entry: Mapping[str, Any]) -> list[str]:
        task = self.report["task"]
        seconds = "-" if entry["seconds"] is None else f"{entry['seconds']:.1f}"
        peak = "-" if entry["peak_bytes"] is None else mebibytes(entry["peak_bytes"])
        if entry["drop"] is None:
            why = "passed over" if entry["passed_over"] else "failed" if entry["failed"] else "not needed"
            return [entry["folder"], seconds, peak, why, "-", "-", "-"]
        gained = "-" if entry["gained"] is None else drop_figures({"estimate": entry["gained"]}, task)[0]
        kl = "-" if entry["kl"] is None else significant(entry["kl"]["estimate"], 3)
        lost = " ".join(drop_figures(entry["drop"], task)).rstrip()
        return [entry["folder"], seconds, peak, lost, gained, kl, "yes" if entry["met"] else "no"]

    def lines(self) -> list[str]:
        """What was passed over, which way was taken, what is claimed of it, and the next command."""
        report = self.report
        lines = [
            f"{entry['folder']}: {'passed over' if entry['passed_over'] else 'failed'}: "
            f"{entry['passed_over'] or entry['failed']}"
            for entry in report["ways"]
            if entry["passed_over"] or entry["failed"]
        ]
        lines += [f"note: {note}" for note in report["notes"]]
        chosen = next(entry for entry in report["ways"] if entry["model"] == report["best"])
        allowed = drop_words({"estimate": report["max_drop"]}, report["task"])
        lost = drop_words(chosen["drop"], report["task"])
        if self.met:
            lines.append(f"taken: {chosen['folder']}, {chosen['does']}: {lost} lost, {allowed} allowed")
        else:
            lines.append(
                f"no way keeps within {allowed}; the best so far is {chosen['folder']}, {chosen['does']}: {lost} lost"
            )
            longer = "train longer (--epochs, --max-steps), " if any(way["trains"] for way in self._measured) else ""
            lines.append(f"{longer}take a format with more bits, or allow more (--max-drop)")
        lines.append(f"the model: {self.best_path}")
        if self.met:
            lines.append(f"{self._claimed(chosen['drop'])}; on others: {self.next_command()}")
        return lines

    def _claimed(self, drop: Mapping[str, Any]) -> str:
        """What the gating rows do not say."""
        if drop["high"] is not None and drop["high"] > self.report["max_drop"]:
            most = drop_words({"estimate": drop["high"]}, self.report["task"])
            return f"{drop['rows']:,} rows leave room for {most}, and rows that chose prove nothing"
        return "rows that chose prove nothing"

    @property
    def _measured(self) -> list[Mapping[str, Any]]:
        return [way for way in self.report["ways"] if way["drop"] is not None]

    def next_command(self) -> str:
        """The command that proves it, on the data's test split where there is one."""
        data = self.report["test"] or "TEST.jsonl"
        words = ["strop", "prove", str(self.path), "--data", data, "--max-drop", f"{self.report['max_drop']:g}"]
        if self.report["task"] != "exact-match":
            words += ["--task", self.report["task"]]
        return shlex.join(words)

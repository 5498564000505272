"""`verify`: is a run what it was when it ended, and are its inputs what they were when it began?

Two questions, answered apart. The run's own files: changed, missing, added, each by name; its checkpoints against
their manifests. Its inputs: the data, the base, an adapter that was trained further; where those changed the run is
intact all the same, but could not be made again from what lies there now. A run in stages is all of its runs. Nothing
is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from strop.config import DataPart, load_config
from strop.data.mixing import open_mixture
from strop.errors import FileFormatError, MissingInputError, StropError
from strop.files.folders import MANIFEST, check_manifest, sha256_file
from strop.files.peft_adapter import base_digest
from strop.models.sources import find_folder
from strop.recipes.manifest import (
    adapter_digest,
    configuration_digest,
    data_files,
    load_manifest,
    paths_below,
    records_digest,
)
from strop.recipes.teacher import teacher_digest

What = Literal["changed", "missing", "added"]


@dataclass(frozen=True)
class Finding:
    """One thing that differs.

    Attributes:
        what: changed, missing or added.
        name: a file of the run, or an input.
        text: how it differs.
    """

    what: What
    name: str
    text: str

    def line(self) -> str:
        """The finding in one line."""
        return f"{self.what}: {self.name}: {self.text}"


@dataclass
class Verification:
    """What a check of a run came to.

    Attributes:
        path: the run's folder.
        finished: whether the run had ended; of one that had not, only checkpoints, finished stages and inputs can be
            checked.
        files: files of the run that were compared.
        inputs: inputs that were compared.
        run_findings: what differs in the run's own files.
        input_findings: what differs in its inputs.
        notes: what could not be checked, and why.
    """

    path: Path
    finished: bool = True
    files: int = 0
    inputs: int = 0
    run_findings: list[Finding] = field(default_factory=list)
    input_findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """Whether every file of the run is what it was."""
        return not self.run_findings

    @property
    def ok(self) -> bool:
        """Whether nothing differs, neither in the run nor in its inputs."""
        return self.intact and not self.input_findings

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"path": str(self.path), "intact": self.intact, "ok": self.ok}

    def lines(self) -> list[str]:
        """The result in sentences, the findings first."""
        lines = [finding.line() for finding in self.run_findings]
        lines += [f"input {finding.line()}" for finding in self.input_findings]
        lines += self.notes
        count = len(self.run_findings)
        if not self.intact:
            lines.append(f"{self.path}: NOT intact: {count} of its files {'differs' if count == 1 else 'differ'}")
        elif self.finished:
            lines.append(f"{self.path}: intact, {self.files:,} files are byte for byte what the run wrote")
        else:
            lines.append(
                f"{self.path}: unfinished; {self.files:,} files of its checkpoints and finished stages are as "
                "they were written"
            )
        if self.input_findings:
            lines.append(
                f"its inputs are not what they were ({len(self.input_findings)} of {self.inputs}): the same run could "
                "not be made from them again"
            )
        else:
            lines.append(f"its {self.inputs} inputs (data, base) are unchanged")
        return lines


def verify(run: str | os.PathLike[str]) -> Verification:
    """Check a run's hashes again.

    Args:
        run: a run's folder, or that of a run in stages.

    Raises:
        MissingInputError: there is no such folder, or it has no manifest.json.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise MissingInputError(f"{folder}: no such folder; name the folder of a run")
    if not (folder / MANIFEST).is_file():
        raise MissingInputError(
            f"{folder}: holds no {MANIFEST}, so there is nothing to compare with; name a run's folder (those made "
            "before version 0.2 have none)"
        )
    result = Verification(folder)
    try:
        manifest = load_manifest(folder)
    except FileFormatError as error:
        result.run_findings.append(Finding("changed", MANIFEST, str(error)))
        return result
    result.finished = bool(manifest["finished"])
    runs = list(manifest.get("runs", {}))
    if result.finished:
        _check_files(result, manifest["files"], runs)
    _check_checkpoints(result)
    if not result.finished and "configuration" in manifest["inputs"]:
        _check_own_settings(result, manifest["inputs"])
    _check_inputs(result, manifest["inputs"])
    for name, digest in manifest.get("runs", {}).items():
        _check_run(result, name, digest)
    return result


def _check_files(result: Verification, listed: Mapping[str, Mapping[str, Any]], runs: list[str]) -> None:
    here = paths_below(result.path, leave_out=runs)
    for name, entry in listed.items():
        result.files += 1
        path = here.pop(name, None)
        if path is None:
            result.run_findings.append(Finding("missing", name, f"{entry['bytes']:,} bytes were written"))
        elif (size := path.stat().st_size) != entry["bytes"]:
            result.run_findings.append(Finding("changed", name, f"{size:,} bytes, {entry['bytes']:,} were written"))
        elif sha256_file(path) != entry["sha256"]:
            result.run_findings.append(Finding("changed", name, "its bytes are not those that were written (SHA-256)"))
    result.run_findings += [Finding("added", name, "the run did not write it") for name in here]


def _check_checkpoints(result: Verification) -> None:
    """Compare checkpoints with their own manifests; of a finished run, those files were compared already."""
    root = result.path / "checkpoints"
    known = {finding.name for finding in result.run_findings}
    for folder in sorted(root.glob("step-*")) if root.is_dir() else []:
        name = folder.relative_to(result.path).as_posix()
        if not result.finished:
            result.files += sum(path.is_file() for path in folder.iterdir())
        try:
            check_manifest(folder)
        except (StropError, OSError) as error:
            if not any(other.startswith(f"{name}/") for other in known):
                text = "; ".join(line.strip() for line in str(error).splitlines()[1:-1]) or str(error)
                result.run_findings.append(Finding("changed", name, text))


def _check_run(result: Verification, name: str, digest: str) -> None:
    """One stage of a run in stages."""
    folder = result.path / name
    if not (folder / MANIFEST).is_file():
        result.run_findings.append(Finding("missing", f"{name}/{MANIFEST}", "the stage wrote one"))
        return
    result.files += 1
    if sha256_file(folder / MANIFEST) != digest:
        text = "it is not the manifest that the stage wrote"
        result.run_findings.append(Finding("changed", f"{name}/{MANIFEST}", text))
        return
    inner = verify(folder)
    result.files += inner.files
    result.inputs += inner.inputs
    for findings, into in (
        (inner.run_findings, result.run_findings),
        (inner.input_findings, result.input_findings),
    ):
        into.extend(Finding(finding.what, f"{name}/{finding.name}", finding.text) for finding in findings)
    result.notes += [f"{name}: {note}" for note in inner.notes]


# --- inputs -----------------------------------------------------------------------------------------------------------


def _check_inputs(result: Verification, inputs: Mapping[str, Any]) -> None:
    data = inputs.get("data")
    if data is not None:
        result.inputs += 1
        if "files" in data:
            _check_data_files(result, data)
        else:
            _check_records(result, data)
    digests: tuple[tuple[str, Callable[[Path], str]], ...] = (
        ("base", base_digest),
        ("adapter", adapter_digest),
        ("teacher", teacher_digest),
    )
    for what, digest in digests:
        record = inputs.get(what)
        if record is None:
            continue
        result.inputs += 1
        name = f"{what} {record['name']}"
        try:
            folder = _found(record, result.path) or find_folder(record["name"])
            changed = digest(folder) != record["sha256"]
        except (StropError, OSError) as error:
            result.input_findings.append(Finding("missing", name, str(error)))
            continue
        if changed:
            text = f"{folder} holds other weights or another configuration than the run began from (SHA-256)"
            result.input_findings.append(Finding("changed", name, text))


def _check_data_files(result: Verification, data: Mapping[str, Any]) -> None:
    place = _found(data, result.path)
    if place is None:
        result.input_findings.append(Finding("missing", f"data {data['name']}", f"nothing is at {data['path']}"))
        return
    here, listed = data_files(place), data["files"]
    for name in sorted({*here, *listed}):
        shown = f"data {place}" if place.is_file() else f"data {place / name}"
        if name not in listed:
            result.input_findings.append(Finding("added", shown, "it was not there when the run began"))
        elif name not in here:
            result.input_findings.append(Finding("missing", shown, "the run was trained on it"))
        elif here[name].stat().st_size != listed[name]["bytes"] or sha256_file(here[name]) != listed[name]["sha256"]:
            result.input_findings.append(Finding("changed", shown, "the run was trained on other bytes (SHA-256)"))


def _found(record: Mapping[str, Any], run_dir: Path) -> Path | None:
    """Where an input lies: from the run, if both were moved together, else where it was."""
    places = [run_dir / record["from_run"]] if "from_run" in record else []
    return next((Path(os.path.normpath(place)) for place in [*places, Path(record["path"])] if place.exists()), None)


def _check_records(result: Verification, data: Mapping[str, Any]) -> None:
    """Rows that came from no file here: read again where that can be done."""
    name = f"data {data['name']}"
    try:
        splits = open_mixture([DataPart(**part) for part in data["sets"]] if "sets" in data else data["name"])
    except (StropError, OSError) as error:
        result.input_findings.append(Finding("missing", name, str(error)))
        return
    if records_digest(chain(splits.train, splits.valid)) != data["records_sha256"]:
        result.input_findings.append(
            Finding("changed", name, "it holds other rows than the run was trained on (SHA-256)")
        )


def _check_own_settings(result: Verification, inputs: Mapping[str, Any]) -> None:
    """Settings and chat template as they lie in the run's folder, against what the run began with.

    Of a finished run the files were compared byte for byte already; of a killed one only this is known.
    """
    file = result.path / "config.yaml"
    if not file.is_file():
        result.run_findings.append(Finding("missing", file.name, "the run's settings"))
        return
    try:
        same = configuration_digest(load_config(file)) == inputs["configuration"]["sha256"]
    except StropError as error:
        result.run_findings.append(Finding("changed", file.name, str(error)))
        return
    if not same:
        result.run_findings.append(Finding("changed", file.name, "other settings than those that the run began with"))

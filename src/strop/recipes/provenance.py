"""What trained, calibrated or chose a model, read from what its makers left beside it.

    a run of tune            manifest.json: data that trained and, by early stopping, chose; the base that it began from
    a choice among runs      auto.json: the rows that it was gated by, and the run or folder that was taken
    a quantized folder       receipt.json: rows that calibrated, and the source
    a merged model           merge.json: the adapter that was merged
    an adapter               its base
    a GGUF file              FILE.json beside it: the model that it was made of, and rows that weighted its columns

Each is followed to the model before it, as far as that is still there. Rows are compared by what they say
(`row_digest`): those that a receipt lists, else those of the data where they lie now; where the data are gone, files
are compared by hash. What cannot be looked at is told.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final

from strop.config import DataPart, data_name, load_config
from strop.data.mixing import open_mixture
from strop.data.records import SPLIT_NAMES, Record
from strop.errors import FileFormatError, MissingInputError, StropError
from strop.files.folders import MANIFEST, read_json, sha256_file
from strop.files.gguf import is_gguf
from strop.files.peft_adapter import base_digest, read_adapter_config
from strop.files.receipts import RECEIPT
from strop.models.sources import find_folder, is_adapter
from strop.recipes.manifest import adapter_digest, load_manifest
from strop.recipes.rows import row_digest

MERGE: Final = "merge.json"
AUTO: Final = "auto.json"
_MOST_MODELS: Final = 64


@dataclass(frozen=True)
class Chooser:
    """Data that had a part in a model.

    Attributes:
        model: The model.
        how: "trained", "calibrated" or "chose".
        name: What the data were called.
        rows: Digests of its rows where the record lists them.
        files: Name to SHA-256 of its files where the record lists those.
        data: What `open_mixture` reads the rows from; None where they are listed or nothing is named.
    """

    model: str
    how: str
    name: str
    rows: frozenset[str] | None = None
    files: Mapping[str, str] | None = None
    data: Any = None

    def shared(self, digests: Collection[str]) -> set[str]:
        """Those of `digests` that are among its rows.

        Raises:
            StropError: The rows can no longer be read.
        """
        if self.rows is not None:
            return set(digests) & self.rows
        mixture = open_mixture(self.data)
        records: Iterable[Record] = chain(mixture.train, mixture.valid)
        return {digest for digest in map(row_digest, records) if digest in digests}

    def holds_file(self, sha256: str) -> bool:
        """Whether one of its files has this hash; those of a test split chose nothing."""
        held = {digest for name, digest in (self.files or {}).items() if not _is_test(name)}
        return sha256 in held


@dataclass
class Provenance:
    """What is known of how models came about.

    Attributes:
        choosers: Data that had a part in one of them.
        sources: The models that each was made of, the nearest first, as far as they are named.
        notes: What could not be looked at.
    """

    choosers: list[Chooser]
    sources: list[str]
    notes: list[str]


def provenance(model: str | os.PathLike[str]) -> Provenance:
    """Follow a model back to where it came from.

    Raises:
        MissingInputError, ModelError: There is no such model.
    """
    result = Provenance([], [], [])
    waiting, seen = [str(model)], {str(model)}
    while waiting and len(seen) <= _MOST_MODELS:
        place = waiting.pop(0)
        try:
            before = _look(place, result)
        except StropError as error:
            if place == str(model):
                raise
            result.notes.append(f"{place}: what it was made of could not be looked at ({error})")
            continue
        for name in before:
            if name not in seen:
                seen.add(name)
                waiting.append(name)
                result.sources.append(name)
    if not result.choosers:
        result.notes.append(
            f"nothing beside {model} says what trained or calibrated it, so no row was looked for there"
        )
    return result


def merged_adapter(folder: Path) -> Path | None:
    """The adapter that a merged model was made of, where it lies where it was and is still the same."""
    if not folder.is_dir():
        return None
    try:
        record = read_json(folder / MERGE)
    except (MissingInputError, FileFormatError):
        return None
    source = record.get("source")
    if not isinstance(source, str) or not is_adapter(Path(source)):
        return None
    return Path(source) if record.get("source_sha256") == adapter_digest(Path(source)) else None


def _look(place: str, result: Provenance) -> list[str]:
    """Note what lies beside one model; returns the models that it was made of."""
    if is_gguf(place):
        file = Path(place)
        if not file.is_file():
            raise MissingInputError(f"{file}: no such file; name a GGUF file, a model's folder or a hub id")
        return _of_export(file, _read(file.with_name(f"{file.name}.json"), result), result)
    folder = find_folder(place)
    before = _names(read_adapter_config(folder).base) if is_adapter(folder) else []
    for home in (folder, folder.parent):
        before += _of_choice(home, _read(home / AUTO, result), result)
        if (home / MANIFEST).is_file():
            before += _of_manifest(place, home, result)
        elif (home / "run.json").is_file() and (home / "config.yaml").is_file():  # of a version without manifests
            settings = load_config(home / "config.yaml")
            result.choosers.append(Chooser(place, "trained", data_name(settings.data), data=settings.data))
            before += _names(settings.model)
    for name in (RECEIPT, MERGE):
        receipt = _read(folder / name, result)
        settings = receipt.get("settings")
        if isinstance(settings, Mapping):
            result.choosers += _of_calibration(place, settings.get("calibration"))
        before += _names(receipt.get("source"))
    return before


def _of_choice(home: Path, account: Mapping[str, Any], result: Provenance) -> list[str]:
    """What a choice among runs says (`strop.recipes.auto`): the model it began from comes before the one it took."""
    gate = account.get("gate")
    if not isinstance(gate, Mapping):
        return []
    listed = gate.get("row_digests")
    if not isinstance(listed, list):
        result.notes.append(f"{home / AUTO}: lists no rows that it was gated by, so none was looked for there")
        listed = []
    rows = frozenset(str(digest) for digest in listed)
    result.choosers.append(Chooser(str(home), "chose", str(home / str(gate.get("file", ""))), rows=rows))
    taken = _names(account.get("best"))
    return [*_names(account.get("model")), *(str(home / name) for name in taken)]


def _of_export(file: Path, receipt: Mapping[str, Any], result: Provenance) -> list[str]:
    """What an export's receipt says, where it is this file's."""
    if receipt.get("sha256", "") not in ("", sha256_file(file)):
        result.notes.append(f"{file.name}.json is the receipt of another file (SHA-256 differs); it was not looked at")
        return []
    result.choosers += _of_calibration(str(file), receipt.get("importance"))
    before, lay = _names(receipt.get("model")), _names(receipt.get("model_path"))
    if lay and Path(lay[0]).exists() and not any(Path(name).exists() for name in before):
        before = lay  # as it was named, it is not found from this folder
    for name in before:
        try:
            folder = find_folder(name)
        except StropError:
            continue  # said where it is looked at
        digest = receipt.get("base_sha256")
        if digest is not None and not is_adapter(folder) and base_digest(folder) != digest:
            result.notes.append(f"{name} holds other weights than those that {file} was made of (SHA-256 differs)")
    return before


def _of_manifest(place: str, home: Path, result: Provenance) -> list[str]:
    try:
        manifest = load_manifest(home)
    except FileFormatError as error:
        result.notes.append(f"{error}; what trained {place} was not looked for there")
        return []
    if manifest.get("kind") != "run":
        return []
    inputs = manifest["inputs"]
    result.choosers.append(_of_run(place, home, inputs["data"]))
    records = [inputs[name] for name in ("adapter", "base") if inputs.get(name)]
    return [str(_found(record, home) or record["name"]) for record in records]


def _read(path: Path, result: Provenance) -> Mapping[str, Any]:
    """A receipt; empty where there is none, or none that can be read, which is told."""
    try:
        return read_json(path)
    except MissingInputError:
        return {}
    except FileFormatError as error:
        result.notes.append(f"{error}; it was not looked at")
        return {}


def _of_run(model: str, home: Path, data: Mapping[str, Any]) -> Chooser:
    files = {name: entry["sha256"] for name, entry in data.get("files", {}).items()}
    if "sets" in data:
        where: Any = [DataPart(**part) for part in data["sets"]]
    else:
        where = str(_found(data, home) or data["name"]) if "path" in data else data["name"]
    return Chooser(model, "trained", data["name"], files=files or None, data=where)


def _of_calibration(model: str, calibration: object) -> Iterator[Chooser]:
    if not isinstance(calibration, Mapping) or calibration.get("built_in") or not _names(calibration.get("data")):
        return
    listed = calibration.get("row_digests")
    rows = frozenset(str(digest) for digest in listed) if isinstance(listed, list) and listed else None
    yield Chooser(model, "calibrated", calibration["data"], rows=rows, data=calibration["data"])


def _found(record: Mapping[str, Any], home: Path) -> Path | None:
    """Where an input lies: from the run, if both were moved together, else where it was."""
    places = [home / record["from_run"]] if "from_run" in record else []
    places += [Path(record["path"])] if "path" in record else []
    return next((Path(os.path.normpath(place)) for place in places if place.exists()), None)


def _names(value: object) -> list[str]:
    return [value] if isinstance(value, str) and value else []


def _is_test(name: str) -> bool:
    return Path(name).name.lower().split(".")[0].split("-")[0] in SPLIT_NAMES["test"]

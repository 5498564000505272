"""The certificate of a proof: a small JSON that says what was compared, on what, and what came out, and checks itself.

It holds the SHA-256 of every file of the model and of its reference, of the data and of the rows, the versions, the
task, the largest drop that was allowed, and per cluster of rows, in the order in which they were looked at, the drop:
a letter each where answers are right or wrong (`L` lost, `G` gained, `=` alike), numbers otherwise. So the verdict
can be found again without the models; and it holds the hash of its own content, against accidents, not against forgers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from strop.errors import FileFormatError, MissingInputError, ModelError, StropError, UsageError
from strop.evaluation.judging import Task
from strop.evaluation.sequential import ERROR, Decision, decide, drop_interval
from strop.files.folders import sha256_file
from strop.files.gguf import is_gguf
from strop.files.peft_adapter import read_adapter_config
from strop.models.sources import find_folder, is_adapter
from strop.pages.atomic import write_whole
from strop.recipes.verify import Finding

FORMAT: Final = 1
KIND: Final = "proof"
ENDING: Final = ".proof.json"
MOST_BYTES: Final = 64 << 20
"""A larger file is no certificate."""

LETTERS: Final[Mapping[str, float]] = {"L": 1.0, "G": -1.0, "=": 0.0}
METHOD: Final = (
    "paired drops, betting against 'the drop is max_drop or more' (pass) and '... or less' (fail), each at wealth 20, "
    "looked at after every cluster (Waudby-Smith and Ramdas 2024; strop.evaluation.sequential)"
)
ASSUMPTIONS: Final = (
    "rows are drawn independently from what the model will meet; rows of one conversation or question are one cluster",
    "no row trained, calibrated or chose either model",
)
CLIPPED: Final = "a row's change counts up to 1 nat per token either way; the drop is the mean of what is counted"

_MODEL_FILES: Final = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_NOT_MODEL: Final = ("receipt.json", "merge.json", "manifest.json", "allocation.json", "run.json")

Sha256 = Field(pattern=r"^[0-9a-f]{64}$")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ModelRecord(_Strict):
    """A model: where it was, in what format it computes, and the hash of each of its files (an adapter's base too)."""

    name: str
    path: str
    format: str
    files: dict[str, str]


class DataRecord(_Strict):
    """The data: the file's hash (None where there is no single file), and what all its rows say."""

    name: str
    path: str | None
    sha256: str | None
    rows_sha256: str
    rows: int
    clusters: int


class FlippedRow(_Strict):
    """A row that only one of the two gets right."""

    row: int
    kind: Literal["lost", "gained"]
    asked: str
    expected: str
    reference: str
    model: str


class Result(_Strict):
    """What came out.

    Attributes:
        decision: pass, fail or undecided.
        drop: Mean over the clusters seen.
        low: Lower end of its interval, valid however often it was looked at.
        high: Upper end.
        rows: Rows seen.
        clusters: Clusters of them, which the test counts.
        e_pass: Largest wealth of Pass; 20 decides.
        e_fail: The same of Fail.
        needs: Of an undecided proof, further rows that would probably decide; None where no number can be named.
        reference: The reference's mean score over the rows seen.
        model: The model's.
        lost: Rows that only the reference gets right.
        gained: Rows that only the model gets right.
        clipped: Rows of which less than the whole change counted.
        left_out: Rows that could not be scored whole.
        seen_before: Rows that were left out because they trained, calibrated or chose.
    """

    decision: Decision
    drop: float
    low: float
    high: float
    rows: int
    clusters: int
    e_pass: float
    e_fail: float
    needs: int | None
    reference: float
    model: float
    lost: int
    gained: int
    clipped: int
    left_out: int
    seen_before: int


class Certificate(_Strict):
    """See the module."""

    format: Literal[1]
    kind: Literal["proof"]
    model: ModelRecord
    reference: ModelRecord
    data: DataRecord
    task: Task
    max_drop: float = Field(gt=0, lt=1)
    unit: str
    seed: int
    error: float
    method: str
    assumptions: list[str]
    notes: list[str]
    result: Result
    outcomes: str | None
    drops: list[float] | None
    rows_digest: str
    flipped: list[FlippedRow]
    versions: dict[str, str]

    def differences(self) -> list[float]:
        """The drop of each cluster seen."""
        if self.outcomes is not None:
            return [LETTERS[letter] for letter in self.outcomes]
        return list(self.drops or ())

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write it whole or not at all."""
        content = self.model_dump()
        return write_whole(path, [_text(content | {"certificate_sha256": _own_hash(content)})])


def encoded(drops: Sequence[float]) -> dict[str, Any]:
    """The drops as a certificate holds them."""
    letters = {value: letter for letter, value in LETTERS.items()}
    if all(drop in letters for drop in drops):
        return {"outcomes": "".join(letters[drop] for drop in drops), "drops": None}
    return {"outcomes": None, "drops": list(drops)}


def read_certificate(path: str | os.PathLike[str]) -> Certificate:
    """Read a certificate.

    Raises:
        MissingInputError: There is no such file.
        FileFormatError: It is none, or not as it was written.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MOST_BYTES:
            raise FileFormatError(f"{file}: {file.stat().st_size:,} bytes are more than any certificate has")
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInputError(f"{file}: no such file; name a certificate (FILE{ENDING})") from None
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{file}: is not valid JSON ({error})") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise FileFormatError(f"{file}: is no certificate of `strop prove`")
    if content.get("format") != FORMAT:
        raise FileFormatError(
            f"{file}: format {content.get('format')!r}, this version reads {FORMAT}; check it with the version of "
            "strop that wrote it"
        )
    own = content.pop("certificate_sha256", None)
    try:
        certificate = Certificate.model_validate(content)
    except ValidationError as error:
        places = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
        raise FileFormatError(f"{file}: {places}") from None
    if own != _own_hash(certificate.model_dump()):
        raise FileFormatError(f"{file}: its content changed since it was written, so nothing in it can be relied on")
    wrong = set(certificate.outcomes or "") - set(LETTERS)
    if (certificate.outcomes is None) == (certificate.drops is None) or wrong:
        raise FileFormatError(f"{file}: needs outcomes (of {', '.join(LETTERS)}) or drops, one of the two")
    if any(abs(drop) > 1 for drop in certificate.drops or ()):
        raise FileFormatError(f"{file}: a drop lies outside -1 to 1")
    return certificate


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _own_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()


# --- files ------------------------------------------------------------------------------------------------------------


def model_record(place: str, format: str) -> ModelRecord:
    """Hash everything that a model is made of: weights, configuration, tokenizer, template; an adapter's base too."""
    return ModelRecord(
        name=place, path=str(_where(place)), format=format, files={n: sha256_file(p) for n, p in model_files(place)}
    )


def model_files(place: str) -> list[tuple[str, Path]]:
    """Name and path of each file that a model is made of."""
    if is_gguf(place):
        path = Path(place)
        return [(path.name, path)]
    folder = find_folder(place)
    found = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    named = [(path.name, path) for path in found if path.name not in _NOT_MODEL]
    if is_adapter(folder):
        named += [(f"base: {name}", path) for name, path in model_files(read_adapter_config(folder).base)]
    return named


def _where(place: str) -> Path:
    return Path(os.path.abspath(place)) if is_gguf(place) else Path(os.path.abspath(find_folder(place)))


# --- checking ---------------------------------------------------------------------------------------------------------


@dataclass
class CertificateCheck:
    """What a check of a certificate came to.

    Attributes:
        path: The certificate.
        decision: What it says; None where it cannot be relied on.
        files: Files that were compared.
        findings: What differs.
    """

    path: Path
    decision: Decision | None = None
    files: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the certificate is sound and nothing it speaks of changed."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"path": str(self.path), "ok": self.ok}

    def lines(self) -> list[str]:
        """The result in sentences, the findings first."""
        lines = [finding.line() for finding in self.findings]
        if self.ok:
            return [
                *lines,
                f"{self.path}: sound; {self.files} files are byte for byte those of the proof, and its rows say: "
                f"{self.decision}",
            ]
        return [*lines, f"{self.path}: NOT to be relied on for what lies here now"]


def check_certificate(path: str | os.PathLike[str]) -> CertificateCheck:
    """Hash the files again and find the verdict again from the drops.

    Raises:
        MissingInputError: There is no such certificate.
        UsageError: A model is named in its place.
    """
    if is_gguf(path):
        raise UsageError(f"{path}: is a model; name the certificate of its proof ({path}{ENDING})")
    result = CertificateCheck(Path(path))
    try:
        certificate = read_certificate(path)
    except FileFormatError as error:
        result.findings.append(Finding("changed", Path(path).name, str(error)))
        return result
    result.decision = certificate.result.decision
    for what, record in (("model", certificate.model), ("reference", certificate.reference)):
        _check_model(result, what, record)
    _check_data(result, certificate.data)
    result.findings += [Finding("changed", "verdict", text) for text in _contradictions(certificate)]
    return result


def _check_model(result: CertificateCheck, what: str, record: ModelRecord) -> None:
    place = record.path if is_gguf(record.path) or Path(record.path).is_dir() else record.name
    try:
        here = dict(model_files(place))
    except (MissingInputError, ModelError, FileFormatError) as error:
        result.findings.append(Finding("missing", f"{what} {record.name}", str(error)))
        return
    for name in sorted({*here, *record.files}):
        result.files += 1
        shown = f"{what} {record.name}: {name}"
        if name not in record.files:
            result.findings.append(Finding("added", shown, "it was not there when the proof was made"))
        elif name not in here or not here[name].is_file():
            result.findings.append(Finding("missing", shown, "the proof was made with it"))
        elif sha256_file(here[name]) != record.files[name]:
            result.findings.append(Finding("changed", shown, "the proof was made with other bytes (SHA-256)"))


def _check_data(result: CertificateCheck, data: DataRecord) -> None:
    if data.path is None or data.sha256 is None:
        return
    result.files += 1
    try:
        same = sha256_file(data.path) == data.sha256
    except OSError as error:
        result.findings.append(Finding("missing", f"data {data.name}", str(error)))
        return
    if not same:
        result.findings.append(Finding("changed", f"data {data.name}", "the proof was made on other bytes (SHA-256)"))


def _contradictions(certificate: Certificate) -> list[str]:
    """What the certificate says of its rows that they do not say."""
    drops, said = certificate.differences(), certificate.result
    if not drops or certificate.error != ERROR:
        return [f"{len(drops)} drops at an error of {certificate.error:g}; needed some, at {ERROR:g}"]
    try:
        found = decide(drops, certificate.max_drop)
        low, high = drop_interval(drops, certificate.max_drop)
    except (ValueError, StropError) as error:
        return [str(error)]
    wrong = []
    if (found.decision, found.rows) != (said.decision, said.clusters):
        wrong.append(
            f"it says {said.decision} after {said.clusters} clusters; its drops say {found.decision} after {found.rows}"
        )
    for name, there, here in (
        ("drop", said.drop, sum(drops) / len(drops)),
        ("low", said.low, low),
        ("high", said.high, high),
        ("e_pass", said.e_pass, found.e_pass),
        ("e_fail", said.e_fail, found.e_fail),
    ):
        if abs(there - here) > 1e-9 * max(1.0, abs(here)):
            wrong.append(f"its {name} is {there:g}; its drops give {here:g}")
    return wrong

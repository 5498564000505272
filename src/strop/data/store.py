"""Samples on the disk: written once in order, read like a list without holding it.

    FOLDER/train.tokens        int32, little-endian: all samples' tokens one after another; a token that carries no
                               label is stored as its complement (-1 - id)
    FOLDER/train.safetensors   ends [N], index [N], answers [A, 2], answer_ends [N], int64 each: where a sample ends,
                               the record that it came from, its answers' ranges, and where those end
    FOLDER/header.json         what it was made of, digests, and the account of the rows
    FOLDER/manifest.json       bytes and SHA-256 of the others

and the same for `valid`. The tokens are memory-mapped, so what is held grows by about 40 bytes a sample, whatever its
length. A folder stands whole or not at all, and is checked before it is believed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray

from strop.data.records import Record
from strop.data.samples import DataReport, SampleSet, prepare, sample_chunks
from strop.data.templates import IGNORED, Sample, TrainOn, template_hash
from strop.errors import StropError
from strop.files.folders import atomic_folder, check_manifest, read_json, write_json, write_manifest
from strop.files.shards import Part, read_file, write_file

FORMAT: Final = 1

Splits = Mapping[str, tuple[Iterable[Sequence[Sample]], DataReport]]
"""For each split its samples in chunks, and the report that is complete once they are all taken."""


def sample_bytes(sample: Sample) -> bytes:
    """A sample's length, ids and labels as int64: what digests of samples are made of."""
    return np.array([len(sample), *sample.input_ids, *sample.labels], dtype="<i8").tobytes()


def samples_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 over the token ids and labels of samples in their order."""
    known = getattr(samples, "digest", None)
    if isinstance(known, str):
        return known
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample_bytes(sample))
    return digest.hexdigest()


def sample_lengths(samples: Sequence[Sample]) -> array[int]:
    """The tokens of each sample, in four bytes each."""
    known = getattr(samples, "lengths", None)
    return known if isinstance(known, array) else array("i", (len(sample) for sample in samples))


def sample_records(samples: Sequence[Sample]) -> NDArray[np.int64]:
    """The position of the record that each sample came from [N]."""
    known = getattr(samples, "records", None)
    return known if isinstance(known, np.ndarray) else np.array([sample.index for sample in samples], dtype=np.int64)


def store_bytes(samples: Sequence[Sample]) -> int:
    """The bytes that samples take in a folder of this module: four a token, and the places where they end."""
    known = getattr(samples, "stored_bytes", None)
    if isinstance(known, int):
        return known
    answers = sum(len(sample.answers) for sample in samples)
    return 4 * sum(sample_lengths(samples)) + 24 * len(samples) + 16 * answers


class TokenStore(Sequence[Sample]):
    """The samples of one split in a folder that `write_store` made.

    Args:
        folder: Where it stands.
        name: The split.
        digest: What `samples_digest` gives for these samples.

    Attributes:
        digest: The same.
        lengths: The tokens of each sample.
        records: The position of the record that each sample came from [N].
    """

    def __init__(self, folder: Path, name: str, digest: str) -> None:
        tables = {key: value.numpy() for key, value in read_file(folder / f"{name}.safetensors").items()}
        self.digest = digest
        self.records: NDArray[np.int64] = tables["index"]
        self._ends, self._answers, self._answer_ends = (tables[key] for key in ("ends", "answers", "answer_ends"))
        size = int(self._ends[-1]) if len(self._ends) else 0
        self._tokens = (
            np.memmap(folder / f"{name}.tokens", dtype="<i4", mode="r", shape=(size,)) if size else np.empty(0, "<i4")
        )
        self.lengths = array("i", np.diff(self._ends, prepend=0).astype(np.int32).tobytes())

    @property
    def stored_bytes(self) -> int:
        """What the samples take on the disk; see `store_bytes`."""
        return (
            self._tokens.nbytes
            + sum(part.nbytes for part in (self._ends, self._answers, self._answer_ends))
            + (self.records.nbytes)
        )

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Sample]:
        return (self._sample(row) for row in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._sample(row) for row in range(len(self))[index]]
        return self._sample(range(len(self))[index])

    def _sample(self, row: int) -> Sample:
        begin, answer = (int(ends[row - 1]) if row else 0 for ends in (self._ends, self._answer_ends))
        stored = self._tokens[begin : int(self._ends[row])]
        learned = stored >= 0
        answers = self._answers[answer : int(self._answer_ends[row])]
        return Sample(
            np.where(learned, stored, -1 - stored).tolist(),
            np.where(learned, stored, IGNORED).tolist(),
            index=int(self.records[row]),
            answers=tuple((start, end) for start, end in answers.tolist()),
        )


def _write_split(folder: Path, name: str, chunks: Iterable[Sequence[Sample]]) -> str:
    """Write one split's two files as its samples come; returns their digest."""
    digest = hashlib.sha256()
    ends, index, answers, answer_ends = array("q"), array("q"), array("q"), array("q")
    written = 0
    with (folder / f"{name}.tokens").open("wb") as file:
        for chunk in chunks:
            for sample in chunk:
                ids, labels = np.array(sample.input_ids, "<i4"), np.array(sample.labels, "<i4")
                file.write(np.where(labels == IGNORED, -1 - ids, ids).astype("<i4").tobytes())
                digest.update(sample_bytes(sample))
                written += len(sample)
                ends.append(written)
                index.append(sample.index)
                for start, end in sample.answers:
                    answers.extend((start, end))
                answer_ends.append(len(answers) // 2)
    tables = {"ends": ends, "index": index, "answers": answers, "answer_ends": answer_ends}
    tensors = {key: torch.from_numpy(np.array(value, dtype=np.int64)) for key, value in tables.items()}
    tensors["answers"] = tensors["answers"].reshape(-1, 2)
    write_file(folder / f"{name}.safetensors", [Part.of(tensors)])
    return digest.hexdigest()


def write_store(folder: Path, key: str, splits: Splits) -> None:
    """Write a folder of samples; whatever stood there is replaced once the new one is whole.

    Args:
        folder: Where it is to stand.
        key: What the samples were made of, to be found again by.
        splits: The samples of each split.
    """
    with atomic_folder(folder, overwrite=True) as part:
        header: dict[str, Any] = {"format": FORMAT, "key": key, "splits": {}}
        for name, (chunks, report) in splits.items():
            digest = _write_split(part, name, chunks)
            header["splits"][name] = {"digest": digest, "report": report.to_dict()}
        write_json(part / "header.json", header)
        write_manifest(part)


def open_store(folder: Path, key: str) -> dict[str, SampleSet]:
    """The samples of each split.

    Raises:
        StropError: The folder is damaged, incomplete, or was made of something else.
    """
    check_manifest(folder)
    header = read_json(folder / "header.json")
    if header.get("format") != FORMAT or header.get("key") != key:
        raise StropError(f"{folder}: made by another version or of other data")
    return {
        name: SampleSet(TokenStore(folder, name, split["digest"]), DataReport.of(split["report"]))
        for name, split in header["splits"].items()
    }


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over everything that a tokenizer's ids depend on: its vocabulary, merges and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    special = sorted((str(name), str(token)) for name, token in tokenizer.special_tokens_map.items())
    return hashlib.sha256(json.dumps([type(tokenizer).__name__, text, special]).encode()).hexdigest()


def rendered(
    records: Mapping[str, Sequence[Record]],
    tokenizer: Any,
    *,
    max_length: int,
    train_on: TrainOn,
    cache: Path | None,
    data_sha256: str,
    version: str,
    held: bool,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, SampleSet]:
    """Samples of each split that has records, as `prepare` makes them: in memory, or in a folder.

    Args:
        records: The records of each split.
        tokenizer: A transformers tokenizer with its chat template.
        max_length: As for `prepare`.
        train_on: As for `prepare`.
        cache: Where samples are kept and looked for. Without it they are held in memory if the records are, else in a
            temporary folder that goes with them.
        data_sha256: What the records were read from.
        version: Of this software.
        held: Whether the records are in memory.
        note: Told what was found.
    """
    filled = {name: part for name, part in records.items() if len(part)}
    if cache is None and held:
        return {
            name: prepare(part, tokenizer, max_length=max_length, train_on=train_on) for name, part in filled.items()
        }

    def make() -> Splits:
        splits: dict[str, tuple[Iterable[Sequence[Sample]], DataReport]] = {}
        for name, part in filled.items():
            report = DataReport(max_length=max_length)
            splits[name] = sample_chunks(part, tokenizer, report, train_on=train_on), report
        return splits

    versions = [version, tokenizers.__version__, transformers.__version__]
    made_of = [versions, data_sha256, tokenizer_digest(tokenizer), template_hash(tokenizer), max_length, train_on]
    key = hashlib.sha256(json.dumps([FORMAT, *made_of]).encode()).hexdigest()
    if cache is not None:
        return stored(cache, key, make, note=note)
    folder = Path(tempfile.mkdtemp(prefix="strop-rows-"))
    try:
        sets = stored(folder, key, make, note=note)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(sets["train"].samples, shutil.rmtree, folder, ignore_errors=True)
    return sets


def stored(
    root: Path, key: str, make: Callable[[], Splits], *, note: Callable[[str], None] = lambda line: None
) -> dict[str, SampleSet]:
    """Samples from `root/KEY` if they stand there whole, else made, written there and read back.

    Samples that were made of something else are removed once the new ones stand.

    Args:
        root: The folder of stores.
        key: SHA-256 of everything that the samples depend on.
        make: Makes them.
        note: Told whether they were found, and if what was found is damaged.
    """
    folder = root / key[:16]
    if folder.is_dir():
        try:
            found = open_store(folder, key)
        except (StropError, OSError, KeyError, ValueError) as error:
            note(f"{folder}: cannot be used and is made again ({str(error).splitlines()[0]})")
        else:
            note(f"the rows were rendered before and are read from {folder}")
            return found
    root.mkdir(parents=True, exist_ok=True)
    write_store(folder, key, make())
    for other in root.iterdir():
        if other != folder and other.is_dir():
            shutil.rmtree(other, ignore_errors=True)
    return open_store(folder, key)

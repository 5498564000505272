"""The GGUF reader: the `gguf` package as an independent writer and reader, files built by hand, and hostile ones."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from strop.errors import FileFormatError, FormatError, MissingInputError
from strop.files.gguf import reader
from strop.files.gguf.blocks import encode
from strop.files.gguf.reader import GgufFile

FIELDS: Mapping[str, Any] = {
    "general.name": "tiny Ünïcode 🐟",
    "a.u8": ("uint8", 200),
    "a.i8": ("int8", -3),
    "a.u16": ("uint16", 65535),
    "a.i16": ("int16", -32768),
    "a.u32": ("uint32", 4_000_000_000),
    "a.i32": ("int32", -5),
    "a.u64": ("uint64", 1 << 63),
    "a.i64": ("int64", -(1 << 62)),
    "a.f32": ("float32", 0.5),
    "a.f64": ("float64", 1e-300),
    "a.bool": ("bool", True),
    "tokens": ["<s>", "", "ü", "🐟", "a" * 300],
    "scores": [0.5, -1.25, 3.0],
    "kinds": [1, 2, 3, -4],
    "flags": [True, False],
}


def written(path: Path, tensors: Mapping[str, tuple[np.ndarray, str]], fields: Mapping[str, Any] = FIELDS) -> Path:
    """A file of the `gguf` package's own writer; tensors are uint8 rows of blocks, or floats."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        if isinstance(value, tuple):
            getattr(writer, f"add_{value[0]}")(key, value[1])
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_string(key, value)
    for name, (data, kind) in tensors.items():
        raw = None if data.dtype != np.uint8 else gguf.GGMLQuantizationType[kind.upper()]
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def some_tensors() -> dict[str, tuple[np.ndarray, str]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 256, generator=generator)
    found = {f"w.{name}": (encode(weight, name), name) for name in ("bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")}
    found["norm"] = (weight[0].numpy(), "f32")
    found["half"] = (weight.half().numpy(), "f16")
    found["experts"] = (weight.reshape(3, 4, 64).numpy(), "f32")
    return found


def test_what_the_gguf_package_writes_is_read(tmp_path: Path) -> None:
    file = GgufFile.open(written(tmp_path / "a.gguf", some_tensors()))
    assert file.version == 3
    assert file.metadata["general.architecture"] == "llama"
    for key, value in FIELDS.items():
        found = file.metadata[key]
        assert found == (value[1] if isinstance(value, tuple) else value), key
        assert type(found) is type(value[1] if isinstance(value, tuple) else value), key
    assert len(file.metadata) == len(FIELDS) + 1


def test_tensors_are_those_that_the_gguf_package_reads(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", some_tensors())
    theirs = {one.name: one for one in gguf.GGUFReader(path).tensors}
    file = GgufFile.open(path)
    assert list(file.tensors) == list(theirs)
    for name, info in file.tensors.items():
        assert info.shape == tuple(reversed(theirs[name].shape.tolist()))
        assert info.type == theirs[name].tensor_type.name.lower()
        assert info.nbytes == theirs[name].n_bytes
        assert file.raw(name).tobytes() == theirs[name].data.tobytes()
        values = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
        assert file.tensor(name).equal(torch.from_numpy(values.astype(np.float32)).reshape(info.shape))
        assert file.tensor(name, torch.bfloat16).dtype == torch.bfloat16


def test_raw_bytes_cannot_be_written_to(tmp_path: Path) -> None:
    file = GgufFile.open(written(tmp_path / "a.gguf", some_tensors()))
    with pytest.raises(ValueError, match="read-only"):
        file.raw("norm")[0] = 1


# Files built by hand: magic, version, counts, keys, tensor descriptions, padding, data.


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def listed(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(
    name: str | bytes = "t", sizes: Iterable[int] = (4,), kind: int = 0, offset: int = 0, dimensions: int | None = None
) -> bytes:
    sizes = list(sizes)
    count = len(sizes) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", count, *sizes, kind, offset)


def built(
    keys: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    keys, tensors = list(keys), list(tensors)
    counts = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data


def opened(tmp_path: Path, content: bytes) -> GgufFile:
    (tmp_path / "x.gguf").write_bytes(content)
    return GgufFile.open(tmp_path / "x.gguf")


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_built_by_hand_is_read(tmp_path: Path, version: int) -> None:
    nested = listed(9, 2, listed(4, 2, struct.pack("<2I", 7, 8)) + listed(8, 1, text("x")))
    keys = [key("general.alignment", 4, struct.pack("<I", 64)), key("n", 9, nested), key("none", 9, listed(8, 0))]
    floats = struct.pack("<4f", 1, 2, 3, 4)
    tensors = [tensor("b", (2, 2), offset=64), tensor("a", (4,), offset=0), tensor("one", (), offset=128)]
    content = built(keys, tensors, floats + bytes(48) + floats + bytes(48) + floats[:4], version=version, alignment=64)
    file = opened(tmp_path, content)
    assert file.version == version
    assert file.metadata["n"] == [[7, 8], ["x"]]
    assert file.metadata["none"] == []
    assert file.alignment == 64
    assert list(file.tensors) == ["b", "a", "one"]
    assert file.tensor("b").tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert file.tensor("one").shape == ()


def test_a_file_without_tensors_or_keys_is_read(tmp_path: Path) -> None:
    file = opened(tmp_path, built())
    assert not file.metadata
    assert not file.tensors


FOUR = bytes(16)
HUGE = (1 << 64) - 1
DEEP = listed(9, 1, listed(9, 1, listed(9, 1, listed(9, 1, listed(0, 0)))))

HOSTILE: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "too short": (b"GGUF" + bytes(19), "23 bytes"),
    "another file": (b"PK\3\4" + bytes(40), "no GGUF file"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n" + bytes(40), "git lfs pull"),
    "from before GGUF": (b"tjgg" + bytes(40), "before GGUF"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (built(version=1), "version 1"),
    "version 4": (built(version=4), "version 4"),
    "version 0": (built(version=0), "version 0"),
    "more tensors than bytes": (built(counts=(HUGE, 0)), "number of tensors is 18,446,744,073,709,551,615"),
    "more keys than bytes": (built(counts=(0, 5), data=bytes(40)), "number of keys is 5"),
    "key longer than the file": (built([struct.pack("<Q", 65_000) + b"a" * 20]), "truncated"),
    "key of 2^63 bytes": (built([struct.pack("<Q", 1 << 63) + b"a" * 20]), "1 to 65,535"),
    "empty key": (built([key("", 4, bytes(4))]), "1 to 65,535"),
    "key not UTF-8": (built([key(b"\xff\xfe", 4, bytes(4))]), "not UTF-8"),
    "key with a line break": (built([key("a\nb", 4, bytes(4))]), "control"),
    "key with NUL": (built([key("a\0b", 4, bytes(4))]), "control"),
    "key twice": (built([key("a", 4, bytes(4)), key("a", 4, bytes(4))]), "'a' comes twice"),
    "unknown kind": (built([key("a", 13, bytes(8))]), "kind of 'a' is 13"),
    "bool of 2": (built([key("a", 7, b"\2")]), "bool of 2"),
    "list with a bool of 2": (built([key("a", 9, listed(7, 2, b"\1\2"))]), "neither 0 nor 1"),
    "text longer than the file": (built([key("a", 8, struct.pack("<Q", 1 << 40))], data=bytes(64)), "truncated"),
    "text not UTF-8": (built([key("a", 8, text(b"\xc3\x28"))]), "not UTF-8"),
    "list longer than the file": (built([key("a", 9, listed(0, 100_000))], data=bytes(99)), "truncated"),
    "list of 2^64 items": (built([key("a", 9, listed(10, HUGE))]), "more than 1,048,576 items"),
    "list of an unknown kind": (built([key("a", 9, listed(77, 1, bytes(64)))]), "items of 'a' is 77"),
    "list of texts that end": (built([key("a", 9, listed(8, 1000, text("x") * 3))]), "truncated"),
    "lists nested without end": (built([key("a", 9, DEEP)]), "more than 4 deep"),
    "lists of lists that are too many": (
        built([key("a", 9, listed(9, 3, 3 * listed(0, 400_000, bytes(400_000))))]),
        "more than 1,048,576 items",
    ),
    "tensor name too long": (built([], [tensor("a" * 257)], FOUR), "1 to 256"),
    "tensor name empty": (built([], [tensor("")], FOUR), "1 to 256"),
    "tensor name with an escape": (built([], [tensor("\x1b[31m")], FOUR), "control"),
    "tensor twice": (built([], [tensor(), tensor(offset=32)], FOUR * 3), "'t' comes twice"),
    "five dimensions": (built([], [tensor(sizes=(1,) * 5)], FOUR), "5 dimensions"),
    "dimensions without end": (built([], [tensor(dimensions=1 << 31)], FOUR), "2,147,483,648 dimensions"),
    "a size of zero": (built([], [tensor(sizes=(4, 0))], FOUR), "at least 1"),
    "sizes that overflow": (built([], [tensor(sizes=(1 << 32, 1 << 32))], FOUR), "below 2"),
    "unknown type": (built([], [tensor(kind=31)], FOUR), "type 31, which no GGUF type has"),
    "row that is no whole block": (built([], [tensor(sizes=(40,), kind=2)], bytes(99)), "block of 32"),
    "offset not aligned": (built([], [tensor(offset=4)], FOUR * 9), "not a multiple of the alignment"),
    "offset beyond the file": (built([], [tensor(offset=1 << 40)], FOUR), "ends at byte"),
    "offset that overflows": (built([], [tensor(offset=HUGE - 31)], FOUR), "ends at byte"),
    "data cut off": (built([], [tensor()], FOUR[:-1]), "truncated"),
    "tensors that overlap": (
        built([], [tensor("a", (16,)), tensor("b", (4,), offset=32)], bytes(64)),
        "'b' begins at byte .* within tensor 'a'",
    ),
    "alignment of zero": (built([key("general.alignment", 4, bytes(4))]), "power of two"),
    "alignment of three": (built([key("general.alignment", 4, struct.pack("<I", 3))]), "power of two"),
    "alignment of text": (built([key("general.alignment", 8, text("x"))]), "power of two"),
    "alignment of true": (built([key("general.alignment", 7, b"\1")]), "power of two"),
    "alignment of a list": (built([key("general.alignment", 9, listed(4, 1, bytes(4)))]), "power of two"),
    "alignment of 2^31": (built([key("general.alignment", 4, struct.pack("<I", 1 << 31))]), "power of two"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_with_the_file_and_the_place_named(tmp_path: Path, case: str) -> None:
    content, words = HOSTILE[case]
    with pytest.raises(FileFormatError, match=words) as caught:
        opened(tmp_path, content)
    assert "x.gguf" in str(caught.value)
    assert len(str(caught.value)) < 700
    assert str(caught.value).isprintable()


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    content = built([key("a", 8, text("x")), key("b", 9, listed(8, 2, text("yy") * 2))], [tensor()], FOUR)
    opened(tmp_path, content)
    for length in range(len(content)):
        with pytest.raises(FileFormatError, match=r"x\.gguf"):
            opened(tmp_path, content[:length])


def test_a_header_past_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(FileFormatError, match="past 1,000 bytes"):
        opened(tmp_path, built([key("a", 8, text("x" * 1000))]))


def test_missing_files_folders_and_pipes_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no such file"):
        GgufFile.open(tmp_path / "none.gguf")
    with pytest.raises(MissingInputError, match="is a folder"):
        GgufFile.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileFormatError, match="not a regular file"):
        GgufFile.open(tmp_path / "pipe")


def test_a_type_that_is_not_decoded_and_a_tensor_that_is_not_there_are_named(tmp_path: Path) -> None:
    file = opened(tmp_path, built([], [tensor(sizes=(256,), kind=16)], bytes(66)))
    assert file.raw("t").size == 66
    with pytest.raises(FormatError, match=r"x\.gguf: t: iq2_xxs is not read; these are"):
        file.tensor("t")
    with pytest.raises(FileFormatError, match="no tensor 'u'"):
        file.tensor("u")

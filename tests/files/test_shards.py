"""safetensors files: byte fixtures, the safetensors package as independent reader and writer, and hostile headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from strop.errors import FileFormatError, MissingInputError, ModelError, StropError
from strop.files.shards import (
    DTYPES,
    Part,
    iter_tensors,
    read_file,
    read_header,
    read_rows,
    read_tensor,
    tensor_files,
    write_file,
    write_shards,
)


def raw_file(path: Path, header: object, data: bytes, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def one(**changes: object) -> dict:
    return {"a": {"dtype": "U8", "shape": [2, 2], "data_offsets": [0, 4]} | changes}


def equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype
        and mine[name].shape == theirs[name].shape
        and mine[name]
        .contiguous()
        .reshape(-1)
        .view(torch.uint8)
        .equal(theirs[name].contiguous().reshape(-1).view(torch.uint8))
        for name in mine
    )


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(3, 4, generator=generator) * 50).to(dtype)
        for name, dtype in DTYPES.items()
        if not name.startswith(("U16", "U32", "U64"))
    }
    return tensors | {
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 5),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }


def test_the_bytes_of_a_file_are_those_that_the_format_demands(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_file(path, [Part.of({"b": torch.tensor([1, 2], dtype=torch.int16)}), Part.of({"a": torch.tensor([[1.0]])})])
    header = (
        b'{"b":{"dtype":"I16","shape":[2],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1,1],"data_offsets":[4,8]}}'
    )
    padded = header + b" " * (-len(header) % 8)
    expected = len(padded).to_bytes(8, "little") + padded + b"\x01\x00\x02\x00" + b"\x00\x00\x80\x3f"
    assert path.read_bytes() == expected


def test_what_is_written_the_safetensors_package_reads_bit_for_bit(tmp_path: Path) -> None:
    write_file(tmp_path / "x.safetensors", [Part.of(some_tensors())], metadata={"format": "pt"})
    assert equal(load_file(tmp_path / "x.safetensors"), some_tensors())


def test_what_the_safetensors_package_writes_is_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert equal(read_file(tmp_path / "model.safetensors"), tensors)
    assert equal(dict(iter_tensors(tmp_path)), tensors)
    assert read_header(tmp_path / "model.safetensors").metadata == {"format": "pt"}
    assert read_tensor(tmp_path / "model.safetensors", "F16").equal(tensors["F16"])


def test_shards_are_split_at_the_limit_and_never_within_a_part(tmp_path: Path) -> None:
    parts = [
        Part.of({f"{i}.w": torch.full((8,), float(i)), f"{i}.s": torch.ones(2)}) for i in range(5)
    ]  # 40 bytes each
    paths = write_shards(tmp_path, parts, max_shard_bytes=100)
    assert [path.name for path in paths] == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [set(read_header(path).entries) for path in paths] == [
        {"0.w", "0.s", "1.w", "1.s"},
        {"2.w", "2.s", "3.w", "3.s"},
        {"4.w", "4.s"},
    ]
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"] == {"total_size": 200}
    assert {name: tensor[0].item() for name, tensor in iter_tensors(tmp_path) if name.endswith("w")} == {
        f"{i}.w": float(i) for i in range(5)
    }


def test_one_part_is_made_at_a_time(tmp_path: Path) -> None:
    alive: list[str] = []

    def part(name: str) -> Part:
        def make() -> dict[str, Tensor]:
            alive.append(name)
            return {name: torch.zeros(4)}

        return Part({name: (torch.float32, (4,))}, make)

    parts = [part("a"), part("b")]
    assert alive == []
    write_shards(tmp_path, parts)
    assert alive == ["a", "b"]


def test_a_part_that_makes_other_tensors_than_announced_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced"):
        write_shards(tmp_path, [Part({"a": (torch.float32, (4,))}, lambda: {"a": torch.zeros(5)})])
    with pytest.raises(ValueError, match="twice"):
        write_shards(tmp_path, [Part.of({"a": torch.zeros(1)}), Part.of({"a": torch.zeros(1)})])


HOSTILE = {
    "no bytes": (b"", "0 bytes"),
    "length beyond the file": ((1 << 40).to_bytes(8, "little") + b"{}", "header length 1,099,511,627,776"),
    "length of all ones": (b"\xff" * 8 + b"{}", "header length"),
    "not JSON": ((4).to_bytes(8, "little") + b"{{{{", "header"),
    "not an object": ((2).to_bytes(8, "little") + b"[]", "header"),
    "leading space": ((3).to_bytes(8, "little") + b" {}", "header"),
    "not UTF-8": ((4).to_bytes(8, "little") + b'{"\xff"', "header"),
    "deep nesting": ((200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995, "header"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_with_the_file_named(tmp_path: Path, case: str) -> None:
    content, words = HOSTILE[case]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(FileFormatError, match=words) as caught:
        read_header(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value)


FIELDS = {
    "dtype": (one(dtype="F9"), "dtype 'F9'"),
    "dtype of another type": (one(dtype=3), "dtype 3"),
    "negative size": (one(shape=[-2, -2]), "shape"),
    "true as a size": (one(shape=[True, 4]), "shape"),
    "fractional size": (one(shape=[2.0, 2]), "shape"),
    "shape no list": (one(shape="22"), "shape"),
    "size past 63 bits": (one(shape=[1 << 70]), "shape"),
    "sizes whose product overflows": (one(shape=[1 << 62, 1 << 62]), "data_offsets span 4 bytes"),
    "span too short": (one(data_offsets=[0, 3]), "data_offsets span 3 bytes"),
    "backwards": (one(data_offsets=[4, 0]), "data_offsets"),
    "negative offset": (one(data_offsets=[-4, 0]), "data_offsets"),
    "three offsets": (one(data_offsets=[0, 4, 8]), "data_offsets"),
    "missing field": ({"a": {"dtype": "U8", "shape": [4]}}, "shape and data_offsets"),
    "another field": (one(extra=1), "shape and data_offsets"),
    "entry no object": ({"a": [1]}, "shape and data_offsets"),
    "metadata no object": ({"__metadata__": 1}, "__metadata__"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, "__metadata__"),
    "truncated": (one(shape=[5], data_offsets=[0, 5]), "truncated"),
    "bytes of no tensor": (one(shape=[3], data_offsets=[0, 3]), "belong to no tensor"),
    "gap": (one(shape=[3], data_offsets=[1, 4]), "leaves a gap"),
    "overlap": (one() | {"b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}, "overlaps"),
    "same bytes twice": (one() | {"b": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, "overlaps"),
    "beyond the file": (one() | {"b": {"dtype": "U8", "shape": [1], "data_offsets": [1 << 40, (1 << 40) + 1]}}, "gap"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_wrong_field_is_refused_by_name(tmp_path: Path, case: str) -> None:
    header, words = FIELDS[case]
    path = raw_file(tmp_path / "x.safetensors", header, b"\0" * 4)
    with pytest.raises(FileFormatError, match=words) as caught:
        read_header(path)
    assert "x.safetensors" in str(caught.value)


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    entry = b'{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
    path = raw_file(tmp_path / "x.safetensors", b'{"a":' + entry + b',"a":' + entry + b"}", b"\0" * 4)
    with pytest.raises(FileFormatError, match="'a' comes twice"):
        read_header(path)


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.float16)}, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    for length in range(len(good)):
        (tmp_path / "bad.safetensors").write_bytes(good[:length])
        with pytest.raises(FileFormatError, match=r"bad\.safetensors"):
            read_file(tmp_path / "bad.safetensors")


@settings(deadline=None, max_examples=120)
@given(place=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_of_the_header_is_refused_or_leaves_a_readable_file(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.int8)}, folder / "model.safetensors")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[place % (len(content) - 22)] = value  # the length or the header, never the data
    (folder / "model.safetensors").write_bytes(content)
    try:
        tensors = read_file(folder / "model.safetensors")
    except StropError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) == 22


def test_no_weights_pickled_weights_and_no_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no such folder"):
        tensor_files(tmp_path / "none")
    with pytest.raises(ModelError, match="holds no weights"):
        tensor_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelError, match=r"pickle.*runs the code"):
        tensor_files(tmp_path)


def sharded(folder: Path) -> Path:
    write_shards(folder, [Part.of({name: torch.ones(4)}) for name in "abc"], max_shard_bytes=20)
    return folder / "model.safetensors.index.json"


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    fields = json.loads(index.read_text())
    fields["weight_map"]["ghost"] = fields["weight_map"]["a"]
    del fields["weight_map"]["b"]
    fields["weight_map"]["c2"] = fields["weight_map"].pop("c")
    index.write_text(json.dumps(fields))
    with pytest.raises(FileFormatError) as caught:
        tensor_files(tmp_path)
    assert "ghost is in the index and not in the file" in str(caught.value)
    assert "c is in the file and not in the index" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("../secret", FileFormatError),
        ("/etc/passwd", FileFormatError),
        ("model-9.safetensors", ModelError),
        (3, FileFormatError),
    ],
)
def test_an_index_that_names_other_files_is_refused(tmp_path: Path, name: object, error: type[Exception]) -> None:
    index = sharded(tmp_path)
    fields = json.loads(index.read_text())
    fields["weight_map"]["a"] = name
    index.write_text(json.dumps(fields))
    with pytest.raises(error):
        list(iter_tensors(tmp_path))


def test_some_rows_of_a_tensor_are_read_alone(tmp_path: Path) -> None:
    held = torch.arange(24, dtype=torch.bfloat16).reshape(6, 2, 2)
    path = tmp_path / "a.safetensors"
    write_file(path, [Part.of({"before": torch.ones(3), "held": held})])
    header = read_header(path)
    assert torch.equal(read_rows(path, "held", 1, 4, header=header), held[1:4])
    assert read_rows(path, "held", 6, 6, header=header).shape == (0, 2, 2)
    with pytest.raises(FileFormatError, match="no tensor 'other'"):
        read_rows(path, "other", 0, 1, header=header)

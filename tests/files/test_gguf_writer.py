from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from strop.errors import DiskFullError, FormatError, UsageError
from strop.files.gguf.mixtures import FILE_TYPES, Mixture, parse_export_format
from strop.files.gguf.reader import GgufFile
from strop.files.gguf.writer import (
    TensorToWrite,
    atomic_file,
    check_disk,
    check_file_target,
    file_bytes,
    header_bytes,
    write_gguf,
)


def _tensor(name: str, shape: tuple[int, ...], values: np.ndarray | None = None) -> TensorToWrite:
    made = np.arange(np.prod(shape), dtype="<f4") if values is None else values
    return TensorToWrite(name, "f32", shape, lambda: iter([made.view(np.uint8)]))


def test_a_file_is_these_bytes(tmp_path: Path) -> None:
    with (tmp_path / "a.gguf").open("wb") as file:
        write_gguf(file, {"k": 7, "list": ["x", ""]}, [_tensor("t", (2, 3))])
    head = (
        b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
        + struct.pack("<Q", 1) + b"k" + struct.pack("<II", 4, 7)
        + struct.pack("<Q", 4) + b"list" + struct.pack("<IIQ", 9, 8, 2)
        + struct.pack("<Q", 1) + b"x" + struct.pack("<Q", 0)
        + struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 3, 2, 0, 0)
    )  # fmt: skip
    head += b"\0" * (-len(head) % 32)
    data = struct.pack("<6f", 0, 1, 2, 3, 4, 5)
    assert (tmp_path / "a.gguf").read_bytes() == head + data + b"\0" * 8


def test_every_kind_of_value_reads_back_in_the_gguf_package_and_ours(tmp_path: Path) -> None:
    import gguf

    values = {
        "general.architecture": "llama",
        "small": 3,
        "large": 1 << 40,
        "negative": -5,
        "real": 0.25,
        "yes": True,
        "text": "ünï\n",
        "texts": ["a", "", "▁"],
        "whole": [-1, 2],
        "reals": [0.5, -1.5],
        "flags": [True, False],
        "raw": b"\x00\xff",
    }
    path = tmp_path / "a.gguf"
    tensors = [_tensor("a", (3, 5)), _tensor("b", (2,)), _tensor("c", (2, 2, 4))]
    with path.open("wb") as file:
        write_gguf(file, values, tensors)
    theirs = gguf.GGUFReader(path)
    ours = GgufFile.open(path)
    for key, value in values.items():
        wanted = list(value) if isinstance(value, bytes) else value
        assert theirs.fields[key].contents() == wanted
        assert ours.metadata[key] == wanted
    assert [tuple(reversed(tensor.shape.tolist())) for tensor in theirs.tensors] == [(3, 5), (2,), (2, 2, 4)]
    assert [tensor.data_offset % 32 for tensor in theirs.tensors] == [0, 0, 0]
    assert np.array_equal(theirs.tensors[2].data, np.arange(16, dtype=np.float32).reshape(2, 2, 4))
    assert path.stat().st_size == file_bytes(
        values, [_tensor("a", (3, 5)), _tensor("b", (2,)), _tensor("c", (2, 2, 4))]
    )


def test_a_tensor_is_made_when_its_turn_comes_and_in_pieces(tmp_path: Path) -> None:
    log: list[str] = []

    def pieces(name: str) -> Iterator[np.ndarray]:
        for row in range(2):
            log.append(f"{name}{row}")
            yield np.full(16, row, np.uint8)

    tensors = [TensorToWrite(name, "f32", (2, 4), lambda name=name: pieces(name)) for name in "ab"]
    with (tmp_path / "a").open("wb") as file:
        write_gguf(file, {}, tensors, told=lambda done, name: log.append(f"{done} {name}"))
    assert log == ["a0", "a1", "1 a", "b0", "b1", "2 b"]


def test_a_tensor_of_another_size_than_announced_is_refused(tmp_path: Path) -> None:
    wrong = TensorToWrite("t", "f32", (2, 2), lambda: iter([np.zeros(12, np.uint8)]))
    with (tmp_path / "a").open("wb") as file, pytest.raises(ValueError, match="12 bytes were made, 16 announced"):
        write_gguf(file, {}, [wrong])
    with pytest.raises(ValueError, match="'t' is to be written twice"):
        header_bytes({}, [_tensor("t", (1,)), _tensor("t", (1,))])
    with pytest.raises(ValueError, match="63 bytes"):
        header_bytes({}, [_tensor("t" * 64, (1,))])


def test_a_file_stands_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "m.gguf"
    for stop in (KeyboardInterrupt, ValueError):
        with pytest.raises(stop):
            _stopped(target, stop, overwrite=False)
        assert list((tmp_path / "deep").iterdir()) == []
    with atomic_file(target) as temporary:
        temporary.write_bytes(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(KeyboardInterrupt):
        _stopped(target, KeyboardInterrupt, overwrite=True)
    assert target.read_bytes() == b"whole"
    assert [path.name for path in target.parent.iterdir()] == ["m.gguf"]


def test_targets_that_cannot_be_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name, said in (
        ("there", "stands there already"),
        ("link", "is a link"),
        (".", "is a folder"),
        ("new/", "no name of a file"),
        ("a\0b", "no name of a file"),
        ("there/below", "is a file, and the output needs a folder"),
    ):
        with pytest.raises(UsageError, match=said):
            check_file_target(f"{tmp_path}/{name}")
    assert check_file_target(tmp_path / "there", overwrite=True) == tmp_path / "there"


def test_a_disk_without_room_is_named_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 5_000_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    check_disk(tmp_path / "not" / "yet", 3_000_000)
    with pytest.raises(DiskFullError, match=r"takes 6,000,000 bytes, and 5,000,000 are free"):
        check_disk(tmp_path, 6_000_000)


# --- which type a tensor takes ----------------------------------------------------------------------------------------


def test_vectors_routers_and_positions_stay_f32_in_every_format() -> None:
    for name in FILE_TYPES:
        mixture = Mixture(name, 8, 4, tied=False)
        assert mixture.choose("blk.0.attn_norm.weight", (256,)).type == "f32"
        assert mixture.choose("blk.0.attn_q.bias", (256,)).type == "f32"
        assert mixture.choose("blk.0.ffn_gate_inp.weight", (4, 256)).type == "f32"
        assert mixture.choose("position_embd.weight", (64, 256)).type == "f32"


def test_the_mixture_spends_more_on_the_ends_and_every_third_block_between() -> None:
    mixture = Mixture("q4_k_m", 32, 0, tied=True)
    more = [block for block in range(32) if mixture.choose(f"blk.{block}.ffn_down.weight", (256, 256)).type == "q6_k"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert mixture.choose("blk.0.ffn_up.weight", (256, 256)).type == "q4_k"
    assert mixture.choose("token_embd.weight", (256, 256)).type == "q6_k"
    assert Mixture("q4_k_m", 32, 0, tied=False).choose("token_embd.weight", (256, 256)).type == "q4_k"


def test_a_row_that_is_no_whole_number_of_blocks_takes_another_type_and_says_why() -> None:
    chosen = Mixture("q4_k", 2, 0, tied=False).choose("blk.0.ffn_up.weight", (8, 96))
    assert (chosen.type, chosen.reason) == ("q5_0", "rows of 96 values are no whole blocks of q4_k")
    assert Mixture("q8_0", 2, 0, tied=False).choose("blk.0.ffn_up.weight", (8, 100)).type == "f16"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("q4_k_m", "did you mean gguf:q4_k_m"),
        ("int4-g32", "a container is needed"),
        ("mlx:int4", "files of the kind 'mlx' are not written"),
        ("gguf:q4km", r"unknown \(did you mean 'q4_k_m'\?\)"),
    ],
)
def test_a_format_that_is_none_is_refused_with_those_there_are(text: str, said: str) -> None:
    with pytest.raises(FormatError, match=f"{said}.*gguf:q8_0"):
        parse_export_format(text)


def _stopped(target: Path, stop: type[BaseException], *, overwrite: bool) -> None:
    with atomic_file(target, overwrite=overwrite) as temporary:
        temporary.write_bytes(b"half")
        raise stop


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

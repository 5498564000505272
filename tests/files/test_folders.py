"""Folders stand whole or not at all; digests find changed bytes; names stay below their root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from strop.errors import FileFormatError, MissingInputError, UsageError
from strop.files import folders
from strop.files.folders import (
    atomic_folder,
    check_manifest,
    inside,
    read_json,
    sha256_file,
    sha256_files,
    write_manifest,
)


def listing(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() if path.is_file() else "/" for path in folder.iterdir()}


def test_a_folder_takes_its_name_only_when_the_block_has_ended(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as folder:
        (folder / "a.txt").write_text("one")
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text("two")
        assert not target.exists()
        assert folder.parent == target.parent
    assert listing(target) == {"a.txt": "one", "sub": "/"}
    assert os.listdir(target.parent) == ["out"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~folders._umask()


def write_half(target: Path, error: type[BaseException], *, overwrite: bool = False) -> None:
    with atomic_folder(target, overwrite=overwrite) as folder:
        (folder / "good.txt").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_in_the_middle_leaves_no_trace(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write_half(tmp_path / "out", error)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_the_old_folder_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "good.txt").write_text("good")
    with pytest.raises(error):
        write_half(target, error, overwrite=True)
    assert listing(target) == {"good.txt": "good"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchanged", "set-aside"])
def test_an_overwritten_folder_is_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
        assert listing(target) == {"old.txt": "old"}
    assert listing(target) == {"new.txt": "new"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    rename = os.rename

    def fails_on_the_new_one(source: Path, destination: Path) -> None:
        if Path(source).name.endswith(".part"):
            raise OSError("no space")
        rename(source, destination)

    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fails_on_the_new_one)
    with pytest.raises(OSError, match="no space"), atomic_folder(target, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert listing(target) == {"old.txt": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_every_file_and_directory_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    sync, give_name = folders.sync, folders._give_name
    monkeypatch.setattr(folders, "sync", lambda path: (seen.append(Path(path).name), sync(path)))
    monkeypatch.setattr(folders, "_give_name", lambda one, other: (seen.append("rename"), give_name(one, other)))
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("")
    at = seen.index("rename")
    assert {"a", "b", "sub", folder.name} <= set(seen[:at])
    assert seen[at + 1 :] == [tmp_path.name]


def test_a_target_that_holds_files_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    with pytest.raises(UsageError, match="already holds files"), atomic_folder(target):
        pytest.fail("the block must not run")
    assert listing(target) == {"precious": "x"}


def test_an_empty_folder_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert listing(tmp_path / "out") == {"a": "1"}


def test_a_file_or_a_link_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name, words in (("file", "is a file"), ("link", "is a link")):
        with pytest.raises(UsageError, match=words), atomic_folder(tmp_path / name, overwrite=True):
            pytest.fail("the block must not run")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    both = {"x": tmp_path / "abc", "y": tmp_path / "abc"}
    assert sha256_files(both) == sha256_files(dict(reversed(both.items())))
    assert sha256_files(both) != sha256_files({"x": tmp_path / "abc"})


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", "a\0b", "..\\x", "C:\\x", "C:x"])
def test_a_name_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileFormatError, match="refused"):
        inside(tmp_path, name)


def test_a_link_that_leaves_its_folder_is_refused_and_one_within_is_followed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("s")
    (root / "inner").write_text("i")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "within").symlink_to(root / "inner")
    with pytest.raises(FileFormatError, match="through a link"):
        inside(root, "out")
    assert inside(root, "within").read_text() == "i"


def test_the_hubs_own_links_into_its_blobs_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "123").write_text("weights")
    (snapshot / "model.safetensors").symlink_to(blobs / "123")
    assert inside(snapshot, "model.safetensors").read_text() == "weights"


def test_a_manifest_finds_every_single_changed_byte(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(range(40)))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("b")
    write_manifest(tmp_path)
    check_manifest(tmp_path)
    good = (tmp_path / "a.bin").read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        (tmp_path / "a.bin").write_bytes(bad)
        with pytest.raises(FileFormatError, match=r"a\.bin: its bytes changed"):
            check_manifest(tmp_path)
    (tmp_path / "a.bin").write_bytes(good)
    check_manifest(tmp_path)


def test_a_manifest_names_all_files_that_differ_at_once(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path)
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_text("longer")
    (tmp_path / "d").write_text("new")
    with pytest.raises(FileFormatError, match="3 file") as caught:
        check_manifest(tmp_path)
    assert all(
        words in str(caught.value) for words in ("a: missing", "b: 6 bytes, 1 were written", "d: not in the manifest")
    )


def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    folders.write_json(tmp_path / "manifest.json", {"files": {"../x": {"bytes": 1, "sha256": ""}}})
    with pytest.raises(FileFormatError, match="refused"):
        check_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "[" * 100_000, "\ud800".encode("utf-16-le", "surrogatepass")])
def test_broken_json_is_named(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FileFormatError, match=r"x\.json"):
        read_json(path)
    with pytest.raises(MissingInputError, match="no such file"):
        read_json(tmp_path / "none.json")

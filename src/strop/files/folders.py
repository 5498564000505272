"""Folders that stand whole or not at all, digests of what is in them, and names that stay below their root.

A model, an adapter and a checkpoint are folders. `atomic_folder` writes one into a temporary sibling, flushes every
file and directory to the disk, and only then gives it its name, so that a reader never sees half of it.
`write_manifest` and `check_manifest` keep the SHA-256 of every file beside it: safetensors carries no checksum, and
four in five changed bytes would load in silence. `inside` refuses a file name that would leave its folder.

Not here: what the files hold (`shards.py`, `saving.py`), and locks between processes that write the same folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from strop.errors import FileFormatError, MissingInputError, UsageError

MANIFEST = "manifest.json"
"""The name of the file that holds the digests of all others in its folder."""

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.(?P<kind>part|old)")


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder to write into, which takes the name `path` when the block ends without an exception.

    Every file and directory is flushed (fsync) before the rename, and the parent directory after it. When the block
    raises, Ctrl-C included, the temporary folder is removed and whatever stood at `path` is untouched. With `overwrite`
    the old folder stands until the new one has its name: they are exchanged in one step where the system can (Linux),
    else the old one is set aside for the moment of the rename and put back if that fails.

    Args:
        path: where the folder is to stand. Missing parents are made. An empty folder there counts as none.
        overwrite: replace what stands at `path`.

    Yields:
        The temporary folder, a sibling of `path` on the same file system.

    Raises:
        UsageError: something stands at `path` and `overwrite` is not set, or `path` is a file or a link.
    """
    target = Path(os.path.abspath(path))
    check_target(target, overwrite=overwrite)
    _make_parents(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private; the folder it becomes should not be
        yield temporary
        _flush(temporary)
        check_target(target, overwrite=overwrite)  # another process may have been there meanwhile
        _give_name(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def clear_leftovers(parent: Path) -> None:
    """Remove what killed processes left of `atomic_folder` below `parent`; an old folder set aside is put back.

    Only for a folder that no other process writes into at the time.
    """
    if not parent.is_dir():
        return
    for path in list(parent.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        aside, target = path / match["name"], parent / match["name"]
        if match["kind"] == "old" and aside.is_dir() and not target.exists():
            os.rename(aside, target)
            sync(parent)
        shutil.rmtree(path, ignore_errors=True)


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse an output path that `atomic_folder` could not take, before any work is done.

    Raises:
        UsageError: as `atomic_folder`.
    """
    target = Path(os.path.abspath(path))
    if target.is_symlink():
        raise UsageError(f"{path}: is a link, and a folder cannot replace it; name the folder that it points to")
    if target.is_file():
        raise UsageError(f"{path}: is a file, a folder is to be written there; choose another output")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UsageError(f"{path}: already holds files; choose another output, or replace it (--overwrite)")


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(files: dict[str, Path]) -> str:
    """Return one SHA-256 for several files: that of the lines ``<sha256>  <name>``, sorted by name."""
    lines = "".join(f"{sha256_file(path)}  {name}\n" for name, path in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def inside(root: str | os.PathLike[str], name: str, *, where: str = "") -> Path:
    """Return the path of the file `name` below `root`.

    Args:
        root: the folder that must not be left.
        name: a relative path, as some file of the folder gives it.
        where: what gave the name, for the message.

    Raises:
        FileFormatError: the name is empty, absolute, holds NUL, a backslash or `..`, or passes through a link that
            leaves `root`.
    """
    place = f"{where}: " if where else ""
    parts = name.replace("\\", "/").split("/")
    if not name or "\0" in name or "\\" in name or name.startswith("/") or ":" in parts[0] or ".." in parts:
        raise FileFormatError(f"{place}the file name {name!r} is not a relative path below its folder; refused")
    path = Path(root) / name
    if not path.resolve().is_relative_to(Path(root).resolve()) and not _is_hub_link(Path(root), path):
        raise FileFormatError(f"{place}the file name {name!r} leads out of {root} through a link; refused")
    return path


def write_json(path: Path, value: object) -> None:
    """Write `value` as readable JSON (UTF-8, two spaces, a newline at the end)."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """Read a JSON file whose top is an object.

    Raises:
        MissingInputError: there is no such file.
        FileFormatError: it is not UTF-8, not JSON, nested without end, or its top is no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise FileFormatError(f"{path}: holds a JSON {type(value).__name__}, an object is needed")
    return value


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: the bytes and the SHA-256 of every other file below `folder`."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in _files(folder)
        if path != folder / MANIFEST
    }
    write_json(folder / MANIFEST, {"files": files})


def check_manifest(folder: Path) -> None:
    """Compare every file below `folder` with its `manifest.json`.

    Raises:
        MissingInputError: there is no manifest.
        FileFormatError: files are missing, changed or not listed; all of them are named.
    """
    listed = read_json(folder / MANIFEST).get("files")
    if not isinstance(listed, dict):
        raise FileFormatError(f"{folder / MANIFEST}: 'files' is {listed!r}, an object is needed")
    problems = []
    for name, entry in sorted(listed.items()):
        path = inside(folder, name, where=str(folder / MANIFEST))
        if not isinstance(entry, dict):
            problems.append(f"{name}: its entry is {entry!r}, an object is needed")
        elif not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != entry.get("bytes"):
            problems.append(f"{name}: {path.stat().st_size} bytes, {entry.get('bytes')} were written")
        elif sha256_file(path) != entry.get("sha256"):
            problems.append(f"{name}: its bytes changed since they were written (SHA-256 differs)")
    here = {path.relative_to(folder).as_posix() for path in _files(folder)} - {MANIFEST}
    problems += [f"{name}: not in the manifest" for name in sorted(here - listed.keys())]
    if problems:
        raise FileFormatError(
            f"{folder}: {len(problems)} file(s) differ from {MANIFEST}:\n  " + "\n  ".join(problems) + "\n"
            "Use another copy of this folder."
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _is_hub_link(root: Path, path: Path) -> bool:
    """The hub's cache holds `snapshots/<revision>/<file>` as links into `blobs/` of the same repository."""
    return root.parent.name == "snapshots" and path.resolve().parent == (root.parent.parent / "blobs").resolve()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(folder: Path) -> None:
    for directory, _, names in os.walk(folder):
        for name in names:
            sync(os.path.join(directory, name))
        sync(directory)


def _make_parents(folder: Path) -> None:
    """Make a folder and those above it, each name flushed to the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file or a folder to the disk."""
    if sys.platform == "win32" and os.path.isdir(path):
        return  # directories cannot be opened there
    handle = os.open(path, os.O_RDONLY if sys.platform != "win32" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _give_name(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
    elif _exchange(temporary, target):
        sync(target.parent)  # before the old folder goes: else a power cut could leave the old name with its remains
        shutil.rmtree(temporary, ignore_errors=True)  # it holds the old folder now
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        sync(target.parent)
        os.rename(target, aside / target.name)
        sync(aside)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(aside / target.name, target)
            aside.rmdir()
            raise
        sync(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
    sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0

"""A file system that forgets: calls that change files are recorded, then a crash after any of them is laid out again.

    record(root)    patches open, os.* and the exchange of `strop.files.folders` while real code writes below `root`
    Disk            plays the calls back; what was not flushed may or may not have reached the disk

The model: a file's data are on the disk as of its last fsync; later data may be whole, cut, zeros or missing. A
folder's entries are on the disk as of its last fsync; of the later changes any prefix, or any subset that keeps each
rename whole, may be. A rename and an exchange happen whole or not at all.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import io
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from strop.files import folders

Call = tuple[Any, ...]  # (name, path, ...): paths relative to the root


class _Recorded(io.FileIO):
    """A file opened for writing whose writes are noted."""

    calls: list[Call]
    place: str

    def write(self, data: Any) -> int:
        self.calls.append(("write", self.place, self.tell(), bytes(data)))
        return super().write(data)


@contextlib.contextmanager
def record(root: Path, *, exchange: bool = True) -> Iterator[list[Call]]:
    """Note all changes below `root`; `exchange`: whether the file system can swap two folders in one step."""
    calls: list[Call] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")}
    real_open, real_exchange = builtins.open, folders._exchange

    def place(path: Any, dir_fd: int | None = None) -> str | None:
        full = (
            os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path) if dir_fd is not None else os.path.abspath(path)
        )
        return os.path.relpath(full, root) if Path(full).is_relative_to(root) else None

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        where = place(file) if isinstance(file, str | os.PathLike) else None
        if where is None or mode not in ("w", "wb"):
            return real_open(file, mode, *args, **options)
        calls.append(("create", where))
        raw = _Recorded(file, "w")
        raw.calls, raw.place = calls, where
        buffered = io.BufferedWriter(raw, 4096)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")

    def fsync(handle: int) -> None:
        real["fsync"](handle)
        if (where := place(os.readlink(f"/proc/self/fd/{handle}"))) is not None:
            calls.append(("fsync", where))

    def one(name: str) -> Any:
        def call(path: Any, *args: Any, dir_fd: int | None = None, **options: Any) -> None:
            where = place(path, dir_fd)
            real[name](path, *args, dir_fd=dir_fd, **options)
            if where is not None:
                calls.append((name, where))

        return call

    def two(name: str) -> Any:
        def call(source: Any, target: Any) -> None:
            real[name](source, target)
            calls.append(("rename", place(source), place(target)))

        return call

    def exchanged(left: Path, right: Path) -> bool:
        if not exchange or not real_exchange(left, right):
            return False
        calls.append(("exchange", place(left), place(right)))
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        patch.setattr(os, "fsync", fsync)
        for name in ("mkdir", "rmdir", "unlink"):
            patch.setattr(os, name, one(name))
        for name in ("rename", "replace"):
            patch.setattr(os, name, two(name))
        patch.setattr(folders, "_exchange", exchanged)
        yield calls


@dataclass
class Node:
    """A file (`data`) or a folder (`entries`), as programs see it and as it lay at its last fsync."""

    folder: bool
    data: bytes = b""
    synced: bytes = b""
    entries: dict[str, Node] = field(default_factory=dict)


Change = list[tuple[Node, str, Node | None]]  # entries set or removed together


class Disk:
    """The state after some calls; `pending` are changes of entries that no fsync has made certain, in order."""

    def __init__(self, start: Path) -> None:
        self.root = self._load(start)
        self.durable: dict[int, dict[str, Node]] = {}
        self.pending: list[Change] = []
        for node in self._all(self.root):
            if node.folder:
                self.durable[id(node)] = dict(node.entries)

    def _load(self, path: Path) -> Node:
        if path.is_dir():
            return Node(True, entries={child.name: self._load(child) for child in path.iterdir()})
        return Node(False, path.read_bytes(), path.read_bytes())

    def _all(self, node: Node) -> Iterator[Node]:
        yield node
        for child in node.entries.values():
            yield from self._all(child)

    def find(self, place: str) -> Node:
        node = self.root
        for part in Path(place).parts:
            node = node.entries[part]
        return node

    def _change(self, *changes: tuple[str, Node | None]) -> None:
        together: Change = []
        for place, node in changes:
            parent, name = self.find(os.path.dirname(place)), os.path.basename(place)
            together.append((parent, name, node))
        for parent, name, node in together:
            if node is None:
                parent.entries.pop(name, None)
            else:
                parent.entries[name] = node
        self.pending.append(together)

    def play(self, call: Call) -> None:
        name, place = call[0], call[1]
        if name in ("create", "mkdir"):
            node = Node(name == "mkdir")
            self.durable[id(node)] = {}
            self._change((place, node))
        elif name == "write":
            node, offset, data = self.find(place), call[2], call[3]
            node.data = node.data[:offset].ljust(offset, b"\0") + data + node.data[offset + len(data) :]
        elif name in ("unlink", "rmdir"):
            self._change((place, None))
        elif name == "rename":
            self._change((call[2], self.find(place)), (place, None))
        elif name == "exchange":
            left, right = self.find(place), self.find(call[2])
            self._change((place, right), (call[2], left))
        elif name == "fsync":
            node = self.find(place)
            if node.folder:
                self._make_certain(node)
            else:
                node.synced = node.data

    def _make_certain(self, folder: Node) -> None:
        """The folder's changes, and what was changed together with them, are on the disk."""
        rest = []
        for change in self.pending:
            if any(parent is folder for parent, _, _ in change):
                self._apply(self.durable, change)
            else:
                rest.append(change)
        self.pending = rest

    @staticmethod
    def _apply(entries: dict[int, dict[str, Node]], change: Change) -> None:
        for parent, name, node in change:
            if node is None:
                entries.setdefault(id(parent), {}).pop(name, None)
            else:
                entries.setdefault(id(parent), {})[name] = node

    def lay_out(self, target: Path, kept: list[bool], data: str) -> None:
        """Write what a crash may leave: of the pending changes those in `kept`; unsynced data as `data` says."""
        entries = copy.copy(self.durable)
        entries = {key: dict(value) for key, value in entries.items()}
        for change, keep in zip(self.pending, kept, strict=True):
            if keep:
                self._apply(entries, change)
        self._write(self.root, target, entries, data)

    def _write(self, node: Node, path: Path, entries: dict[int, dict[str, Node]], data: str) -> None:
        if node.folder:
            path.mkdir(exist_ok=True)
            for name, child in entries.get(id(node), {}).items():
                self._write(child, path / name, entries, data)
            return
        content = node.data
        if node.synced != node.data:
            half = max(len(node.synced), len(node.data) // 2)
            content = {
                "lost": node.synced,
                "cut": node.data[:half],
                "zeros": node.data[:half].ljust(len(node.data), b"\0"),
                "whole": node.data,
            }[data]
        path.write_bytes(content)

    def crashes(self, draw: random.Random) -> Iterator[tuple[list[bool], str]]:
        """What may be left: nothing pending, all of it, prefixes, random subsets; each with other losses of data."""
        count = len(self.pending)
        prefixes = {0, count, *draw.sample(range(count + 1), min(2, count + 1))}
        choices = [[index < length for index in range(count)] for length in sorted(prefixes)]
        choices += [[draw.random() < 0.5 for _ in range(count)] for _ in range(2 if count > 1 else 0)]
        ways = ["lost", "cut", "zeros", "whole"]
        for number, kept in enumerate(choices):
            yield kept, ways[number % 4]
        yield [True] * count, "cut"
        yield [True] * count, "whole"  # the process died, the machine did not

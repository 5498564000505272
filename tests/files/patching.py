"""GGUF files and patches built byte by byte, for the tests of patches."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from strop.files.gguf.patch import PatchFile, Summary, write_patch
from strop.files.gguf.reader import GgufFile
from strop.files.gguf.types import TYPES


class Part(NamedTuple):
    """A tensor of one row."""

    name: str
    type: str
    raw: bytes

    @property
    def columns(self) -> int:
        kind = TYPES[self.type]
        return len(self.raw) // kind.block_bytes * kind.block


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def gguf_bytes(
    parts: Sequence[Part],
    keys: Sequence[tuple[str, str]] = (),
    *,
    order: Sequence[int] | None = None,
    filler: bytes = b"\0",
    extra: int = 0,
    tail: bytes = b"",
) -> bytes:
    """A file: `order` is that of the data, `extra` rows of 32 bytes lie between tensors, `filler` fills every gap."""
    offset, offsets, data = 0, {}, b""
    for number in order if order is not None else range(len(parts)):
        offsets[number] = len(data)
        data += parts[number].raw
        data += filler * (-len(data) % 32 + 32 * extra)
        offset = len(data)
    assert offset == len(data)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(parts), len(keys))
    head += b"".join(text(key) + struct.pack("<I", 8) + text(value) for key, value in keys)
    for number, part in enumerate(parts):
        head += text(part.name) + struct.pack("<IQ", 1, part.columns)
        head += struct.pack("<IQ", TYPES[part.type].number, offsets[number])
    return head + filler * (-len(head) % 32) + data + tail


def raw_of(kind: str, blocks: int, seed: int) -> bytes:
    """Random bytes of so many blocks."""
    return np.random.default_rng(seed).bytes(blocks * TYPES[kind].block_bytes)


def sealed(*, base: bytes, tuned: bytes, body: bytes, changed: Mapping[str, object] = MappingProxyType({})) -> bytes:
    """A patch of version 1 with this body, fields of its header `changed`, and a digest that fits."""
    stamps = {
        "base": {"bytes": len(base), "sha256": hashlib.sha256(base).hexdigest()},
        "made_by": "test",
        "tuned": {"bytes": len(tuned), "sha256": hashlib.sha256(tuned).hexdigest()},
    }
    header = json.dumps({**stamps, **changed}, separators=(",", ":")).encode()
    whole = b"STRPATCH" + struct.pack("<II", 1, len(header)) + header + body
    return whole + hashlib.sha256(whole).digest()


def patch_bytes(folder: Path, base: bytes, tuned: bytes) -> bytes:
    """What `write_patch` makes of two files."""
    for name, content in (("base.gguf", base), ("tuned.gguf", tuned)):
        (folder / name).write_bytes(content)
    with (folder / "made.patch").open("wb") as file:
        write_patch(file, GgufFile.open(folder / "base.gguf"), GgufFile.open(folder / "tuned.gguf"), made_by="test")
    return (folder / "made.patch").read_bytes()


def restored(folder: Path, base: bytes, patch: bytes) -> bytes:
    """What a patch makes of a base, however it ends."""
    (folder / "base.gguf").write_bytes(base)
    (folder / "read.patch").write_bytes(patch)
    opened, file = PatchFile.open(folder / "read.patch"), GgufFile.open(folder / "base.gguf")
    opened.check_base(file)
    return b"".join(opened.restored(file, Summary()))

"""Patches that are almost right: a sound one on a fixed base, a few of its bytes and numbers then broken.

Nine in ten broken ones get a digest that fits again, for the digest alone would refuse every one of them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import struct
import tempfile
import zlib
from pathlib import Path

from strop.errors import FileFormatError
from strop.files.gguf.patch import PatchFile, Summary
from strop.files.gguf.patch_streams import number
from strop.files.gguf.reader import GgufFile

from .patching import Part, gguf_bytes, patch_bytes, raw_of

_KINDS = (("a", "q4_0", 8), ("b", "q4_k", 2), ("c", "f16", 40), ("d", "q6_k", 1), ("e", "f32", 7), ("f", "mxfp4", 3))
_PARTS = [Part(name, kind, raw_of(kind, blocks, 1)) for name, kind, blocks in _KINDS]
_BASE = gguf_bytes(_PARTS, [("general.name", "base")])
_NUMBERS = (0, 1, 2, 3, 4, 7, 8, 31, 127, 128, 255, 256, 1 << 16, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63)
_VALUES = (*_NUMBERS, -1, 1.5, None, True, "", "0" * 64, "\x1b[2J", "\ud800", [], {}, [[[]]])
_BOMB = zlib.compress(bytes(1 << 20), 9, -zlib.MAX_WBITS)


def make_patch(draw: random.Random) -> bytes:
    """A small patch; in 19 of 20 cases something in it may be wrong."""
    sound = _sound(draw.randrange(50))
    (length,) = struct.unpack_from("<I", sound, 12)
    header, body = json.loads(sound[16 : 16 + length]), sound[16 + length : -32]
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3)) if draw.random() < 0.95 else 0):
        if draw.random() < 0.15:
            _break_header(draw, header)
        else:
            body = _break_body(draw, body)
    text = json.dumps(header).encode()
    head = b"STRPATCH" + struct.pack("<II", 1, len(text))
    if draw.random() < 0.05:
        head = head[:8] + struct.pack("<II", draw.choice((0, 1, 2, 1 << 31)), draw.choice((0, 1, len(text), 1 << 31)))
    whole = head + text + body
    digest = hashlib.sha256(whole).digest() if draw.random() < 0.9 else sound[-32:]
    return whole + digest


@functools.cache
def _sound(place: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return patch_bytes(Path(folder), _BASE, _tuned(random.Random(place)))


def _tuned(draw: random.Random) -> bytes:
    """A file with the base's tensors: some bytes in them moved, and perhaps its metadata and its layout."""
    parts = []
    for part in _PARTS:
        raw = bytearray(part.raw)
        for _ in range(draw.choice((0, 0, 1, 5, 100))):
            raw[draw.randrange(len(raw))] = draw.getrandbits(8)
        parts.append(Part(part.name, part.type, bytes(raw)))
    keys = [("general.name", draw.choice(("base", "tuned", "x" * 300)))]
    if draw.random() < 0.7:
        return gguf_bytes(parts, keys)
    order = draw.sample(range(len(parts)), len(parts))
    return gguf_bytes(parts, keys, order=order, extra=draw.randrange(2), tail=draw.randbytes(draw.randrange(40)))


def _break_header(draw: random.Random, header: dict) -> None:
    name = draw.choice(("base", "tuned", "made_by"))
    if isinstance(header.get(name), dict) and draw.random() < 0.8:
        header[name][draw.choice(("bytes", "sha256"))] = draw.choice(_VALUES)
    elif draw.random() < 0.5:
        header[name] = draw.choice(_VALUES)
    else:
        header.pop(name, None)


def _break_body(draw: random.Random, body: bytes) -> bytes:
    """Another byte or number, a stretch doubled or gone, an end cut off or added, or a stream that is far too long."""
    place = draw.randrange(len(body) + 1)
    how = draw.randrange(7)
    if how == 0:
        return body[:place]
    if how == 1:
        return body + draw.randbytes(draw.randrange(1, 20))
    if how == 2:
        return body[:place] + number(draw.choice(_NUMBERS)) + body[place + 1 :]
    if how == 3:
        return body[:place] + bytes([1]) + number(len(_BOMB)) + _BOMB + body[place:]
    if how == 4:
        return body[:place] + bytes([draw.getrandbits(8)]) + body[place + 1 :]
    end = min(len(body), place + draw.randrange(1, 32))
    return body[:end] + body[place:] if how == 5 else body[:place] + body[end:]


def read_patch(path: Path) -> None:
    """Apply it to the base, as `strop apply` does, but for the writing."""
    base = path.parent / "base.gguf"
    if not base.exists():
        base.write_bytes(_BASE)
    patch, file, digest = PatchFile.open(path), GgufFile.open(base), hashlib.sha256()
    patch.check_base(file)
    for piece in patch.restored(file, Summary()):
        digest.update(piece)
    if digest.hexdigest() != patch.tuned.sha256:
        raise FileFormatError(f"{path}: makes another file than it promises")

"""Patches: what makes one GGUF file of another with the same tensors, byte for byte, in a small part of its size.

    0        "STRPATCH"
    8        version u32 (1)                                          little endian
    12       length of the header u32, at most 65,536
    16       header, JSON: {"base": {"bytes", "sha256"}, "made_by", "tuned": {"bytes", "sha256"}}
    ...      layout: a byte 0 where the tensors lie in the order of the base and with its gaps between them; else 1, and
             two streams: u32 for each tensor, its number in the base's order; u64 for each tensor, the bytes between it
             and what lies before it, and one more, the bytes after the last
    ...      rest: all bytes outside the tensors, as copies of the base's: their count, of each its place there, its
             length, and the length of new bytes after it; the length of all new bytes, and a stream of them
    ...      tensors, in the order in which they lie in the tuned file, in pieces of 2^20 numbers' worth of blocks; of
             each piece its fields in the order of `block_fields`: a byte, and streams (`patch_streams`)
    -32      SHA-256 of all that stands before

    stream   kind (0 as it is, 1 deflate, 2 LZMA2, 3 zeros), length, bytes
    field    0                                                          nothing moved
             1, m, k, length of the first stream, four streams          m numbers moved: gaps (two), signs, sizes
             2, m, length of the first stream, three streams            m numbers moved: gaps, signs, sizes
             3, a stream                                                all its numbers anew
    lengths  7 bits a byte, lowest first, 128 set where another follows

"In the order of the base" is the order of the tensors' places in the file. Tensors are equal when names, types and
shapes are: their order, their places, the metadata and the padding may differ. Memory holds a piece of a tensor and the
bytes outside the tensors (96 MiB at the most, or the file is refused).

A patch is trusted in nothing: its digest is checked before anything but the version is read, each length against the
numbers that the base's own tensors have before anything is made, and the restored file against the tuned SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from strop.errors import FileFormatError, MissingInputError, UsageError
from strop.files.gguf.block_fields import FIELDS, Bytes
from strop.files.gguf.patch_rest import MAX_REST_BYTES, pack_rest, unpack_rest
from strop.files.gguf.patch_streams import Cursor, pack_field, stream, unpack_field
from strop.files.gguf.reader import GgufFile, TensorInfo
from strop.files.gguf.types import TYPES

MAGIC: Final = b"STRPATCH"
VERSION: Final = 1
PIECE_NUMBERS: Final = 1 << 20
"""Codes or values of a piece of a tensor."""

_MAX_HEADER_BYTES: Final = 1 << 16
_DIGEST_BYTES: Final = 32
_SHOWN: Final = 5


@dataclass(frozen=True)
class Stamp:
    """What a file is known by: its bytes, and their SHA-256."""

    nbytes: int
    sha256: str

    @classmethod
    def of(cls, file: GgufFile) -> Stamp:
        """That of a GGUF file."""
        return cls(file.nbytes, file.sha256())

    def __str__(self) -> str:
        return f"SHA-256 {self.sha256} ({self.nbytes:,} bytes)"


@dataclass
class Moves:
    """What moved in the tensors of one type.

    Attributes:
        tensors: of this type; `tensors_moved` of them differ.
        numbers: by role (codes, scales, values), how many there are.
        moved: by role, how many of them differ.
    """

    tensors: int = 0
    tensors_moved: int = 0
    numbers: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)


@dataclass
class Summary:
    """What a patch changes.

    Attributes:
        types: what moved, by the type of the tensors.
        new_bytes: outside the tensors (metadata, padding), those that are not copied from the base.
    """

    types: dict[str, Moves] = field(default_factory=dict)
    new_bytes: int = 0

    def add(self, info: TensorInfo, moved: Counter[str]) -> None:
        """Count a tensor in."""
        moves = self.types.setdefault(info.type, Moves())
        blocks = info.nbytes // TYPES[info.type].block_bytes
        moves.tensors += 1
        moves.tensors_moved += moved.total() > 0
        for one in FIELDS[info.type]:
            moves.numbers[one.role] += one.count * blocks
        moves.moved.update(moved)


def check_same_tensors(base: GgufFile, tuned: GgufFile) -> None:
    """Refuse two files that no patch lies between.

    Raises:
        UsageError: they hold other tensors, or more bytes outside of them than a patch takes; what differs is named.
    """
    problems = []
    for name in [*base.tensors, *(name for name in tuned.tensors if name not in base.tensors)]:
        one, other = base.tensors.get(name), tuned.tensors.get(name)
        if one is None or other is None:
            problems.append(f"{name}: only in {(tuned if one is None else base).path}")
        elif (one.type, one.shape) != (other.type, other.shape):
            problems.append(f"{name}: {one.type} {list(one.shape)} and {other.type} {list(other.shape)}")
    if problems:
        more = f"\n  and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        raise UsageError(
            f"{base.path} and {tuned.path} differ in {len(problems):,} tensors, and a patch needs the same names, "
            "types and shapes:\n  " + "\n  ".join(problems[:_SHOWN]) + more + "\n"
            "Export both from the same base in the same --format, or send the whole file."
        )
    for file in (base, tuned):
        rest = file.nbytes - sum(info.nbytes for info in file.tensors.values())
        if rest > MAX_REST_BYTES:
            raise UsageError(
                f"{file.path}: {rest:,} bytes lie outside its tensors; a patch takes {MAX_REST_BYTES:,} at the most. "
                "Write the file again, without what was appended to it"
            )


def write_patch(file: BinaryIO, base: GgufFile, tuned: GgufFile, *, made_by: str) -> Summary:
    """Write what makes `tuned` of `base`; `made_by` names the program in the header.

    Raises:
        UsageError: as `check_same_tensors`.
    """
    check_same_tensors(base, tuned)
    digest, summary = hashlib.sha256(), Summary()
    for part in _parts(base, tuned, made_by, summary):
        digest.update(part)
        file.write(part)
    file.write(digest.digest())
    return summary


def _parts(base: GgufFile, tuned: GgufFile, made_by: str, summary: Summary) -> Iterator[bytes]:
    """A patch but for its digest."""
    old, new = Stamp.of(base), Stamp.of(tuned)
    header = {"base": _plain(old), "made_by": made_by, "tuned": _plain(new)}
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    yield MAGIC + struct.pack("<II", VERSION, len(text)) + text
    before, after = _in_order(base), _in_order(tuned)
    gaps = _gaps(tuned, after)
    if [info.name for info in before] == [info.name for info in after] and _gaps(base, before)[1:] == gaps[1:]:
        yield b"\0"
    else:
        numbers = {info.name: number for number, info in enumerate(before)}
        order = np.array([numbers[info.name] for info in after], "<u4")
        yield b"\1" + stream(order.tobytes()) + stream(np.array(gaps, "<u8").tobytes())
    packed, summary.new_bytes = pack_rest(_rest(base, before), _rest(tuned, after))
    yield packed
    for info in after:
        moved: Counter[str] = Counter()
        for one, other in zip(_pieces(base, base.tensors[info.name]), _pieces(tuned, info), strict=True):
            for kind in FIELDS[info.type]:
                packed, count = pack_field(kind.read(one), kind.read(other), kind)
                moved[kind.role] += count
                yield packed
        summary.add(info, moved)


class PatchFile:
    """A patch whose digest and header have been checked.

    Attributes:
        path: The file.
        nbytes: Of the patch.
        base: What the patch belongs to.
        tuned: What it makes of it.
    """

    def __init__(self, path: Path, data: Any, place: int, header: dict[str, Any]) -> None:
        self.path = path
        self.nbytes = len(data)
        self.base = _stamp(header["base"])
        self.tuned = _stamp(header["tuned"])
        self._data = data
        self._place = place

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> PatchFile:
        """Map a patch and check its digest and its header.

        Raises:
            MissingInputError: There is no such file.
            FileFormatError: It is no patch, a damaged or truncated one, or one of a newer version.
        """
        data = _mapped(path)
        if data[:8] != MAGIC:
            raise FileFormatError(
                f"{path}: begins with {bytes(data[:8])!r}, a patch of `strop diff` with {MAGIC!r}; name the base "
                "first, the patch second"
            )
        version, length = struct.unpack_from("<II", data, 8)
        if version != VERSION:
            raise FileFormatError(
                f"{path}: is a patch of version {version:,}, and this strop reads version {VERSION}; a newer one "
                "made it, or it is damaged. Update strop (pip install -U strop), or fetch the patch again"
            )
        end = len(data) - _DIGEST_BYTES
        if hashlib.sha256(memoryview(data)[:end]).digest() != data[end:]:
            raise FileFormatError(
                f"{path}: its bytes are not those that were written (its own SHA-256 differs); it is damaged or "
                "truncated. Fetch it again"
            )
        if not length <= min(_MAX_HEADER_BYTES, end - 16):
            raise FileFormatError(f"{path}: at byte 12: the header takes {length:,} bytes; it is damaged")
        return cls(Path(path), data, 16 + length, _header(path, bytes(data[16 : 16 + length])))

    def check_base(self, base: GgufFile) -> None:
        """Refuse any file but the one that the patch was made from.

        Raises:
            UsageError: it is another one; both are named.
            FileFormatError: it is that one, and no file with its tensors has as many bytes as the patch promises.
        """
        found = Stamp.of(base)
        if found == self.base:
            if not 0 <= self._rest_bytes(base) <= MAX_REST_BYTES:
                raise FileFormatError(
                    f"{self.path}: promises a file of {self.tuned.nbytes:,} bytes, which no file with the tensors of "
                    f"{base.path} has; it is damaged"
                )
            return
        if found == self.tuned:
            raise UsageError(
                f"{base.path}: is what {self.path} makes already ({found}); use it as it is, or name the base, "
                f"{self.base}"
            )
        raise UsageError(
            f"{base.path}: is not the file that {self.path} belongs to.\n  got     {found}\n  needed  {self.base}\n"
            "Name that file; a base of the same name from elsewhere, or exported again, is another one."
        )

    def restored(self, base: GgufFile, summary: Summary) -> Iterator[bytes]:
        """The tuned file's bytes in order, piece by piece, and what moved counted into `summary`.

        `base` has passed `check_base`. Who keeps the bytes compares their SHA-256 with `tuned` first.

        Raises:
            FileFormatError: the patch holds something else than what makes a file of the base's tensors.
        """
        cursor = Cursor(memoryview(self._data), self._place, self.nbytes - _DIGEST_BYTES, str(self.path))
        before = _in_order(base)
        after, gaps = self._layout(cursor, base, before)
        rest, summary.new_bytes = unpack_rest(cursor, _rest(base, before), sum(gaps))
        place = 0
        for info, gap in zip(after, gaps, strict=False):
            yield rest[place : place + gap]
            place += gap
            moved: Counter[str] = Counter()
            for piece in _pieces(base, info):
                blocks = piece
                for number, kind in enumerate(FIELDS[info.type]):
                    numbers, count = unpack_field(cursor, piece, kind, f"{info.name}, field {number}")
                    moved[kind.role] += count
                    if numbers is not None:
                        blocks = blocks.copy() if blocks is piece else blocks
                        kind.write(numbers, blocks)
                yield blocks.tobytes()
            summary.add(info, moved)
        yield rest[place:]
        if cursor.place != cursor.end:
            raise cursor.error(f"{cursor.end - cursor.place:,} bytes are left over; it is damaged")

    def _layout(self, cursor: Cursor, base: GgufFile, before: list[TensorInfo]) -> tuple[list[TensorInfo], list[int]]:
        """The tensors in the tuned file's order, and the bytes before each and after the last."""
        rest = self._rest_bytes(base)
        if cursor.number("the layout", 1) == 0:
            inner = _gaps(base, before)[1:]
            if sum(inner) > rest:
                raise cursor.error("the gaps between the tensors take more bytes than the tuned file has")
            return before, [rest - sum(inner), *inner]
        order = np.frombuffer(cursor.stream(4 * len(before), "the order"), "<u4").tolist()
        gaps = np.frombuffer(cursor.stream(8 * len(before) + 8, "the gaps between tensors"), "<u8").tolist()
        if sorted(order) != list(range(len(before))) or sum(gaps) != rest:
            raise cursor.error("the layout is not one of the base's tensors; it is damaged")
        return [before[number] for number in order], gaps

    def _rest_bytes(self, base: GgufFile) -> int:
        """Bytes of the tuned file outside its tensors."""
        return self.tuned.nbytes - sum(info.nbytes for info in base.tensors.values())


def _mapped(path: str | os.PathLike[str]) -> Any:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileFormatError(f"{path}: is not a regular file; name a patch of `strop diff`")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < 16 + _DIGEST_BYTES:
                raise FileFormatError(f"{path}: is shorter than any patch; it is truncated, or none")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file") from None


def _header(path: str | os.PathLike[str], text: bytes) -> dict[str, Any]:
    """The header, every field that is used of its type."""
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
        header = json.loads(text)
        if _is_stamp(header["base"]) and _is_stamp(header["tuned"]):
            return header
    raise FileFormatError(f"{path}: at byte 16: the header does not name a base and a tuned file; it is damaged")


def _is_stamp(value: Any) -> bool:
    size, digest = value["bytes"], value["sha256"]
    whole = type(size) is int and 0 <= size < 1 << 63
    return whole and isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")


def _plain(stamp: Stamp) -> dict[str, Any]:
    return {"bytes": stamp.nbytes, "sha256": stamp.sha256}


def _stamp(value: dict[str, Any]) -> Stamp:
    return Stamp(value["bytes"], value["sha256"])


def _in_order(file: GgufFile) -> list[TensorInfo]:
    """The tensors as they lie in the file."""
    return sorted(file.tensors.values(), key=lambda info: info.start)


def _gaps(file: GgufFile, tensors: Iterable[TensorInfo]) -> list[int]:
    """Bytes before each tensor that belong to none, and those after the last."""
    gaps, end = [], 0
    for info in tensors:
        gaps.append(info.start - end)
        end = info.start + info.nbytes
    return [*gaps, file.nbytes - end]


def _rest(file: GgufFile, tensors: Iterable[TensorInfo]) -> bytes:
    """All bytes outside the tensors."""
    parts, end = [], 0
    for info in tensors:
        parts.append(file.span(end, info.start).tobytes())
        end = info.start + info.nbytes
    return b"".join([*parts, file.span(end, file.nbytes).tobytes()])


def _pieces(file: GgufFile, info: TensorInfo) -> Iterator[Bytes]:
    """A tensor's blocks, uint8 [n, bytes of a block], a bounded number at a time."""
    kind = TYPES[info.type]
    blocks = file.raw(info.name).reshape(-1, kind.block_bytes)
    step = PIECE_NUMBERS // kind.block
    for start in range(0, len(blocks), step):
        yield blocks[start : start + step]

"""GGUF and safetensors files, and patches of GGUF files, that are almost right: a few of their fields are broken.

`make_gguf` and `make_safetensors` give the bytes of a file for a seed's draws. Most of the damage keeps the structure
(a count, a length, an offset, a kind, a text is another one; an entry comes twice, is gone, or has moved), for bytes
that are changed at random seldom come past the first check. `read_gguf` and `read_safetensors` look at everything that
such a file holds. `run_cases` counts what came of many.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strop.errors import StropError
from strop.files.gguf.reader import GgufFile
from strop.files.gguf.types import BY_NUMBER, TYPES
from strop.files.shards import DTYPES, read_file, read_header
from strop.memory import resident_bytes

from .patch_fuzzing import make_patch, read_patch

SECONDS_OF_A_CASE = 10
BYTES_OF_ALL = 256 << 20

_NUMBERS = (0, 1, 2, 3, 7, 31, 32, 33, 255, 256, 1 << 16, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40)
_NUMBERS += ((1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1)
_TEXTS = (
    b"",
    b"\0",
    b"a" * 65,
    b"a" * 300,
    b"\xff\xfe",
    b"\xed\xa0\x80",
    "🐟".encode(),
    b"\x1b[2J",
    b"../../etc/passwd",
)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass
class Field:
    """A piece of a file: a whole number of `size` bytes, or bytes as they are (`size` 0)."""

    value: int | bytes
    size: int = 0

    def to_bytes(self) -> bytes:
        if isinstance(self.value, bytes):
            return self.value
        return (self.value % (1 << 8 * self.size)).to_bytes(self.size, "little")


def make_gguf(draw: random.Random) -> bytes:
    """A small GGUF file; in 19 of 20 cases something in it is wrong."""
    keys = [_gguf_key(draw, place) for place in range(draw.randrange(5))]
    if draw.random() < 0.2:
        alignment = draw.choice([1, 8, 16, 64, 128, draw.choice(_NUMBERS)])
        keys.append([*_text(b"general.alignment"), Field(4, 4), Field(alignment, 4)])
    tensors, data = _gguf_tensors(draw)
    head = [Field(b"GGUF"), Field(draw.choice((2, 3)), 4), Field(len(tensors), 8), Field(len(keys), 8)]
    damage = draw.choice((0, 1, 1, 1, 2, 3)) if draw.random() < 0.95 else 0
    for _ in range(damage):
        entries = draw.choice((keys, tensors))
        if entries and draw.random() < 0.3:
            _move_entries(draw, entries)
        else:
            _break_field(draw, draw.choice([head, *keys, *tensors]))
    pieces = [one.to_bytes() for part in (head, *keys, *tensors) for one in part]
    content = b"".join(pieces)
    content += bytes(-len(content) % 32) + data
    return _break_bytes(draw, content) if draw.random() < 0.3 else content


def _text(value: bytes) -> list[Field]:
    return [Field(len(value), 8), Field(value)]


def _gguf_key(draw: random.Random, place: int) -> list[Field]:
    name = draw.choice(
        (b"general.name", b"tokenizer.ggml.tokens", b"llama.block_count", b"split.count", b"k%d" % place)
    )
    kind = draw.choice((*_SIZES, 8, 8, 9, 9, 9))
    return [*_text(name if draw.random() < 0.3 else b"key.%d" % place), Field(kind, 4), *_gguf_value(draw, kind, 0)]


def _gguf_value(draw: random.Random, kind: int, depth: int) -> list[Field]:
    if kind in _SIZES:
        return [Field(draw.choice((0, 1)) if kind == 7 else draw.getrandbits(64), _SIZES[kind])]
    if kind == 8:
        return _text(draw.choice((b"", b"llama", "é🐟".encode(), b"x" * draw.randrange(50))))
    inner = draw.choice((*_SIZES, 8, 9)) if depth < 6 else 0
    count = draw.randrange(4)
    items = [one for _ in range(count) for one in _gguf_value(draw, inner, depth + 1)]
    return [Field(inner, 4), Field(count, 8), *items]


def _gguf_tensors(draw: random.Random) -> tuple[list[list[Field]], bytes]:
    tensors, offset = [], 0
    for place in range(draw.randrange(5)):
        kind = TYPES[draw.choice(("f32", "f16", "bf16", "q4_0", "q5_1", "q8_0", "q4_k", "q6_k", "iq2_xxs", "i32"))]
        shape = [kind.block * draw.randrange(1, 3)] + [draw.randrange(1, 4) for _ in range(draw.randrange(3))]
        sizes = [Field(size, 8) for size in shape]
        name = b"blk.%d.attn_q.weight" % place
        tensors.append([*_text(name), Field(len(shape), 4), *sizes, Field(kind.number, 4), Field(offset, 8)])
        offset += -(-kind.nbytes(list(reversed(shape))) // 32) * 32
    return tensors, draw.randbytes(offset)


def _move_entries(draw: random.Random, entries: list[list[Field]]) -> None:
    place = draw.randrange(len(entries))
    how = draw.randrange(3)
    if how == 0:
        entries.insert(draw.randrange(len(entries) + 1), entries[place])
    elif how == 1:
        del entries[place]
    else:
        draw.shuffle(entries)


def _break_field(draw: random.Random, fields: list[Field]) -> None:
    place = draw.randrange(len(fields))
    one = fields[place]
    if isinstance(one.value, bytes):
        value: int | bytes = draw.choice(_TEXTS)
    else:
        near = one.value + draw.choice((-1, 1, -32, 32))
        value = draw.choice((near, draw.choice(_NUMBERS), draw.choice(list(BY_NUMBER)), draw.getrandbits(8 * one.size)))
    fields[place] = Field(value, one.size)
    if isinstance(value, bytes) and place and draw.random() < 0.7:  # its length with it, so that what follows is read
        fields[place - 1] = Field(len(value), fields[place - 1].size)


def _break_bytes(draw: random.Random, content: bytes) -> bytes:
    """Cut off, lengthened, a byte changed, a stretch doubled or gone."""
    place = draw.randrange(len(content) + 1)
    how = draw.randrange(5)
    if how == 0:
        return content[:place]
    if how == 1:
        return content + draw.randbytes(draw.randrange(1, 100))
    if how == 2:
        return content[:place] + draw.randbytes(1) + content[place + 1 :]
    end = min(len(content), place + draw.randrange(1, 64))
    return content[:end] + content[place:] if how == 3 else content[:place] + content[end:]


def make_safetensors(draw: random.Random) -> bytes:
    """A small safetensors file; in 19 of 20 cases something in it is wrong."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if draw.random() < 0.5 else {}
    offset = 0
    for place in range(draw.randrange(5)):
        dtype = draw.choice(list(DTYPES))
        shape = [draw.randrange(1, 5) for _ in range(draw.randrange(4))]
        size = DTYPES[dtype].itemsize
        for number in shape:
            size *= number
        header[f"layer.{place}.weight"] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    data = draw.randbytes(offset)
    damage = draw.choice((0, 1, 1, 1, 2, 3)) if draw.random() < 0.95 else 0
    for _ in range(damage):
        _break_json(draw, header)
    text = json.dumps(header).encode()
    if damage and draw.random() < 0.3:
        text = _break_bytes(draw, text)
    length = (
        len(text) if draw.random() < 0.9 else draw.choice((*_NUMBERS[:-1], len(text) + 1, len(text) - 1)) % (1 << 64)
    )
    content = length.to_bytes(8, "little") + text + data
    return _break_bytes(draw, content) if draw.random() < 0.3 else content


def _break_json(draw: random.Random, header: dict[str, Any]) -> None:
    """Another value somewhere, or a field gone, renamed or added."""
    value = draw.choice((*_NUMBERS, -1, 1.5, 1e308, True, None, "", "F32", "U8", "x" * 300, "\ud800", [], {}, [[[[]]]]))
    if not header or draw.random() < 0.1:
        header[draw.choice(("__metadata__", "a", "", "\x1b[2J", "../x"))] = value
        return
    name = draw.choice(list(header))
    entry = header[name]
    how = draw.randrange(5)
    if how == 0 or not isinstance(entry, dict) or not entry:
        header[name] = value
        return
    part = draw.choice(list(entry))
    if how == 1:
        entry[part] = value
    elif how == 2:
        entry[draw.choice(("dtype", "shape", "extra"))] = entry.pop(part)
    elif how == 3:
        header[draw.choice(("b", *header))] = entry
    elif isinstance(entry[part], list) and entry[part]:
        numbers = entry[part]
        place = draw.randrange(len(numbers))
        near = numbers[place] + draw.choice((-1, 1, 8)) if isinstance(numbers[place], int) else value
        numbers[place] = draw.choice((near, value))


def read_gguf(path: Path) -> None:
    """Look at everything: every key, every tensor's bytes and values, where its type is one that is read."""
    file = GgufFile.open(path)
    for key in file.metadata:
        assert file.metadata[key] is not None
    for name, info in file.tensors.items():
        assert file.raw(name).size == info.nbytes
        with contextlib.suppress(StropError):  # a type that is not decoded
            assert tuple(file.tensor(name).shape) == info.shape


def read_safetensors(path: Path) -> None:
    """Look at everything: every tensor."""
    header = read_header(path)
    for name, tensor in read_file(path).items():
        assert tuple(tensor.shape) == header.entries[name].shape


KINDS: dict[str, tuple[Callable[[random.Random], bytes], Callable[[Path], None]]] = {
    "gguf": (make_gguf, read_gguf),
    "safetensors": (make_safetensors, read_safetensors),
    "patch": (make_patch, read_patch),
}


@dataclass
class Outcome:
    """What came of the cases."""

    cases: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0
    grown_bytes: int = 0


def run_cases(kind: str, seed: int, cases: int, folder: Path) -> Outcome:
    """Make and read `cases` files, one after the other; case k of a seed is always the same file.

    A failure is anything but a StropError: another exception, more than `SECONDS_OF_A_CASE`, or an allocation that
    takes the process more than `BYTES_OF_ALL` above what it held before (a limit of the system's, where there is one).
    """
    make, read = KINDS[kind]
    outcome, path, before = Outcome(), folder / f"case.{kind}", resident_bytes()
    with _limits():
        for place in range(cases):
            content = make(random.Random(f"{kind} {seed} {place}"))
            path.write_bytes(content)
            began = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, SECONDS_OF_A_CASE)
            try:
                read(path)
                outcome.accepted += 1
            except StropError as error:
                outcome.refused[type(error).__name__] += 1
                if not _is_fit_to_show(str(error)):
                    outcome.failures.append(f"{kind} seed {seed} case {place}: message {str(error)[:200]!r}")
            except Exception as error:  # the very thing that is looked for, of whatever kind
                outcome.failures.append(f"{kind} seed {seed} case {place}: {type(error).__name__}: {error}")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            outcome.cases += 1
            outcome.slowest_seconds = max(outcome.slowest_seconds, time.monotonic() - began)
    outcome.grown_bytes = resident_bytes() - before
    return outcome


def _is_fit_to_show(message: str) -> bool:
    return 0 < len(message) < 2000 and all(line.isprintable() for line in message.split("\n"))


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """An alarm that raises, and the most data that the process may have (Linux) for as long as the block runs."""

    def too_slow(number: int, frame: object) -> None:
        raise TimeoutError(f"a case took more than {SECONDS_OF_A_CASE} s")

    status = Path("/proc/self/status")
    held = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmData")]
    old_limits, old_alarm = resource.getrlimit(resource.RLIMIT_DATA), signal.signal(signal.SIGALRM, too_slow)
    resource.setrlimit(resource.RLIMIT_DATA, (int(held[0]) * 1024 + BYTES_OF_ALL, old_limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, old_limits)
        signal.signal(signal.SIGALRM, old_alarm)

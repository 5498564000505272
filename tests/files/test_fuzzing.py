"""Ten thousand broken files with committed seeds, and the worst that a header may ask of memory."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from strop.errors import StropError
from strop.files.gguf.reader import MAX_ENTRIES, MAX_HEADER_BYTES, MAX_ITEMS, GgufFile
from strop.files.shards import MAX_HEADER_BYTES as MAX_SAFETENSORS_BYTES
from strop.files.shards import MAX_HEADER_MARKS, read_header
from strop.memory import PeakMemory
from tests.fresh import in_fresh_process

from . import fuzzing
from .fuzzing import BYTES_OF_ALL, KINDS, run_cases


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2])
def test_broken_files_are_read_or_refused_with_errors_of_our_own(kind: str, seed: int, tmp_path: Path) -> None:
    outcome = run_cases(kind, seed, 2500, tmp_path)
    assert outcome.failures == []
    assert outcome.cases == 2500
    assert outcome.accepted > 250  # neither all sound nor all broken at the first byte
    assert sum(outcome.refused.values()) > 1250
    assert outcome.grown_bytes < 64 << 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_can_be_made_again(kind: str) -> None:
    make, _ = KINDS[kind]
    assert make(random.Random("7")) == make(random.Random("7"))
    assert make(random.Random("7")) != make(random.Random("8"))


def crash(path: Path) -> None:
    raise IndexError(path)


def hang(path: Path) -> None:
    while True:
        path.exists()


def take_too_much(path: Path) -> None:
    bytearray(BYTES_OF_ALL + (64 << 20))


def say_too_much(path: Path) -> None:
    raise StropError("\x1b[2J")


@pytest.mark.parametrize(
    ("read", "words"),
    [(crash, "IndexError"), (hang, "TimeoutError"), (take_too_much, "MemoryError"), (say_too_much, "message")],
)
def test_a_reader_that_crashes_hangs_or_takes_too_much_is_found_out(
    read: Callable[[Path], None], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "gguf", (KINDS["gguf"][0], read))
    monkeypatch.setattr(fuzzing, "SECONDS_OF_A_CASE", 0.05)
    outcome = run_cases("gguf", 1, 2, tmp_path)
    assert len(outcome.failures) == 2
    assert all(words in failure for failure in outcome.failures)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf_of(keys: list[bytes], tensors: list[bytes], data: bytes = b"") -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


FISH = "🐟".encode()
"""One character past 16 bits makes Python keep four bytes for each character of the text."""


def worst_gguf(case: str) -> bytes:
    if case == "texts":
        item = text(FISH + b"x" * (MAX_HEADER_BYTES // MAX_ITEMS - 13))
        return gguf_of([text(b"a") + struct.pack("<IIQ", 9, 8, MAX_ITEMS) + item * MAX_ITEMS], [])
    if case == "one text":
        return gguf_of([text(b"a") + struct.pack("<I", 8) + text(FISH + b"x" * (MAX_HEADER_BYTES - 99))], [])
    if case == "keys":
        size = MAX_HEADER_BYTES // MAX_ENTRIES - 40
        keys = [text(b"%06d" % place) + struct.pack("<I", 8) + text(FISH + b"x" * size) for place in range(MAX_ENTRIES)]
        return gguf_of(keys, [])
    if case == "lists":
        items = struct.pack("<IQ", 0, 1) + b"x"
        half = MAX_ITEMS // 2
        return gguf_of([text(b"a") + struct.pack("<IIQ", 9, 9, half) + items * half], [])
    if case == "bytes":
        few = MAX_HEADER_BYTES // MAX_ITEMS - 1
        lists = [struct.pack("<IIQ", 9, 0, MAX_ITEMS) + bytes(MAX_ITEMS) for _ in range(few)]
        return gguf_of([text(b"%d" % place) + one for place, one in enumerate(lists)], [])
    described = [
        text(b"%0200d" % place) + struct.pack("<I4QIQ", 4, 1, 1, 1, 1, 0, 32 * place) for place in range(MAX_ENTRIES)
    ]
    return gguf_of([], described, bytes(32 * MAX_ENTRIES))


def worst_safetensors(case: str) -> bytes:
    if case == "metadata":
        pairs = b",".join(b'"%06d":"%d"' % (place, place % 10) for place in range(MAX_HEADER_MARKS // 2))
        filler = b'"f":"' + FISH + b"x" * (MAX_SAFETENSORS_BYTES - len(pairs) - 60) + b'"'
        header = b'{"__metadata__":{' + pairs + b"," + filler + b"}}"
    elif case == "lists":
        header = b'{"a":[' + b",".join([b"[]"] * (MAX_HEADER_MARKS // 2 - 9)) + b"]}"
    elif case == "the last name twice":
        names = [b'"%d":0' % place for place in range(MAX_HEADER_MARKS - 9)]
        header = b"{" + b",".join([*names, names[-1]]) + b"}"
    else:
        entry = b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        header = b"{" + b",".join(entry % place for place in range(MAX_HEADER_MARKS // 8)) + b"}"
    return len(header).to_bytes(8, "little") + header


GGUF_CASES = ("texts", "one text", "keys", "lists", "bytes", "tensors")
SAFETENSORS_CASES = ("metadata", "lists", "the last name twice", "tensors")


def peaks_of_the_worst(folder: Path) -> dict[str, tuple[int, bool]]:
    """Of each file the most memory in bytes, and whether it was read."""
    found = {}
    for kind, cases, make in (
        ("gguf", GGUF_CASES, worst_gguf),
        ("safetensors", SAFETENSORS_CASES, worst_safetensors),
    ):
        for case in cases:
            path = folder / f"x.{kind}"
            path.write_bytes(make(case))
            is_read = True
            with PeakMemory() as peak:
                try:
                    look_at_everything(path)
                except StropError:
                    is_read = False
            found[f"{kind} {case}"] = (peak.peak_bytes, is_read)
    return found


def look_at_everything(path: Path) -> None:
    if path.suffix == ".gguf":
        file = GgufFile.open(path)
        for key in file.metadata:
            assert file.metadata[key] is not None
    else:
        read_header(path)


def test_the_worst_headers_that_are_read_take_less_than_256_mb(tmp_path: Path) -> None:
    """And end: a quadratic walk over the names of one would take hours."""
    found = in_fresh_process(peaks_of_the_worst, tmp_path)
    assert {case: peak for case, (peak, _) in found.items() if peak > BYTES_OF_ALL} == {}
    assert {case for case, (_, is_read) in found.items() if not is_read} == {
        "safetensors lists",
        "safetensors the last name twice",
    }
    assert found["gguf texts"][0] > BYTES_OF_ALL // 3  # the worst there is, or this test shows nothing

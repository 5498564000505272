"""Patches between GGUF files: any bytes of every type come back; what is damaged, hostile or newer is refused."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strop.errors import FileFormatError, MissingInputError, UsageError
from strop.files.gguf import patch as patches
from strop.files.gguf.block_fields import FIELDS
from strop.files.gguf.patch import PatchFile, Summary, check_same_tensors, write_patch
from strop.files.gguf.reader import GgufFile
from strop.files.gguf.types import TYPES
from strop.memory import PeakMemory
from tests.fresh import in_fresh_process

from . import patch_oracle
from .patching import Part, gguf_bytes, patch_bytes, raw_of, restored, sealed

ANY_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

BASE = gguf_bytes(
    [Part("a", "f16", struct.pack("<2e", 1.0, 2.0)), Part("b", "q4_0", b"\x00\x3c" + bytes(range(16)))],
    [("general.name", "one")],
)
TUNED = gguf_bytes(
    [
        Part("a", "f16", struct.pack("<2e", 1.0, 4.0)),
        Part("b", "q4_0", b"\x00\x3c" + b"\x01\x00" + bytes(range(2, 15)) + b"\xff"),
    ],
    [("general.name", "three")],
)


def test_a_patch_is_these_bytes(tmp_path: Path) -> None:
    """Codes 0, 1 and 31 moved, by 1, -1 and -1, and one of two gains; the name is another."""
    assert BASE[48:59] == struct.pack("<Q", 3) + b"one"
    body = [
        "00",  # the tensors lie in the base's order, with its gaps
        "02",  # of the rest, two copies:
        "00 30 0c",  # from 0 on 48 bytes, and twelve new ones: the length of the name, and its letters but the last
        "3a 6e 00",  # from 58 on 110 bytes: "e", what else is in the header, padding
        "0c  00 0c 05 00000000000000 74687265",  # the twelve, as they are
        "03  00 04  00 00  3c 44",  # a: two values anew, low bytes, high bytes
        "00",  # b: no scale moved
        "02 03 03",  # three codes moved; three bytes of gaps:
        "00 03 00 00 1d",  # none, none, 29
        "00 01 60",  # signs 0 1 1
        "03 00",  # sizes: all 0
    ]
    whole = sealed(base=BASE, tuned=TUNED, body=bytes.fromhex("".join(body)))
    assert patch_bytes(tmp_path, BASE, TUNED) == whole
    assert restored(tmp_path, BASE, whole) == TUNED


def variants(kind: str, seed: int) -> tuple[bytes, bytes]:
    """Two files with the same tensors of this type and others, and nothing else in common."""
    parts = [
        [Part("w", kind, raw_of(kind, 5, seed + place)), Part("n", "f32", raw_of("f32", 3, seed + place))]
        for place in (0, 1)
    ]
    return gguf_bytes(parts[0], [("k", "v")]), gguf_bytes(parts[1], [("k", "w" * 40), ("l", "")], order=[1, 0], extra=1)


@pytest.mark.parametrize("kind", TYPES)
def test_files_of_every_type_come_back_in_both_directions(kind: str, tmp_path: Path) -> None:
    one, other = variants(kind, 7)
    for base, tuned in ((one, other), (other, one), (one, one)):
        assert restored(tmp_path, base, patch_bytes(tmp_path, base, tuned)) == tuned


@ANY_FOLDER
@given(
    kind=st.sampled_from(sorted(TYPES)),
    blocks=st.integers(1, 40),
    data=st.data(),
    order=st.permutations([0, 1, 2]),
    filler=st.binary(min_size=1, max_size=1),
    extra=st.integers(0, 2),
    tail=st.binary(max_size=50),
    keys=st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.text(max_size=40)), unique_by=lambda one: one[0]),
)
def test_any_two_files_with_the_same_tensors_come_back(
    kind: str,
    blocks: int,
    data: st.DataObject,
    order: list[int],
    filler: bytes,
    extra: int,
    tail: bytes,
    keys: list[tuple[str, str]],
    tmp_path: Path,
) -> None:
    size = blocks * TYPES[kind].block_bytes
    raws = [np.frombuffer(raw_of(kind, blocks, seed), np.uint8).copy() for seed in range(3)]
    base = gguf_bytes([Part(name, kind, raw.tobytes()) for name, raw in zip("xyz", raws, strict=True)], [("a", "1")])
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 3 * size - 1), st.integers(0, 255)), max_size=30)):
        raws[place // size][place % size] = value
    parts = [Part(name, kind, raw.tobytes()) for name, raw in zip("xyz", raws, strict=True)]
    tuned = gguf_bytes(parts, keys, order=order, filler=filler, extra=extra, tail=tail)
    assert restored(tmp_path, base, patch_bytes(tmp_path, base, tuned)) == tuned


@pytest.mark.parametrize("kind", patch_oracle.FIELDS)
@pytest.mark.parametrize("share", [0.002, 0.02, 0.3, 1.0])
def test_a_reader_written_from_the_description_gives_the_same_file(kind: str, share: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    raws = [np.frombuffer(raw_of(kind, blocks, blocks), np.uint8).copy() for blocks in (30, 7)]
    base = gguf_bytes([Part(name, kind, raw.tobytes()) for name, raw in zip("vw", raws, strict=True)], [("k", "v")])
    for raw in raws:
        raw += ((rng.random(raw.size) < share) * rng.choice([1, 16, 255], raw.size)).astype(np.uint8)
    parts = [Part(name, kind, raw.tobytes()) for name, raw in zip("vw", raws, strict=True)]
    for order, keys in (([0, 1], [("k", "v")]), ([1, 0], [("k", "another value"), ("l", "")])):
        tuned = gguf_bytes(parts, keys, order=order, extra=order[0])
        made = patch_bytes(tmp_path, base, tuned)
        tensors = sorted(GgufFile.open(tmp_path / "base.gguf").tensors.values(), key=lambda one: one.start)
        places = [patch_oracle.Tensor(one.type, one.start, one.nbytes) for one in tensors]
        assert patch_oracle.restore(base, places, made) == tuned


def test_what_moved_is_counted_by_type_and_role_when_written_and_when_applied(tmp_path: Path) -> None:
    raw = np.frombuffer(raw_of("q4_k", 4, 1), np.uint8).reshape(4, 144).copy()
    parts = [Part("w", "q4_k", raw.tobytes()), Part("v", "q4_k", raw[:1].tobytes()), Part("n", "f32", bytes(12))]
    base = gguf_bytes(parts)
    scale, codes = FIELDS["q4_k"][0], FIELDS["q4_k"][4]
    numbers = codes.read(raw)
    numbers[[0, 500, 1023]] ^= 1
    codes.write(numbers, raw)
    scales = scale.read(raw)
    scales[2] ^= 5
    scale.write(scales, raw)
    tuned = gguf_bytes([Part("w", "q4_k", raw.tobytes()), parts[1], Part("n", "f32", struct.pack("<3f", 0, 1, 0))])
    made = patch_bytes(tmp_path, base, tuned)
    written, applied = Summary(), Summary()
    files = [GgufFile.open(tmp_path / name) for name in ("base.gguf", "tuned.gguf")]
    with (tmp_path / "again").open("wb") as file:
        written = write_patch(file, *files, made_by="test")
    assert b"".join(PatchFile.open(tmp_path / "made.patch").restored(files[0], applied)) == tuned
    assert (tmp_path / "again").read_bytes() == made
    for summary in (written, applied):
        moves = summary.types["q4_k"]
        assert (moves.tensors, moves.tensors_moved) == (2, 1)
        assert dict(moves.numbers) == {"codes": 5 * 256, "scales": 5 * (2 + 16)}
        assert {role: count for role, count in moves.moved.items() if count} == {"codes": 3, "scales": 1}
        assert summary.types["f32"].moved["values"] == 1
        assert summary.new_bytes == 0


def test_two_in_a_hundred_codes_moved_take_less_than_a_twentieth_of_the_file(tmp_path: Path) -> None:
    blocks = np.frombuffer(raw_of("q4_0", 1 << 14, 1), np.uint8).reshape(-1, 18).copy()
    base = gguf_bytes([Part("w", "q4_0", blocks.tobytes())])
    codes, rng = FIELDS["q4_0"][1], np.random.default_rng(2)
    numbers = codes.read(blocks).astype(int)
    moved = rng.random(numbers.size) < 0.02
    numbers += moved * np.where(numbers == 0, 1, np.where(numbers == 15, -1, rng.choice([-1, 1], numbers.size)))
    codes.write(numbers.astype(np.uint8), blocks)
    tuned = gguf_bytes([Part("w", "q4_0", blocks.tobytes())])
    assert len(patch_bytes(tmp_path, base, tuned)) < 0.05 * len(tuned)


def test_gains_that_moved_by_a_little_take_less_than_themselves(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    gains = rng.normal(1, 0.1, 4096).astype(np.float16)
    moved = (gains.view(np.int16) + rng.integers(-3, 4, 4096, np.int16)).view(np.float16)
    base, tuned = (gguf_bytes([Part("n", "f16", one.tobytes())]) for one in (gains, moved))
    assert len(patch_bytes(tmp_path, base, tuned)) < 0.3 * len(tuned)


def test_pieces_of_a_tensor_come_back_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "PIECE_NUMBERS", 512)
    for kind in ("q4_0", "q6_k", "f32"):
        one, other = variants(kind, 3)
        assert restored(tmp_path, one, patch_bytes(tmp_path, one, other)) == other


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_files_with_other_tensors_are_refused_and_the_differences_named(tmp_path: Path) -> None:
    parts = [Part("same", "f32", bytes(4)), Part("wide", "f32", bytes(8)), Part("kind", "f32", bytes(4))]
    (tmp_path / "one.gguf").write_bytes(gguf_bytes([*parts, Part("gone", "q4_0", bytes(18))]))
    other = [parts[0], Part("wide", "f32", bytes(12)), Part("kind", "f16", bytes(2))]
    more = [Part(f"new.{place}", "f32", bytes(4)) for place in range(4)]
    (tmp_path / "two.gguf").write_bytes(gguf_bytes([*other, *more]))
    one, two = GgufFile.open(tmp_path / "one.gguf"), GgufFile.open(tmp_path / "two.gguf")
    with pytest.raises(UsageError) as caught:
        check_same_tensors(one, two)
    said = str(caught.value)
    assert "differ in 7 tensors" in said
    assert "wide: f32 [2] and f32 [3]" in said
    assert "kind: f32 [1] and f16 [1]" in said
    assert f"gone: only in {one.path}" in said
    assert f"new.0: only in {two.path}" in said
    assert "and 2 more" in said
    assert "same --format" in said
    with (tmp_path / "p").open("wb") as file, pytest.raises(UsageError, match="differ in 7 tensors"):
        write_patch(file, one, two, made_by="test")
    check_same_tensors(one, one)


def test_a_file_with_too_much_outside_its_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "MAX_REST_BYTES", 500)
    (tmp_path / "a.gguf").write_bytes(gguf_bytes([Part("a", "f32", bytes(4))], tail=bytes(500)))
    file = GgufFile.open(tmp_path / "a.gguf")
    with pytest.raises(UsageError, match=r"bytes lie outside its tensors; a patch takes 500"):
        check_same_tensors(file, file)


def test_another_base_is_refused_with_both_digests(tmp_path: Path) -> None:
    made = patch_bytes(tmp_path, BASE, TUNED)
    other = BASE[:-1] + b"\1"
    with pytest.raises(UsageError) as caught:
        restored(tmp_path, other, made)
    for content in (other, BASE):
        assert hashlib.sha256(content).hexdigest() in str(caught.value)
    assert hashlib.sha256(TUNED).hexdigest() not in str(caught.value)


def test_the_tuned_file_as_its_own_base_is_refused_and_said_to_be_that(tmp_path: Path) -> None:
    made = patch_bytes(tmp_path, BASE, TUNED)
    with pytest.raises(UsageError, match=r"makes already.*name the base"):
        restored(tmp_path, TUNED, made)


def test_a_patch_damaged_at_any_byte_is_refused(tmp_path: Path) -> None:
    made = patch_bytes(tmp_path, BASE, TUNED)
    path = tmp_path / "damaged.patch"
    for place in range(len(made)):
        for flip in (1, 0x80):
            path.write_bytes(made[:place] + bytes([made[place] ^ flip]) + made[place + 1 :])
            with pytest.raises(FileFormatError, match="damaged"):
                PatchFile.open(path)


def test_a_patch_cut_off_or_lengthened_anywhere_is_refused(tmp_path: Path) -> None:
    made = patch_bytes(tmp_path, BASE, TUNED)
    path = tmp_path / "cut.patch"
    for content in (*(made[:length] for length in range(len(made))), made + b"\0", made[1:]):
        path.write_bytes(content)
        with pytest.raises(FileFormatError):
            PatchFile.open(path)


def test_a_patch_of_a_newer_version_is_refused_by_its_number(tmp_path: Path) -> None:
    made = patch_bytes(tmp_path, BASE, TUNED)
    newer = made[:8] + struct.pack("<I", 2) + made[12:-32]
    for content in (newer + made[-32:], newer + hashlib.sha256(newer).digest(), newer):
        (tmp_path / "newer.patch").write_bytes(content)
        with pytest.raises(FileFormatError, match=r"version 2, and this strop reads version 1.*pip install -U strop"):
            PatchFile.open(tmp_path / "newer.patch")


def test_what_is_no_patch_is_refused_by_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BASE)
    with pytest.raises(FileFormatError, match=r"begins with b'GGUF.*the patch second"):
        PatchFile.open(tmp_path / "a")
    with pytest.raises(FileFormatError, match="not a regular file"):
        PatchFile.open(tmp_path)
    with pytest.raises(MissingInputError, match="no such file"):
        PatchFile.open(tmp_path / "b")


@pytest.mark.parametrize(
    "changed",
    [
        {"base": None},
        {"base": {"bytes": -1, "sha256": "0" * 64}},
        {"base": {"bytes": 1 << 63, "sha256": "0" * 64}},
        {"base": {"bytes": True, "sha256": "0" * 64}},
        {"tuned": {"bytes": 1, "sha256": "0" * 63}},
        {"tuned": {"bytes": 1, "sha256": "\x1b" * 64}},
        {"tuned": {"bytes": 1}},
        {"tuned": []},
    ],
)
def test_a_header_that_names_no_files_is_refused(changed: dict, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(sealed(base=BASE, tuned=TUNED, body=b"", changed=changed))
    with pytest.raises(FileFormatError, match="at byte 16: the header does not name"):
        PatchFile.open(tmp_path / "a")


@pytest.mark.parametrize("header", [b"", b"[" * 60_000, b"\xff", b"{}", b"7", b'{"base": {}, "tuned": {}}'])
def test_a_header_that_is_no_object_is_refused(header: bytes, tmp_path: Path) -> None:
    whole = b"STRPATCH" + struct.pack("<II", 1, len(header)) + header
    (tmp_path / "a").write_bytes(whole + hashlib.sha256(whole).digest())
    with pytest.raises(FileFormatError, match="the header does not name"):
        PatchFile.open(tmp_path / "a")
    whole = b"STRPATCH" + struct.pack("<II", 1, 1 << 31) + header
    (tmp_path / "a").write_bytes(whole + hashlib.sha256(whole).digest())
    with pytest.raises(FileFormatError, match="the header takes 2,147,483,648 bytes"):
        PatchFile.open(tmp_path / "a")


@pytest.mark.parametrize("size", [0, 17, 1 << 40, (1 << 63) - 1])
def test_a_size_that_no_file_with_these_tensors_has_is_refused_before_any_work(size: int, tmp_path: Path) -> None:
    promised = {"tuned": {"bytes": size, "sha256": "0" * 64}}
    with pytest.raises(FileFormatError, match="promises a file of"):
        restored(tmp_path, BASE, sealed(base=BASE, tuned=TUNED, body=b"\0", changed=promised))


LAYOUT = "01  00 08 0100000000000000"
"""Another order of two tensors, as a stream; the gaps follow."""


def gaps_of(*gaps: int) -> str:
    return "00 18" + struct.pack(f"<{len(gaps)}Q", *gaps).hex()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "the layout takes 1 bytes, and 0 are left"),
        ("02", "the layout is 2; at most 1"),
        ("01 00 08 0100000001000000" + gaps_of(128, 0, 42), "not one of the base's tensors"),
        ("01 00 08 0000000002000000" + gaps_of(128, 0, 42), "not one of the base's tensors"),
        (LAYOUT + gaps_of(128, 0, 43), "not one of the base's tensors"),
        (LAYOUT + gaps_of((1 << 64) - 1, 0, 171), "not one of the base's tensors"),
        (LAYOUT + "00 10" + "00" * 16, "the gaps between tensors does not hold the 24 bytes"),
        ("00 01 00 8101 00 00 0000", "make 129 bytes, 170 are needed"),
        ("00 01 00 aa01 00 00 0000 00 00", "takes 1 bytes, and 0 are left"),
        ("00 01 00 aa01 00 00 0000 00 00 00 00", "1 bytes are left over"),
        ("00 01 00 aa01 00 00 0000 00 00 04", "b, field 1: how it is kept is 4"),
    ],
)
def test_a_body_that_makes_no_file_is_refused_by_its_place(body: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=rf"at byte \d+: .*{said}"):
        restored(tmp_path, BASE, sealed(base=BASE, tuned=TUNED, body=bytes.fromhex(body)))


def test_a_patch_of_nothing_is_the_base_again(tmp_path: Path) -> None:
    """And what a body gives that is sound but not the tuned file is for the caller to compare."""
    body = bytes.fromhex("00 01 00 aa01 00 00 0000 00 00 00")
    assert restored(tmp_path, BASE, sealed(base=BASE, tuned=TUNED, body=body)) == BASE


def test_the_base_in_another_order_with_other_gaps_by_hand(tmp_path: Path) -> None:
    body = LAYOUT + gaps_of(128, 14, 28) + "01 00 aa01 00 00 0000 00 00 00"
    wanted = BASE[:128] + BASE[160:178] + BASE[132:146] + BASE[128:132] + BASE[146:160] + BASE[178:]
    assert restored(tmp_path, BASE, sealed(base=BASE, tuned=wanted, body=bytes.fromhex(body))) == wanted


def peak_of_applying(folder: Path) -> tuple[int, int]:
    """Bytes above those before, of writing a patch and of applying it; a tensor of 64 MB, some of it moved."""
    raw = np.zeros(1 << 24, np.uint32)
    (folder / "base.gguf").write_bytes(gguf_bytes([Part("w", "f32", raw.tobytes())]))
    raw[::50] += 1
    (folder / "tuned.gguf").write_bytes(gguf_bytes([Part("w", "f32", raw.tobytes())]))
    del raw
    base, tuned = GgufFile.open(folder / "base.gguf"), GgufFile.open(folder / "tuned.gguf")
    with PeakMemory() as writing, (folder / "a.patch").open("wb") as file:
        write_patch(file, base, tuned, made_by="test")
    digest, patch = hashlib.sha256(), PatchFile.open(folder / "a.patch")
    with PeakMemory() as reading:
        for piece in patch.restored(base, Summary()):
            digest.update(piece)
    assert digest.hexdigest() == patch.tuned.sha256
    return writing.peak_bytes, reading.peak_bytes


def test_memory_holds_a_piece_of_a_tensor(tmp_path: Path) -> None:
    writing, reading = in_fresh_process(peak_of_applying, tmp_path)
    assert writing < 32 << 20
    assert reading < 32 << 20

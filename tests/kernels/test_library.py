"""Which kernels are chosen, and what becomes of a library that is absent, damaged, of another version or unfit."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from strop import kernels
from strop.errors import ConfigError
from strop.kernels import build, library
from strop.numerics import accelerated, fake_quantize, parse_scheme

HOME = Path(build.__file__).parent
compiled = pytest.mark.skipif(not (HOME / build.LIBRARY).exists(), reason="the native library was not compiled")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in (build.LIBRARY, build.RECEIPT):
        shutil.copy(HOME / name, tmp_path / name)
    return tmp_path


@compiled
def test_a_whole_library_is_loaded(copy: Path) -> None:
    found = library.load(copy)
    assert isinstance(found, library.Library), found
    assert found.runnable[0] == "portable"
    assert set(found.runnable) <= set(found.built)
    assert library.choose(found, "").name == found.runnable[-1]


def test_without_a_library_the_reference_works_and_says_why(tmp_path: Path) -> None:
    found = library.load(tmp_path)
    assert isinstance(found, str)
    for asked in ("", "reference", "avx2"):
        choice = library.choose(found, asked)
        assert (choice.name, choice.library, choice.runnable) == ("reference", None, ())
        assert "python -m strop.kernels" in choice.reason


@compiled
@pytest.mark.parametrize("place", [0, 100, 0.5, -1])
def test_a_damaged_library_is_not_loaded(copy: Path, place: float) -> None:
    """A changed byte anywhere, or an end that is missing, would crash a process that maps it."""
    path = copy / build.LIBRARY
    content = bytearray(path.read_bytes())
    at = int(place * len(content)) if isinstance(place, float) else place
    content[at] ^= 0x40
    path.write_bytes(content)
    assert "damaged" in str(library.load(copy))
    path.write_bytes(content[: len(content) // 2])
    assert "damaged" in str(library.load(copy))
    path.write_bytes(b"")
    assert "damaged" in str(library.load(copy))


@compiled
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"library_sha256": 3}', "\x00", '{"library_sha256": null}'])
def test_a_damaged_receipt_is_no_receipt(copy: Path, text: str) -> None:
    (copy / build.RECEIPT).write_text(text)
    assert isinstance(library.load(copy), str)


@compiled
def test_a_library_of_another_version_is_not_loaded(copy: Path) -> None:
    receipt = json.loads((copy / build.RECEIPT).read_text())
    receipt["sources_sha256"] = "0" * 64
    (copy / build.RECEIPT).write_text(json.dumps(receipt))
    assert "another version's sources" in str(library.load(copy))


@compiled
def test_a_library_that_lacks_a_function_is_not_used(copy: Path) -> None:
    """A library of somebody else's, with a receipt that fits it."""
    import hashlib

    other = Path(torch._C.__file__)
    shutil.copy(other, copy / build.LIBRARY)
    receipt = json.loads((copy / build.RECEIPT).read_text())
    receipt["library_sha256"] = hashlib.sha256(other.read_bytes()).hexdigest()
    (copy / build.RECEIPT).write_text(json.dumps(receipt))
    assert "cannot be loaded" in str(library.load(copy))


@compiled
def test_an_instruction_set_that_the_processor_lacks_gives_the_reference(copy: Path) -> None:
    found = library.load(copy)
    assert isinstance(found, library.Library)
    found.built, found.runnable = ("portable", "avx512"), ("portable",)  # a processor without
    choice = library.choose(found, "avx512")
    assert choice.name == "reference"
    assert "this processor does not run it" in choice.reason
    assert library.choose(found, "").name == "portable"
    found.built = ("portable",)
    assert "it was not compiled" in library.choose(found, "avx512").reason


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'avx51' \(did you mean 'avx512'\?\); it is one of reference, portable"):
        library.choose("none", "avx51")


def test_forcing_ends_with_its_block() -> None:
    before = kernels.in_use()
    weight, scheme = torch.ones(2, 64), parse_scheme("int4-g32")
    with kernels.forced("reference") as choice:
        assert kernels.in_use() is choice
        assert accelerated.fake_quantize(weight, scheme, None, None) is None
    assert kernels.in_use() is before


@pytest.mark.parametrize("asked", ["reference", "portable", "avx2", "avx512", "neon", ""])
def test_the_environment_forces_a_choice(asked: str) -> None:
    program = "from strop import kernels; print(kernels.in_use().name)"
    environment = {**os.environ, library.VARIABLE: asked}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    runnable = kernels.in_use().runnable
    best = runnable[-1] if runnable else "reference"
    assert done.stdout.strip() == (best if not asked else asked if asked in runnable else "reference")


@compiled
def test_a_forked_process_rounds_as_its_parent() -> None:
    """The parent's threads are not there after a fork; the child makes its own (torch's would be in vain)."""
    program = """
import os, torch
torch.get_num_threads = lambda: 3
from strop.numerics import fake_quantize, parse_scheme
weight, scheme = torch.arange(1 << 18).sin().view(512, 512), parse_scheme("int4-g32")
expected = fake_quantize(weight, scheme)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(fake_quantize(weight, scheme), expected) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    environment = {**os.environ, library.VARIABLE: kernels.in_use().runnable[-1], "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=environment, check=True, timeout=120)


@compiled
def test_several_callers_at_once_get_what_one_gets() -> None:
    from concurrent.futures import ThreadPoolExecutor

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        scheme = parse_scheme("int4-g32-full")
        weights = [torch.randn(256, 512, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
        expected = [fake_quantize(weight, scheme) for weight in weights]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(20):
                assert all(map(torch.equal, pool.map(lambda weight: fake_quantize(weight, scheme), weights), expected))
    finally:
        torch.set_num_threads(before)


def test_a_compiler_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / build.LIBRARY).write_bytes(b"before")
    for command, said in (("false", "exit code 1"), (str(tmp_path / "absent"), "No such file")):
        monkeypatch.setenv("CXX", command)
        with pytest.raises(build.BuildError, match=said):
            build.build(tmp_path)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [build.LIBRARY]
    assert (tmp_path / build.LIBRARY).read_bytes() == b"before"


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
def test_an_instruction_set_that_the_compiler_does_not_know_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "old"
    real = shutil.which("c++") or shutil.which("g++")
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-mavx512bf16*) echo unknown >&2; exit 1;; esac\nexec {real} "$@" -O0\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    receipt = build.build(tmp_path / "made")
    assert "avx512" not in receipt["instruction_sets"]  # type: ignore[operator]
    found = library.load(tmp_path / "made")
    assert isinstance(found, library.Library), found
    assert "avx512" not in found.built
    assert library.choose(found, "avx512").name == "reference"


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no compiler for 64-bit ARM")
def test_a_cross_compiler_makes_the_library_of_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the instruction sets of that processor, and unfit for this one; `scripts/cross` runs it."""
    monkeypatch.setenv("CXX", "aarch64-linux-gnu-g++ -O0")
    receipt = build.build(tmp_path)
    assert receipt["target"] == "aarch64-linux-gnu"
    assert receipt["instruction_sets"] == ["portable", "neon"]
    header = (tmp_path / build.LIBRARY).read_bytes()[:20]
    assert int.from_bytes(header[18:20], "little") == 183  # EM_AARCH64, the machine of an ELF file
    if platform.machine() == "x86_64":
        assert "cannot be loaded" in str(library.load(tmp_path))


@compiled
def test_a_processor_s_best_instruction_set_is_the_last_of_its_own() -> None:
    found = library.load(HOME)
    assert isinstance(found, library.Library), found
    others = {"x86_64": {"neon"}, "aarch64": {"avx2", "avx512"}}.get(platform.machine(), set())
    assert not others & set(found.built)
    assert not others & set(found.runnable)

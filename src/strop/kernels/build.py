"""Compiles the native library: `python -m strop.kernels`, or when the package is installed (setup.py).

    strop_kernels.so     the library: the kernels once for each instruction set, and what chooses among them
    strop_kernels.json   its receipt: the digests of the library and of the sources, the compiler and its target,
                         the instruction sets

The receipt is how `library` knows, before a byte of the library is run, that it is whole and made of these sources.
Uses the standard library alone, and nothing of strop: setup.py runs this file before anything is installed.

The compiler is $CXX, else c++, g++ or clang++; it says itself what processors it compiles for, so that a cross-compiler
makes the library of its target (`scripts/cross`). An instruction set that it does not know is left out; no compiler at
all is an error here and a note in an installation, where the PyTorch reference does everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = "strop_kernels.dll" if os.name == "nt" else "strop_kernels.so"
RECEIPT = "strop_kernels.json"

# What the values depend on: no contraction into fused operations, and none of what -ffast-math allows. The two others
# say that nobody reads errno or the processor's exception flags, without which comparisons make no vectors.
_FLAGS = ("-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno")
_QUIET = ("-fno-trapping-math", "-ftree-vectorize", "-fvect-cost-model=dynamic")
_X86: dict[str, tuple[str, ...]] = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16"),
        *("-mfma", "-mprefer-vector-width=512"),
    ),
}
_X86["amx"] = (*_X86["avx512"], "-mamx-tile", "-mamx-bf16")
_ARM: dict[str, tuple[str, ...]] = {"neon": ()}  # every 64-bit ARM processor has it
_LEVELS = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}
_COMPILE_SECONDS = 300


class BuildError(Exception):
    """The library could not be compiled; the message says what the compiler said."""


def sources_digest() -> str:
    """SHA-256 of the C++ sources, names and bytes."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def build(folder: Path, *, flags: Sequence[str] = ()) -> dict[str, object]:
    """Compile the library into `folder`, and write its receipt there.

    Args:
        folder: Where both files go; what lay there before is replaced as a whole.
        flags: Further flags for the compiler and the linker, such as those of a sanitizer.

    Returns:
        The receipt.

    Raises:
        BuildError: There is no compiler, or it failed.
    """
    compiler = find_compiler()
    target = _call([*compiler, "-dumpmachine"]).strip()
    levels = _LEVELS.get(target.lower().split("-")[0], {})
    with tempfile.TemporaryDirectory() as scratch:

        def compiled(name: str, *more: str) -> Path:
            made = Path(scratch) / f"{name}.o"
            _call([*compiler, *_FLAGS, *_QUIET, *flags, *more, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(made)])
            return made

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            portable = pool.submit(compiled, "portable")
            others = {name: pool.submit(compiled, name, *options) for name, options in levels.items()}
        objects = [portable.result()]
        objects += [job.result() for job in others.values() if job.exception() is None]
        known = [name for name, job in others.items() if job.exception() is None]
        objects.append(compiled("dispatch", "-pthread", *(f"-DSTROP_HAS_{name.upper()}" for name in known)))
        made = Path(scratch) / LIBRARY
        _call([*compiler, *flags, "-shared", "-pthread", "-o", str(made), *map(str, objects)])
        receipt: dict[str, object] = {
            "library_sha256": hashlib.sha256(made.read_bytes()).hexdigest(),
            "sources_sha256": sources_digest(),
            "compiler": _call([*compiler, "--version"]).splitlines()[0],
            "target": target,
            "instruction_sets": ["portable", *known],
        }
        folder.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that has the old library mapped keeps it.
        partial = folder / f"{LIBRARY}.{os.getpid()}"
        shutil.copyfile(made, partial)
        partial.replace(folder / LIBRARY)
    (folder / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    return receipt


def find_compiler() -> list[str]:
    """The C++ compiler as a command line: $CXX, else the first of c++, g++ and clang++ that there is.

    Raises:
        BuildError: There is none.
    """
    if given := shlex.split(os.environ.get("CXX", "")):
        return given
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler: there is no c++, g++ or clang++ on the path, and CXX names none")


def _call(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise BuildError(f"{shlex.join(command)}: exit code {done.returncode}\n{said}")
    return done.stdout


def main() -> int:
    """Compile into this package's folder, and say what was made."""
    try:
        receipt = build(Path(__file__).parent)
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(receipt, indent=1) + "\n")
    return 0

"""Finds the native library, makes sure of it, and chooses the instruction set; answers which is in use, and why.

Nothing is trusted before its digest: the receipt beside the library (`build`) names the SHA-256 of the library and of
the sources that it was made of, and both are compared before it is loaded. Whatever is wrong, the PyTorch reference
does the work and `in_use().reason` says why.

`STROP_KERNELS` forces a choice: `reference`, `portable`, `avx2`, `avx512`, `amx` or `neon`. One that this machine
cannot run is the reference again, with its reason; `forced` does the same within a program.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

from strop.errors import ConfigError, nearest
from strop.kernels.build import LIBRARY, RECEIPT, sources_digest

REFERENCE = "reference"
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "amx", "neon")
"""Those there are, as the library numbers them; the last that is built and runs here is chosen."""

VARIABLE = "STROP_KERNELS"


class Job(ctypes.Structure):
    """What a kernel is asked to do; the fields are explained in csrc/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "codes", "scale", "value_scale", "zero", "mask")),
        *((name, ctypes.c_void_p) for name in ("levels", "midpoints", "order", "bias", "inputs", "sums", "laid")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "size", "row_bytes", "tokens")),
        *(
            (name, ctypes.c_int32)
            for name in ("x_type", "y_type", "scale_type", "bits", "qmin", "mode", "given", "shared")
        ),
    )


class BlockJob(ctypes.Structure):
    """What a part of a decoder's block is asked to do; the fields are explained in csrc/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "grad", "add", "y", "sum", "q", "k", "v", "gain", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("reciprocal", "sums", "first", "last", "labels")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "stride", "heads", "kv_heads", "length", "turned")),
        *((name, ctypes.c_int64) for name in ("tokens", "token", "key")),
        *((name, ctypes.c_float) for name in ("eps", "scaling")),
        *((name, ctypes.c_int32) for name in ("x_type", "y_type", "shared")),
    )


class SearchJob(ctypes.Structure):
    """A search of superblocks; the fields are explained in csrc/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weights", "codes", "d", "dmin", "sub_scale", "sub_minimum")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
    )


class StepJob(ctypes.Structure):
    """What a decoder's block is asked to do for one token of each text; the fields are explained in csrc/kernels.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("products", ctypes.POINTER(Job) * 7),
        ("gains", ctypes.c_void_p * 4),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "keys", "values", "index")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "gate", "up", "between", "given", "normed", "scores")),
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "inner", "heads", "kv_heads", "size", "turned")),
        ("columns", ctypes.c_int64),
        ("eps", ctypes.c_float * 4),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("type", "tiled")),
    )


class Int8Job(ctypes.Structure):
    """What an int8 product is asked to do; the fields are explained in csrc/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "factor", "codes", "scales", "weight", "channel", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "outputs")),
        *((name, ctypes.c_int64) for name in ("x_stride", "stride", "weight_stride", "y_stride")),
        *((name, ctypes.c_int32) for name in ("x_type", "back")),
    )


class Moment(ctypes.Structure):
    """A moment of AdamW in 8 bits; the fields are explained in csrc/kernels.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("codes", "scales", "levels", "below", "edges"))


class AdamJob(ctypes.Structure):
    """A step of AdamW; the fields are explained in csrc/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "gradient")),
        *((name, Moment) for name in ("first", "second")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_float) for name in ("new_first", "old_second", "new_second", "root_scale", "eps")),
        *((name, ctypes.c_float) for name in ("decay", "rate")),
        ("gradient_type", ctypes.c_int32),
    )


class HqqJob(ctypes.Structure):
    """Scales by HQQ; the fields are explained in csrc/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "scales", "zero")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_float) for name in ("low", "high", "power", "log2_beta", "log2_kappa", "stride", "gain")),
        *((name, ctypes.c_int32) for name in ("iterations", "scale_type")),
    )


AnyJob: TypeAlias = Job | BlockJob | SearchJob | StepJob | Int8Job | AdamJob | HqqJob

INT8_KERNELS = ("round_rows", "int8_product")

BLOCK_KERNELS = (
    *("norm", "norm_backward", "norm_gain", "split_heads", "split_heads_backward", "merge_heads"),
    *("merge_heads_backward", "softmax", "softmax_backward", "swiglu", "swiglu_backward", "cross_entropy"),
)

SEARCH_KERNELS = ("search_four_bit", "search_six_bit")

KERNELS = (
    "round_affine",
    "quantize_affine",
    "dequantize_affine",
    "round_codebook",
    "quantize_codebook",
    "dequantize_codebook",
    "mask_gradient",
    "product",
    "tiled_product",
)


@dataclass(frozen=True)
class Choice:
    """Which kernels do the work.

    Attributes:
        name: An instruction set, or `reference`.
        reason: Why that one, in a sentence.
        runnable: The instruction sets that the library has and this machine runs.
        library: The native library's file, None where none is loaded.
        compiler: What compiled it.
    """

    name: str
    reason: str
    runnable: tuple[str, ...] = ()
    library: Path | None = None
    compiler: str = ""


class Library:
    """The native library, loaded.

    Args:
        path: The library's file; it is loaded as it is.
        compiler: What compiled it.

    Raises:
        OSError: It cannot be loaded.
        AttributeError: It lacks a function.
        ValueError: Its jobs are not those of this version.
    """

    def __init__(self, path: Path, compiler: str = "") -> None:
        self.path, self.compiler = path, compiler
        native = ctypes.CDLL(str(path))
        kinds = {"job": Job, "block_job": BlockJob, "search_job": SearchJob, "step_job": StepJob}
        kinds |= {"int8_job": Int8Job, "adam_job": AdamJob, "hqq_job": HqqJob}
        for name, needs in kinds.items():
            has = getattr(native, f"strop_{name}_bytes")
            if has() != ctypes.sizeof(needs):
                raise ValueError(f"its jobs have {has()} bytes, needed {ctypes.sizeof(needs)}")
        built, runs = native.strop_built(), native.strop_runnable()
        self.built = tuple(name for number, name in enumerate(INSTRUCTION_SETS) if built >> number & 1)
        self.runnable = tuple(name for number, name in enumerate(INSTRUCTION_SETS) if (built & runs) >> number & 1)
        jobs = {name: Job for name in KERNELS} | {name: BlockJob for name in BLOCK_KERNELS}
        jobs |= {name: SearchJob for name in SEARCH_KERNELS} | {name: Int8Job for name in INT8_KERNELS}
        jobs |= {"step": StepJob, "adam_step": AdamJob, "hqq_scales": HqqJob}
        self.functions = {name: getattr(native, f"strop_{name}") for name in jobs}
        for name, function in self.functions.items():
            function.argtypes = (ctypes.POINTER(jobs[name]), ctypes.c_int, ctypes.c_int)

    def call(self, kernel: str, job: AnyJob, instruction_set: str, threads: int) -> bool:
        """Run a kernel; False where it refuses the values, and the reference has the message."""
        number = INSTRUCTION_SETS.index(instruction_set)
        return self.functions[kernel](ctypes.byref(job), number, threads) == 0


def load(folder: Path) -> Library | str:
    """The library in `folder`, or why it cannot be used."""
    path = folder / LIBRARY
    try:
        receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
        content = path.read_bytes()
    except FileNotFoundError:
        return "the native library was not compiled (python -m strop.kernels does it, with a C++ compiler)"
    except (OSError, ValueError) as error:
        return f"the native library or its receipt cannot be read ({error}); {_AGAIN}"
    fields = cast(dict[str, object], receipt) if isinstance(receipt, dict) else {}
    if fields.get("library_sha256") != hashlib.sha256(content).hexdigest():
        return f"{path} is damaged: its digest is not the one noted when it was compiled; {_AGAIN}"
    if fields.get("sources_sha256") != sources_digest():
        return f"{path} was compiled from another version's sources; {_AGAIN}"
    try:
        return Library(path, str(fields.get("compiler", "")))
    except (OSError, AttributeError, ValueError) as error:
        return f"{path} cannot be loaded ({error}); {_AGAIN}"


_AGAIN = "compile it again: python -m strop.kernels"


@functools.cache
def _loaded() -> Library | str:
    return load(Path(__file__).parent)


def choose(library: Library | str, asked: str) -> Choice:
    """The kernels to use of a library (or of none, for the reason given), where `asked` is asked for ("": the best).

    Raises:
        ConfigError: `asked` is no such name.
    """
    if asked and asked != REFERENCE and asked not in INSTRUCTION_SETS:
        known = (REFERENCE, *INSTRUCTION_SETS)
        raise ConfigError(f"{VARIABLE} is {asked!r}{nearest(asked, known)}; it is one of {', '.join(known)}")
    if isinstance(library, str):
        return Choice(REFERENCE, library)
    found = (library.runnable, library.path, library.compiler)
    if asked == REFERENCE:
        return Choice(REFERENCE, "asked for", *found)
    if not asked:
        return Choice(library.runnable[-1], "the best that was compiled and that this processor runs", *found)
    if asked in library.runnable:
        return Choice(asked, "asked for", *found)
    lacking = "this processor does not run it" if asked in library.built else "it was not compiled"
    return Choice(REFERENCE, f"{asked} was asked for, but {lacking}; there is {', '.join(library.runnable)}", *found)


_choices: list[Choice] = []
"""The choice in force, last; the first is the environment's, made on first use."""


def in_use() -> Choice:
    """Which kernels are in use, and why.

    Raises:
        ConfigError: `STROP_KERNELS` is set to something unknown.
    """
    if not _choices:
        _choices.append(choose(_loaded(), os.environ.get(VARIABLE, "").strip().lower()))
    return _choices[-1]


@contextmanager
def forced(name: str) -> Iterator[Choice]:
    """Use other kernels for a while, in all threads: an instruction set, or `reference`."""
    in_use()
    _choices.append(choose(_loaded(), name))
    try:
        yield _choices[-1]
    finally:
        _choices.pop()


def native() -> tuple[Library, str] | None:
    """The library and the instruction set in use; None where the reference is."""
    choice = in_use()
    library = _loaded()
    return None if choice.name == REFERENCE or isinstance(library, str) else (library, choice.name)

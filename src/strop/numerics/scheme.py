"""`Scheme`: how a weight is quantized, and the one text that says so: `[container:]scheme`, the value of `--format`.

    format   [-gN | -tensor]  [-asym | -full]  [-dq]  [-sf16 | -sbf16 | -sf32]  [-a8 [-asym | -static | -over6]]

    int8            8 bits, symmetric, one float32 scale per output channel
    int4-g32        4 bits, symmetric, one float16 scale per 32 inputs
    int4-g128-asym  with a zero point; int4-g32-full spends the scale's sign on the value of largest magnitude
    int8-tensor     one scale for the whole weight
    nf4, fp4        codebooks, blocks of 64 over the flattened weight, float32 scales; -dq quantizes those scales again
    fp8, fp8_e5m2   8-bit floats, one float32 scale per output channel
    int8-a8         int8 weights and int8 activations, multiplied as integers (`activations` has what follows -a8)
    mxfp4           OCP's MXFP4: 4-bit floats (e2m1), one power of two (E8M0, 8 bits) per 32 inputs
    gguf:q4_0       the file container GGUF and its type q4_0, which is int4-g32-full
    gguf:q4_k       its type Q4_K: 4 bits with a scale and a minimum of 6 bits each per 32 inputs, in superblocks of 256

`-sf16`, `-sbf16` and `-sf32` set the dtype in which scales are stored, where the default is not wanted.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from strop.errors import FormatError, nearest
from strop.numerics.activations import OUTLIER_THRESHOLD, Activations, parse_activations
from strop.numerics.formats import FORMATS, CodebookFormat, FloatFormat, Format, IntFormat

NESTED_BLOCK = 256
"""Block scales that share one float32 scale of their own under double quantization."""

SUPER_SIZE = 256
"""Inputs in a superblock of Q4_K, whose groups' scales (and minimums) share one float16 scale."""

SUB_BITS = 6
"""Bits of a group's scale, and of its minimum, within a superblock."""

E8M0 = torch.float8_e8m0fnu
"""The powers of two from 2^-127 to 2^127 in 8 bits: the scales of MXFP4."""


class Mode(enum.Enum):
    """Where the grid lies around zero (the formulas stand in `affine.choose_scale`)."""

    SYMMETRIC = "symmetric"
    SYMMETRIC_FULL = "symmetric_full"
    ASYMMETRIC = "asymmetric"


class Granularity(enum.Enum):
    """Which values share a scale.

    All of a tensor; an output channel; `group_size` inputs of one channel; `group_size` values in a row of the
    flattened weight (BLOCK, for codebooks).
    """

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    BLOCK = "block"


_SCALE_SUFFIX: Mapping[torch.dtype, str] = {torch.float16: "sf16", torch.bfloat16: "sbf16", torch.float32: "sf32"}
_SCALE_DTYPE = {suffix: dtype for dtype, suffix in _SCALE_SUFFIX.items()}
_ALIASES: Mapping[str, str] = dict.fromkeys(("llm.int8", "llm-int8", "llm_int8"), f"int8-a8-over{OUTLIER_THRESHOLD:g}")
_GROUP_SIZES = {"nf4": 64, "fp4": 64, "mxfp4": 32}
"""Sizes that need no -gN, because the format is hardly used with another or has no other."""
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def default_scale_dtype(granularity: Granularity, form: Format | None = None) -> torch.dtype:
    """Float16 where a scale serves a group, float32 where it serves a channel, a tensor or a codebook's block.

    MXFP4 has its own, E8M0.
    """
    if form == FORMATS["mxfp4"]:
        return E8M0
    return torch.float16 if granularity is Granularity.GROUP else torch.float32


@dataclass(frozen=True)
class Scheme:
    """How a weight [out, in] is quantized.

    Attributes:
        format: What a code is: an `IntFormat`, a `FloatFormat` of 8 bits or MXFP4's, or a `CodebookFormat`.
        mode: Where an integer grid lies; codebooks and floats are symmetric.
        granularity: Which values share a scale; BLOCK for codebooks and for them alone.
        group_size: Values that share a scale (GROUP, BLOCK), else None.
        scale_dtype: The dtype in which scales are stored; codes are chosen against the stored scale.
        double_quant: Codebooks only: the block scales are stored as 8-bit codes (QLoRA, section 3).
        super_size: Q4_K only: inputs whose groups' scales and minimums are 6-bit multiples of two float16 numbers, so
            that value = super_scale * sub_scale * code - super_minimum * sub_minimum. There is no zero point then.
        activations: How the layer's inputs are rounded to int8; None where they are not.

    Raises:
        FormatError: The combination cannot exist.
    """

    format: Format
    mode: Mode = Mode.SYMMETRIC
    granularity: Granularity = Granularity.CHANNEL
    group_size: int | None = None
    scale_dtype: torch.dtype = torch.float32
    double_quant: bool = False
    super_size: int | None = None
    activations: Activations | None = None

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise FormatError(f"{self.format.name}: " + "; ".join(problems))

    @property
    def bits(self) -> int:
        """Bits of one code, without scales."""
        return self.format.bits

    @property
    def name(self) -> str:
        """The canonical text; `parse_scheme(scheme.name) == scheme`."""
        if self.super_size is not None:
            return "q4_k"
        parts = [self.format.name]
        if self.granularity is Granularity.TENSOR:
            parts.append("tensor")
        elif self.group_size is not None and self.group_size != _GROUP_SIZES.get(self.format.name):
            parts.append(f"g{self.group_size}")
        if self.mode is not Mode.SYMMETRIC:
            parts.append("asym" if self.mode is Mode.ASYMMETRIC else "full")
        if self.double_quant:
            parts.append("dq")
        if self.scale_dtype != default_scale_dtype(self.granularity, self.format):
            parts.append(_SCALE_SUFFIX[self.scale_dtype])
        if self.activations is not None:
            parts.append(self.activations.name)
        return "-".join(parts)

    def __str__(self) -> str:
        return self.name

    @property
    def has_zero_point(self) -> bool:
        """Whether a stored integer says where zero lies; a superblock has minimums instead."""
        return self.mode is Mode.ASYMMETRIC and self.super_size is None

    @property
    def has_plain_groups(self) -> bool:
        """Whether groups of inputs have a scale each, which is stored as it is: integers, and no superblocks."""
        grouped = self.granularity is Granularity.GROUP and self.super_size is None
        return grouped and isinstance(self.format, IntFormat)

    @property
    def has_power_scale(self) -> bool:
        """Whether scales are powers of two (MXFP4)."""
        return self.scale_dtype == E8M0

    @property
    def has_real_scales(self) -> bool:
        """Whether scales are numbers of a floating-point dtype, not codes or powers of two."""
        return not (self.double_quant or self.super_size is not None or self.has_power_scale)

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the scales of a weight of `shape` (out, in): [1, 1], [out, 1], [out, groups] or [blocks]."""
        rows, columns = shape
        if self.granularity is Granularity.TENSOR:
            return (1, 1)
        if self.group_size is None:
            return (rows, 1)
        if self.granularity is Granularity.GROUP:
            return (rows, columns // self.group_size)
        return (-(-rows * columns // self.group_size),)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Bits per weight of a weight of `shape` (out, in), counting packed codes, scales and zero points.

        >>> round(parse_scheme("nf4-dq").bits_per_weight((4096, 4096)), 3)
        4.127
        >>> parse_scheme("int4-g32").bits_per_weight((64, 64))
        4.5
        """
        rows, columns = shape
        scales = 1
        for size in self.scale_shape(shape):
            scales *= size
        if self.granularity is Granularity.BLOCK:
            code_bytes = -(-rows * columns * self.bits // 8)
        else:
            code_bytes = rows * -(-columns * self.bits // 8)
        if self.double_quant:
            scale_bytes = scales + 4 * -(-scales // NESTED_BLOCK) + 4  # codes, their scales, the offset
        elif self.super_size is not None:  # two float16 numbers a superblock, two 6-bit codes a group
            scale_bytes = 4 * rows * (columns // self.super_size) + 2 * scales * SUB_BITS // 8
        else:
            scale_bytes = scales * self.scale_dtype.itemsize
        zero_bytes = scales if self.has_zero_point else 0
        return 8 * (code_bytes + scale_bytes + zero_bytes) / (rows * columns)

    def _problems(self) -> Iterable[str]:
        is_codebook = isinstance(self.format, CodebookFormat)
        is_mx = self.format == FORMATS["mxfp4"]
        if isinstance(self.format, FloatFormat) and self.format.bits != 8 and not is_mx:
            yield "a 16- or 32-bit float stores weights as they are; quantize to fp8, nf4 or an integer"
        if is_codebook != (self.granularity is Granularity.BLOCK):
            yield "codebooks (nf4, fp4) are scaled by blocks of the flattened weight, and nothing else is"
        if isinstance(self.format, IntFormat):
            if not self.format.signed and self.mode is not Mode.ASYMMETRIC:
                yield "an unsigned grid without a zero point holds no negative weight; use the signed format, or -asym"
        elif self.mode is not Mode.SYMMETRIC:
            yield "only integer formats have a zero point or a full-range grid"
        if (self.group_size is None) != (self.granularity in (Granularity.TENSOR, Granularity.CHANNEL)):
            yield "a group size belongs to groups and blocks, and they need one"
        if self.group_size is not None and self.group_size < 2:
            yield f"a group holds at least 2 values, got {self.group_size}"
        if is_codebook and self.group_size not in _BLOCK_SIZES:
            yield f"blocks hold a power of two from 32 to 4096 values, got {self.group_size}"
        if is_mx and (self.group_size != 32 or self.granularity is not Granularity.GROUP or self.scale_dtype != E8M0):
            yield "a block of MXFP4 is 32 inputs, and its scale a power of two (E8M0); there is no other kind"
        elif not is_mx and self.scale_dtype not in _SCALE_SUFFIX:
            yield f"scales are stored in float16, bfloat16 or float32, got {self.scale_dtype}"
        elif is_codebook and self.scale_dtype != torch.float32:
            yield "block scales are stored in float32 (-dq makes them smaller)"
        if self.double_quant and not is_codebook:
            yield "double quantization is for nf4 and fp4; use larger groups to store fewer scales"
        if self.activations is not None and not self._multiplies_integers():
            yield "8-bit activations (-a8) go with int8 weights, symmetric, per channel or tensor: int8-a8"
        if self.super_size is not None and (
            (self.super_size, self.group_size, self.scale_dtype) != (SUPER_SIZE, 32, torch.float16)
            or self.format != FORMATS["uint4"]
        ):
            yield "superblocks are those of Q4_K: 4 bits, 8 groups of 32 inputs, float16"

    def _multiplies_integers(self) -> bool:
        """Whether products with int8 activations can be summed as integers."""
        whole_rows = self.granularity in (Granularity.CHANNEL, Granularity.TENSOR)
        return self.format == FORMATS["int8"] and self.mode is not Mode.ASYMMETRIC and whole_rows


@dataclass(frozen=True)
class FormatSpec:
    """What a `--format` text means: a scheme, and the container that demands it (None: the scheme's own file format).

    `container_type` is the container's own name for the scheme (`q4_0`), None without a container.
    """

    container: str | None
    scheme: Scheme
    container_type: str | None = None

    @property
    def name(self) -> str:
        """The canonical text."""
        return self.scheme.name if self.container is None else f"{self.container}:{self.container_type}"

    def __str__(self) -> str:
        return self.name


def parse_scheme(text: str) -> Scheme:
    """Read a scheme.

    Raises:
        FormatError: Unknown, impossible, or with a container; the message names the nearest there is.

    >>> parse_scheme("int4-g32-full")  # doctest: +ELLIPSIS
    Scheme(format=IntFormat(name='int4', bits=4, signed=True), mode=<Mode.SYMMETRIC_FULL: 'symmetric_full'>, ...
    >>> parse_scheme("int4-g128-asym").name
    'int4-g128-asym'
    """
    words = text.strip().lower()
    if ":" in words:
        container = words.partition(":")[0]
        raise FormatError(f"{text!r}: no container fits here, got {container!r}; give a scheme alone, such as int4-g32")
    if words == "q4_k":
        return _Q4_K
    base, *suffixes = _ALIASES.get(words, words).split("-")
    activations: Activations | None = None
    if "a8" in suffixes:
        place = suffixes.index("a8")
        activations = parse_activations(suffixes[place + 1 :], text=text)
        suffixes = suffixes[:place]
    number = FORMATS.get(base)
    if number is None:
        raise FormatError(f"{text!r}: {_unknown_base(base)}")
    chosen: dict[str, str] = {}
    for suffix in suffixes:
        kind = _kind_of(suffix)
        if kind is None:
            known = ("asym", "full", "tensor", "dq", *_SCALE_DTYPE, "a8")
            raise FormatError(
                f"{text!r}: unknown part {suffix!r}{nearest(suffix, known)}; after the format come -gN (a group of N), "
                f"{', '.join('-' + name for name in known)}"
            )
        if kind in chosen:
            raise FormatError(f"{text!r}: both -{chosen[kind]} and -{suffix} set the {kind}; keep one")
        chosen[kind] = suffix
    sharing = chosen.get("granularity", "")
    group_size = int(sharing[1:]) if sharing.startswith("g") else None if sharing else _GROUP_SIZES.get(number.name)
    if isinstance(number, CodebookFormat):
        granularity = Granularity.TENSOR if sharing == "tensor" else Granularity.BLOCK
    elif sharing == "tensor":
        granularity = Granularity.TENSOR
    else:
        granularity = Granularity.CHANNEL if group_size is None else Granularity.GROUP
    modes = {"asym": Mode.ASYMMETRIC, "full": Mode.SYMMETRIC_FULL}
    scale_dtype = _SCALE_DTYPE.get(chosen.get("scale dtype", ""), default_scale_dtype(granularity, number))
    try:
        return Scheme(
            format=number,
            mode=modes.get(chosen.get("mode", ""), Mode.SYMMETRIC),
            granularity=granularity,
            group_size=group_size,
            scale_dtype=scale_dtype,
            double_quant="scale quantization" in chosen,
            activations=activations,
        )
    except FormatError as error:
        raise FormatError(f"{text!r}: {error}") from None


def _kind_of(suffix: str) -> str | None:
    """What a part of the text sets, or None if it means nothing."""
    if suffix == "tensor" or (suffix[:1] == "g" and suffix[1:].isdecimal()):
        return "granularity"
    if suffix in ("asym", "full"):
        return "mode"
    if suffix == "dq":
        return "scale quantization"
    return "scale dtype" if suffix in _SCALE_DTYPE else None


def _unknown_base(base: str) -> str:
    """Why a format name is not known, with the nearest that is."""
    if base in GGUF_TYPES:
        return f"{base} is a type of GGUF files; write gguf:{base}"
    quantized = [name for name, form in FORMATS.items() if form.bits <= 8]
    digits = "".join(character for character in base if character.isdecimal())
    if base.rstrip("0123456789") == "int" and digits:
        bits = min(max(int(digits), 2), 8)
        return f"integers have 2 to 8 bits, got {digits}; the nearest is int{bits}"
    return f"unknown format {base!r}{nearest(base, quantized)}; there are int2 to int8, fp8, fp8_e5m2, mxfp4, nf4, fp4"


def _first_digit(name: str) -> int:
    """The first digit in a name (the bits of a GGUF type), 4 if there is none."""
    return next((int(character) for character in name if character.isdecimal()), 4)


_Q4_K = Scheme(FORMATS["uint4"], Mode.ASYMMETRIC, Granularity.GROUP, 32, torch.float16, super_size=SUPER_SIZE)


def _alike(one: str, other: str) -> int:
    """Characters that two names begin with in common."""
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


GGUF_TYPES: Mapping[str, Scheme] = MappingProxyType(
    {"q4_0": parse_scheme("int4-g32-full"), "q8_0": parse_scheme("int8-g32"), "q4_k": _Q4_K}
)
"""GGUF's types whose grid is one of our schemes; their scales are float16. `q4_k` is a scheme of its own."""

_OTHER_CONTAINERS = ("mlx", "onnx")


def parse_format(text: str) -> FormatSpec:
    """Read a `--format`: `[container:]scheme`.

    Raises:
        FormatError: Unknown or not available; the message names the nearest there is.

    >>> parse_format("gguf:q4_0").scheme.name
    'int4-g32-full'
    >>> parse_format("nf4-dq").container is None
    True
    """
    container, colon, rest = text.strip().lower().partition(":")
    if not colon:
        if container in GGUF_TYPES:  # a scheme's own name, but no file format of its own
            raise FormatError(f"{text!r}: {_unknown_base(container)}")
        return FormatSpec(None, parse_scheme(text))
    if container == "gguf":
        if rest in GGUF_TYPES:
            return FormatSpec(container, GGUF_TYPES[rest], rest)
        near = min(GGUF_TYPES, key=lambda name: (abs(_first_digit(name) - _first_digit(rest)), -_alike(name, rest)))
        raise FormatError(f"{text!r}: the gguf types there are: {', '.join(GGUF_TYPES)}; the nearest is gguf:{near}")
    if container in _OTHER_CONTAINERS:
        try:
            advice = f"{parse_scheme(rest)} without a container is there, and gguf:q4_0"
        except FormatError:
            advice = "int4-g32 without a container is there, and gguf:q4_0"
        raise FormatError(f"{text!r}: files of the kind {container} are not written; {advice}")
    known = ["gguf", *_OTHER_CONTAINERS]
    raise FormatError(f"{text!r}: unknown container {container!r}{nearest(container, known)}; the one there is: gguf")

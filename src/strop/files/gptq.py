"""Integer weights as GPTQ's tools hold them (AutoGPTQ, GPTQModel, AutoRound): read, not written.

Of a layer NAME with weight [out, in], b bits (2, 3, 4 or 8), groups of g inputs (one group with -1):

    NAME.qweight   int32 [in * b / 32, out]       codes of one output below each other, the first lowest, across words
    NAME.qzeros    int32 [in / g, out * b / 32]   zero points of one group beside each other, likewise; "gptq" (v1,
                                                  and what no checkpoint_format says) stores z - 1, "gptq_v2" z
    NAME.scales    float16 [in / g, out]
    NAME.g_idx     int32 [in]                     the group of each input; without it input i is in group i // g

W[o, i] = scale[group of i, o] * (code - z). A column of `qweight` read as bytes is a row of ours: of 3 bits too, whose
32 codes fill three words without a gap (10 codes, one split 2 + 1, 10, one split 1 + 2, 10). Under activation order
(`desc_act`) the inputs of a group stand apart; then the weight carries a `group_index`, and its codes stay in the
file's order. v1's z = 0 is stored as the largest code, and read so, as ExLlama's kernels do.

Where the configuration says `sym`, z is 2^(b-1), and nothing else is taken: several tools wrote v2's zero points under
v1's name (vLLM, pull request 38966), which there can be told, and is. An asymmetric file is read as it is labelled.

A layer says itself what it is; sizes are checked against the configuration, but for GPTQModel's `dynamic`, whose rules
give single layers other bits and groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from strop.errors import FileFormatError, FormatError
from strop.numerics.packing import unpack
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme, parse_scheme

METHOD = "gptq"
"""The value of `quant_method` in a model's configuration."""

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
"""What the tensors of a layer end in."""

_BITS = (2, 3, 4, 8)
_VERSIONS = ("gptq", "gptq_v2")


def scheme_from_config(config: Mapping[str, Any]) -> Scheme | None:
    """Return the scheme that a `quantization_config` describes; None where its layers may differ (`dynamic`).

    Raises:
        FormatError: a layout other than GPTQ's two, other bits, or no sensible group size; all are named.
    """
    version, bits, size = _version(config), config.get("bits"), config.get("group_size", 128)
    problems = []
    if version not in _VERSIONS:
        problems.append(f"checkpoint_format {version!r}; {' and '.join(_VERSIONS)} are read")
    if config.get("is_marlin_format"):
        problems.append("weights in Marlin's order (is_marlin_format), which only its kernel reads")
    if bits not in _BITS:
        problems.append(f"bits {bits!r}; 2, 3, 4 and 8 are read")
    if type(size) is not int or (size != -1 and size < 2):
        problems.append(f"group_size {size!r}; at least 2, or -1 for one group, is needed")
    if problems:
        raise FormatError("gptq: this model has what strop does not read: " + "; ".join(problems))
    if config.get("dynamic"):
        return None
    return scheme_of(int(str(bits)), size, symmetric=config.get("sym", True) is True)


def decode(tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, where: str = "weight") -> QuantizedTensor:
    """Return the quantized weight that a layer's tensors hold, codes and scales bit for bit.

    Args:
        tensors: by their own names, without the layer's: `qweight`, `qzeros`, `scales`, and `g_idx` or not.
        config: the model's `quantization_config`.
        where: the layer's name, for messages.

    Raises:
        FormatError: as `scheme_from_config`.
        FileFormatError: tensors are missing or too many, have another shape or dtype than the format demands, zero
            points that contradict `sym`, or an order of inputs that is none.
    """
    scheme_from_config(config)
    check_names(tensors, where, optional="g_idx")
    qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    for name, tensor, dtype in (("qweight", qweight, torch.int32), ("qzeros", qzeros, torch.int32)):
        check_matrix(name, tensor, dtype, where)
    check_scales(scales, where)
    columns, bits, size = _sizes(tensors, config, where)
    groups, rows = scales.shape
    count = 1 if size == -1 else -(-columns // size)
    expected = {"qweight": (columns * bits // 32, rows), "qzeros": (groups, -(-rows * bits // 32))}
    expected["scales"] = (count, rows)
    check_shapes(tensors, expected, where)
    symmetric = config.get("sym", True) is True
    zero_point = unpack(_rows_of_bytes(qzeros, -(-rows * bits // 8)), bits, rows)  # [groups, out]
    half = 1 << (bits - 1)
    if symmetric:
        check_symmetric(zero_point, (half - 1, half), f"{half - 1} (v1) or {half} (v2)", where)
    elif _version(config) == "gptq":
        zero_point = (zero_point + 1) & ((1 << bits) - 1)
    parts = {"codes": _rows_of_bytes(qweight.T, columns * bits // 8), "scale": scales.T.contiguous()}
    if not symmetric:
        parts["zero_point"] = zero_point.T.contiguous()
    if "g_idx" in tensors and (index := group_index(tensors["g_idx"], columns, size, where)) is not None:
        parts["group_index"] = index
    return built(parts, scheme_of(bits, size, symmetric=symmetric, dtype=scales.dtype), (rows, columns), where)


def scheme_of(bits: int, size: int, *, symmetric: bool, dtype: torch.dtype = torch.float16) -> Scheme:
    """The scheme of integers of `bits` in groups of `size` (-1: one a row) with scales of `dtype`."""
    name = f"int{bits}" + ("" if size == -1 else f"-g{size}") + ("" if symmetric else "-asym")
    return parse_scheme(f"{name}-{ {torch.float16: 'sf16', torch.bfloat16: 'sbf16', torch.float32: 'sf32'}[dtype] }")


def group_index(given: Tensor, columns: int, size: int, where: str, *, name: str = "g_idx") -> Tensor | None:
    """The group of each input, int32 [in]; None where groups are runs of `size` inputs, as they are without it.

    Raises:
        FileFormatError: it is no order of the inputs in groups of `size`.
    """
    if given.dtype not in (torch.int32, torch.int64) or tuple(given.shape) != (columns,):
        raise FileFormatError(f"{where}: {name} is {given.dtype} {list(given.shape)}; int32 [{columns}] is needed")
    in_order = torch.arange(columns, device=given.device) // (columns if size == -1 else size)
    if given.equal(in_order.to(given.dtype)) or bool((given == -1).all()):
        return None
    if not given.sort().values.equal(in_order.to(given.dtype)):
        raise FileFormatError(
            f"{where}: {name} does not put {columns} inputs into groups of {size} each; the file is damaged, or its "
            "group_size is another"
        )
    return given.to(torch.int32).contiguous()


def check_names(tensors: Mapping[str, Tensor], where: str, *, optional: str | None = None) -> None:
    """Refuse other tensors than `qweight`, `qzeros`, `scales` and one that may be left out."""
    needed = {"qweight", "qzeros", "scales"}
    if not needed <= tensors.keys() <= needed | {optional}:
        raise FileFormatError(
            f"{where}: tensors {', '.join(sorted(tensors))} found, {', '.join(sorted(needed))} are needed"
            + (f" ({optional} may be there)" if optional else "")
        )


def check_matrix(name: str, tensor: Tensor, dtype: torch.dtype, where: str) -> None:
    """Refuse what has not two sizes, or another dtype."""
    if tensor.ndim != 2 or tensor.dtype != dtype or 0 in tensor.shape:
        raise FileFormatError(f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}; {dtype} of two sizes is needed")


def check_scales(scales: Tensor, where: str) -> None:
    """Refuse scales that are no matrix of finite floats."""
    if scales.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise FileFormatError(f"{where}: scales is {scales.dtype}; float16, bfloat16 or float32 is needed")
    check_matrix("scales", scales, scales.dtype, where)
    if not torch.isfinite(scales).all():
        raise FileFormatError(f"{where}: scales holds NaN or infinite values; the file is damaged")


def check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, int]], where: str) -> None:
    """Refuse shapes other than those expected; all that differ are named."""
    wrong = [
        f"{name} is {list(tensors[name].shape)}, needed {list(shape)}"
        for name, shape in expected.items()
        if tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise FileFormatError(f"{where}: {'; '.join(wrong)}")


def check_symmetric(zero_point: Tensor, allowed: tuple[int, ...], text: str, where: str) -> None:
    """Refuse zero points that are not all one and the same of `allowed`, in a file that says it is symmetric."""
    values = zero_point.unique().tolist()
    if len(values) != 1 or values[0] not in allowed:
        shown = ", ".join(str(value) for value in values[:4])
        raise FileFormatError(
            f"{where}: the configuration says that the grid is symmetric, so every zero point is stored as {text}, and "
            f"{shown} is found; readers would not agree on it. If the grid is asymmetric, say so in "
            "quantization_config, as the tool that quantized does"
        )


def built(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], where: str) -> QuantizedTensor:
    """The quantized weight.

    Raises:
        FileFormatError: the parts do not fit.
    """
    try:
        return QuantizedTensor.from_tensors(parts, scheme, shape)
    except FormatError as error:
        raise FileFormatError(f"{where}: {error}") from error


def _version(config: Mapping[str, Any]) -> object:
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    return version.lower() if isinstance(version, str) else version


def _sizes(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    """Inputs, bits and group size (-1: one group) of a layer, as its tensors say or, without `g_idx`, the configuration
    does.

    Raises:
        FileFormatError: they are none, or not the configuration's.
    """
    words, groups = tensors["qweight"].shape[0], tensors["scales"].shape[0]
    bits, size = int(config["bits"]), int(config.get("group_size", 128))
    columns = tensors["g_idx"].numel() if "g_idx" in tensors else words * 32 // bits
    if not config.get("dynamic"):
        if columns % 32 or (size != -1 and columns % size):
            raise FileFormatError(
                f"{where}: {columns} inputs are no whole number of {'words' if columns % 32 else f'groups of {size}'}; "
                "strop holds no short last group. Use a model that was quantized with groups that divide its layers"
            )
        return columns, bits, size
    found = words * 32 // columns if columns else 0
    if found not in _BITS or words * 32 != found * columns or columns % groups:
        raise FileFormatError(
            f"{where}: qweight {list(tensors['qweight'].shape)} and {groups} groups do not fit {columns} inputs"
        )
    return columns, found, -1 if groups == 1 else columns // groups


def _rows_of_bytes(words: Tensor, count: int) -> Tensor:
    """The first `count` bytes of each row of int32 words."""
    return words.contiguous().view(torch.uint8)[:, :count].contiguous()

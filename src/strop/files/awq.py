"""4-bit weights as AutoAWQ's GEMM layout holds them: read, not written.

Of a layer NAME with weight [out, in], groups of g inputs (one group with -1):

    NAME.qweight   int32 [in, out / 8]      eight codes of one input, of neighbouring outputs, in each word
    NAME.qzeros    int32 [in / g, out / 8]  zero points of one group, likewise
    NAME.scales    float16 [in / g, out]

W[o, i] = scale[i // g, o] * (code - z). The nibbles of a word, from the lowest, are those of the outputs

    0 2 4 6 1 3 5 7

of its eight. Codes are taken over as they are and lie in another order here: those of one output beside each other.

The other layouts (`gemv`, `gemv_fast`, llm-awq's, Marlin's) are refused by name. Where the configuration says that
there are no zero points (`zero_point: false`, as AutoRound writes symmetric models), every one must be 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from strop.errors import FileFormatError, FormatError
from strop.files.gptq import built, check_matrix, check_names, check_scales, check_shapes, check_symmetric, scheme_of
from strop.numerics.packing import pack
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme

METHOD = "awq"
"""The value of `quant_method` in a model's configuration."""

SUFFIXES = ("qweight", "qzeros", "scales")
"""What the tensors of a layer end in."""

_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output of its eight a nibble belongs to, from the lowest."""

_BITS = 4


def scheme_from_config(config: Mapping[str, Any]) -> Scheme:
    """Return the scheme that a `quantization_config` describes.

    Raises:
        FormatError: another layout than GEMM's, other bits, or no sensible group size; all are named.
    """
    layout = config.get("version") or config.get("format") or "gemm"
    bits, size = config.get("bits", config.get("w_bit")), _group_size(config)
    problems = []
    if str(layout).lower() != "gemm" or config.get("backend") == "llm-awq":
        named = "llm-awq" if config.get("backend") == "llm-awq" else layout
        problems.append(f"the layout {named!r}; gemm is read")
    if bits != _BITS:
        problems.append(f"bits {bits!r}; 4 are read")
    if type(size) is not int or (size != -1 and size < 2):
        problems.append(f"group_size {size!r}; at least 2, or -1 for one group, is needed")
    if problems:
        raise FormatError("awq: this model has what strop does not read: " + "; ".join(problems))
    return scheme_of(_BITS, size, symmetric=not config.get("zero_point", True))


def decode(tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, where: str = "weight") -> QuantizedTensor:
    """Return the quantized weight that a layer's tensors hold, codes and scales bit for bit.

    Args:
        tensors: by their own names, without the layer's: `qweight`, `qzeros`, `scales`.
        config: the model's `quantization_config`.
        where: the layer's name, for messages.

    Raises:
        FormatError: as `scheme_from_config`.
        FileFormatError: tensors are missing or too many, have another shape or dtype than the format demands, or zero
            points that contradict `zero_point: false`.
    """
    scheme_from_config(config)
    check_names(tensors, where)
    qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    check_matrix("qweight", qweight, torch.int32, where)
    check_matrix("qzeros", qzeros, torch.int32, where)
    check_scales(scales, where)
    columns, rows, size = qweight.shape[0], qweight.shape[1] * 8, _group_size(config)
    if size != -1 and columns % size:
        raise FileFormatError(f"{where}: {columns} inputs are no whole number of groups of {size}")
    groups = 1 if size == -1 else columns // size
    check_shapes(tensors, {"qzeros": (groups, rows // 8), "scales": (groups, rows)}, where)
    symmetric = not config.get("zero_point", True)
    zero_point = _nibbles(qzeros)  # [groups, out]
    if symmetric:
        check_symmetric(zero_point, (8,), "8", where)
    parts = {"codes": pack(_nibbles(qweight).T.contiguous(), _BITS), "scale": scales.T.contiguous()}
    if not symmetric:
        parts["zero_point"] = zero_point.T.contiguous()
    return built(parts, scheme_of(_BITS, size, symmetric=symmetric, dtype=scales.dtype), (rows, columns), where)


def _group_size(config: Mapping[str, Any]) -> Any:
    return config.get("group_size", config.get("q_group_size", 128))


def _nibbles(words: Tensor) -> Tensor:
    """The nibbles of int32 words in the order of the outputs, uint8: [n, out / 8] to [n, out]."""
    codes = torch.empty((*words.shape, 8), dtype=torch.uint8, device=words.device)
    for nibble, output in enumerate(_OUTPUTS):
        codes[..., output] = ((words >> (4 * nibble)) & 0xF).to(torch.uint8)
    return codes.flatten(-2)

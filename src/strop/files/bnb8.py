"""8-bit weights as bitsandbytes holds them (LLM.int8): read, not written.

Of a layer NAME with weight [out, in]:

    NAME.weight         int8 [out, in]
    NAME.SCB            float32 [out]: the largest magnitude of each row
    NAME.weight_format  uint8, 0: rows as they are (the other orders belonged to a GPU and were never saved by default)

W[o, i] = weight[o, i] * SCB[o] / 127, and the inputs are rounded to int8 too, but for columns with a value beyond
`llm_int8_threshold` (6): our `int8-a8-over6`; with threshold 0 no column is spared, `int8-a8`. Codes are taken over
bit for bit; the stored scale is SCB / 127 in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from strop.errors import FileFormatError, FormatError
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme, parse_scheme

METHOD = "bitsandbytes"
"""The value of `quant_method` in a model's configuration; `load_in_8bit` tells it from the 4-bit layout."""

SUFFIXES = ("SCB", "weight_format")
"""What the tensors of a layer end in, besides `weight` itself."""


def scheme_from_config(config: Mapping[str, Any]) -> Scheme:
    """Return the scheme that a `quantization_config` describes.

    Raises:
        FormatError: a threshold that is no number, or weights that are said to be kept in 16 bits.
    """
    threshold = config.get("llm_int8_threshold", 6.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < math.inf:
        raise FormatError(f"bitsandbytes: llm_int8_threshold {threshold!r}; a number of at least 0 is needed")
    if config.get("llm_int8_has_fp16_weight"):
        raise FormatError("bitsandbytes: 8-bit layers that keep 16-bit weights (llm_int8_has_fp16_weight) are not read")
    return parse_scheme(f"int8-a8-over{threshold:g}" if threshold else "int8-a8")


def decode(tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, where: str = "weight") -> QuantizedTensor:
    """Return the quantized weight that a layer's tensors hold, codes bit for bit.

    Args:
        tensors: by their own names, without the layer's: `weight`, `SCB`, and `weight_format` or not.
        config: the model's `quantization_config`.
        where: the layer's name, for messages.

    Raises:
        FormatError: as `scheme_from_config`.
        FileFormatError: tensors are missing or too many, have another shape or dtype than the format demands, or lie in
            an order that belonged to a GPU.
    """
    scheme = scheme_from_config(config)
    if not {"weight", "SCB"} <= tensors.keys() <= {"weight", "SCB", "weight_format"}:
        raise FileFormatError(
            f"{where}: tensors {', '.join(sorted(tensors))} found, SCB and weight are needed (weight_format may be "
            "there)"
        )
    weight, absmax = tensors["weight"], tensors["SCB"]
    if weight.dtype != torch.int8 or weight.ndim != 2 or 0 in weight.shape:
        raise FileFormatError(f"{where}: weight is {weight.dtype} {list(weight.shape)}; int8 [out, in] is needed")
    if absmax.dtype != torch.float32 or absmax.numel() != weight.shape[0] or not torch.isfinite(absmax).all():
        raise FileFormatError(
            f"{where}: SCB is {absmax.dtype} {list(absmax.shape)}; {weight.shape[0]} finite float32 are needed"
        )
    order = tensors.get("weight_format")
    if order is not None and (order.dtype != torch.uint8 or order.numel() != 1 or int(order) != 0):
        raise FileFormatError(
            f"{where}: weight_format {order.tolist()}; 0 (row by row) is read, the others lie in the order of one GPU"
        )
    parts = {"codes": weight.contiguous().view(torch.uint8) ^ 0x80, "scale": absmax.reshape(-1, 1) / 127}
    try:
        return QuantizedTensor.from_tensors(parts, scheme, (weight.shape[0], weight.shape[1]))
    except FormatError as error:
        raise FileFormatError(f"{where}: {error}") from error

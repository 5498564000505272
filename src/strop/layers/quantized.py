"""The layers that hold a `QuantizedTensor`, those that train towards one, and which of them a scheme asks for."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from strop.layers.fake_quant_linear import FakeQuantLinear
from strop.layers.int8_linear import Int8Linear, OutlierInt8Linear
from strop.layers.qat_lora_linear import QatLoraLinear
from strop.layers.quant_linear import QuantLinear
from strop.layers.scale_linear import ScaleLinear
from strop.numerics.qtensor import QuantizedTensor

THROUGH_ROUNDING: Final = (FakeQuantLinear, QatLoraLinear, ScaleLinear)
"""The layers that train through the rounding they will be stored with; each has `to_quant_linear` and `hold`."""

QuantizedLinear = QuantLinear | Int8Linear | OutlierInt8Linear
"""A linear layer over a `QuantizedTensor`, which it gives as `qtensor`."""

QUANTIZED: Final = (QuantLinear, Int8Linear, OutlierInt8Linear)
"""The same, for `isinstance`."""


def quantized_linear(qtensor: QuantizedTensor, bias: Tensor | None = None) -> QuantizedLinear:
    """The layer that computes what the weight's scheme says: with 8-bit activations, or with those that come.

    Raises:
        FormatError: as `Int8Linear`.
    """
    activations = qtensor.scheme.activations
    if activations is None:
        return QuantLinear(qtensor, bias)
    return Int8Linear(qtensor, bias) if activations.threshold is None else OutlierInt8Linear(qtensor, bias)

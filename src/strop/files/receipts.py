"""`receipt.json`: what a lossy step did to every weight, kept beside the model that it made.

Per linear layer: its name and shape, the format that was asked for and the one it has, why it fell back where it did,
the relative squared error ||W - W'||^2 / ||W||^2, the largest |W - W'|, and the bytes it takes now. For the model:
average bits per weight of the linear layers, and what was measured on held-out rows.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strop.files.folders import write_json
from strop.numerics.qtensor import QuantizedTensor

RECEIPT = "receipt.json"


@dataclass(frozen=True)
class TensorReceipt:
    """What became of one weight [out, in].

    Attributes:
        name: the layer's full name.
        shape: (out, in).
        requested: the format that was asked for.
        actual: the format it has; a dtype where it was kept as it is.
        reason: why it fell back; None where it did not.
        relative_error: ||W - W'||^2 / ||W||^2; 0 where it was kept.
        max_error: the largest |W - W'|.
        nbytes: bytes of codes, scales and zero points, or of the kept weight.
        calibration_tokens: of an expert: how many calibration tokens the router gave it; None for other layers, and
            where nothing calibrated.
        calibration_share: the share of all calibration tokens, 0 to 1.
    """

    name: str
    shape: tuple[int, int]
    requested: str
    actual: str
    reason: str | None
    relative_error: float
    max_error: float
    nbytes: int
    calibration_tokens: int | None = None
    calibration_share: float | None = None

    @classmethod
    def of(cls, name: str, weight: Tensor, qtensor: QuantizedTensor, requested: str) -> TensorReceipt:
        """Compare a weight with what it was rounded to; the sums are taken in float64."""
        original = weight.detach().float()
        error = qtensor.dequantize().sub_(original)
        total = float(torch.linalg.vector_norm(original, dtype=torch.float64)) ** 2
        lost = float(torch.linalg.vector_norm(error, dtype=torch.float64)) ** 2
        return cls(
            name=name,
            shape=qtensor.shape,
            requested=requested,
            actual=qtensor.scheme.name,
            reason=None,
            relative_error=lost / total if total > 0 else 0.0,
            max_error=float(error.abs().max()),
            nbytes=qtensor.nbytes,
        )

    @classmethod
    def kept(cls, name: str, weight: Tensor, shape: tuple[int, int], requested: str, reason: str) -> TensorReceipt:
        """A weight that stays in its own dtype."""
        dtype = str(weight.dtype).removeprefix("torch.")
        return cls(name, shape, requested, dtype, reason, 0.0, 0.0, math.prod(shape) * weight.element_size())


@dataclass
class Receipt:
    """What a lossy step did to a model.

    Attributes:
        source: what was quantized.
        requested: the format that was asked for.
        settings: how (method, observer, calibration data).
        tensors: one entry per linear layer inside the blocks.
        held_out: figures measured against the source on rows that calibrated nothing; empty where no data were given.
        left_alone: weights that no format reaches (experts in one tensor, where a model computes them its own way).
        experts: how many of the entries in `tensors` are experts of a mixture.
        blocks: how far each block's output is from full precision, where rows calibrated.
    """

    source: str
    requested: str
    settings: dict[str, Any]
    tensors: list[TensorReceipt] = field(default_factory=list)
    held_out: dict[str, Any] = field(default_factory=dict)
    left_alone: list[str] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    experts: int = 0

    @property
    def fallbacks(self) -> list[TensorReceipt]:
        """The weights that did not get the format that was asked for."""
        return [tensor for tensor in self.tensors if tensor.reason is not None]

    @property
    def bits_per_weight(self) -> float:
        """Average over the linear layers, scales and kept weights counted."""
        weights = sum(math.prod(tensor.shape) for tensor in self.tensors)
        return 8 * sum(tensor.nbytes for tensor in self.tensors) / weights if weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The content of receipt.json."""
        return {
            "source": self.source,
            "requested": self.requested,
            "settings": self.settings,
            "bits_per_weight": self.bits_per_weight,
            "layers": len(self.tensors),
            "experts": self.experts,
            "fallbacks": [tensor.name for tensor in self.fallbacks],
            "left_alone": self.left_alone,
            "held_out": self.held_out,
            "blocks": self.blocks,
            "tensors": [dataclasses.asdict(tensor) | {"shape": list(tensor.shape)} for tensor in self.tensors],
        }

    def write(self, folder: Path) -> None:
        """Write receipt.json into `folder`."""
        write_json(folder / RECEIPT, self.to_dict())

"""`receipt.json`: what a lossy step did to every weight, kept beside the model that it made.

Per linear layer: its name and shape, the format that was asked for and the one it has, why it fell back where it did,
the relative squared error ||W - W'||^2 / ||W||^2, the largest |W - W'|, the share of its weights that the grid could
only clip, and the bytes it takes now. For the model: average bits per weight of the linear layers, the share of them
that fell back, what was measured on held-out rows, the gate, and what made it (versions, seed, time, memory).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strop.errors import FormatError
from strop.files.folders import write_json
from strop.numerics.loss import fold_scales, rounding_loss
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
        saturation: the share of the weights that lie more than half a step beyond the grid's outermost value, 0 to 1:
            see `strop.numerics.loss.RoundingLoss`; 0 where it was kept.
        finite_scales: whether every scale is a finite number; None where it was kept. A receipt with one that is not
            is refused, so what is written says true.
        folded: whether the errors are against the weight with scales of its rows and columns, found by least squares,
            because the method folds such scales into other layers before it rounds, as AWQ does.
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
    saturation: float = 0.0
    finite_scales: bool | None = None
    folded: bool = False
    calibration_tokens: int | None = None
    calibration_share: float | None = None

    @classmethod
    def of(
        cls, name: str, weight: Tensor, qtensor: QuantizedTensor, requested: str, *, folds: bool = False
    ) -> TensorReceipt:
        """Compare a weight with what it was rounded to, a piece at a time; the sums are taken in float64.

        Args:
            name: the layer's full name.
            weight: [out, in].
            qtensor: what it was rounded to.
            requested: the format that was asked for.
            folds: whether the method may have folded scales of this weight into other layers; it is then looked for.

        Raises:
            FormatError: scales are not finite.
        """
        scales = [qtensor.scales(), *([] if (minimums := qtensor.minimums()) is None else [minimums])]
        broken = sum(int((~torch.isfinite(part)).sum()) for part in scales)
        if broken:
            raise FormatError(
                f"{name}: {broken:,} of {sum(part.numel() for part in scales):,} scales as {qtensor.scheme.name} are "
                "not finite, and finite ones are needed; check the weight for values that no scale can hold, or "
                "choose a format with float32 scales (-sf32)"
            )
        scales_folded = fold_scales(weight, qtensor) if folds else None
        if scales_folded is not None:
            weight = (weight.detach().float() * scales_folded[0]).mul_(scales_folded[1])
        loss = rounding_loss(weight, qtensor)
        return cls(
            name=name,
            shape=qtensor.shape,
            requested=requested,
            actual=qtensor.scheme.name,
            reason=None,
            relative_error=loss.relative_error,
            max_error=loss.largest_error,
            nbytes=qtensor.nbytes,
            saturation=loss.saturation,
            finite_scales=True,
            folded=scales_folded is not None,
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
        parameters: of the whole model.
        weights_bytes: of the weight files that were written; None where it is not known.
        source_weights_bytes: of the source's weight files.
        gate: what was allowed on the held-out rows, and what passed; empty where nothing was asked.
        made_by: versions, seed, seconds and memory.
    """

    source: str
    requested: str
    settings: dict[str, Any]
    tensors: list[TensorReceipt] = field(default_factory=list)
    held_out: dict[str, Any] = field(default_factory=dict)
    left_alone: list[str] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    experts: int = 0
    parameters: int = 0
    weights_bytes: int | None = None
    source_weights_bytes: int | None = None
    gate: dict[str, Any] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)

    @property
    def fallbacks(self) -> list[TensorReceipt]:
        """The weights that did not get the format that was asked for."""
        return [tensor for tensor in self.tensors if tensor.reason is not None]

    @property
    def bits_per_weight(self) -> float:
        """Average over the linear layers, scales and kept weights counted."""
        weights = sum(math.prod(tensor.shape) for tensor in self.tensors)
        return 8 * sum(tensor.nbytes for tensor in self.tensors) / weights if weights else 0.0

    @property
    def fallback_share(self) -> float:
        """The share of the linear layers' weights that did not get the format that was asked for, 0 to 1."""
        weights = sum(math.prod(tensor.shape) for tensor in self.tensors)
        return sum(math.prod(tensor.shape) for tensor in self.fallbacks) / weights if weights else 0.0

    @property
    def rounded_share(self) -> float | None:
        """The share of all of the model's parameters that were rounded; None where their number is not known."""
        rounded = sum(math.prod(tensor.shape) for tensor in self.tensors if tensor.reason is None)
        return rounded / self.parameters if self.parameters else None

    def to_dict(self) -> dict[str, Any]:
        """The content of receipt.json."""
        return {
            "source": self.source,
            "requested": self.requested,
            "settings": self.settings,
            "bits_per_weight": self.bits_per_weight,
            "weights_bytes": self.weights_bytes,
            "source_weights_bytes": self.source_weights_bytes,
            "layers": len(self.tensors),
            "experts": self.experts,
            "fallbacks": [tensor.name for tensor in self.fallbacks],
            "fallback_share": self.fallback_share,
            "parameters": self.parameters,
            "rounded_share": self.rounded_share,
            "left_alone": self.left_alone,
            "held_out": self.held_out,
            "gate": self.gate,
            "made_by": self.made_by,
            "blocks": self.blocks,
            "tensors": [dataclasses.asdict(tensor) | {"shape": list(tensor.shape)} for tensor in self.tensors],
        }

    def write(self, folder: Path) -> None:
        """Write receipt.json into `folder`."""
        write_json(folder / RECEIPT, self.to_dict())

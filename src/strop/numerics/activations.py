"""The inputs of a linear layer as 8-bit integers: how (`Activations`, the part of a format after `-a8`), and the codes.

    x ~ scale * (code - zero_point),    x [tokens, in], code int8 [tokens, in], scale float32 [tokens, 1]

    a8          per token, symmetric: scale = max|x| / 127.5 of that token, found while the model runs
    a8-asym     per token with a zero point: scale = (max - min) / 255, the range widened to hold zero
    a8-static   one symmetric scale for the tensor, fixed before by calibration; beyond it values are clipped
    a8-over6    per token without the columns in which any |x| is over 6 (LLM.int8); scale = max|x| / 127

A token that is not finite gets the scale NaN, so that what broke shows in the output and is not rounded away.

Sources: Dettmers and others, "LLM.int8()" (2022), section 3 (the threshold 6 and absmax / 127); Xiao and others,
"SmoothQuant" (2022), section 2 (per token, per tensor, static and dynamic). 127.5 is compressed-tensors' divisor.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.errors import FormatError

OUTLIER_THRESHOLD = 6.0
"""Magnitude over which a column of activations is kept out of int8 (LLM.int8, section 3.2)."""

_STEPS = 255
_SMALLEST = 2.0**-149  # float32's smallest positive number


class ActivationRange(enum.Enum):
    """Which activations share a scale, and whether it has a zero point."""

    TOKEN = "token"
    TOKEN_ASYMMETRIC = "token_asymmetric"
    TENSOR = "tensor"


@dataclass(frozen=True)
class Activations:
    """How activations become int8.

    Attributes:
        range: What shares a scale; TENSOR is fixed by calibration, the others are found while the model runs.
        threshold: Columns with any magnitude over it stay in floating point; None for none.

    Raises:
        FormatError: A threshold that is not positive, or with another range than TOKEN.
    """

    range: ActivationRange = ActivationRange.TOKEN
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is None:
            return
        if self.range is not ActivationRange.TOKEN:
            raise FormatError(f"{self.name}: outliers are split off from activations per token, symmetric, alone")
        if not (math.isfinite(self.threshold) and self.threshold > 0):
            raise FormatError(f"the outlier threshold is {self.threshold:g}; needed a positive number, such as 6")

    @property
    def is_static(self) -> bool:
        """Whether the scale is fixed by calibration."""
        return self.range is ActivationRange.TENSOR

    @property
    def name(self) -> str:
        """The part of a format's text that says it, without a leading dash."""
        if self.threshold is not None:
            return f"a8-over{self.threshold:g}"
        return {"token": "a8", "token_asymmetric": "a8-asym", "tensor": "a8-static"}[self.range.value]


def parse_activations(parts: list[str], *, text: str) -> Activations:
    """Read what follows `a8` in a format's text.

    Raises:
        FormatError: Something else than `asym`, `static`, `overN` or nothing.

    >>> parse_activations(["over6"], text="int8-a8-over6").threshold
    6.0
    """
    if not parts:
        return Activations()
    if parts == ["asym"]:
        return Activations(ActivationRange.TOKEN_ASYMMETRIC)
    if parts == ["static"]:
        return Activations(ActivationRange.TENSOR)
    if len(parts) == 1 and parts[0].startswith("over"):
        number = parts[0].removeprefix("over")
        if number.replace(".", "", 1).isdecimal():
            return Activations(threshold=float(number))
    raise FormatError(
        f"{text!r}: after -a8 (8-bit activations, per token) comes nothing, -asym (with zero points), -static (one "
        f"scale from calibration) or -over6 (columns with a magnitude over 6 in floating point), got -{'-'.join(parts)}"
    )


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric codes of each token: x [tokens, in], any float dtype, to int8 [tokens, in] and scale [tokens, 1]."""
    x = x.float()
    scale = _positive(x.abs().amax(dim=1, keepdim=True) / (_STEPS / 2))
    return _codes(x, scale), scale


def token_codes_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of each token with a zero point: int8 [tokens, in], scale [tokens, 1], zero point int32 [tokens, 1]."""
    x = x.float()
    low, high = x.amin(dim=1, keepdim=True).clamp_(max=0.0), x.amax(dim=1, keepdim=True).clamp_(min=0.0)
    scale = _positive((high - low) / _STEPS)
    zero_point = torch.round(-128 - low / scale).clamp_(-128, 127).nan_to_num_(0.0)
    codes = torch.round(x / scale).add_(zero_point).nan_to_num_(0.0).clamp_(-128, 127)
    return codes.to(torch.int8), scale, zero_point.to(torch.int32)


def tensor_codes(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric codes at one given scale [1]: int8 [tokens, in], and the scale of each token [tokens, 1].

    The scale is the one given, but NaN for a token that is not finite.
    """
    x = x.float()
    finite = torch.isfinite(x.abs().amax(dim=1, keepdim=True))
    return _codes(x, scale), torch.where(finite, scale, torch.nan)


def tensor_scale(low: float, high: float) -> float:
    """The static scale of a range: max(-low, high) / 127.5, 1 for an empty range.

    >>> tensor_scale(-1.0, 255.0)
    2.0
    """
    largest = max(-low, high, 0.0)
    return max(largest / (_STEPS / 2), _SMALLEST) if largest else 1.0


def vector_codes(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """LLM.int8's codes of each token, the outlier columns left out.

    Args:
        x: [tokens, in], any float dtype.
        threshold: A column is an outlier where any token's magnitude is over it.

    Returns:
        int8 [tokens, in], 0 in outlier columns; scale [tokens, 1] = max|x| / 127 over the columns that are left; and
        the places of the outlier columns, int64, ascending.
    """
    x = x.float()
    outlier = ~(x.abs().amax(dim=0) <= threshold)  # NaN is one
    kept = x.masked_fill(outlier, 0.0)
    scale = _positive(kept.abs().amax(dim=1, keepdim=True) / 127)
    return _codes(kept, scale), scale, outlier.nonzero().flatten()


def rounded(x: Tensor, activations: Activations, scale: Tensor | None = None) -> Tensor:
    """What the codes of x [..., in] stand for, float32: the inputs that an `Int8Linear` computes with.

    Args:
        x: Any float dtype.
        activations: How they are rounded; with an outlier threshold the outlier columns stay as they are.
        scale: The static scale [1]; where there is none, one that covers x.
    """
    tokens = x.reshape(-1, x.shape[-1]).float()  # [..., in] -> [tokens, in]
    if activations.threshold is not None:
        codes, token_scale, outliers = vector_codes(tokens, activations.threshold)
        values = codes.float() * token_scale
        values[:, outliers] = tokens[:, outliers]
    elif activations.range is ActivationRange.TOKEN_ASYMMETRIC:
        codes, token_scale, zero_point = token_codes_asymmetric(tokens)
        values = (codes.int() - zero_point).float() * token_scale
    elif activations.is_static:
        if scale is None:
            low, high = (float(end) for end in torch.aminmax(tokens))
            scale = torch.tensor([tensor_scale(low, high)], device=x.device)
        codes, token_scale = tensor_codes(tokens, scale)
        values = codes.float() * token_scale
    else:
        codes, token_scale = token_codes(tokens)
        values = codes.float() * token_scale
    return values.view(x.shape)


def _positive(scale: Tensor) -> Tensor:
    """A scale that can be divided by: 1 for nothing but zeros; NaN where it is not finite."""
    scale = torch.where(scale > 0, scale.clamp(min=_SMALLEST), torch.where(scale == 0, 1.0, torch.nan))
    return torch.where(torch.isfinite(scale), scale, torch.nan)


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return torch.round(x / scale).nan_to_num_(0.0).clamp_(-128, 127).to(torch.int8)

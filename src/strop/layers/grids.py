"""Grids that a weight trains through: where their scales come from, and how many codes may move.

    RangeGrid     scales that cover each group's own range, found again on every call; held from `hold` on
    LearnedGrid   scales (and zero points) that learn with the weight: "Learned Step Size Quantization", Esser and
                  others, 2020, and "LSQ+", Bhalgat and others, 2020
    MovesGrid     the scales of a start, and codes of which only so many may leave the start's
    CodeMoves     the same, for a change of a weight that is held as codes: the largest changes move their codes
    ZeroMoves     the same for zero points: a group's mean change moves all of the group by whole steps

Each gives a weight's rounded values for the forward pass and, by the same numbers, the tensor that is stored: bit for
bit the same. The gradient of the weight passes straight through. Scales are rounded to the file's dtype on the way.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor, nn

from strop.errors import FormatError
from strop.methods.rounding import round_through, settled, stored_scale, straight, whole
from strop.numerics.affine import fake_quantize
from strop.numerics.formats import FloatFormat, IntFormat
from strop.numerics.groups import plan_shape, restore, split, spread
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scales import settle_scale
from strop.numerics.scheme import Scheme

FACTORS: Final = (0.05, 20.0)
"""How far a learned scale goes from its start, as multiples of it; so it never vanishes and never changes sign."""


@torch.no_grad()
def bound_factors(factor: Tensor) -> int:
    """Bring factors of learned scales back within `FACTORS`, in place; returns how many had left them."""
    outside = int(((factor < FACTORS[0]) | (factor > FACTORS[1])).sum())
    factor.clamp_(*FACTORS)
    return outside


class Grid(Protocol):
    """What a layer trains through."""

    @property
    def scheme(self) -> Scheme:
        """The grid's scheme."""
        ...

    def rounded(self, weight: Tensor) -> Tensor:
        """The weight [out, in] on the grid, in its dtype, with a gradient."""
        ...

    def settled(self, weight: Tensor) -> QuantizedTensor:
        """What is stored of the weight: it dequantizes to `rounded` bit for bit."""
        ...

    def hold(self, weight: Tensor) -> None:
        """Let the scales stay as they are from now on."""
        ...

    def keep_in_bounds(self) -> int:
        """After an optimizer's step: no scale vanishes or turns; how many had to be stopped."""
        ...


class RangeGrid(nn.Module):
    """Scales that cover each group's range, as rounding to nearest takes them.

    Args:
        scheme: the grid.
        shape: (out, in).
        holds: whether `hold` will be called: the held scales travel in a checkpoint.
        device: where they are held.

    Raises:
        FormatError: the shape does not fit, or scales that are codes themselves are to be held.
    """

    def __init__(
        self,
        scheme: Scheme,
        shape: tuple[int, int],
        *,
        holds: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        size = plan_shape(shape, scheme)
        self.scheme, self.held = scheme, False
        self.scale: Tensor | None
        self.zero_point: Tensor | None
        if holds and scheme.super_size is not None:
            raise FormatError(f"{scheme}: its scales are codes of a superblock and cannot be frozen; leave freeze out")
        self.register_buffer("scale", torch.zeros(size, device=device) if holds else None, persistent=False)
        self.register_buffer(
            "zero_point",
            torch.zeros(size, device=device) if holds and scheme.has_zero_point else None,
            persistent=False,
        )

    def rounded(self, weight: Tensor) -> Tensor:
        """See `Grid`."""
        return fake_quantize(weight, self.scheme, **self._given())

    def settled(self, weight: Tensor) -> QuantizedTensor:
        """See `Grid`."""
        return quantize_tensor(weight.detach(), self.scheme, **self._given())

    @torch.no_grad()
    def hold(self, weight: Tensor) -> None:
        """See `Grid`; a second call changes nothing."""
        if self.held or self.scale is None:
            return
        shape = (weight.shape[0], weight.shape[1])
        scale, zero = settle_scale(split(weight.detach(), self.scheme), self.scheme, shape, None, None, where="weight")
        self.scale.copy_(scale.float())
        if self.zero_point is not None and zero is not None:
            self.zero_point.copy_(zero)
        self.held = True

    def keep_in_bounds(self) -> int:
        """Nothing is learned here."""
        return 0

    def _given(self) -> dict[str, Any]:
        if not self.held:
            return {}
        form = self.scheme.format
        zero = self.zero_point
        if zero is not None and isinstance(form, IntFormat):
            zero = zero.to(torch.int8 if form.signed else torch.uint8)
        return {"scale": self.scale, "zero_point": zero}


class LearnedGrid(nn.Module):
    """Scales, and zero points where there are any, that learn.

        s = start * factor        g = 1 / sqrt(values that share a scale * largest code)

    The factor's gradient is multiplied by g (Esser and others, section 2.2), so that it weighs in the gradient's norm
    as a weight's does. Learning a multiple of the start, and not the scale, lets one rate serve layers of any size.

    Args:
        start: a weight on the grid, whose scales and zero points are where learning begins.

    Raises:
        FormatError: the scheme's scales are codes themselves (double quantization, superblocks, powers of two).
    """

    def __init__(self, start: QuantizedTensor) -> None:
        super().__init__()
        scheme, start = start.scheme, _with_real_scales(start, "scales are learned")
        assert start.scale is not None
        self.scheme = scheme
        self.begun: Tensor
        self.register_buffer("begun", start.scale.float().clone(), persistent=False)
        self.factor = nn.Parameter(torch.ones_like(start.scale, dtype=torch.float32))
        self.zero: nn.Parameter | None = None
        if start.zero_point is not None:
            self.zero = nn.Parameter(start.zero_point.float())
        shared = start.shape[0] * start.shape[1] / self.factor.numel()
        self.gradient_scale = 1.0 / math.sqrt(shared * _largest(scheme))

    def rounded(self, weight: Tensor) -> Tensor:
        """See `Grid`."""
        scale, zero = self._numbers()
        return round_through(weight.float(), self.scheme, scale, zero).to(weight.dtype)

    def settled(self, weight: Tensor) -> QuantizedTensor:
        """See `Grid`."""
        with torch.no_grad():
            return settled(weight.float(), self.scheme, *self._numbers())

    def hold(self, weight: Tensor) -> None:
        """See `Grid`."""
        self.factor.requires_grad = False
        if self.zero is not None:
            self.zero.requires_grad = False

    @torch.no_grad()
    def keep_in_bounds(self) -> int:
        """See `Grid`."""
        outside = bound_factors(self.factor)
        if self.zero is not None:
            self.zero.clamp_(0, self._steps())
        return outside

    def _numbers(self) -> tuple[Tensor, Tensor | None]:
        scale = stored_scale(self.begun * _weighed(self.factor, self.gradient_scale), self.scheme)
        if self.zero is None:
            return scale, None
        return scale, whole(_weighed(self.zero, self.gradient_scale), 0, self._steps())

    def _steps(self) -> int:
        assert isinstance(self.scheme.format, IntFormat)
        return self.scheme.format.steps


class _FromStart(nn.Module):
    """What grids that keep a start's scales have alike: nothing to hold or to bound, and values of what is stored.

    Args:
        start: the weight on its grid.
        what: is done to it, for the error.

    Raises:
        FormatError: the start's scales are codes themselves.
    """

    def __init__(self, start: QuantizedTensor, what: str) -> None:
        super().__init__()
        self.scheme, self.start = start.scheme, _with_real_scales(start, what)

    @abstractmethod
    def settled(self, weight: Tensor) -> QuantizedTensor:
        """See `Grid`."""

    def rounded(self, weight: Tensor) -> Tensor:
        """See `Grid`."""
        return straight(self.settled(weight).dequantize(weight.dtype), weight)

    def hold(self, weight: Tensor) -> None:
        """The scales stay in any case."""

    def keep_in_bounds(self) -> int:
        """Nothing is learned here."""
        return 0


class MovesGrid(_FromStart):
    """The start's scales, and the start's codes but for the few that want to move most.

    A code moves where the weight lies nearest to another; where more than `share` of a layer's codes would, those whose
    weights are furthest from the start's values, in steps of the grid, are the ones that do. The others keep the
    start's codes in the forward pass and go on collecting gradient.

    Args:
        start: the weight on its grid.
        share: of the codes of the layer that may differ from the start's; 1 for all.

    Raises:
        FormatError: the scheme's scales are codes themselves.
    """

    def __init__(self, start: QuantizedTensor, share: float) -> None:
        super().__init__(start, "moves are counted")
        self.limit = int(share * start.shape[0] * start.shape[1])

    @torch.no_grad()
    def settled(self, weight: Tensor) -> QuantizedTensor:
        """See `Grid`."""
        start = self.start
        nearest = quantize_tensor(weight.detach().float(), self.scheme, scale=start.scale, zero_point=_own_zero(start))
        before, after = start.stored_codes().flatten(), nearest.stored_codes().flatten()
        moved = (before != after).nonzero().flatten()
        if len(moved) <= self.limit:
            return nearest
        far = _in_steps(weight, start).abs_().flatten()[moved]
        stays = torch.ones(len(moved), dtype=torch.bool, device=moved.device)
        stays[torch.topk(far, self.limit).indices] = False
        after[moved[stays]] = before[moved[stays]]
        return start.with_codes(after.view(start.shape))


class CodeMoves(_FromStart):
    """The start's scales, and its codes moved where a change of its values is among the largest.

        u = (w - start) / s        the `share` of the layer with the largest |u| moves by max(1, round(|u|)) codes

    For a base that is held as codes: every weight begins on its code, where a change below half a step would move
    nothing. After Yuan and others, "LoTA-QAF: Lossless Ternary Adaptation for Quantization-Aware Fine-Tuning" (2025),
    whose adapters are ternary and whose threshold is a number; here the change is real and the threshold is what lets
    `share` of the codes move. The share grows with the run, so that what moves first is what matters most.

    Args:
        start: the base on its grid.
        share: of the codes that move at the end of the run.

    Attributes:
        progress: of the run, 0 to 1; the codes that move now are `share * progress`.

    Raises:
        FormatError: the scheme is of no integers, or its scales are codes themselves.
    """

    def __init__(self, start: QuantizedTensor, share: float) -> None:
        if not isinstance(start.scheme.format, IntFormat):
            raise FormatError(f"{start.scheme}: codes are moved by steps on grids of integers, such as int4-g32")
        super().__init__(start, "codes are moved")
        self.share, self.progress = share, 1.0

    @torch.no_grad()
    def settled(self, weight: Tensor) -> QuantizedTensor:
        """See `Grid`."""
        form = self.scheme.format
        assert isinstance(form, IntFormat)
        steps = _in_steps(weight, self.start)
        places = _largest_places(steps, self.share * self.progress)
        codes = self.start.stored_codes().flatten().to(torch.int16)
        change = steps.flatten()[places]
        codes[places] += (change.abs().round_().clamp_(1, form.steps).copysign_(change)).to(torch.int16)
        return self.start.with_codes(codes.clamp_(0, form.steps).to(torch.uint8).view(self.start.shape))


class ZeroMoves(_FromStart):
    """The start's codes and scales, and its zero points moved where a group's mean change is among the largest.

        v = mean over the group of (w - start) / s        z' = z - sign(v) * max(1, round(|v|)) for the `share` largest

    After Xu and others, "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models" (2023), whose zero
    points are real numbers; in the files that hold integer ones a move is a whole step of the grid for every weight of
    the group.

    Args:
        start: the base on its grid.
        share: of the zero points that move at the end of the run.

    Attributes:
        progress: as in `CodeMoves`.

    Raises:
        FormatError: the scheme has no zero points.
    """

    def __init__(self, start: QuantizedTensor, share: float) -> None:
        if start.zero_point is None:
            raise FormatError(
                f"{start.scheme}: has no zero points to move; int4-g32-asym has, and --hold codes needs none"
            )
        super().__init__(start, "zero points are moved")
        self.share, self.progress = share, 1.0

    @torch.no_grad()
    def settled(self, weight: Tensor) -> QuantizedTensor:
        """See `Grid`."""
        start, form = self.start, self.scheme.format
        assert isinstance(form, IntFormat)
        assert start.zero_point is not None
        change = split(_in_steps(weight, start), self.scheme).mean(dim=-1).flatten()
        places = _largest_places(change, self.share * self.progress)
        zeros = start.zero_point.flatten().to(torch.int16)
        zeros[places] -= (change[places].abs().round_().clamp_(1, form.steps).copysign_(change[places])).to(torch.int16)
        zeros = zeros.clamp_(0, form.steps).to(torch.uint8).view(start.zero_point.shape)
        return dataclasses.replace(start, zero_point=zeros)

    def pooled(self, x: Tensor) -> Tensor:
        """The inputs that an adapter's gradient is formed with: the mean of each group in the place of its values."""
        size = self.scheme.group_size or x.shape[-1]
        groups = x.unflatten(-1, (-1, size))
        return groups.mean(dim=-1, keepdim=True).expand_as(groups).flatten(-2)


def _with_real_scales(start: QuantizedTensor, what: str) -> QuantizedTensor:
    """The start, where codes and zero points mean the same under scales of their own.

    Raises:
        FormatError: they do not.
    """
    if not start.scheme.has_real_scales or start.scale is None or start.group_index is not None:
        raise FormatError(f"{start.scheme}: {what} on grids with plain scales, such as int4-g32 and gguf:q4_0")
    return start


def _own_zero(start: QuantizedTensor) -> Tensor | None:
    """The zero points in the format's own codes."""
    form = start.scheme.format
    if start.zero_point is None or not isinstance(form, IntFormat):
        return None
    return (start.zero_point.to(torch.int16) + form.qmin).to(torch.int8 if form.signed else torch.uint8)


def _in_steps(weight: Tensor, start: QuantizedTensor) -> Tensor:
    """(w - start) / s, [out, in], float32, with the scale's sign: how many codes the weight lies above the start."""
    assert start.scale is not None
    groups = split(weight.detach().float() - start.dequantize(), start.scheme)
    scale = spread(start.scale.float())
    return restore(groups / torch.where(scale == 0, 1.0, scale), start.shape)


def _largest_places(x: Tensor, share: float) -> Tensor:
    """Where the values of largest magnitude stand, at most `share` of them, those that are 0 left out; int64."""
    size = x.flatten().abs()
    count = int(share * size.numel())
    if not count:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    values, places = torch.topk(size, count, sorted=False)
    return places[values > 0]


def _largest(scheme: Scheme) -> float:
    """The largest code, in multiples of the scale."""
    form = scheme.format
    if isinstance(form, IntFormat):
        return float(form.qmax if form.signed else form.steps)
    return form.max_value if isinstance(form, FloatFormat) else 1.0


def _weighed(x: Tensor, factor: float) -> Tensor:
    return cast(Callable[..., Tensor], _Weighed.apply)(x, factor)  # pyright: ignore[reportUnknownMemberType]


class _Weighed(torch.autograd.Function):
    """x, with its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None

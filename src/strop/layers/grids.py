"""Grids that a weight trains through: where their scales come from, and how many codes may move.

    RangeGrid     scales that cover each group's own range, found again on every call; held from `hold` on
    LearnedGrid   scales (and zero points) that learn with the weight: "Learned Step Size Quantization", Esser and
                  others, 2020, and "LSQ+", Bhalgat and others, 2020
    MovesGrid     the scales of a start, and codes of which only so many may leave the start's
    CodeMoves     the same, for a change of a weight that is held as codes: codes move by steps that sum to the change
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

_PLASTIC: Final = 1.324717957244746


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
    """The start's scales, and its codes moved by what a change of its values comes to, rounded fairly.

        u = (w - start) / s        code' = code + round(u + d)        d: evenly spread over -1/2 to 1/2

    For a base that is held as codes: every weight begins on its code, where a change below half a step would move
    nothing, and the optimizer could not see what a small change is worth. With d each weight stands at a place of its
    own between two thresholds, as a weight that was rounded does: of many weights that are to change by a tenth of a
    step a tenth move by one, so that the moves sum to the change. No change moves no code, and d costs no memory.
    Where more than `share` of a layer's codes would move, the furthest from their codes do.

    Args:
        start: the base on its grid.
        share: of the codes that may move; 1 for all.

    Raises:
        FormatError: the scheme is of no integers, or its scales are codes themselves.
    """

    def __init__(self, start: QuantizedTensor, share: float) -> None:
        if not isinstance(start.scheme.format, IntFormat):
            raise FormatError(f"{start.scheme}: codes are moved by steps on grids of integers, such as int4-g32")
        super().__init__(start, "codes are moved")
        self.share = share

    @torch.no_grad()
    def settled(self, weight: Tensor) -> QuantizedTensor:
        """See `Grid`."""
        form = self.scheme.format
        assert isinstance(form, IntFormat)
        moves = _moves(_in_steps(weight, self.start), self.share, form.steps)
        codes = self.start.stored_codes().to(torch.int16).add_(moves).clamp_(0, form.steps)
        return self.start.with_codes(codes.to(torch.uint8))


class ZeroMoves(_FromStart):
    """The start's codes and scales, and its zero points moved by what each group's mean change comes to.

        v = mean over the group of (w - start) / s        z' = z - round(v + d)        d, share: as in `CodeMoves`

    After Xu and others, "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models" (2023), whose zero
    points are real numbers; in the files that hold integer ones a move is a whole step of the grid for every weight of
    the group.

    Args:
        start: the base on its grid.
        share: of the zero points that may move; 1 for all.

    Raises:
        FormatError: the scheme has no zero points.
    """

    def __init__(self, start: QuantizedTensor, share: float) -> None:
        if start.zero_point is None:
            raise FormatError(
                f"{start.scheme}: has no zero points to move; int4-g32-asym has, and --hold codes needs none"
            )
        super().__init__(start, "zero points are moved")
        self.share = share

    @torch.no_grad()
    def settled(self, weight: Tensor) -> QuantizedTensor:
        """See `Grid`."""
        start, form = self.start, self.scheme.format
        assert isinstance(form, IntFormat)
        assert start.zero_point is not None
        change = split(_in_steps(weight, start), self.scheme).mean(dim=-1)
        moves = _moves(change, self.share, form.steps).view(start.zero_point.shape)
        zeros = start.zero_point.to(torch.int16).sub_(moves).clamp_(0, form.steps)
        return dataclasses.replace(start, zero_point=zeros.to(torch.uint8))

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


def _moves(change: Tensor, share: float, most: int) -> Tensor:
    """Whole steps for a change [rows, columns] in steps, at most `share` of them not 0; int16, within +-most."""
    placed = (change + _spread_places(change)).clamp_(-most, most)
    moves = placed.round().to(torch.int16)
    moved = moves.flatten().nonzero().flatten()
    limit = int(share * moves.numel())
    if len(moved) > limit:
        least = torch.topk(placed.abs_().flatten()[moved], len(moved) - limit, largest=False, sorted=False).indices
        moves.view(-1)[moved[least]] = 0
    return moves


def _spread_places(like: Tensor) -> Tensor:
    """Numbers within -1/2 to 1/2 for the places of a matrix, evenly spread in every stretch of it; float32.

    The lattice of Roberts, "The unreasonable effectiveness of quasirandom sequences" (2018): frac(i / p^2 + j / p) for
    p^3 = p + 1. Of any few neighbours in a row or a column no two are close, so that sums over either are fair.
    """
    rows, columns = (torch.arange(size, dtype=torch.float64, device=like.device) for size in like.shape)
    places = (rows / _PLASTIC**2).frac().float()[:, None] + (columns / _PLASTIC).frac().float()
    return places.frac_().sub_(0.5)


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

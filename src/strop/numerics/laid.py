"""`LaidGrid`: a scheme's grid laid over one weight, scales and zero points settled, ready to give codes and values.

`quantize_tensor` and `fake_quantize` both go through it, which is why what training sees is what is stored, bit for
bit. Groups are those of `groups.split`, [rows, groups, size]; `rows` says which of them are meant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from strop.errors import FormatError
from strop.numerics import grid
from strop.numerics.codebook import NestedScale, nest
from strop.numerics.formats import Format, IntFormat
from strop.numerics.groups import group_range, plan_shape, rows_of, spread
from strop.numerics.scales import check_finite_range, settle_scale, stored_zero_point
from strop.numerics.scheme import Mode, Scheme
from strop.numerics.superblock import SuperScale, check_super_scale, plain_super_scale, super_scale_of


@dataclass(frozen=True, eq=False)
class LaidGrid:
    """What is stored beside the codes, and the same numbers in the shapes that groups are worked on with.

    Attributes:
        scale: As stored; None where scales are nested or of superblocks.
        zero_point: As stored, uint8, or None.
        nested: The block scales under double quantization.
        super_scale: Scales and minimums of superblocks.
        clips: Whether the grid may leave some of the weight's values outside.
        form: The codes' number format.
        code_scale: What codes are chosen against, float32, spread.
        value_scale: What values are made with: another under double quantization alone.
        zero: Stored zero points, spread, or None.
        minimum: What is subtracted from every value, float32, spread, or None.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    nested: NestedScale | None
    super_scale: SuperScale | None
    clips: bool
    form: Format
    code_scale: Tensor
    value_scale: Tensor
    zero: Tensor | None
    minimum: Tensor | None

    def codes(self, x: Tensor, rows: slice, *, noise: Tensor | None = None) -> Tensor:
        """Stored codes of x, float32 [rows, groups, size]: the nearest, or under noise in [0, 1) one of the two."""
        scale, zero = rows_of(self.code_scale, rows), self._zero(rows)
        if noise is None:
            return grid.codes(self._raised(x, rows), scale, zero, self.form)
        return grid.noisy_codes(self._raised(x, rows), scale, zero, self.form, noise)

    def rounded(self, x: Tensor, rows: slice) -> Tensor:
        """The values that the codes of x stand for, float32."""
        scale, value_scale = rows_of(self.code_scale, rows), rows_of(self.value_scale, rows)
        values = grid.rounded(self._raised(x, rows), scale, value_scale, self._zero(rows), self.form)
        return values if self.minimum is None else values.sub_(rows_of(self.minimum, rows))

    def inside(self, x: Tensor, rows: slice) -> Tensor:
        """Where the grid does not clip x, bool."""
        return grid.inside(self._raised(x, rows), rows_of(self.code_scale, rows), self._zero(rows), self.form)

    def _raised(self, x: Tensor, rows: slice) -> Tensor:
        return x if self.minimum is None else x + rows_of(self.minimum, rows)

    def _zero(self, rows: slice) -> Tensor | None:
        return None if self.zero is None else rows_of(self.zero, rows)


def lay_grid(
    groups: Tensor,
    scheme: Scheme,
    shape: tuple[int, int],
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    super_scale: SuperScale | None = None,
    where: str = "weight",
) -> LaidGrid:
    """Settle scales and zero points: those given, checked, or those of each group's own range.

    Args:
        groups: The weight, cut by `groups.split`.
        scheme: The grid.
        shape: (out, in).
        scale: As in `quantize_tensor`.
        zero_point: As in `quantize_tensor`.
        super_scale: As in `quantize_tensor`.
        where: The weight's name, for messages.

    Raises:
        FormatError: The weight holds NaN or infinite values, or what is given does not fit the scheme.
    """
    given = scale is not None or super_scale is not None
    if scheme.super_size is not None or super_scale is not None:
        settled = _settle_superblocks(groups, scheme, shape, scale, zero_point, super_scale, where)
        step = settled.scales()
        code_scale = spread(torch.where(step > 0, step, torch.inf))  # x / infinity is 0: the only code such a group has
        minimum = spread(settled.minimums())
        return LaidGrid(
            scale=None,
            zero_point=None,
            nested=None,
            super_scale=settled,
            clips=True,
            form=scheme.format,
            code_scale=code_scale,
            value_scale=spread(step),
            zero=None,
            minimum=minimum,
        )
    scale, zero_point = settle_scale(groups, scheme, shape, scale, zero_point, where=where)
    stored_zero = None if zero_point is None else stored_zero_point(zero_point, scheme.format)
    code_scale = spread(scale.float())
    nested = nest(scale) if scheme.double_quant else None
    return LaidGrid(
        scale=None if nested is not None else scale,
        zero_point=stored_zero,
        nested=nested,
        super_scale=None,
        clips=given or scheme.mode is Mode.SYMMETRIC_FULL or scheme.has_power_scale,
        form=scheme.format,
        code_scale=code_scale,
        value_scale=code_scale if nested is None else spread(nested.dequantize()),
        zero=None if stored_zero is None else spread(stored_zero),
        minimum=None,
    )


def _settle_superblocks(
    groups: Tensor,
    scheme: Scheme,
    shape: tuple[int, int],
    scale: Tensor | None,
    zero_point: Tensor | None,
    super_scale: SuperScale | None,
    where: str,
) -> SuperScale:
    """Superblocks: those given, those that scales and zero points given come nearest to, or the plain ones."""
    if super_scale is None and scale is None:
        assert isinstance(scheme.format, IntFormat)
        return plain_super_scale(groups, scheme.format, where=where)
    low, high = group_range(groups)
    check_finite_range(low, high, where=where)
    if super_scale is not None:
        if scale is not None or zero_point is not None:
            raise FormatError(f"{where}: superblocks hold the scales; give no others beside them")
        return check_super_scale(super_scale, scheme, shape, where=where)
    size = plan_shape(shape, scheme, where=where)
    for name, part in (("scale", scale), ("zero_point", zero_point)):
        if part is None or tuple(part.shape) != size:
            got = "none" if part is None else str(list(part.shape))
            raise FormatError(f"{where}: {scheme.name} takes a {name} of shape {list(size)}, got {got}")
        if not torch.isfinite(part).all() or (part < 0).any():
            raise FormatError(f"{where}: {name}s of {scheme.name} are finite and not negative")
    assert scale is not None
    assert zero_point is not None
    step = scale.detach().float()
    return super_scale_of(step, step * zero_point.detach().float(), where=where)

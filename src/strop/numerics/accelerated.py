"""What of `numerics` the native kernels do: schemes in their terms, and None for all that stays with the reference.

Kernels know integers of 2 to 8 bits per tensor, channel or group, and the 4-bit codebooks; float32 and bfloat16 values
on a CPU. Floats of 8 bits and less, superblocks, activation order, stochastic rounding, other dtypes and devices are
the reference's, and so is every refusal: a kernel that meets values it cannot round leaves them to it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.kernels import operations
from strop.kernels.library import Job
from strop.kernels.operations import AffineGrid, Codebook
from strop.numerics.codebook import NestedScale, nest
from strop.numerics.formats import CodebookFormat, IntFormat
from strop.numerics.groups import split
from strop.numerics.laid import LaidGrid, lay_grid
from strop.numerics.scheme import Granularity, Mode, Scheme

_MODES = {
    Mode.SYMMETRIC: operations.SYMMETRIC,
    Mode.SYMMETRIC_FULL: operations.FULL_RANGE,
    Mode.ASYMMETRIC: operations.ASYMMETRIC,
}


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight rounded to a grid.

    Attributes:
        values: [out, in], the weight's dtype.
        mask: Where the grid did not clip, packed; None where it clips nothing.
        size: Values of a group.
    """

    values: Tensor
    mask: Tensor | None
    size: int


@dataclass(frozen=True, eq=False)
class Coded:
    """The parts of a `QuantizedTensor`."""

    codes: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    nested: NestedScale | None


def fake_quantize(weight: Tensor, scheme: Scheme, scale: Tensor | None, zero_point: Tensor | None) -> Rounded | None:
    """`affine.fake_quantize` without its gradient; the weight's shape has been checked."""
    weight = weight.detach()
    if not _takes(weight, scheme):
        return None
    shape = (weight.shape[0], weight.shape[1])
    laid = _laid(weight, scheme, scale, zero_point)
    clips = laid.clips if laid is not None else scheme.mode is Mode.SYMMETRIC_FULL
    if (book := _codebook(scheme)) is not None:
        made = operations.round_codebook(
            weight,
            book,
            scale=None if laid is None else laid.code_scale.reshape(-1),
            value_scale=None if laid is None else laid.value_scale.reshape(-1),
            masked=clips,
        )
        return None if made is None else Rounded(*made, book.size)
    grid = _affine(scheme, shape)
    made = operations.round_affine(
        weight,
        grid,
        scale_dtype=scheme.scale_dtype,
        scale=None if laid is None else laid.scale,
        zero=None if laid is None else laid.zero_point,
        masked=clips,
    )
    return None if made is None else Rounded(*made, grid.size)


def quantize(
    weight: Tensor, scheme: Scheme, scale: Tensor | None, zero_point: Tensor | None, *, where: str
) -> Coded | None:
    """`qtensor.quantize_tensor`, rounding to the nearest; the weight's shape has been checked."""
    if not _takes(weight, scheme):
        return None
    shape = (weight.shape[0], weight.shape[1])
    if (book := _codebook(scheme)) is not None:
        given = None if scale is None else _given(weight, scheme, scale, zero_point, where).code_scale.reshape(-1)
        made = operations.quantize_codebook(weight, book, scale=given)
        if made is None:
            return None
        codes, block_scale = made
        return Coded(codes, None, None, nest(block_scale)) if scheme.double_quant else Coded(*made, None, None)
    laid = _laid(weight, scheme, scale, zero_point, where=where)
    made = operations.quantize_affine(
        weight,
        _affine(scheme, shape),
        scale_dtype=scheme.scale_dtype,
        scale=None if laid is None else laid.scale,
        zero=None if laid is None else laid.zero_point,
    )
    return None if made is None else Coded(*made, None)


def dequantize(
    codes: Tensor,
    scheme: Scheme,
    shape: tuple[int, int],
    *,
    scale: Tensor,
    zero_point: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """The values of packed codes, their scales as stored (a codebook's in float32)."""
    if not _knows(scheme):
        return None
    if (book := _codebook(scheme)) is not None:
        return operations.dequantize_codebook(codes, shape, book, scale=scale, dtype=dtype)
    return operations.dequantize_affine(
        codes, shape[1], _affine(scheme, shape), scale=scale, zero=zero_point, dtype=dtype
    )


@dataclass(frozen=True, eq=False)
class RowReader:
    """Reads some rows of a quantized weight at a time, so that no more of it is dense than those.

    Attributes:
        scheme: The weight's.
        columns: Values of a row.
        codes: Packed, [out, bytes of a row].
        scale: Of each group, [out, groups of a row]; a single one serves all rows.
        zero_point: Like it, or None.
    """

    scheme: Scheme
    columns: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @classmethod
    def of(
        cls, codes: Tensor, scheme: Scheme, shape: tuple[int, int], scale: Tensor, zero_point: Tensor | None
    ) -> RowReader | None:
        """For packed codes, their scales as stored (a codebook's in float32); None where no kernel reads their rows."""
        rows, columns = shape
        if not _knows(scheme) or operations.usable(codes, scale, zero_point) is None:
            return None
        if (book := _codebook(scheme)) is not None and columns % book.size:
            return None  # a block of the flattened weight may begin in the middle of a row
        if scheme.granularity is not Granularity.TENSOR:
            scale = scale.reshape(rows, -1)
            zero_point = None if zero_point is None else zero_point.reshape(rows, -1)
        return cls(scheme, columns, codes.reshape(rows, -1), scale, zero_point)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """The values of rows `start` to `stop` into `out` [stop - start, in], float32 or bfloat16."""
        shared = self.scheme.granularity is Granularity.TENSOR
        codes = self.codes[start:stop]
        scale = self.scale if shared else self.scale[start:stop]
        zero = self.zero_point if shared or self.zero_point is None else self.zero_point[start:stop]
        shape = (stop - start, self.columns)
        if (book := _codebook(self.scheme)) is not None:
            flat, blocks = codes.reshape(-1), scale.reshape(-1)
            made = operations.dequantize_codebook(flat, shape, book, scale=blocks, dtype=out.dtype, out=out)
        else:
            grid = _affine(self.scheme, shape)
            made = operations.dequantize_affine(
                codes, self.columns, grid, scale=scale, zero=zero, dtype=out.dtype, out=out
            )
        assert made is out


def product(
    x: Tensor, scheme: Scheme, shape: tuple[int, int], parts: Mapping[str, Tensor], bias: Tensor | None
) -> Tensor | None:
    """A few tokens times a quantized weight transposed, plus a bias; the weight is never dense.

    Args:
        x: [..., in].
        scheme: The weight's.
        shape: (out, in).
        parts: The weight's tensors by name, as `QuantizedTensor.tensors` gives them.
        bias: [out] in the dtype of x, or None.

    Returns:
        [..., out] in the dtype of x, summed in float32.
    """
    rows, columns = shape
    grid = _product_grid(scheme, columns)
    if grid is None or "group_index" in parts:
        return None
    if not operations.product_takes(x.numel() // columns, grid, columns, x.dtype):
        return None
    if "nested_codes" in parts:
        scale = NestedScale(parts["nested_codes"], parts["nested_scale"], parts["nested_offset"]).dequantize()
    else:
        scale = parts["scale"]
    flat = x if x.ndim == 2 else x.reshape(-1, columns)
    zero = parts.get("zero_point")
    made = operations.product(flat, parts["codes"], grid, scale=scale, zero=zero, bias=bias, shape=shape)
    return made if made is None or x.ndim == 2 else made.view(*x.shape[:-1], rows)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized weight as a step of a block reads it (`kernels.step`), where it lies.

    Attributes:
        job: What the product asks of the kernels.
        grid: Its grid.
        shape: (out, in).
        bias: [out], or None.
        held: The tensors that the job points to.
    """

    job: Job
    grid: AffineGrid | Codebook
    shape: tuple[int, int]
    bias: Tensor | None
    held: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, scheme: Scheme, shape: tuple[int, int], parts: Mapping[str, Tensor], bias: Tensor | None
    ) -> PackedWeight | None:
        """For a weight's tensors by name; None where no kernel reads them as they lie."""
        grid = _product_grid(scheme, shape[1])
        held = tuple(tensor.detach() for tensor in (*parts.values(), bias) if tensor is not None)
        if grid is None or not {"codes", "scale"} <= set(parts) <= {"codes", "scale", "zero_point"}:
            return None
        if operations.usable(*held) is None:
            return None
        zero = parts.get("zero_point")
        job = operations.product_job(parts["codes"], grid, scale=parts["scale"], zero=zero, bias=bias, shape=shape)
        return None if job is None else cls(job, grid, shape, bias, held)


@functools.lru_cache(maxsize=256)
def _product_grid(scheme: Scheme, columns: int) -> AffineGrid | Codebook | None:
    """The grid of a scheme over rows of some length, made once; None where there are no kernels for it."""
    if not _knows(scheme):
        return None
    return _codebook(scheme) or _affine(scheme, (1, columns))


def _knows(scheme: Scheme) -> bool:
    """Whether there are kernels for a scheme."""
    if isinstance(scheme.format, CodebookFormat):
        return scheme.bits == 4
    return isinstance(scheme.format, IntFormat) and scheme.super_size is None


def _takes(weight: Tensor, scheme: Scheme) -> bool:
    """Whether the kernels are in use and round this weight to this scheme."""
    known = _knows(scheme) and weight.dtype in (torch.float32, torch.bfloat16)
    return known and operations.usable(weight) is not None


def _laid(
    weight: Tensor, scheme: Scheme, scale: Tensor | None, zero_point: Tensor | None, *, where: str = "weight"
) -> LaidGrid | None:
    """Scales settled beforehand: given, one for a whole tensor, or nested; None where each group has its own."""
    if (
        scale is None
        and zero_point is None
        and scheme.granularity is not Granularity.TENSOR
        and not scheme.double_quant
    ):
        return None
    return _given(weight, scheme, scale, zero_point, where)


def _given(weight: Tensor, scheme: Scheme, scale: Tensor | None, zero_point: Tensor | None, where: str) -> LaidGrid:
    shape = (weight.shape[0], weight.shape[1])
    return lay_grid(split(weight, scheme), scheme, shape, scale=scale, zero_point=zero_point, where=where)


def _affine(scheme: Scheme, shape: tuple[int, int]) -> AffineGrid:
    assert isinstance(scheme.format, IntFormat)
    size, shared = scheme.group_size or shape[1], scheme.granularity is Granularity.TENSOR
    return AffineGrid(scheme.bits, scheme.format.qmin, _MODES[scheme.mode], size, shared)


def _codebook(scheme: Scheme) -> Codebook | None:
    """A scheme's codebook in the kernels' terms; None for integers."""
    if not isinstance(scheme.format, CodebookFormat):
        return None
    assert scheme.group_size is not None
    return _tables(scheme.format, scheme.group_size)


@functools.cache
def _tables(form: CodebookFormat, size: int) -> Codebook:
    """The levels ascending, each once (FP4's second zero is left out), with the codes that they have."""
    levels = torch.tensor(form.levels, dtype=torch.float32, device="cpu")
    first: dict[float, int] = {}
    for code, level in enumerate(form.levels):
        first.setdefault(level, code)
    ordered = sorted(first)
    ascending = torch.tensor(ordered, dtype=torch.float32, device="cpu")
    order = torch.tensor([first[level] for level in ordered], dtype=torch.uint8, device="cpu")
    spare = levels.numel() - ascending.numel()
    return Codebook(
        size,
        levels,
        torch.cat([ascending, ascending[-1:].expand(spare)]),
        torch.cat([(ascending[:-1] + ascending[1:]) / 2, torch.full((spare,), torch.inf, device="cpu")]),
        torch.cat([order, order[-1:].expand(spare)]),
    )

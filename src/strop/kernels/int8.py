"""Rows rounded to int8, and their products with an int8 weight: exact sums, one rounding on the way out.

    rounded:    scale[t] = max over i of |f[i] x[t, i]| / 127,   code[t, i] = round(f[i] x[t, i] * (127 / max))
    product:    y[t, n] = scale[t] * channel[n] * sum over i of code[t, i] * W[n, i]          (`back`: W[i, n])

The sum is int32 and exact, whatever multiplies: the native library, by tiles (AMX) or by pairs (AVX2), or where it has
neither `torch._int_mm` (exact where `numerics.int8_matmul.native_is_exact`). So the bits are the same by all ways, and
do not depend on the number of threads. A row that is not finite gives NaN, a row of zeros (below 1e-30) zeros.

One copy of the weight, as it lies [out, in], serves both directions. Rows are padded to whole tiles with zeros.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.kernels.library import Int8Job, native
from strop.kernels.operations import usable

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_SUMS = 3
_DEEP, _PANEL = 64, 32


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of int8 with a scale each.

    Attributes:
        codes: int8 [at least count, padded columns], zeros behind the columns.
        scales: float32 [count].
        columns: How many columns count.
    """

    codes: Tensor
    scales: Tensor
    columns: int


def round_rows(x: Tensor, factor: Tensor | None = None) -> Rows:
    """Round the rows of x.

    Args:
        x: float32 or bfloat16 [count, columns], rows contiguous; sums fit int32 up to 2^16 columns.
        factor: float32 [columns], what the columns are multiplied by first.
    """
    count, columns = x.shape
    assert x.stride(1) == 1
    stride = -(-columns // _DEEP) * _DEEP
    codes = torch.empty(-(-count // _PANEL) * _PANEL, stride, dtype=torch.int8)
    scales = torch.empty(count, dtype=torch.float32)
    job = Int8Job(rows=count, columns=columns, x_stride=x.stride(0), stride=stride, x_type=_TYPES[x.dtype])
    job.x, job.codes, job.scales = x.data_ptr(), codes.data_ptr(), scales.data_ptr()
    job.factor = None if factor is None else factor.data_ptr()
    if count and not _call("round_rows", job):
        raise ValueError("round_rows: the kernel refused its job")
    return Rows(codes, scales, columns)


def product(x: Rows, weight: Tensor, out: Tensor, *, channel: Tensor | None = None, back: bool = False) -> None:
    """The product of the formula above into `out`.

    Args:
        x: The rows.
        weight: int8 [out, at least in], rows contiguous.
        out: float32 or bfloat16 [count, out], or [count, in] with `back`; rows contiguous.
        channel: float32, one for each column of `out`.
        back: Multiply by W instead of by its transpose.
    """
    job = Int8Job(rows=len(x.scales), columns=x.columns, outputs=out.shape[1], stride=x.codes.shape[1])
    job.codes, job.scales, job.weight, job.y = (t.data_ptr() for t in (x.codes, x.scales, weight, out))
    job.weight_stride, job.y_stride, job.x_type, job.back = weight.stride(0), out.stride(0), _TYPES[out.dtype], back
    job.channel = None if channel is None else channel.data_ptr()
    if not len(x.scales) or (is_native() and _call("int8_product", job)):
        return
    plain_product(x, weight, out, channel=channel, back=back)


def plain_product(x: Rows, weight: Tensor, out: Tensor, *, channel: Tensor | None = None, back: bool = False) -> None:
    """The same by `torch._int_mm`."""
    codes = x.codes[: len(x.scales), : x.columns]
    matrix = weight[: x.columns, : out.shape[1]] if back else weight[: out.shape[1], : x.columns].t()
    # torch has no public name for it
    sums: Tensor = torch._int_mm(  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
        codes.contiguous(), matrix
    )
    y = sums.float().mul_(x.scales[:, None])
    out.copy_(y if channel is None else y.mul_(channel))


def sums(x: Tensor, weight: Tensor) -> Tensor | None:
    """The exact sums alone, where the library multiplies by pairs: int8 [tokens, in] and [out, in] -> int32.

    None where it does not (torch's product is faster there), or cannot read the tensors, as in `operations`.
    """
    choice = native()
    if choice is None or choice[1] != "avx2":
        return None
    x, weight = x.contiguous(), weight.contiguous()
    if usable(x, weight) is None:
        return None
    y = torch.empty(x.shape[0], weight.shape[0], dtype=torch.int32)
    job = Int8Job(rows=x.shape[0], columns=x.shape[1], outputs=weight.shape[0], stride=x.shape[1], x_type=_SUMS)
    job.codes, job.weight, job.y = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    job.weight_stride, job.y_stride = weight.shape[1], weight.shape[0]
    return y if _call("int8_product", job) else None


@functools.cache
def _native_of(instruction_set: str) -> bool:
    """Whether an instruction set has the product: tried on one value."""
    found = native()
    if found is None or found[1] != instruction_set:
        return False
    rows, out = round_rows(torch.ones(1, 1)), torch.empty(1, 1)
    job = Int8Job(rows=1, columns=1, outputs=1, stride=rows.codes.shape[1], weight_stride=1, y_stride=1)
    weight = torch.ones(1, 1, dtype=torch.int8)
    job.codes, job.scales, job.weight, job.y = (t.data_ptr() for t in (rows.codes, rows.scales, weight, out))
    return _call("int8_product", job)


def is_native() -> bool:
    """Whether the library multiplies; else `torch._int_mm` does."""
    found = native()
    return found is not None and _native_of(found[1])


def _call(kernel: str, job: Int8Job) -> bool:
    found = native()
    assert found is not None, "there are no native kernels; ask `available` first"
    library, instruction_set = found
    return library.call(kernel, job, instruction_set, torch.get_num_threads())

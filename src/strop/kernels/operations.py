"""The kernels on tensors: rounding to a grid, codes of values, values of codes, and the gradient of the rounding.

Each does what the PyTorch reference in `numerics` does, bit for bit, in one pass over contiguous CPU tensors, split
over `torch.get_num_threads()` threads; the result does not depend on their number. None is returned where the kernels
cannot do it: the reference is forced or all there is, a tensor is of another kind, or its values are to be refused
(NaN, infinities, a scale that overflows), for which the reference has the message.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strop.kernels.library import Job, Library, native

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_VALUES = (torch.float32, torch.bfloat16)
_CPU = torch.device("cpu")  # named, for the default device may be another
_PLAIN = (Tensor, nn.Parameter)

MOST_TOKENS = 64
"""Rows that `product` ever takes; `product_takes` says how many of a kind."""

SYMMETRIC, FULL_RANGE, ASYMMETRIC = 0, 1, 2
"""Where an integer grid lies: s = max |x| / ((2^b - 1) / 2), max |x| / -2^(b-1) with a sign, or a zero point."""


@dataclass(frozen=True)
class AffineGrid:
    """An integer grid over rows cut into groups.

    Attributes:
        bits: 2 to 8.
        qmin: The smallest code.
        mode: One of the three above.
        size: Values of a group; it divides a row.
        shared: One scale serves all; it is given then.
    """

    bits: int
    qmin: int
    mode: int
    size: int
    shared: bool = False


@dataclass(frozen=True, eq=False)
class Codebook:
    """A table of 16 levels over blocks of the flattened weight.

    Attributes:
        size: Values of a block, even; the last block may be short.
        levels: float32 [16], in the order of the codes.
        ascending: float32 [16], ascending; what is not used repeats the last.
        midpoints: float32 [15], between the ascending levels; what is not used is infinite.
        order: uint8 [16], the codes of the ascending levels.
    """

    size: int
    levels: Tensor
    ascending: Tensor
    midpoints: Tensor
    order: Tensor


def usable(*tensors: Tensor | None) -> tuple[Library, str] | None:
    """The library and the instruction set, where the kernels are in use and can read these tensors."""
    for tensor in tensors:
        if tensor is not None and not (
            type(tensor) in _PLAIN and tensor.is_cpu and tensor.is_contiguous() and tensor.numel() > 0
        ):
            return None
    # What torch.compile traces and what functorch wraps have no bytes to read.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage]
        return None
    return native()


def round_affine(
    x: Tensor, grid: AffineGrid, *, scale_dtype: torch.dtype, scale: Tensor | None, zero: Tensor | None, masked: bool
) -> tuple[Tensor, Tensor | None] | None:
    """The values of the grid nearest to x, ties to even.

    Args:
        x: float32 or bfloat16 [rows, columns].
        grid: The grid; without `scale` its scales are those of each group's own range, rounded to `scale_dtype`.
        scale_dtype: float32, bfloat16 or float16.
        scale: Given scales, in `scale_dtype`: [rows, groups], or one where it is shared.
        zero: Stored zero points that go with them, uint8.
        masked: Whether to say where the grid does not clip x.

    Returns:
        The values, like x, and the mask (for `mask_gradient`) where asked for.
    """
    found = usable(x, scale, zero)
    if found is None or x.dtype not in _VALUES or not _fits(grid, x.shape, scale_dtype, scale, zero):
        return None
    rows, columns = x.shape
    values = torch.empty_like(x)
    mask = _mask(rows * columns, grid.size) if masked else None
    job = _affine_job(grid, rows, columns, scale_dtype, scale, zero)
    job.x, job.y, job.x_type = x.data_ptr(), values.data_ptr(), _TYPES[x.dtype]
    job.given, job.mask = scale is not None, _pointer(mask)
    return (values, mask) if _run(found, "round_affine", job) else None


def quantize_affine(
    x: Tensor, grid: AffineGrid, *, scale_dtype: torch.dtype, scale: Tensor | None, zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Packed codes (uint8 [rows, bytes]) with their scales and stored zero points, found where none are given."""
    found = usable(x, scale, zero)
    if found is None or x.dtype not in _VALUES or not _fits(grid, x.shape, scale_dtype, scale, zero):
        return None
    rows, columns = x.shape
    codes = torch.empty((rows, (columns * grid.bits + 7) // 8), dtype=torch.uint8, device=_CPU)
    given = scale is not None
    if scale is None:
        scale = torch.empty((rows, columns // grid.size), dtype=scale_dtype, device=_CPU)
        zero = torch.empty(scale.shape, dtype=torch.uint8, device=_CPU) if grid.mode == ASYMMETRIC else None
    job = _affine_job(grid, rows, columns, scale_dtype, scale, zero)
    job.x, job.x_type, job.given = x.data_ptr(), _TYPES[x.dtype], given
    job.codes, job.row_bytes = codes.data_ptr(), codes.shape[1]
    return (codes, scale, zero) if _run(found, "quantize_affine", job) else None


def dequantize_affine(
    codes: Tensor,
    columns: int,
    grid: AffineGrid,
    *,
    scale: Tensor,
    zero: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor | None:
    """The values of packed codes, [rows, columns], in float32 and rounded once to `dtype`, into `out` if given."""
    found = usable(codes, scale, zero)
    shape, row_bytes = (codes.shape[0], columns), (columns * grid.bits + 7) // 8
    if found is None or dtype not in _VALUES or not _fits(grid, shape, scale.dtype, scale, zero):
        return None
    if codes.dtype != torch.uint8 or codes.shape[1:] != (row_bytes,):
        return None
    values = torch.empty(shape, dtype=dtype, device=_CPU) if out is None else out
    job = _affine_job(grid, *shape, scale.dtype, scale, zero)
    job.codes, job.row_bytes = codes.data_ptr(), codes.shape[1]
    job.y, job.y_type = values.data_ptr(), _TYPES[dtype]
    return values if _run(found, "dequantize_affine", job) else None


def round_codebook(
    x: Tensor, book: Codebook, *, scale: Tensor | None, value_scale: Tensor | None, masked: bool
) -> tuple[Tensor, Tensor | None] | None:
    """The values of the codebook nearest to x, and the mask where asked for.

    Args:
        x: float32 or bfloat16, any shape.
        book: The codebook.
        scale: float32 [blocks], what codes are chosen against; None: each block's largest magnitude.
        value_scale: float32 [blocks], what values are made with; None: the same.
        masked: Whether to say where the grid does not clip x.
    """
    found = usable(x, scale, value_scale)
    if found is None or x.dtype not in _VALUES or not _fits_blocks(book, x.numel(), scale, value_scale):
        return None
    values = torch.empty_like(x)
    mask = _mask(x.numel(), book.size) if masked else None
    job = _codebook_job(book, x.numel(), book.ascending, scale)
    job.x, job.y, job.x_type, job.given = x.data_ptr(), values.data_ptr(), _TYPES[x.dtype], scale is not None
    job.value_scale, job.mask = _pointer(value_scale), _pointer(mask)
    return (values, mask) if _run(found, "round_codebook", job) else None


def quantize_codebook(x: Tensor, book: Codebook, *, scale: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Packed codes of the flattened x (uint8 [bytes]), and the scales: those given, or the blocks' own."""
    found = usable(x, scale)
    if found is None or x.dtype not in _VALUES or not _fits_blocks(book, x.numel(), scale):
        return None
    codes = torch.empty((x.numel() + 1) // 2, dtype=torch.uint8, device=_CPU)
    given = scale is not None
    if scale is None:
        scale = torch.empty(-(-x.numel() // book.size), dtype=torch.float32, device=_CPU)
    job = _codebook_job(book, x.numel(), book.ascending, scale)
    job.x, job.x_type, job.given, job.codes = x.data_ptr(), _TYPES[x.dtype], given, codes.data_ptr()
    return (codes, scale) if _run(found, "quantize_codebook", job) else None


def dequantize_codebook(
    codes: Tensor,
    shape: tuple[int, int],
    book: Codebook,
    *,
    scale: Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor | None:
    """The values of packed codes, in `shape`, in float32 and rounded once to `dtype`, into `out` if given."""
    found = usable(codes, scale)
    count = shape[0] * shape[1]
    if found is None or dtype not in _VALUES or not _fits_blocks(book, count, scale):
        return None
    if codes.dtype != torch.uint8 or codes.shape != ((count + 1) // 2,):
        return None
    values = torch.empty(shape, dtype=dtype, device=_CPU) if out is None else out
    job = _codebook_job(book, count, book.levels, scale)
    job.codes, job.y, job.y_type = codes.data_ptr(), values.data_ptr(), _TYPES[dtype]
    return values if _run(found, "dequantize_codebook", job) else None


def mask_gradient(grad: Tensor, mask: Tensor, size: int) -> Tensor | None:
    """The gradient where the mask of a rounding in groups of `size` is set, times zero elsewhere."""
    found = usable(grad, mask)
    if found is None or grad.dtype not in _VALUES or mask.shape != _mask_shape(grad.numel(), size):
        return None
    result = torch.empty_like(grad)
    job = Job(rows=1, columns=grad.numel(), size=size, x_type=_TYPES[grad.dtype])
    job.x, job.y, job.mask = grad.data_ptr(), result.data_ptr(), mask.data_ptr()
    return result if _run(found, "mask_gradient", job) else None


def product_takes(tokens: int, grid: AffineGrid | Codebook, columns: int, dtype: torch.dtype) -> bool:
    """Whether `product` is the fastest way for so many rows of x; with more a dense weight is made for all of them.

    Measured with weights [5632, 2048] and [2048, 5632] on a processor with AMX, and with PyTorch held to what others
    have: bfloat16 tiles beat the dense weight up to 64 rows, other products up to 16 rows of bfloat16. Codes that no
    vectors read are taken one by one for each four rows, which pays for four. In float32, where models are compared bit
    for bit, more than four rows are multiplied as a dense model multiplies them.
    """
    found = native()
    if found is None or not 1 <= tokens <= MOST_TOKENS:
        return False
    bits, size = (4, grid.size) if isinstance(grid, Codebook) else (grid.bits, grid.size)
    if is_tiled(tokens, bits, dtype, found[1]):
        return True
    by_vectors = found[1] != "portable" and (bits == 8 or (bits == 4 and (size % 8 == 0 or size == columns)))
    return tokens <= (16 if by_vectors and dtype == torch.bfloat16 else _FEW)


def is_tiled(tokens: int, bits: int, dtype: torch.dtype, instruction_set: str) -> bool:
    """Whether weights are decoded into bfloat16 tiles: where few rows do not pay for that, they are not."""
    return instruction_set == "amx" and dtype == torch.bfloat16 and tokens > (2 * _FEW if bits == 8 else _FEW)


_FEW = 4
"""Rows that one pass over the codes takes; their weights are exact."""


def product(
    x: Tensor,
    codes: Tensor,
    grid: AffineGrid | Codebook,
    *,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, int],
) -> Tensor | None:
    """X times packed weights transposed, plus the bias, the weights never written down: [tokens, out], like x.

    Products are summed in float32 and the sum is rounded once. The weights are those of the codes, exact; where more
    than a few rows of bfloat16 go through bfloat16 tiles, weights are rounded to it once, as dense ones are.

    Args:
        x: float32 or bfloat16 [tokens, in], at most `MOST_TOKENS`.
        codes: uint8 [out, bytes], or a codebook's, flat; its blocks divide a row then.
        grid: The grid of the codes.
        scale: As stored; a codebook's in float32.
        zero: Stored zero points, or None.
        bias: [out] in the dtype of x, or None.
        shape: (out, in).
    """
    found = usable(x, codes, scale, zero, bias)
    if found is None or x.dtype not in _VALUES or x.ndim != 2 or x.shape[1] != shape[1] or x.shape[0] > MOST_TOKENS:
        return None
    if bias is not None and (bias.dtype != x.dtype or bias.shape != shape[:1]):
        return None
    job = product_job(codes, grid, scale=scale, zero=zero, bias=bias, shape=shape)
    if job is None:
        return None
    result = x.new_empty((x.shape[0], shape[0]))
    job.x, job.x_type, job.y, job.tokens = x.data_ptr(), _TYPES[x.dtype], result.data_ptr(), x.shape[0]
    tiled = is_tiled(job.tokens, job.bits, x.dtype, found[1])
    return result if _run(found, "tiled_product" if tiled else "product", job) else None


def product_job(
    codes: Tensor,
    grid: AffineGrid | Codebook,
    *,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, int],
) -> Job | None:
    """What `product` asks of the kernels but for x and y; None where these are no weights that they read."""
    known = _product_job(grid, shape, scale.dtype)
    if known is None or codes.dtype != torch.uint8 or codes.numel() != shape[0] * known.row_bytes:
        return None
    if not isinstance(grid, Codebook):
        if codes.ndim != 2 or not _fits(grid, shape, scale.dtype, scale, zero):
            return None
    elif zero is not None or scale.numel() * grid.size != shape[0] * shape[1]:
        return None
    job = Job.from_buffer_copy(known)
    job.codes, job.scale, job.zero, job.bias = codes.data_ptr(), scale.data_ptr(), _pointer(zero), _pointer(bias)
    return job


@functools.lru_cache(maxsize=256)
def _product_job(grid: AffineGrid | Codebook, shape: tuple[int, int], scale_dtype: torch.dtype) -> Job | None:
    """What all products with weights of a kind have alike: made once, for a token's time is short."""
    rows, columns = shape
    if isinstance(grid, Codebook):
        if columns % grid.size or scale_dtype != torch.float32:
            return None
        job = _codebook_job(grid, rows * columns, grid.levels, None)
        job.rows, job.columns, job.row_bytes = rows, columns, columns // 2
        return job
    if scale_dtype not in _TYPES:
        return None
    job = _affine_job(grid, rows, columns, scale_dtype, None, None)
    job.row_bytes = (columns * grid.bits + 7) // 8
    return job


def unpacked_mask(mask: Tensor, count: int, size: int) -> Tensor:
    """The mask of a rounding of `count` values in groups of `size` as a flat bool tensor."""
    bits = mask.view(-1, mask.shape[-1], 1).bitwise_right_shift(torch.arange(8, device=mask.device)) & 1
    return bits.view(mask.shape[0], -1)[:, :size].reshape(-1)[:count].bool()


def _mask(count: int, size: int) -> Tensor:
    """Room for a bit for each value, each group's from a whole byte on."""
    return torch.empty(_mask_shape(count, size), dtype=torch.uint8, device=_CPU)


def _mask_shape(count: int, size: int) -> tuple[int, int]:
    return -(-count // size), (size + 7) // 8


def _fits(
    grid: AffineGrid, shape: tuple[int, ...], scale_dtype: torch.dtype, scale: Tensor | None, zero: Tensor | None
) -> bool:
    """Whether a weight and what is given beside it have the sizes and dtypes that a kernel will read."""
    if len(shape) != 2 or not 2 <= grid.bits <= 8 or shape[1] % grid.size or scale_dtype not in _TYPES:
        return False
    if scale is None:
        return zero is None and not grid.shared
    count = 1 if grid.shared else shape[0] * (shape[1] // grid.size)
    if (zero is not None) != (grid.mode == ASYMMETRIC):
        return False
    fitting = scale.numel() == count and scale.dtype == scale_dtype
    return fitting and (zero is None or (zero.numel() == count and zero.dtype == torch.uint8))


def _fits_blocks(book: Codebook, count: int, *scales: Tensor | None) -> bool:
    """The same for blocks of a codebook."""
    blocks = -(-count // book.size)
    return all(scale is None or (scale.numel() == blocks and scale.dtype == torch.float32) for scale in scales)


def _affine_job(
    grid: AffineGrid, rows: int, columns: int, scale_dtype: torch.dtype, scale: Tensor | None, zero: Tensor | None
) -> Job:
    return Job(
        scale=_pointer(scale),
        zero=_pointer(zero),
        rows=rows,
        columns=columns,
        size=grid.size,
        shared=grid.shared,
        scale_type=_TYPES[scale_dtype],
        bits=grid.bits,
        qmin=grid.qmin,
        mode=grid.mode,
    )


def _codebook_job(book: Codebook, count: int, levels: Tensor, scale: Tensor | None) -> Job:
    return Job(
        scale=_pointer(scale),
        levels=levels.data_ptr(),
        midpoints=book.midpoints.data_ptr(),
        order=book.order.data_ptr(),
        rows=1,
        columns=count,
        size=book.size,
        bits=4,
    )


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p | int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(found: tuple[Library, str], kernel: str, job: Job) -> bool:
    library, instruction_set = found
    return library.call(kernel, job, instruction_set, torch.get_num_threads())

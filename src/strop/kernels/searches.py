"""The searches for scales, on tensors: of superblocks what `methods.superblocks` and `methods.block_fit` do, bit for
bit, and HQQ's (`methods.hqq`), whose powers are good to about 1e-6.

Searches of superblocks return None where the kernels cannot do it, as in `operations`.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from strop.kernels.library import HqqJob, SearchJob
from strop.kernels.operations import usable

SUPERBLOCK = 256


def search_four_bit(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Q4_K's numbers of least weighted squared error.

    Args:
        x: float32 [rows, columns], finite; columns in whole superblocks.
        weights: float32 [columns], not negative; None for 1.

    Returns:
        d and dmin, float16 [rows, superblocks]; codes of scales and minimums, uint8 [rows, groups of 32].
    """
    found, blocks = _usable(x, weights), x.numel() // SUPERBLOCK
    if found is None:
        return None
    d, dmin = (torch.empty((len(x), blocks // len(x)), dtype=torch.float16) for _ in range(2))
    sub_scale, sub_minimum = (torch.empty((len(x), 8 * blocks // len(x)), dtype=torch.uint8) for _ in range(2))
    job = _job(x, weights, d, sub_scale)
    job.dmin, job.sub_minimum = dmin.data_ptr(), sub_minimum.data_ptr()
    library, instruction_set = found
    done = library.call("search_four_bit", job, instruction_set, torch.get_num_threads())
    return (d, dmin, sub_scale, sub_minimum) if done else None


def search_six_bit(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Q6_K's numbers of least weighted squared error: d float16 [rows, superblocks], sub-scales int8 [rows, groups of
    16], codes int8 like x. Arguments as `search_four_bit`'s.
    """
    found, blocks = _usable(x, weights), x.numel() // SUPERBLOCK
    if found is None:
        return None
    d = torch.empty((len(x), blocks // len(x)), dtype=torch.float16)
    sub_scale = torch.empty((len(x), 16 * blocks // len(x)), dtype=torch.int8)
    codes = torch.empty(x.shape, dtype=torch.int8)
    job = _job(x, weights, d, sub_scale)
    job.codes = codes.data_ptr()
    library, instruction_set = found
    done = library.call("search_six_bit", job, instruction_set, torch.get_num_threads())
    return (d, sub_scale, codes) if done else None


def _usable(x: Tensor, weights: Tensor | None):
    if x.ndim != 2 or x.shape[1] % SUPERBLOCK or x.dtype != torch.float32:
        return None
    if weights is not None and (weights.dtype != torch.float32 or weights.shape != x.shape[1:]):
        return None
    return usable(x, weights)


def _job(x: Tensor, weights: Tensor | None, d: Tensor, sub_scale: Tensor) -> SearchJob:
    return SearchJob(
        x=x.data_ptr(),
        weights=None if weights is None else ctypes.c_void_p(weights.data_ptr()),
        d=d.data_ptr(),
        sub_scale=sub_scale.data_ptr(),
        rows=x.shape[0],
        columns=x.shape[1],
    )


_STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def hqq_scales(
    x: Tensor,
    scales: Tensor,
    zero: Tensor | None,
    ends: tuple[int, int],
    scale_dtype: torch.dtype,
    *,
    p: float,
    beta: float,
    kappa: float,
    iterations: int,
    stride: float,
    gain: float,
) -> bool:
    """Put the best scales that HQQ meets in place of those given; False, and nothing done, where the kernels cannot.

    Args:
        x: float32 [groups, size], finite.
        scales: float32 [groups, 1], values that `scale_dtype` holds; those to begin with.
        zero: Stored zero points like them, float32, or None.
        ends: Of the integer grid, in stored codes where there are zero points.
        scale_dtype: float32, bfloat16 or float16.
        p: The norm.
        beta: Of the first iteration.
        kappa: What it grows by.
        iterations: At most so many.
        stride: How far a scale moves, in multiples of what least squares ask for.
        gain: The share that a group must gain to go on.
    """
    if x.dtype != torch.float32 or scale_dtype not in _STORED:
        return False
    found = usable(x, scales, zero)
    if found is None:
        return False
    job = HqqJob(rows=len(x), columns=x.shape[1], low=ends[0], high=ends[1], iterations=iterations)
    job.x, job.scales, job.zero = x.data_ptr(), scales.data_ptr(), None if zero is None else zero.data_ptr()
    job.power, job.log2_beta, job.log2_kappa, job.stride, job.gain = p, math.log2(beta), math.log2(kappa), stride, gain
    job.scale_type = _STORED[scale_dtype]
    library, instruction_set = found
    return library.call("hqq_scales", job, instruction_set, torch.get_num_threads())

"""A decoder's block in one call while each of some texts gets one token.

    h = x + O(attention(turn(Q(n1)), cached K and V))        n1 = norm1(x)
    y = h + D(silu(G(n2)) * U(n2))                           n2 = norm2(h)

Products are those of packed weights (`operations.product`); the new token's keys and values go into the cache, and
attention sees each text's own columns up to there. What lies between products is computed in float32 and rounded once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.kernels import operations
from strop.kernels.library import Job, StepJob, native

_TYPES = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True)
class StepShape:
    """What a block's parts look like.

    Attributes:
        heads: Of queries.
        kv_heads: Of keys and values; they divide those of queries.
        size: Values of a head.
        turned: Values of a head that its position turns, the first ones.
        inner: Columns of gate and of up.
        eps: Of the norms: before attention, before the feed-forward part, of queries, of keys.
        scaling: Of the scores.
    """

    heads: int
    kv_heads: int
    size: int
    turned: int
    inner: int
    eps: tuple[float, float, float, float]
    scaling: float


class Step:
    """One block.

    Args:
        shape: Its parts' shapes.
        products: Jobs of queries, keys, values, output, gate, up and down; what they point to must outlive this.
        grids: Each product's grid.
        widths: Each product's inputs.
        gains: float32, of the norms in the order of `StepShape.eps`; the last two may be missing.
    """

    def __init__(
        self,
        shape: StepShape,
        products: Sequence[Job],
        grids: Sequence[operations.AffineGrid | operations.Codebook],
        widths: Sequence[int],
        gains: Sequence[Tensor],
    ) -> None:
        self._products, self._gains = list(products), list(gains)
        self._kinds = list(zip(grids, widths, (job.bits for job in products), strict=True))
        self._known: dict[tuple[int, torch.dtype, str], int | None] = {}
        self._job = StepJob(
            products=(ctypes.POINTER(Job) * 7)(*(ctypes.pointer(job) for job in self._products)),
            gains=(ctypes.c_void_p * 4)(*(gain.data_ptr() for gain in self._gains)),
            eps=(ctypes.c_float * 4)(*shape.eps),
            hidden=widths[0],
            inner=shape.inner,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            size=shape.size,
            turned=shape.turned,
            scaling=shape.scaling,
        )

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, index: Tensor
    ) -> Tensor | None:
        """A token of each text through the block; None where the kernels do not take that many.

        Args:
            x: float32 or bfloat16 [tokens, hidden].
            cos: Of the tokens' positions, float32 [tokens, turned].
            sin: Like it.
            keys: The cache [slots, columns, kv_heads, size], like x; the tokens' keys are put in.
            values: Like it.
            index: Where each token goes, int64 [tokens]: slot * columns + column.

        Returns:
            What the block gives, like x.
        """
        found = native()
        if found is None or x.dtype not in _TYPES or keys.dtype != x.dtype or values.dtype != x.dtype:
            return None
        for tensor in (x, cos, sin, keys, values, index):
            assert tensor.is_contiguous(), "the kernels read contiguous tensors"
        library, instruction_set = found
        tokens = x.shape[0]
        tiled = self._tiled(tokens, x.dtype, instruction_set)
        if tiled is None:
            return None
        y = x.clone()
        job = StepJob.from_buffer_copy(self._job)
        job.x, job.cos, job.sin, job.index = y.data_ptr(), cos.data_ptr(), sin.data_ptr(), index.data_ptr()
        job.keys, job.values, job.columns = keys.data_ptr(), values.data_ptr(), keys.shape[1]
        job.tokens, job.type, job.tiled = tokens, _TYPES[x.dtype], tiled
        return y if library.call("step", job, instruction_set, torch.get_num_threads()) else None

    def _tiled(self, tokens: int, dtype: torch.dtype, instruction_set: str) -> int | None:
        """Which products go through tiles, a bit each; None where one of them does not take so many tokens."""
        key = (tokens, dtype, instruction_set)
        if key not in self._known:
            takes = all(operations.product_takes(tokens, grid, width, dtype) for grid, width, _ in self._kinds)
            tiles = [operations.is_tiled(tokens, bits, dtype, instruction_set) for _, _, bits in self._kinds]
            self._known[key] = sum(tile << place for place, tile in enumerate(tiles)) if takes else None
        return self._known[key]

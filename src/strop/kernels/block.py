"""The parts of a decoder's block that are no matrix products, on contiguous CPU tensors.

Each is one pass in float32 with one rounding on the way out, split over `torch.get_num_threads()` threads; the result
does not depend on their number. The residual stream and what products take may differ in dtype: float32 beside float32
or bfloat16, bfloat16 beside bfloat16. `available` says whether there are kernels; without them nothing here works, and
the caller keeps transformers' own block.

Heads lie as [rows, kv_heads, length, group, size]: those that share keys follow each other for each token, so that a
stretch of tokens is one matrix. Of scores, a row sees the keys `first` to `last` of its token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from strop.kernels.library import BlockJob, native

_TYPES = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True)
class Heads:
    """How the heads of an attention layer lie.

    Attributes:
        queries: Heads of queries.
        keys: Heads of keys and values; they divide those of queries.
        size: Values of a head.
        rows: Rows of the batch.
        length: Tokens of a row.
        turned: Values of a head that its position turns, an even number; the first ones.
    """

    queries: int
    keys: int
    size: int
    rows: int
    length: int
    turned: int

    @property
    def group(self) -> int:
        """Heads of queries that share keys."""
        return self.queries // self.keys

    def of_queries(self, like: Tensor) -> Tensor:
        """Room for queries, or for what attention gives: [rows * keys, length * group, size]."""
        return like.new_empty(self.rows * self.keys, self.length * self.group, self.size)

    def of_keys(self, like: Tensor) -> Tensor:
        """Room for keys or values: [rows * keys, length, size]."""
        return like.new_empty(self.rows * self.keys, self.length, self.size)

    def job(self) -> BlockJob:
        """The job of a kernel over all heads of all tokens."""
        return BlockJob(
            rows=self.rows * self.length,
            columns=self.size,
            stride=(self.queries + 2 * self.keys) * self.size,
            heads=self.queries,
            kv_heads=self.keys,
            length=self.length,
            turned=self.turned,
        )


@dataclass(frozen=True)
class Turns:
    """Rotary positions: cos and sin, float32 [length, turned], or [rows * length, turned] where rows differ."""

    cos: Tensor
    sin: Tensor
    shared: bool

    def into(self, job: BlockJob) -> None:
        """Give them to a job."""
        job.cos, job.sin, job.shared = self.cos.data_ptr(), self.sin.data_ptr(), self.shared


def available(*dtypes: torch.dtype) -> bool:
    """Whether the kernels are in use, and take these dtypes."""
    return native() is not None and all(dtype in _TYPES for dtype in dtypes)


def norm(
    x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, *, add: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Root mean square norm of x + add over the last dimension: gain * s / sqrt(mean(s^2) + eps), s = x + add.

    Args:
        x: [..., columns], of the stream.
        gain: float32 [columns].
        eps: Added to the mean square.
        dtype: Of the result.
        add: Like x, in `dtype`; None adds nothing.

    Returns:
        s, in the dtype of x; the norm, in `dtype`; 1 / rms of each row, float32.
    """
    columns = x.shape[-1]
    y = torch.empty_like(x, dtype=dtype)
    total = x if add is None else torch.empty_like(x)
    reciprocal = torch.empty(x.shape[:-1], dtype=torch.float32)
    job = _rows_job(x, y, columns)
    job.x, job.gain, job.y, job.reciprocal, job.eps = (*_pointers(x, gain, y, reciprocal), eps)
    job.add, job.sum = (add.data_ptr(), total.data_ptr()) if add is not None else (None, None)
    _run("norm", job)
    return total, y, reciprocal


def norm_backward(grad: Tensor, x: Tensor, gain: Tensor, reciprocal: Tensor, add: Tensor | None) -> Tensor:
    """The gradient of a norm's input, plus `add` (what came past the norm), in the dtype of x."""
    y = torch.empty_like(x)
    job = _rows_job(x, grad, x.shape[-1])
    job.x, job.grad, job.gain, job.reciprocal, job.y = _pointers(x, grad, gain, reciprocal, y)
    job.add = None if add is None else add.data_ptr()
    _run("norm_backward", job)
    return y


def norm_gain(grad: Tensor, x: Tensor, reciprocal: Tensor) -> Tensor:
    """The gradient of a norm's gain, float32 [columns]."""
    sums = torch.empty(x.shape[-1], dtype=torch.float32)
    job = _rows_job(x, grad, x.shape[-1])
    job.x, job.grad, job.reciprocal, job.sums = _pointers(x, grad, reciprocal, sums)
    _run("norm_gain", job)
    return sums


class HeadNorm:
    """The norm of each head of queries or keys, in the columns of a product that they lie in.

    Args:
        heads: How many there are.
        offset: The first one's place in a row of the product.
        size: Values of each.
        gain: float32 [size].
        eps: Added to the mean square.
    """

    def __init__(self, heads: int, offset: int, size: int, gain: Tensor, eps: float) -> None:
        self.heads, self.offset, self.size, self.gain, self.eps = heads, offset, size, gain, eps

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Norm the heads of x [tokens, width] into y, which is like it; 1 / rms, float32 [tokens * heads]."""
        reciprocal = torch.empty(x.shape[0] * self.heads, dtype=torch.float32)
        job = self._job(x)
        job.x, job.y = self._place(x), self._place(y)
        job.gain, job.reciprocal, job.eps = *_pointers(self.gain, reciprocal), self.eps
        _run("norm", job)
        return reciprocal

    def backward(self, grad: Tensor, x: Tensor, reciprocal: Tensor, y: Tensor) -> Tensor:
        """The heads' gradient into y, and the gain's, float32 [size]; all like x."""
        job, sums = self._job(x), torch.empty(self.size, dtype=torch.float32)
        job.x, job.grad, job.y = self._place(x), self._place(grad), self._place(y)
        job.gain, job.reciprocal, job.sums = _pointers(self.gain, reciprocal, sums)
        _run("norm_backward", job)
        _run("norm_gain", job)
        return sums

    def _job(self, x: Tensor) -> BlockJob:
        kind = _TYPES[x.dtype]
        rows, stride = x.shape[0] * self.heads, x.shape[1]
        return BlockJob(rows=rows, columns=self.size, stride=stride, heads=self.heads, x_type=kind, y_type=kind)

    def _place(self, tensor: Tensor) -> int:
        return tensor.data_ptr() + self.offset * tensor.element_size()


def split_heads(turned: Tensor, plain: Tensor, heads: Heads, turns: Turns) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of `turned` turned by their positions, values of `plain`: each laid by heads.

    Args:
        turned: [tokens, (queries + 2 keys) * size], of which queries and keys are read.
        plain: Like it, of which values are read; may be the same.
        heads: How they lie.
        turns: The positions.
    """
    q, k, v = heads.of_queries(turned), heads.of_keys(turned), heads.of_keys(turned)
    job = heads.job()
    turns.into(job)
    job.x, job.q, job.k, job.v = _pointers(turned, q, k, v)
    job.add = plain.data_ptr() + (heads.queries + heads.keys) * heads.size * plain.element_size()
    job.y_type = _TYPES[turned.dtype]
    _run("split_heads", job)
    return q, k, v


def split_heads_backward(q: Tensor, k: Tensor, v: Tensor, heads: Heads, turns: Turns) -> Tensor:
    """The gradient of `split_heads`' inputs together, [tokens, (queries + 2 keys) * size]."""
    job = heads.job()
    y = q.new_empty(job.rows, job.stride)
    turns.into(job)
    job.q, job.k, job.v, job.y = _pointers(q, k, v, y)
    job.y_type = _TYPES[q.dtype]
    _run("split_heads_backward", job)
    return y


def merge_heads(given: Tensor, reciprocal: Tensor, heads: Heads) -> Tensor:
    """What attention gave, each row times its reciprocal, by tokens: [tokens, queries * size]."""
    job = heads.job()
    y = given.new_empty(job.rows, heads.queries * heads.size)
    job.q, job.reciprocal, job.y = _pointers(given, reciprocal, y)
    job.y_type = _TYPES[given.dtype]
    _run("merge_heads", job)
    return y


def merge_heads_backward(grad: Tensor, merged: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """The gradient [tokens, queries * size] laid by heads, and each row's product with what was merged, float32."""
    q = heads.of_queries(grad)
    products = torch.empty(q.shape[:2], dtype=torch.float32)
    job = heads.job()
    job.grad, job.x, job.q, job.sums = _pointers(grad, merged, q, products)
    job.y_type = _TYPES[grad.dtype]
    _run("merge_heads_backward", job)
    return q, products


@dataclass(frozen=True)
class Scores:
    """A part of the scores: some tokens' rows against some keys.

    Attributes:
        heads: How heads lie.
        scaling: What scores are multiplied by.
        first: int32 [rows, length], the first key that each token sees.
        last: The last one; before the first where it sees none.
        token: The first token of the part.
        tokens: How many.
        key: The first key.
    """

    heads: Heads
    scaling: float
    first: Tensor
    last: Tensor
    token: int
    tokens: int
    key: int

    def softmax(self, scores: Tensor, reciprocal: Tensor, logarithm: Tensor) -> None:
        """In place: scores [rows * keys, tokens * group, width] to what is their softmax but for a factor a row.

        Args:
            scores: Changed to e^(scaled - most), 0 where a row does not see.
            reciprocal: float32 [rows * keys, length * group]; that factor is written to it.
            logarithm: Like it; the logarithm of each row's sum is written to it.
        """
        job = self._job(scores)
        job.y, job.reciprocal, job.sums = _pointers(scores, reciprocal, logarithm)
        _run("softmax", job)

    def softmax_backward(self, scores: Tensor, grad: Tensor, products: Tensor, logarithm: Tensor) -> None:
        """In place: scores to probabilities, and the gradient of probabilities to that of scores before scaling."""
        job = self._job(scores)
        job.y, job.q, job.reciprocal, job.sums = _pointers(scores, grad, products, logarithm)
        _run("softmax_backward", job)

    def _job(self, scores: Tensor) -> BlockJob:
        job = self.heads.job()
        job.rows, job.columns = scores.shape[0] * scores.shape[1], scores.shape[2]
        job.tokens, job.token, job.key, job.scaling = self.tokens, self.token, self.key, self.scaling
        job.first, job.last, job.y_type = *_pointers(self.first, self.last), _TYPES[scores.dtype]
        return job


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x [tokens, gate and up]."""
    y = x.new_empty(x.shape[0], x.shape[1] // 2)
    job = BlockJob(rows=y.shape[0], columns=y.shape[1], y_type=_TYPES[x.dtype])
    job.x, job.y = _pointers(x, y)
    _run("swiglu", job)
    return y


def swiglu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and the product again."""
    back, y = torch.empty_like(x), torch.empty_like(grad)
    job = BlockJob(rows=y.shape[0], columns=y.shape[1], y_type=_TYPES[x.dtype])
    job.x, job.grad, job.q, job.y = _pointers(x, grad, back, y)
    _run("swiglu_backward", job)
    return back, y


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """In place: logits [tokens, vocabulary] to their gradient, softmax - one-hot; the losses, float32 [tokens].

    Args:
        logits: Changed to the gradient; zeros where the label is negative, whose loss is zero.
        labels: int64 [tokens].
    """
    losses = torch.empty(logits.shape[0], dtype=torch.float32)
    job = BlockJob(rows=logits.shape[0], columns=logits.shape[1], y_type=_TYPES[logits.dtype])
    job.y, job.labels, job.sums = _pointers(logits, labels, losses)
    _run("cross_entropy", job)
    return losses


def _rows_job(x: Tensor, y: Tensor, columns: int) -> BlockJob:
    rows = x.numel() // columns
    return BlockJob(rows=rows, columns=columns, stride=columns, heads=1, x_type=_TYPES[x.dtype], y_type=_TYPES[y.dtype])


def _pointers(*tensors: Tensor) -> tuple[int, ...]:
    for tensor in tensors:
        assert tensor.is_contiguous(), "the kernels read contiguous tensors"
    return tuple(tensor.data_ptr() for tensor in tensors)


def _run(kernel: str, job: BlockJob) -> None:
    found = native()
    assert found is not None, "there are no native kernels; ask `available` first"
    library, instruction_set = found
    if job.rows and not library.call(kernel, job, instruction_set, torch.get_num_threads()):
        raise ValueError(
            f"{kernel}: the kernel refused its job (a label beyond the vocabulary, or dtypes that do not go together)"
        )

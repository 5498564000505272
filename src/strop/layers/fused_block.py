"""A decoder's block as one piece, forward and backward, for training on a CPU.

    h = x + O(attention(turn(Q(n1)), turn(K(n1)), V(n1)))        n1 = norm1(x)
    y = h + D(silu(G(n2)) * U(n2))                               n2 = norm2(h)

Q, K and V are one product, G and U another (`block_products`); what lies between products is one native pass each
(`strop.kernels.block`). Attention takes `ROWS_AT_ONCE` tokens at a time against the keys that they see, so that its
memory grows with the length and not with its square, and documents of a packed row cost what they would alone. Kept
for the backward pass are x, h, the turned heads, attention's output, and gate and up; norms, probabilities and the
inputs of the products are made again. There is no autograd graph inside.

Which tokens see which is read from the mask that the model makes: a stretch of keys for each token (causal, padded,
packed, sliding). A call that is anything else (a cache, another mask) goes to the block's own forward.

Numbers: products in the dtype of the inputs, or autocast's; the residual stream in its own; norms, softmax and SwiGLU
in float32 with one rounding. transformers' own block rounds some values twice, and is what the tests compare with.

Sources: Dao, "FlashAttention-2" (2023), for the backward pass of attention from the logarithm of the sums; Hu and
others, "LoRA" (2021).
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from strop.kernels import block as kernels
from strop.kernels.block import HeadNorm, Heads, Scores, Turns
from strop.layers.base import compute_dtype, refuse_second_derivative
from strop.layers.block_products import Operands, Part, Product
from strop.layers.int8_products import Int8Weight, MeasuredInt8

ROWS_AT_ONCE: Final = 128
"""Tokens whose scores are there at once."""


@dataclass(frozen=True, eq=False)
class Norm:
    """A root mean square norm: its module, and what it adds to the mean square."""

    module: nn.Module
    eps: float

    @property
    def gain(self) -> nn.Parameter:
        """[columns]."""
        (gain,) = self.module.parameters(recurse=False)
        return gain


@dataclass(frozen=True, eq=False)
class BlockParts:
    """The modules that a block is made of, by what they do.

    Attributes:
        qkv: The layers of queries, keys, values.
        out: That of attention's output.
        gate_up: Those of gate and up.
        down: That back to the stream.
        norms: Before attention and before the feed-forward part.
        head_norms: Of queries and keys, or None.
        head_size: Values of a head.
        scaling: Of the scores.
    """

    qkv: tuple[Part, Part, Part]
    out: Part
    gate_up: tuple[Part, Part]
    down: Part
    norms: tuple[Norm, Norm]
    head_norms: tuple[Norm, Norm] | None
    head_size: int
    scaling: float

    def groups(self) -> tuple[tuple[Part, ...], ...]:
        """The layers that read the same input, in the order of the block."""
        return self.qkv, (self.out,), self.gate_up, (self.down,)

    def all_norms(self) -> tuple[Norm, ...]:
        """In the order of the fields."""
        return *self.norms, *(self.head_norms or ())

    def gains(self) -> list[nn.Parameter]:
        """Of all norms."""
        return [norm.gain for norm in self.all_norms()]


@dataclass(frozen=True)
class Seen:
    """The keys that each token sees: int32 [rows, length], the first and the last; none where the last is before."""

    first: Tensor
    last: Tensor

    @functools.cached_property
    def stretches(self) -> list[tuple[int, int, int, int]]:
        """`ROWS_AT_ONCE` tokens at a time, the keys that they see: first token, behind the last, first key, behind."""
        length, found = self.first.shape[1], []
        for token in range(0, length, ROWS_AT_ONCE):
            end = min(token + ROWS_AT_ONCE, length)
            first, last = self.first[:, token:end], self.last[:, token:end]
            sees = last >= first
            keys = (int(first[sees].min()), int(last[sees].max()) + 1) if bool(sees.any()) else (0, 1)
            found.append((token, end, *keys))
        return found

    @classmethod
    def causal(cls, rows: int, length: int) -> Seen:
        """All earlier tokens and itself."""
        last = torch.arange(length, dtype=torch.int32).expand(rows, length).contiguous()
        return cls(torch.zeros_like(last), last)

    @classmethod
    def of(cls, mask: Tensor) -> Seen | None:
        """From a mask [rows, 1, length, length], True or 0 where a token sees; None where that is no stretch."""
        if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
            return None
        grid = mask[:, 0]
        if grid.dtype == torch.bool:
            sees = grid
        else:
            sees = grid == 0
            if not bool((sees | (grid <= torch.finfo(grid.dtype).min / 2)).all()):
                return None  # it weighs, and does not only hide
        length, counts = grid.shape[-1], sees.sum(-1, dtype=torch.int32)
        first = sees.byte().argmax(-1).int()
        last = first + counts - 1
        places = torch.arange(length)
        if not torch.equal(sees, (places >= first[..., None]) & (places <= last[..., None])):
            return None
        return cls(first.contiguous(), last.contiguous())


class _Masks:
    """What the last masks came to: a model gives the same one to many blocks."""

    def __init__(self) -> None:
        self.known: list[tuple[weakref.ref[Tensor], int, Seen | None]] = []

    def seen(self, mask: Tensor) -> Seen | None:
        if mask.is_inference():
            return Seen.of(mask)  # it has no version, so that a change would not be noticed
        for reference, version, seen in self.known:
            if reference() is mask and version == mask._version:
                return seen
        found = Seen.of(mask)
        # Another thread may do the same: a new list each, and what is returned is what was found here.
        living = [entry for entry in self.known if entry[0]() is not None][-3:]
        self.known = [*living, (weakref.ref(mask), mask._version, found)]
        return found


_MASKS = _Masks()


class FusedBlock:
    """Stands in for a block's forward.

    `int8` holds, for each of its products, the weights in int8 that stand in for them while the block is in training
    mode; None where there are none.

    Args:
        block: The block.
        parts: What it is made of.
        own: The block's own forward, for calls that this one does not take.
        unmasked_is_causal: Whether a call without a mask means that each token sees those before it.
        wrap: What the block gives back, of its hidden states.
    """

    def __init__(
        self,
        block: nn.Module,
        parts: BlockParts,
        own: Callable[..., Any],
        *,
        unmasked_is_causal: bool,
        wrap: Callable[[Tensor], Any],
    ) -> None:
        self.parts, self.own, self.unmasked_is_causal, self.wrap = parts, own, unmasked_is_causal, wrap
        self.block = block
        self.int8: list[Int8Weight | MeasuredInt8 | None] = [None] * len(parts.groups())
        self._places = [(owner, name, module) for owner in block.modules() for name, module in owner.named_children()]
        self._inner = [module for module in block.modules() if module is not block]
        self._forwards = [vars(module).get("forward") for module in self._inner]

    def in_place(self) -> bool:
        """Whether all inside the block is what it was: adapters come and go, and so may an activation."""
        return all(owner._modules.get(name) is module for owner, name, module in self._places)

    def _watched(self) -> bool:
        """Whether somebody waits for a call of a layer inside, which one piece does not make, or has replaced it."""
        if any(vars(module).get("forward") is not own for module, own in zip(self._inner, self._forwards, strict=True)):
            return True
        return any(hooks for module in self._inner for hooks in _hooks(module))

    def __call__(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        """The block's forward."""
        call = None if args or not self.in_place() or self._watched() else self._call(hidden_states, options)
        if call is None:
            return self.own(hidden_states, *args, **options)
        return self.wrap(_Function.apply(call, hidden_states, *call.tensors()))

    def _call(self, x: Tensor, options: Mapping[str, Any]) -> _Call | None:
        positions, mask = options.get("position_embeddings"), options.get("attention_mask")
        if options.get("past_key_values") is not None or positions is None or x.dim() != 3 or x.numel() == 0:
            return None
        dtype = compute_dtype(x)
        if x.device.type != "cpu" or not kernels.available(x.dtype, dtype):
            return None
        rows, length = x.shape[:2]
        if isinstance(mask, Tensor):
            seen = _MASKS.seen(mask)
            if seen is None or mask.shape[-1] != length or mask.shape[0] not in (1, rows):
                return None
            if mask.shape[0] != rows:
                seen = Seen(*(part.expand(rows, length).contiguous() for part in (seen.first, seen.last)))
        elif mask is None and self.unmasked_is_causal:
            seen = Seen.causal(rows, length)
        else:
            return None
        cos, sin = positions
        if cos.dim() != 3 or cos.shape[0] not in (1, rows) or cos.shape[1] != length or sin.shape != cos.shape:
            return None
        flat = [part.float().reshape(-1, part.shape[-1]).contiguous() for part in (cos, sin)]
        turns = Turns(flat[0], flat[1], shared=cos.shape[0] == 1)
        int8 = self.int8 if self.block.training else [None] * len(self.int8)
        return _Call(self.parts, dtype, seen, turns, Heads(*self._heads(), rows, length, cos.shape[-1]), int8)

    def _heads(self) -> tuple[int, int, int]:
        size = self.parts.head_size
        return self.parts.qkv[0].shape[0] // size, self.parts.qkv[1].shape[0] // size, size


def _hooks(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    backward = (module._backward_pre_hooks, module._backward_hooks)
    return module._forward_pre_hooks, module._forward_hooks, *backward


class _Call:
    """One call: the layers as they stand, and how tokens and heads lie."""

    def __init__(
        self,
        parts: BlockParts,
        dtype: torch.dtype,
        seen: Seen,
        turns: Turns,
        heads: Heads,
        int8: Sequence[Int8Weight | MeasuredInt8 | None],
    ) -> None:
        self.parts, self.dtype, self.seen, self.turns, self.heads = parts, dtype, seen, turns, heads
        self.int8 = list(int8)
        self.operands = [[Operands.of(part, dtype) for part in group] for group in parts.groups()]
        self.gains = [gain.detach().float() for gain in parts.gains()]

    def tensors(self) -> list[Tensor | None]:
        """All that may be trained: the gains, then the operands' tensors."""
        operands = itertools.chain.from_iterable(self.operands)
        return [*self.parts.gains(), *itertools.chain.from_iterable(one.tensors() for one in operands)]

    def fill(self, tensors: Sequence[Tensor | None]) -> None:
        """Put the tensors in again that `tensors` gave."""
        count = len(self.parts.gains())
        self.gains = [gain.detach().float() for gain in tensors[:count] if gain is not None]
        given = iter(tensors[count:])
        self.operands = [
            [one.filled(part, list(itertools.islice(given, 4))) for one, part in zip(group, parts, strict=True)]
            for group, parts in zip(self.operands, self.parts.groups(), strict=True)
        ]

    def empty(self) -> None:
        """Let go of them until the backward pass."""
        self.operands = [[one.emptied() for one in group] for group in self.operands]
        self.gains = []

    def products(self) -> list[Product]:
        """Those of queries, keys and values; of attention's output; of gate and up; and the last."""
        return [Product(group, self.dtype, int8) for group, int8 in zip(self.operands, self.int8, strict=True)]

    def head_norms(self) -> tuple[HeadNorm, HeadNorm] | None:
        """Of queries and keys."""
        norms, heads = self.parts.head_norms, self.heads
        if norms is None:
            return None
        return (
            HeadNorm(heads.queries, 0, heads.size, self.gains[2], norms[0].eps),
            HeadNorm(heads.keys, heads.queries * heads.size, heads.size, self.gains[3], norms[1].eps),
        )

    # --- attention ----------------------------------------------------------------------------------------------------

    def _stretches(self) -> Iterator[tuple[Scores, slice, slice]]:
        """The parts of the scores: each with its rows of queries, and its keys."""
        heads, seen = self.heads, self.seen
        for token, end, begin, behind in seen.stretches:
            part = Scores(heads, self.parts.scaling, seen.first, seen.last, token, end - token, begin)
            yield part, slice(token * heads.group, end * heads.group), slice(begin, behind)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Turned heads -> the output by tokens [tokens, heads * size], and the logarithm of each row's sum."""
        given = torch.empty_like(q)
        reciprocal = torch.empty(q.shape[:2], dtype=torch.float32)
        logarithm = torch.empty_like(reciprocal)
        for part, rows, keys in self._stretches():
            scores = torch.bmm(q[:, rows], k[:, keys].transpose(1, 2))
            part.softmax(scores, reciprocal, logarithm)
            torch.bmm(scores, v[:, keys], out=given[:, rows])
        return kernels.merge_heads(given, reciprocal, self.heads), logarithm

    def attention_backward(
        self, grad: Tensor, merged: Tensor, logarithm: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the output by tokens -> those of q, k, v."""
        grad_rows, products = kernels.merge_heads_backward(grad, merged, self.heads)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for part, rows, keys in self._stretches():
            scores = torch.bmm(q[:, rows], k[:, keys].transpose(1, 2))
            through = torch.bmm(grad_rows[:, rows], v[:, keys].transpose(1, 2))
            part.softmax_backward(scores, through, products, logarithm)
            torch.bmm(through, k[:, keys], out=grad_q[:, rows])
            grad_k[:, keys] += torch.bmm(through.transpose(1, 2), q[:, rows])
            grad_v[:, keys] += torch.bmm(scores.transpose(1, 2), grad_rows[:, rows])
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)

    # --- the block ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """X [tokens, hidden] -> y like it, and what the backward pass needs of activations."""
        products, norms = self.products(), self.parts.norms
        _, seen, _ = kernels.norm(x, self.gains[0], norms[0].eps, self.dtype)
        qkv, kept = products[0].forward(seen)
        extra: list[Tensor | None] = []
        turned = qkv
        if (head_norms := self.head_norms()) is not None:
            turned = torch.empty_like(qkv)
            extra = [qkv, *(norm.forward(qkv, turned) for norm in head_norms)]
        q, k, v = kernels.split_heads(turned, qkv, self.heads, self.turns)
        del turned, qkv, seen
        merged, logarithm = self.attention(q, k, v)
        added, more = products[1].forward(merged)
        kept += more
        h, seen, _ = kernels.norm(x, self.gains[1], norms[1].eps, self.dtype, add=added)
        del added
        gate_up, more = products[2].forward(seen)
        kept += more
        del seen
        down, more = products[3].forward(kernels.swiglu(gate_up))
        return h + down, [x, q, k, v, merged, logarithm, h, gate_up, *kept, *more, *extra]

    def backward(self, grad: Tensor, saved: Sequence[Tensor | None], *, wants_x: bool) -> list[Tensor | None]:
        """The gradient of y -> those of x and of `tensors`."""
        products, norms = self.products(), self.parts.norms
        (x, q, k, v, merged, logarithm, h, gate_up), rest = _present(saved[:8]), iter(saved[8:])
        kept = [list(itertools.islice(rest, 2 * len(product.stacks))) for product in products]
        extra = _present(list(rest))
        trained = [gain.requires_grad for gain in self.parts.gains()]
        grad_gains: list[Tensor | None] = [None] * len(trained)
        grads: list[list[Tensor | None]] = []

        # y = h + D(silu(G) * U): the input of D is made again beside its gradient
        back = products[3].backward(grad.to(self.dtype), kept[3])
        assert back.x is not None
        grad_gate_up, act = kernels.swiglu_backward(back.x, gate_up)
        grads.append(back.tensors(act))
        del act, back
        back = products[2].backward(grad_gate_up, kept[2])
        _, seen, reciprocal = kernels.norm(h, self.gains[1], norms[1].eps, self.dtype)
        grads.append(back.tensors(seen))
        assert back.x is not None
        grad_h = kernels.norm_backward(back.x, h, self.gains[1], reciprocal, grad)
        if trained[1]:
            grad_gains[1] = kernels.norm_gain(back.x, h, reciprocal)
        del back, grad_gate_up, seen

        # h = x + O(attention)
        back = products[1].backward(grad_h.to(self.dtype), kept[1])
        grads.append(back.tensors(merged))
        assert back.x is not None
        heads = self.attention_backward(back.x, merged, logarithm, q, k, v)
        grad_qkv = kernels.split_heads_backward(*heads, self.heads, self.turns)
        del heads, back
        if (head_norms := self.head_norms()) is not None:
            grad_turned, (qkv, *reciprocals) = grad_qkv, extra
            grad_qkv = grad_turned.clone()  # values pass as they are
            for place, (norm, reciprocal) in enumerate(zip(head_norms, reciprocals, strict=True), start=2):
                grad_gains[place] = norm.backward(grad_turned, qkv, reciprocal, grad_qkv)
        wants_gain = trained[0]
        back = products[0].backward(grad_qkv, kept[0], wants_x=wants_x or wants_gain)
        _, seen, reciprocal = kernels.norm(x, self.gains[0], norms[0].eps, self.dtype)
        grads.append(back.tensors(seen))
        grad_x = None
        if back.x is not None:
            grad_x = kernels.norm_backward(back.x, x, self.gains[0], reciprocal, grad_h) if wants_x else None
            grad_gains[0] = kernels.norm_gain(back.x, x, reciprocal) if wants_gain else None
        gains = [
            found.to(gain.dtype) if found is not None and gain.requires_grad else None
            for found, gain in zip(grad_gains, self.parts.gains(), strict=True)
        ]
        return [grad_x, *gains, *itertools.chain.from_iterable(reversed(grads))]


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


class _Function(torch.autograd.Function):
    """(call, hidden states, the call's tensors) -> hidden states."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *tensors: Tensor | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y, saved = call.forward(x.reshape(-1, x.shape[-1]).contiguous())
        call.empty()
        ctx.call, ctx.given = call, len(tensors)
        ctx.save_for_backward(*tensors, *saved)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a block in one piece")
        (grad,), call = grads, ctx.call
        saved = ctx.saved_tensors
        call.fill(saved[: ctx.given])
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        with torch.autocast("cpu", enabled=False):
            grad_x, *others = call.backward(rows, saved[ctx.given :], wants_x=ctx.needs_input_grad[1])
        call.empty()
        return None, None if grad_x is None else grad_x.view(grad.shape), *others

"""Linear layers that read the same input, as one product forward and backward: what a fused block is made of.

    y = x @ [W_1; W_2; ...]^T + [b_1; b_2; ...] + s_j * (dropout(x) @ A_j^T) @ B_j^T  in the columns of layer j

The weight of a quantized layer, and one in another dtype than the products', is made dense a tile at a time
(`TILE_VALUES`), tiles reaching over layers; it is made again in the backward pass. A dense weight in the products'
dtype is used where it lies. There is no autograd inside: `forward` says what it kept, `backward` gives the gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from strop.layers.base import linear_shape
from strop.layers.fake_quant_linear import FakeQuantLinear
from strop.layers.int8_products import Int8Weight, MeasuredInt8
from strop.layers.lora_linear import LoraLinear
from strop.layers.quant_linear import QuantLinear
from strop.numerics.accelerated import RowReader

TILE_VALUES: Final = 1 << 22
"""Values of a weight that are dense at a time: 8 MiB in bfloat16."""


@dataclass(frozen=True, eq=False)
class Part:
    """A linear layer of a product.

    Attributes:
        base: `nn.Linear`, `QuantLinear` or `FakeQuantLinear`.
        adapter: The adapter over it, or None.
    """

    base: nn.Module
    adapter: LoraLinear | None

    @classmethod
    def of(cls, module: nn.Module) -> Part | None:
        """A layer of the model as a part; None for kinds that are not made of a weight and an adapter."""
        base = module.base if type(module) is LoraLinear else module
        if type(base) not in (nn.Linear, QuantLinear, FakeQuantLinear):
            return None
        if isinstance(base, FakeQuantLinear) and (base.inputs is not None or base is not module):
            return None
        return cls(base, module if isinstance(module, LoraLinear) else None)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return linear_shape(self.base)

    @property
    def dropout(self) -> float:
        """Probability with which an input of the adapter is dropped, as things stand."""
        return self.adapter.dropout if self.adapter is not None and self.adapter.training else 0.0

    def weight(self) -> Tensor | None:
        """The dense weight, through its rounding where it has one; None for a quantized layer."""
        if isinstance(self.base, QuantLinear):
            return None
        if isinstance(self.base, FakeQuantLinear) and self.base.rounds:
            with torch.autocast("cpu", enabled=False):
                return self.base.grid.rounded(self.base.weight)
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def bias(self) -> Tensor | None:
        """[out], or None."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def reader(self) -> RowReader | _WholeReader | None:
        """Of a quantized layer's rows; None for a dense one."""
        return (
            (self.base.qtensor.row_reader() or _WholeReader(self.base)) if isinstance(self.base, QuantLinear) else None
        )

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] of the adapter; None where there is none, or it is switched off."""
        if self.adapter is None or self.adapter.switched_off:
            return None
        return self.adapter.lora_A, self.adapter.lora_B


class _WholeReader:
    """Rows of a quantized weight that no kernel reads by rows: it is dense for as long as this object lives."""

    def __init__(self, layer: QuantLinear) -> None:
        self.layer = layer
        self.dense: Tensor | None = None

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """The values of rows `start` to `stop` into `out`."""
        if self.dense is None:
            self.dense = self.layer.qtensor.dequantize(out.dtype)
        out.copy_(self.dense[start:stop])


@dataclass(frozen=True, eq=False)
class Operands:
    """What a layer brings to one call.

    Attributes:
        shape: (out, in).
        weight: Dense [out, in]; None for a quantized layer.
        bias: [out], or None.
        a: [r, in] of the adapter, or None.
        b: [out, r] of it, or None.
        reader: Of a quantized layer's rows, or None.
        scaling: s.
        dropout: Of the adapter's input.
    """

    shape: tuple[int, int]
    weight: Tensor | None
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    reader: RowReader | _WholeReader | None
    scaling: float
    dropout: float

    @classmethod
    def of(cls, part: Part, dtype: torch.dtype) -> Operands:
        """As the layer stands now; what is rounded in training is in `dtype`."""
        weight = part.weight()
        if weight is not None and isinstance(part.base, FakeQuantLinear):
            weight = weight.to(dtype)
        a, b = part.factors() or (None, None)
        scaling = part.adapter.scaling if part.adapter is not None else 1.0
        return cls(part.shape, weight, part.bias(), a, b, part.reader(), scaling, part.dropout)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those that autograd is given, since they may be trained: weight, bias, a, b."""
        return self.weight, self.bias, self.a, self.b

    def emptied(self) -> Operands:
        """Without tensors, to be kept until the backward pass."""
        return replace(self, weight=None, bias=None, a=None, b=None, reader=None)

    def filled(self, part: Part, tensors: Sequence[Tensor | None]) -> Operands:
        """With them again."""
        weight, bias, a, b = tensors
        return replace(self, weight=weight, bias=bias, a=a, b=b, reader=part.reader())


@dataclass(frozen=True, eq=False)
class _Stack:
    """Adapters that read one input: all of a product's without dropout, else one, for each drops inputs of its own.

    Attributes:
        members: The layers, each with its place in the product and its rows of the stacked A.
        rank: Rows of the stacked A.
        dropout: Of the input.
    """

    members: list[tuple[Operands, int, slice]]
    rank: int
    dropout: float

    @classmethod
    def of(cls, parts: Sequence[Operands]) -> list[_Stack]:
        adapted = [(part, place) for place, part in enumerate(parts) if part.a is not None and part.b is not None]
        together = all(part.dropout == 0.0 for part, _ in adapted)
        stacks = []
        for group in [adapted] if together and adapted else [[one] for one in adapted]:
            members, rank = [], 0
            for part, place in group:
                more = len(_given(part.a))
                members.append((part, place, slice(rank, rank + more)))
                rank += more
            stacks.append(cls(members, rank, group[0][0].dropout))
        return stacks

    def a(self, dtype: torch.dtype) -> Tensor:
        """The stacked A [rank, in]."""
        return torch.cat([_given(part.a) for part, _, _ in self.members]).to(dtype)


class Product:
    """The product of one call.

    Args:
        parts: Its layers' operands.
        dtype: What is multiplied in.
        int8: The weights in int8, which stand in for them, or are compared with them; None: neither.
    """

    def __init__(
        self, parts: Sequence[Operands], dtype: torch.dtype, int8: Int8Weight | MeasuredInt8 | None = None
    ) -> None:
        self.parts, self.dtype, self.int8 = list(parts), dtype, int8
        self.columns, self.stacks = parts[0].shape[1], _Stack.of(parts)
        self.starts = [sum(part.shape[0] for part in parts[:index]) for index in range(len(parts) + 1)]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """X [tokens, in] -> y [tokens, sum of out], and what the backward pass needs.

        That is, for each stack of adapters: s * dropout(x) @ A^T [tokens, sum of r]; and which inputs were kept, bool
        [tokens, in], None without dropout.
        """
        y = self._times_weight(x)
        columns = self._columns_of(y)
        for part, mine in zip(self.parts, columns, strict=True):
            if part.bias is not None:
                mine += part.bias.to(self.dtype)
        kept: list[Tensor | None] = []
        for stack in self.stacks:
            mask = None
            if stack.dropout > 0.0:
                mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - stack.dropout)
            down = _dropped(x, mask, stack.dropout) @ stack.a(self.dtype).t()
            for part, place, ranks in stack.members:
                narrow = down[:, ranks].mul_(part.scaling)
                columns[place].addmm_(narrow, _given(part.b).to(self.dtype).t())
            kept += [down, mask]
        return y, kept

    def backward(self, grad: Tensor, kept: Sequence[Tensor | None], *, wants_x: bool = True) -> ProductBackward:
        """The backward pass for a gradient of y [tokens, sum of out], in the products' dtype."""
        back = self._times_weight_back(grad) if wants_x else None
        columns, through = self._columns_of(grad), []
        for stack, mask in zip(self.stacks, kept[1::2], strict=True):
            narrow = grad.new_empty(grad.shape[0], stack.rank)
            for part, place, ranks in stack.members:
                torch.mm(columns[place], _given(part.b).to(self.dtype), out=narrow[:, ranks])
                narrow[:, ranks].mul_(part.scaling)
            through.append(narrow)
            if back is not None and mask is None:
                back.addmm_(narrow, stack.a(self.dtype))
            elif back is not None:
                back += _dropped(narrow @ stack.a(self.dtype), mask, stack.dropout)
        return ProductBackward(self, grad, kept, through, back)

    def _times_weight(self, x: Tensor) -> Tensor:
        """X [tokens, in] @ W^T."""
        if isinstance(self.int8, Int8Weight):
            return self.int8.forward(x)
        y = x.new_empty(x.shape[0], self.starts[-1])
        for start, weight in self.tiles():
            torch.mm(x, weight.t(), out=y[:, start : start + weight.shape[0]])
        if self.int8 is not None:
            self.int8.compare(y, self.int8.weight.forward(x))
        return y

    def _times_weight_back(self, grad: Tensor) -> Tensor:
        """The gradient of y [tokens, sum of out] @ W."""
        if isinstance(self.int8, Int8Weight):
            return self.int8.backward(grad)
        back: Tensor | None = None
        for start, weight in self.tiles():
            piece = grad[:, start : start + weight.shape[0]]
            back = piece @ weight if back is None else back.addmm_(piece, weight)
        assert back is not None
        if self.int8 is not None:
            self.int8.compare(back, self.int8.weight.backward(grad))
        return back

    def _columns_of(self, y: Tensor) -> list[Tensor]:
        """Each layer's."""
        return [y[:, begin:end] for begin, end in itertools.pairwise(self.starts)]

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """The weight's rows in stretches: (the first row's place, [rows, in] in the products' dtype).

        A tile is overwritten by the next.
        """
        most = max(1, TILE_VALUES // self.columns)
        held: Tensor | None = None
        first = filled = 0
        for start, part in zip(self.starts, self.parts, strict=False):
            if part.weight is not None and part.weight.dtype == self.dtype:
                if held is not None and filled:
                    yield first, held[:filled]
                yield start, part.weight
                first, filled = start + part.shape[0], 0
                continue
            done = 0
            while done < part.shape[0]:
                if held is None:
                    held = torch.empty(min(most, self.starts[-1]), self.columns, dtype=self.dtype)
                count = min(part.shape[0] - done, len(held) - filled)
                room = held[filled : filled + count]
                if part.reader is not None:
                    part.reader.read(done, done + count, room)
                else:
                    assert part.weight is not None
                    room.copy_(part.weight[done : done + count])
                filled, done = filled + count, done + count
                if filled == len(held):
                    yield first, held
                    first, filled = first + filled, 0
        if held is not None and filled:
            yield first, held[:filled]


@dataclass(frozen=True, eq=False)
class ProductBackward:
    """A product's backward pass, the gradient of its input found.

    Attributes:
        product: The product.
        grad: The gradient of y.
        kept: What the forward pass kept.
        through: For each stack of adapters, s * dL/dy @ B [tokens, sum of r].
        x: The gradient of x [tokens, in]; None where it was not wanted.
    """

    product: Product
    grad: Tensor
    kept: Sequence[Tensor | None]
    through: Sequence[Tensor]
    x: Tensor | None

    def tensors(self, x: Tensor) -> list[Tensor | None]:
        """The gradients of each layer's `Operands.tensors`, None for those that are not trained.

        Args:
            x: The product's input, as in the forward pass.
        """
        product, columns = self.product, self.product._columns_of(self.grad)
        found: list[list[Tensor | None]] = []
        for part, mine in zip(product.parts, columns, strict=True):
            weight = bias = None
            if part.weight is not None and part.weight.requires_grad:
                weight = (mine.t() @ x).to(part.weight.dtype)
            if part.bias is not None and part.bias.requires_grad:
                bias = mine.sum(0, dtype=torch.float32).to(part.bias.dtype)
            found.append([weight, bias, None, None])
        for index, stack in enumerate(product.stacks):
            down, mask = self.kept[2 * index : 2 * index + 2]
            stacked = self.through[index].t() @ _dropped(x, mask, stack.dropout)  # [sum of r, in]
            for part, place, ranks in stack.members:
                a, b = _given(part.a), _given(part.b)
                found[place][2] = stacked[ranks].to(a.dtype)
                found[place][3] = (columns[place].t() @ _given(down)[:, ranks]).to(b.dtype)
        return list(itertools.chain.from_iterable(found))


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _dropped(x: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    """The values that were kept, scaled so that their mean stays; all of them without a mask."""
    return x if mask is None else (x * mask).mul_(1.0 / (1.0 - probability))

"""What one block's forward pass keeps for its backward pass, counted from the shapes of its linear layers.

Counts are of numbers per token unless the name says bytes. Which layer is which is told by shape alone: a layer that
reads the residual stream has in_features = h, one that writes to it out_features = h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from strop.planner.parameters import ExpertShape, LinearShape, ModelShape, block_of

Attention = Literal["fused", "plain", "block"]
"""`fused` never holds the scores; `plain` keeps them, of every head and pair of positions; with `block` the whole block
is one piece (`strop.layers.fused_block`), which keeps least."""


@dataclass(frozen=True)
class Precision:
    """In which dtypes a block's activations are.

    Args:
        product_bytes: an element of the linear layers' outputs: 2 in bf16, 4 in fp32.
        residual_bytes: an element of the residual stream. Where fp32 weights are trained and the products cast to bf16
            (autocast) it stays fp32, and every linear layer that reads it casts a copy of its own.
        trained: whether the block's own weights are trained.
    """

    product_bytes: int
    residual_bytes: int
    trained: bool


@dataclass(frozen=True)
class Block:
    """One decoder block: its linear layers, its fused experts (`active_experts` of each work on a token), its norms."""

    linears: tuple[LinearShape, ...]
    experts: tuple[ExpertShape, ...]
    hidden_size: int
    norms: float
    heads: int
    query_features: int
    key_value_features: int
    active_experts: int

    @property
    def widest_features(self) -> int:
        """Return the feed-forward width i: the widest input of a layer that writes to the residual stream."""
        widths = [linear.in_features for linear in self.linears if linear.out_features == self.hidden_size]
        widths += [self._active(expert) * min(expert.shape[1:]) for expert in self.experts]
        return max(widths, default=self.hidden_size)

    @property
    def gated(self) -> bool:
        """Say whether the feed-forward layer multiplies two activations of its width: silu(gate) * up."""
        width = self.widest_features
        if self.experts:
            return any(max(expert.shape[1:]) == 2 * min(expert.shape[1:]) for expert in self.experts)
        into = [linear.out_features for linear in self.linears if linear.in_features == self.hidden_size]
        return sum(size for size in into if size in (width, 2 * width)) >= 2 * width

    def kept_features(self, *, product: bool = True) -> float:
        """Count what has to be kept: two numbers a norm and feature, and each linear layer's side off the residual
        stream.

        For a Llama block: 4h + 2 h_q + 2 h_kv + 2i, and i more with `product`: silu(gate) * up, which the gradient of
        the down projection or of its adapter needs. For Llama-3-8B in bf16 that is 110.6 KB a token, 139.3 KB with
        the product.
        """
        features = 2 * self.norms * self.hidden_size
        features += sum(self._inner(linear.in_features, linear.out_features) for linear in self.linears)
        features += sum(self._active(expert) * self._inner(*expert.shape[1:]) for expert in self.experts)
        return features if product else features - self.widest_features

    def kept_bytes(
        self, precision: Precision, *, adapter_features: int = 0, length: int = 0, attention: Attention = "fused"
    ) -> float:
        """Return the bytes per token that transformers' layers keep, run one operation after the other.

        Differs from `kept_features` in this: a norm keeps its input in fp32, and its normalised output where its weight
        is trained; keys and values are repeated for every query head; silu(gate) is kept beside the gate; plain
        attention keeps the softmax in fp32 and, in bf16, once more. A block in one piece keeps, on the residual stream,
        its input and that of its feed-forward part; queries, keys and values, attention's output, gate and up; what
        its adapters keep, and a number in fp32 for each head.

        Args:
            precision: the dtypes.
            adapter_features: numbers that the block's adapters keep: x A^T, their rank each.
            length: tokens in a row, for plain attention.
            attention: how attention is computed.
        """
        element, casts = precision.product_bytes, precision.product_bytes != precision.residual_bytes
        if attention == "block":
            inner = 2 * self.query_features + 2 * self.key_value_features + 2 * self.widest_features + adapter_features
            return 2.0 * precision.residual_bytes * self.hidden_size + element * inner + 4.0 * self.heads
        norms = self.norms * self.hidden_size
        inner = self.kept_features() - 2 * norms  # what is not on the residual stream
        readers = sum(linear.in_features == self.hidden_size for linear in self.linears) - self._square_outputs
        kept = 4.0 * norms * (2 if precision.trained else 1)
        kept += element * (readers * self.hidden_size if casts else norms)
        kept += element * (inner + 2 * max(self.query_features - self.key_value_features, 0) + adapter_features)
        if self.gated:
            kept += element * self.widest_features
        if attention == "plain":
            kept += self.heads * length * (4 if element == 4 else 4 + element)
        return kept

    def backward_bytes(self, element_bytes: int) -> float:
        """Return the bytes per token of the gradients at the widest point: silu(gate) * up and its two factors."""
        return 3 * element_bytes * self.widest_features

    @property
    def in_one_piece(self) -> bool:
        """Say whether a block of such layers may run as one piece; the model itself decides that when it is trained."""
        h, width, shapes = self.hidden_size, self.widest_features, self.linears
        into = sorted(linear.out_features for linear in shapes if linear.in_features == h)
        layers = [self.query_features, self.key_value_features, self.key_value_features, width, width]
        square = [h] if self._square_outputs else []
        return len(shapes) == 7 and not self.experts and self.norms <= 4 and into == sorted(layers + square)

    @property
    def _square_outputs(self) -> int:
        """Return 1 where attention's output layer has in_features = h too, and so looks like a reader of the stream."""
        shapes = {(linear.in_features, linear.out_features) for linear in self.linears}
        return int(self.query_features == self.hidden_size and (self.hidden_size, self.hidden_size) in shapes)

    def _active(self, expert: ExpertShape) -> int:
        return min(self.active_experts, expert.shape[0])

    def _inner(self, one: int, other: int) -> int:
        inner = [size for size in (one, other) if size != self.hidden_size]
        return sum(inner) if inner else self.hidden_size  # a square layer stands for one activation


def blocks(shape: ModelShape) -> dict[str, Block]:
    """Group a model's linear layers and experts by the block they stand in."""
    linears: dict[str, list[LinearShape]] = {}
    experts: dict[str, list[ExpertShape]] = {}
    for linear in shape.linears:
        linears.setdefault(block_of(linear.name), []).append(linear)
    for expert in shape.experts:
        experts.setdefault(block_of(expert.name), []).append(expert)
    names = dict.fromkeys([*linears, *experts])
    return {
        name: Block(
            tuple(linears.get(name, ())),
            tuple(experts.get(name, ())),
            shape.hidden_size,
            shape.norms / max(shape.layers, 1),
            shape.heads,
            shape.query_features,
            shape.key_value_features,
            shape.active_experts,
        )
        for name in names
    }

"""What one block's forward pass keeps for its backward pass, counted from the shapes of its linear layers.

Counts are of numbers per token unless the name says bytes. Which layer is which is told by shape alone: a layer that
reads the residual stream has in_features = h, one that writes to it out_features = h.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from strop.planner.parameters import ExpertShape, LinearShape, ModelShape, block_of


@dataclass(frozen=True)
class Block:
    """One decoder block: its linear layers, its fused experts (`active_experts` of each work on a token), its norms."""

    linears: tuple[LinearShape, ...]
    experts: tuple[ExpertShape, ...]
    hidden_size: int
    norms: float
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

    def kept_bytes(self, *, element_bytes: int, trained: bool, adapter_features: int = 0) -> float:
        """Return the bytes per token that transformers' layers keep, run one operation after the other.

        Beyond `kept_features`: a norm keeps its input in fp32, and its normalised output where its weight is trained;
        silu(gate) is kept beside the gate.

        Args:
            element_bytes: 2 in bf16, 4 in fp32.
            trained: whether the block's own weights are trained.
            adapter_features: numbers per token that the block's adapters keep: x A^T, their rank each.
        """
        kept = element_bytes * self.kept_features()
        kept += (4 - element_bytes) * self.norms * self.hidden_size
        if trained:
            kept += element_bytes * self.norms * self.hidden_size
        if self.gated:
            kept += element_bytes * self.widest_features
        return kept + element_bytes * adapter_features

    def backward_bytes(self, *, element_bytes: int) -> float:
        """Return the bytes per token of the gradients at the widest point: silu(gate) * up and its two factors."""
        return 3 * element_bytes * self.widest_features

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
    names: Iterable[str] = dict.fromkeys([*linears, *experts])
    return {
        name: Block(
            tuple(linears.get(name, ())),
            tuple(experts.get(name, ())),
            shape.hidden_size,
            shape.norms / max(shape.layers, 1),
            shape.active_experts,
        )
        for name in names
    }

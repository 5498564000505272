"""Blocks that give each text its next token in one native call (`strop.kernels.step`), and which blocks those are.

A block of seven quantized linear layers and two or four norms costs a dozen calls of Python modules per token, which
is more than its products take. While `in_steps` lasts, such blocks write with a `SlotCache` in one call; whatever else
they are asked (a prompt, another cache, a gradient, a hook within) goes to their own forward.

Nothing goes by name. A pass over a few tokens takes down what a block calls (`training.fusing`), and its copy in
float32 then goes over the same tokens one by one: each output has to be what the block's own forward gives for it.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from strop.evaluation.slots import SlotCache
from strop.kernels import block as block_kernels
from strop.kernels.step import Step, StepShape
from strop.layers.block_products import Part
from strop.layers.fused_block import BlockParts
from strop.layers.quant_linear import QuantLinear
from strop.numerics.accelerated import PackedWeight
from strop.training.fusing import (
    Observed,
    block_parts,
    close,
    decoder_blocks,
    far_places,
    float_copy,
    floats,
    hidden_of,
    moved,
    observe,
    wrapper,
)
from strop.training.recompute import forward_as

PROBE_TOKENS: Final = 5
"""Tokens that a block is tried with."""


class _Turns:
    """The positions of the pass under way, as the kernels read them: a model gives the same to all blocks."""

    def __init__(self) -> None:
        self.given: Any = None
        self.laid: tuple[Tensor, Tensor] | None = None

    def of(self, positions: tuple[Tensor, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
        """Cos and sin [tokens, turned] of [tokens or 1, 1, turned]."""
        if self.laid is None or self.given is not positions:
            cos, sin = (part.float().expand(tokens, 1, -1).reshape(tokens, -1).contiguous() for part in positions)
            self.given, self.laid = positions, (cos, sin)
        return self.laid


class StepBlock:
    """Stands in for a block's forward while texts are written.

    Args:
        block: The block.
        parts: What it is made of.
        weights: Of its products, in their order.
        turned: Values of a head that its position turns.
        place: Its place among the layers of the cache.
        wrap: What the block gives back, of its hidden states.
        turns: Shared by a model's blocks.
    """

    def __init__(
        self,
        block: nn.Module,
        parts: BlockParts,
        weights: list[PackedWeight],
        turned: int,
        place: int,
        wrap: Callable[[Tensor], Any],
        turns: _Turns,
    ) -> None:
        self.own, self.place, self.wrap, self.turns = block.forward, place, wrap, turns
        self._weights = weights  # which the step's jobs point to
        inner = [module for module in block.modules() if module is not block]
        self._hooks = [hooks for one in inner for hooks in (one._forward_pre_hooks, one._forward_hooks)]
        self._biases = {weight.bias.dtype for weight in weights if weight.bias is not None}
        norms = parts.all_norms()
        eps = [norm.eps for norm in norms] + [0.0] * (4 - len(norms))
        size = parts.head_size
        shape = StepShape(
            heads=weights[0].shape[0] // size,
            kv_heads=weights[1].shape[0] // size,
            size=size,
            turned=turned,
            inner=weights[4].shape[0],
            eps=(eps[0], eps[1], eps[2], eps[3]),
            scaling=parts.scaling,
        )
        self.step = Step(
            shape,
            [weight.job for weight in weights],
            [weight.grid for weight in weights],
            [weight.shape[1] for weight in weights],
            [norm.gain.detach().float().clone() for norm in norms],
        )
        self._state = _state(block)

    def in_place(self, block: nn.Module) -> bool:
        """Whether the block has the layers and values that this was made of."""
        return _state(block) == self._state

    def __call__(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        """The block's forward."""
        y = None if args else self._written(hidden_states, options)
        return self.own(hidden_states, *args, **options) if y is None else self.wrap(y)

    def _written(self, x: Tensor, options: dict[str, Any]) -> Tensor | None:
        cache, positions = options.get("past_key_values"), options.get("position_embeddings")
        if type(cache) is not SlotCache or (index := cache.shared.index) is None or positions is None:
            return None
        tokens, length, hidden = x.shape
        if length != 1 or index.shape[0] != tokens or self._biases - {x.dtype} or torch.is_grad_enabled():
            return None
        layer = cache.kept[self.place]
        if layer.keys is None or layer.values is None or any(self._hooks):
            return None
        cos, sin = self.turns.of(positions, tokens)
        y = self.step(x.reshape(tokens, hidden), cos, sin, layer.keys, layer.values, index)
        return None if y is None else y.view(x.shape)


def _state(block: nn.Module) -> list[tuple[int, int, int]]:
    """What a block's layers and their values are, to see whether any has changed."""
    tensors = itertools.chain(block.parameters(), block.buffers())
    modules = [(id(module), 0, 0) for module in block.modules()]
    versions = [(id(one), one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors]
    return modules + versions


_known: weakref.WeakKeyDictionary[PreTrainedModel, dict[int, StepBlock]] = weakref.WeakKeyDictionary()
"""What models' blocks turned out to be; a block that has changed since is tried again with all others."""


@contextlib.contextmanager
def in_steps(model: PreTrainedModel) -> Iterator[None]:
    """Let the blocks that can write in one call do so while the context lasts."""
    blocks = decoder_blocks(model)
    if model.device.type != "cpu" or not block_kernels.available():
        found: dict[int, StepBlock] = {}
    else:
        found = _known.get(model, {})
        if model not in _known or any(not step.in_place(blocks[place]) for place, step in found.items()):
            found = _known[model] = find_steps(model)
    with contextlib.ExitStack() as stack:
        for place, step in found.items():
            if "forward" not in vars(blocks[place]):
                stack.enter_context(forward_as(blocks[place], step))
        yield


@torch.inference_mode()
def find_steps(model: PreTrainedModel) -> dict[int, StepBlock]:
    """The blocks that can write in one call, by their place."""
    blocks, turns = decoder_blocks(model), _Turns()
    if not any(type(module) is QuantLinear for block in blocks for module in block.modules()):
        return {}
    vocabulary = int(model.config.get_text_config().vocab_size)
    tokens = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    found: dict[int, StepBlock] = {}
    for place, seen in observe(model, blocks, {"input_ids": tokens, "use_cache": False}).items():
        step = _tried(blocks[place], seen, place, turns)
        if step is not None:
            found[place] = step
    return found


def _tried(block: nn.Module, seen: Observed, place: int, turns: _Turns) -> StepBlock | None:
    """A block in one call, if its copy in float32 gives token by token what its own forward gives for all at once."""
    parts = block_parts(block, seen)
    if parts is None or "forward" in vars(block) or _weights(parts) is None:
        return None
    trial = float_copy(block).eval()
    trial_parts = block_parts(trial, moved(seen, block, trial))
    options = {name: floats(value) for name, value in seen.options.items()}
    x, (cos, sin) = seen.x.float(), options["position_embeddings"]
    if trial_parts is None or (trial_weights := _weights(trial_parts)) is None or cos.shape[:2] != (1, x.shape[1]):
        return None
    given = trial.forward(x, **options)
    wrap = wrapper(given)
    if wrap is None or not torch.equal(hidden_of(given), hidden_of(trial.forward(x, **far_places(options)))):
        return None
    turned = int(cos.shape[-1])
    one = StepBlock(trial, trial_parts, trial_weights, turned, place, wrap, turns)
    room = x.new_zeros(1, x.shape[1], trial_weights[1].shape[0] // parts.head_size, parts.head_size)
    keys, values, rows = room, room.clone(), []
    for at in range(x.shape[1]):
        row = one.step(
            x[:, at].contiguous(), cos[0, at : at + 1], sin[0, at : at + 1], keys, values, torch.tensor([at])
        )
        if row is None:
            return None
        rows.append(row)
    if not close(hidden_of(given) - x, torch.stack(rows, 1) - x):
        return None
    weights = _weights(parts)
    return None if weights is None else StepBlock(block, parts, weights, turned, place, wrap, turns)


def _weights(parts: BlockParts) -> list[PackedWeight] | None:
    """The seven products' weights where they lie; None where one is not quantized, or has an adapter."""
    found = [_weight(part) for part in itertools.chain.from_iterable(parts.groups())]
    return [weight for weight in found if weight is not None] if None not in found else None


def _weight(part: Part) -> PackedWeight | None:
    layer = part.base
    if type(layer) is not QuantLinear or part.adapter is not None or "forward" in vars(layer):
        return None
    return PackedWeight.of(layer.scheme, part.shape, layer.qtensor.tensors(), layer.bias)

"""Keys and values rounded in training as the served cache rounds them, so that a run trains what `--kv-cache` computes.

transformers' attention hands its keys and values to `past_key_values.update` and attends to what comes back. Here that
is a cache which keeps nothing: it gives the values of the codes that `evaluation.kv_cache` would hold (the same groups,
the same fp16 scales, bit for bit), with the gradient passed through as if nothing was rounded. It lives for one forward
pass, and computing a block again asks it again.

    int8  every token's keys and values come back rounded, its own included
    int4  a token sees the last 32 to 63 tokens as they are and the older ones rounded, by whole blocks of 32. So both
          come back, [.., 2 * tokens, size], and the mask lets each token see of each block the one form or the other:
          with b = position // 32, blocks up to b - 2 rounded, blocks b - 1 and b as they are

Positions and blocks count from the beginning of each document, packed or not. This is what the cache computes for a
text that is scored, or written token by token. It differs in one thing from `chat` in 4 bits: a prompt that is read in
one pass there sees its own keys and values unrounded, and here it sees the older ones rounded as answers do.

`check_reach` measures on the model that every layer's keys and values go this way.

Shapes: keys and values [batch, heads, tokens, size]; masks [batch, 1, tokens, 2 * tokens], added to the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from strop.data.batches import Batch
from strop.data.packing import PackedAttention, block_mask, packed_attention
from strop.errors import ModelError, TrainingError
from strop.evaluation.kv_cache import STRIDE, KVFormat, RoundedLayer, channels, new_cache
from strop.numerics.grouped import Grouped


class _Straight(torch.autograd.Function):
    """The second value forward, the first one's gradient backward."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None


def _rounded(states: Tensor, *, bits: int, group: int) -> Tensor:
    """What the codes stand for, [..., size], in groups along the last dimension; what is no number stays as it is."""
    with torch.no_grad():
        if not torch.isfinite(states).all():
            return states  # the loss is no number either, and the loop says so
        return Grouped.of(states, bits=bits, group=group).values(states.dtype)


@dataclass(frozen=True)
class _Blocks:
    """The whole blocks of 32 tokens in the documents of a batch.

    Attributes:
        rows: [blocks], the row of each.
        tokens: [blocks, 32], its tokens' places in the row.
    """

    rows: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, positions: Tensor, documents: Tensor) -> _Blocks:
        """From each token's position in its document and its document's number (-1: padding), [batch, tokens] each."""
        last = torch.zeros_like(documents, dtype=torch.bool)
        last[:, STRIDE - 1 :] = positions[:, STRIDE - 1 :] % STRIDE == STRIDE - 1
        rows, ends = (last & (documents >= 0)).nonzero(as_tuple=True)
        return cls(rows, ends[:, None] + torch.arange(1 - STRIDE, 1, device=ends.device))


class _EmptyLayer(CacheLayerMixin):
    """One layer of a cache that keeps nothing."""

    is_sliding = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to begin."""

    def get_seq_length(self) -> int:
        """0: nothing came before."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that attention will see of a mask that transformers makes, and the place of the first."""
        return query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Nothing to forget."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing to reorder."""


class _PlantedLayer(_EmptyLayer):
    """Gives keys and values back with a change of zero added to each, to which the gradient is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The same keys and values."""
        self.changes = tuple(torch.zeros_like(x).requires_grad_() for x in (key_states, value_states))
        return key_states + self.changes[0], value_states + self.changes[1]


class _RoundingLayer(_EmptyLayer):
    """Gives keys and values back as a served cache would hold them."""

    def __init__(self, form: KVFormat, blocks: _Blocks | None) -> None:
        super().__init__()
        self.form, self.blocks = form, blocks

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention is to see of these keys and values."""
        bits, group = self.form.bits, channels(self.form, value_states.shape[-1])
        values = _Straight.apply(value_states, _rounded(value_states.detach(), bits=bits, group=group))
        if self.blocks is None:
            size = key_states.shape[-1]
            return _Straight.apply(key_states, _rounded(key_states.detach(), bits=bits, group=size)), values
        keys = _Straight.apply(key_states, self._by_channel(key_states.detach(), self.blocks))
        return torch.cat([key_states, keys], dim=2), torch.cat([value_states, values], dim=2)

    def _by_channel(self, keys: Tensor, blocks: _Blocks) -> Tensor:
        """Every block's keys rounded per channel; tokens of no whole block stay as they are."""
        result = keys.clone()
        if len(blocks.rows):
            rows = blocks.rows[:, None].to(keys.device)
            tokens = blocks.tokens.to(keys.device)
            picked = keys.transpose(1, 2)[rows, tokens]  # [batch, tokens, heads, size] -> [blocks, 32, heads, size]
            picked = _rounded(picked.permute(0, 2, 3, 1).contiguous(), bits=self.form.bits, group=STRIDE)
            result.transpose(1, 2)[rows, tokens] = picked.permute(0, 3, 1, 2)
        return result


@dataclass(frozen=True)
class RoundedBatch:
    """A batch whose forward pass rounds keys and values.

    Attributes:
        batch: the batch.
        layers: how many the model has.
        form: how they are kept.
        attention: what the model's mask must hold.
    """

    batch: Batch
    layers: int
    form: KVFormat
    attention: PackedAttention

    @property
    def labels(self) -> Tensor:
        """The batch's."""
        return self.batch.labels

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for the model's forward: the batch's, a cache that rounds, and the mask that it needs."""
        inputs = self.batch.inputs()
        if not self.form.window:
            return inputs | {"past_key_values": self._cache(None)}
        positions, documents = _places(self.batch)
        seen = block_mask(documents, self.attention)
        mask = (
            {name: _widened(part, positions) for name, part in seen.items()}
            if isinstance(seen, dict)
            else _widened(seen, positions)
        )
        return inputs | {"attention_mask": mask, "past_key_values": self._cache(_Blocks.of(positions, documents))}

    def _cache(self, blocks: _Blocks | None) -> Cache:
        return Cache(layers=[_RoundingLayer(self.form, blocks) for _ in range(self.layers)])


def _places(batch: Batch) -> tuple[Tensor, Tensor]:
    """Each token's position in its document, and its document's number (-1: padding), [batch, tokens] each."""
    places = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    if batch.documents is not None and batch.position_ids is not None:
        return batch.position_ids, batch.documents
    documents = torch.where(places[None, :] < batch.lengths[:, None], 0, -1)
    return places[None, :].expand_as(documents), documents


def _widened(mask: Tensor, positions: Tensor) -> Tensor:
    """[B, 1, T, T] to [B, 1, T, 2T]: the tokens as they are where they are near, then the rounded ones where not."""
    blocks = positions // STRIDE
    far = (blocks[:, None, :] <= blocks[:, :, None] - 2)[:, None]  # [B, 1, T, T], query by key
    never = torch.finfo(mask.dtype).min
    return torch.cat([mask.masked_fill(far, never), mask.masked_fill(~far, never)], dim=3)


class KVRounding:
    """Rounds a model's keys and values in training.

    Args:
        model: the model that is trained.
        form: as it will be served.
        max_length: tokens of a row, at the most.

    Raises:
        ModelError: it keeps a state of another kind, which cannot be rounded; or takes no explicit mask (int4).
    """

    def __init__(self, model: PreTrainedModel, form: KVFormat, max_length: int) -> None:
        self.model, self.form, self.attention = model, form, PackedAttention()
        served = new_cache(model, form).layers
        strange = sorted({type(layer).__name__ for layer in served if not isinstance(layer, RoundedLayer)})
        if strange:
            raise ModelError(
                f"{type(model).__name__}: its layers hold {', '.join(strange)} beside keys and values, and cannot be "
                "trained with a rounded cache; leave kv_cache out"
            )
        self.layers = len(served)
        if form.window:
            try:
                self.attention = packed_attention(model, max_length)
            except TrainingError as error:
                raise ModelError(f"kv_cache: {form.name} needs an explicit mask. {error}") from error

    def of(self, batch: Batch) -> RoundedBatch:
        """The same batch, its keys and values rounded in the forward pass."""
        return RoundedBatch(batch, self.layers, self.form, self.attention)

    def check_reach(self, batch: Batch) -> None:
        """Measure that every layer's attention sees the keys and values that a cache gives back.

        A small change is planted into each layer's keys and into its values; the gradient of the logits with respect to
        each must not vanish.

        Raises:
            TrainingError: a layer does not ask the cache, or does not attend to what it gives.
        """
        model, training = self.model, self.model.training
        row = batch.select(0).to(model.device)
        planted = [_PlantedLayer() for _ in range(self.layers)]
        reached: dict[int, bool] = {}
        model.eval()
        try:
            with torch.enable_grad():
                logits = model(**row.inputs(), past_key_values=Cache(layers=list(planted))).logits
                changes = [change for layer in planted for change in layer.changes]
                found = torch.autograd.grad(logits.float().square().sum(), changes, allow_unused=True)
            for change, gradient in zip(changes, found, strict=True):
                reached[id(change)] = gradient is not None and bool((gradient != 0).any())
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise TrainingError(
                f"kv_cache: {type(model).__name__} does not take a cache in training "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); leave kv_cache out"
            ) from error
        finally:
            model.train(training)
        lost = [
            f"{what} of layer {number}"
            for number, layer in enumerate(planted)
            for what, change in zip(("keys", "values"), layer.changes or (None, None), strict=True)
            if not reached.get(id(change), False)
        ]
        if lost:
            more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
            raise TrainingError(
                f"kv_cache: in {type(model).__name__} a change planted in the {', '.join(lost[:4])}{more} does not "
                "reach the logits, so that they would not be rounded; leave kv_cache out"
            )

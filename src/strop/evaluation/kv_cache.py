"""A cache of keys and values in 8 or 4 bits, in the place of transformers' own.

    int8  every token at once: keys and values of a head share one scale and offset per token; attention sees the
          rounded ones, its own token's included
    int4  keys per channel over 32 tokens, values per token over 32 channels; the last 32 to 63 tokens stay as they are,
          and move to the codes 32 at a time (KIVI's layout: the outliers of keys lie in a few channels)

Attention gets what the codes stand for. A prompt that is read in one pass sees its own keys and values unrounded in
the int4 cache, and tokens that follow see it rounded. A text that is scored (`STRIDE` tokens at a time) meets exactly
what it would if it were written token by token: between two multiples of 32 the int4 cache rounds nothing anew.

Rows that are padded on the left share groups of keys with their padding: in 4 bits an answer can depend on the prompts
beside it. Layers that attend to a window keep the whole text here, with the mask of their window.

Source: Liu and others, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (2024), section 3, with other
sizes: 32 tokens to a group and at least 32 of residue. Not here: linear attention and other states that are no keys and
values stay as they are; kinds of cache layers that hold more than both are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from strop.errors import ModelError, UsageError, nearest
from strop.numerics.grouped import Grouped, grouped_bytes

STRIDE = 32
"""Tokens whose keys share a scale per channel in the int4 cache, and the least of them that stay unrounded."""

KINDS = ("int8", "int4")


@dataclass(frozen=True)
class KVFormat:
    """How keys and values are kept: "int8" or "int4".

    Raises:
        UsageError: Another name.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise UsageError(
                f"unknown key-value cache {self.name!r}{nearest(self.name, KINDS)}; there are int8 and int4"
            )

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self.name.removeprefix("int"))

    @property
    def window(self) -> int:
        """Tokens that stay unrounded at the least."""
        return STRIDE if self.name == "int4" else 0

    def bytes_per_token(self, heads: int, key_size: int, value_size: int) -> float:
        """Bytes that a rounded token takes in one layer, keys and values together."""
        values = heads * grouped_bytes(value_size, bits=self.bits, group=channels(self, value_size))
        if self.name == "int8":
            return values + heads * grouped_bytes(key_size, bits=8, group=key_size)
        return values + heads * key_size * grouped_bytes(STRIDE, bits=4, group=STRIDE) / STRIDE


def channels(form: KVFormat, size: int) -> int:
    """Channels of a token's value that share a scale."""
    return STRIDE if form.name == "int4" and size % STRIDE == 0 else size


class RoundedLayer(CacheLayerMixin):
    """One layer's keys and values [batch, heads, tokens, size], the older ones as codes, the last as they came."""

    is_sliding = False
    is_croppable = False

    def __init__(self, form: KVFormat) -> None:
        super().__init__()
        self.form = form
        self.rounded_keys: Grouped | None = None
        self.rounded_values: Grouped | None = None
        self.rounded = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no token."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens; returns all keys and values that attention is to see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        if not self.form.window:
            self._round(self.keys.shape[2])
            return self._seen()
        seen = self._seen()
        self._round((self.keys.shape[2] - self.form.window) // STRIDE * STRIDE)
        return seen

    def _seen(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        if self.rounded_keys is None or self.rounded_values is None:
            return self.keys, self.values
        keys = self.rounded_keys.values(self.dtype)
        if self.form.window:
            keys = keys.transpose(-1, -2).flatten(2, 3)  # [.., groups, size, 32] -> [.., tokens, size]
        values = self.rounded_values.values(self.dtype)
        return torch.cat([keys, self.keys], dim=2), torch.cat([values, self.values], dim=2)

    def _round(self, count: int) -> None:
        """Move the first `count` of the unrounded tokens to the codes."""
        if count <= 0:
            return
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys[:, :, :count], self.values[:, :, :count]
        self.keys, self.values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()
        if self.form.window:
            keys = keys.unflatten(2, (-1, STRIDE)).transpose(-1, -2)  # [.., tokens, size] -> [.., groups, size, 32]
        new_keys = Grouped.of(keys, bits=self.form.bits, group=keys.shape[-1])
        new_values = Grouped.of(values, bits=self.form.bits, group=channels(self.form, values.shape[-1]))
        self.rounded_keys = new_keys if self.rounded_keys is None else self.rounded_keys.joined(new_keys, 2)
        self.rounded_values = new_values if self.rounded_values is None else self.rounded_values.joined(new_values, 2)
        self.rounded += count

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.rounded + (0 if self.keys is None else self.keys.shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that attention will see, and the place of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.rounded_keys = self.rounded_values = None
        self.rounded, self.is_initialized = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows that the beams go on from."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.is_initialized:
            assert self.keys is not None
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if not self.is_initialized:
            return
        assert self.keys is not None
        assert self.values is not None
        rows = indices.to(self.device)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        if self.rounded_keys is not None and self.rounded_values is not None:
            self.rounded_keys, self.rounded_values = self.rounded_keys.chosen(rows), self.rounded_values.chosen(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held, counted as memory is (whole storages)."""
        parts = [part for part in (self.keys, self.values) if part is not None]
        for rounded in (self.rounded_keys, self.rounded_values):
            parts += rounded.tensors() if rounded is not None else ()
        return sum(part.untyped_storage().nbytes() for part in parts)


def new_cache(model: PreTrainedModel, form: KVFormat | None) -> Cache:
    """An empty cache for `model`; with None transformers' own, in full precision.

    Raises:
        ModelError: The model keeps another kind of state, which cannot be rounded.
    """
    cache = DynamicCache(config=model.config)
    if form is None:
        return cache
    layers: list[Any] = []
    strange = set()
    for layer in cache.layers:
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            layers.append(RoundedLayer(form))
        elif type(layer) in (LinearAttentionLayer, DummyLayer):
            layers.append(layer)
        else:
            strange.add(type(layer).__name__)
    if strange or not any(isinstance(layer, RoundedLayer) for layer in layers):
        kinds = ", ".join(sorted(strange)) or "no keys and values"
        raise ModelError(
            f"{type(model).__name__}: its cache holds {kinds}, which --kv-cache {form.name} cannot round; leave it out"
        )
    return Cache(layers=layers)


@torch.inference_mode()
def kv_bytes_per_token(model: PreTrainedModel, form: KVFormat | None) -> float:
    """Bytes that a token takes in the cache of `model` over all its layers, once it is rounded.

    One token is read to learn the sizes.
    """
    cache = new_cache(model, None)
    model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=model.device), past_key_values=cache, use_cache=True)
    total = 0.0
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or not keys.numel():
            continue
        heads, key_size, value_size = keys.shape[1], keys.shape[-1], values.shape[-1]
        if form is None:
            total += heads * (key_size + value_size) * keys.element_size()
        else:
            total += form.bytes_per_token(heads, key_size, value_size)
    return total

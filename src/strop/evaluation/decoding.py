"""Writing many answers at once without waiting for the longest: the loop that `generation` runs.

A `Decoder` keeps up to `slots` texts in a `SlotCache`. `read` takes prompts into free slots and gives the logits after
each; `write` takes one token per text and gives the logits after it; `drop` frees a slot, and the last text moves into
it. A beginning that prompts have alike is read once (`share`) and copied. Only the logits of last positions are made,
and the mask of a step is the mask of the step before with one column more.

Whether a model can be run like this is not known by its name: `decodes` runs a few random tokens through it both ways,
ragged and alike, shared, moved and padded, and compares the logits with those of a plain forward pass. Where they
differ, where the cache holds anything but keys and values, or where a text outgrows a layer's window or the length at
which LongRoPE turns all texts of a pass otherwise, transformers' own generation does the work.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from strop.evaluation.slots import SlotCache, no_columns

LOGITS_DIFFER = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far logits may lie from a plain pass, as a share of their spread: what rounding alone brings."""

LOGITS_DIFFER_16_BIT = 0.1

MOST_READ = 8
"""Prompts in a pass: logits are made for each at every place where one of them ends."""

_FIRST_COLUMNS = 64


class Decoder:
    """Texts that are being written.

    Args:
        model: A causal language model that `decodes`.
        slots: The most texts at once.

    Attributes:
        lengths: Tokens of each text that is being written, in the order of the slots.
    """

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        self.model, self.slots = model, slots
        self.lengths: list[int] = []
        self.shared = 0
        layers = len(DynamicCache(config=model.config).layers)
        self._cache = SlotCache(layers, slots + 1, _FIRST_COLUMNS)  # the last slot is for what prompts have alike
        self._chooses = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._ends = torch.zeros(slots, dtype=torch.int64, device=model.device)
        self._make_mask()

    @torch.inference_mode()
    def share(self, tokens: Sequence[int]) -> None:
        """Read a beginning that all prompts to come have; before the first of them."""
        self._need(len(tokens))
        self._cache.reading(self.slots, 1, 0)
        self._run(self._ids([tokens]), self._positions(0, len(tokens)), last=[len(tokens) - 1])
        self.shared = len(tokens)

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Take prompts into free slots; each is longer than what is shared. Returns logits [prompts, vocabulary]."""
        parts = [prompts[at : at + MOST_READ] for at in range(0, len(prompts), MOST_READ)]
        return torch.cat([self._read(part) for part in parts])

    def _read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        first, start = len(self.lengths), self.shared
        longest = max(len(prompt) for prompt in prompts)
        self._need(longest + 1)
        if start:
            self._cache.copy(self.slots, first, rows=len(prompts), length=start)
        self._cache.reading(first, len(prompts), start)
        rests = [prompt[start:] for prompt in prompts]
        last = sorted({len(rest) - 1 for rest in rests})
        logits = self._run(self._ids(rests), self._positions(start, longest), last=last)  # [prompts, last, vocabulary]
        for row, prompt in enumerate(prompts, start=first):
            self.lengths.append(len(prompt))
            self._show(row, len(prompt))
        places = [last.index(len(rest) - 1) for rest in rests]
        return logits[torch.arange(len(prompts)), torch.tensor(places)]

    @torch.inference_mode()
    def write(self, tokens: Tensor) -> Tensor:
        """Give each text a token, [texts]; returns the logits after it [texts, vocabulary]."""
        rows, seen = len(self.lengths), max(self.lengths) + 1
        self._need(seen)
        ends = self._ends[:rows]
        index = self._slot_starts[:rows] + ends
        self._mask.view(-1).index_fill_(0, index, 0)
        self._cache.writing(index, seen)
        alike = min(self.lengths) == seen - 1  # every text sees all columns, and attention without a mask is faster
        output = self.model(
            input_ids=tokens[:, None],
            position_ids=ends[:, None],
            attention_mask=None if alike else self._mask[:rows, :, :, :seen],
            past_key_values=self._cache,
            use_cache=True,
        )
        ends += 1
        self.lengths = [length + 1 for length in self.lengths]
        return output.logits[:, -1]

    @torch.inference_mode()
    def drop(self, row: int) -> None:
        """Free a slot; the last text moves into it."""
        last = len(self.lengths) - 1
        if row != last:
            self._cache.copy(last, row, length=self.lengths[last])
            self.lengths[row] = self.lengths[last]
            self._show(row, self.lengths[last])
        del self.lengths[last]

    def _run(self, ids: Tensor, positions: Tensor, *, last: Sequence[int]) -> Tensor:
        """Read tokens; the logits at the places `last`."""
        places = torch.tensor(last, device=ids.device)
        chosen = {"logits_to_keep": places} if self._chooses else {}
        logits = self.model(
            input_ids=ids, position_ids=positions, past_key_values=self._cache, use_cache=True, **chosen
        ).logits
        return logits if self._chooses else logits[:, places]

    def _ids(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Tokens [prompts, longest], filled up on the right with the last: nothing looks at what follows it."""
        longest = max(len(prompt) for prompt in prompts)
        padded = [[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts]
        return torch.tensor(padded, device=self.model.device)

    def _positions(self, start: int, end: int) -> Tensor:
        return torch.arange(start, end, device=self.model.device)[None]

    def _show(self, row: int, length: int) -> None:
        """Let a text see its own tokens and nothing else."""
        self._ends[row] = length
        self._mask[row, ..., :length] = 0
        self._mask[row, ..., length:] = torch.finfo(self._mask.dtype).min

    def _need(self, columns: int) -> None:
        if self._cache.need(columns):
            self._make_mask()
            for row, length in enumerate(self.lengths):
                self._show(row, length)

    def _make_mask(self) -> None:
        columns, device = self._cache.shared.columns, self.model.device
        self._mask = no_columns(self.slots, columns, self.model.dtype, device)
        self._slot_starts = torch.arange(self.slots, device=device) * columns


_known: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()
"""Models that were tried."""


def decodes(model: PreTrainedModel, longest: int) -> bool:
    """Whether a `Decoder` writes with this model what a plain forward pass gives, for texts of up to `longest` tokens.

    The first call tries it, with gradients off and in evaluation mode; its answer is remembered.
    """
    layers = DynamicCache(config=model.config).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return False
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    if windows and longest >= min(windows):
        return False
    if longest > _turned_alike(model):
        return False
    if model not in _known:
        _known[model] = _agrees(model)
    return _known[model]


def _turned_alike(model: PreTrainedModel) -> float:
    """Tokens up to which a token's rotary position does not depend on the longest text of the pass."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    each = [one for one in (rope, *rope.values()) if isinstance(one, dict) and one.get("rope_type") == "longrope"]
    return min((one["original_max_position_embeddings"] for one in each), default=float("inf"))


@torch.inference_mode()
def _agrees(model: PreTrainedModel) -> bool:
    """Run three short texts both ways: with a shared beginning, of different lengths, one taking another's slot."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    texts = torch.randint(vocabulary, (3, 7), generator=generator)
    texts[:, :2] = texts[0, :2]
    one, two, three = texts.tolist()
    try:
        plain = model(input_ids=texts.to(model.device), use_cache=False).logits.float()
        decoder = Decoder(model, slots=2)
        decoder.share(one[:2])
        found = [*decoder.read([one[:5], two[:4]])]
        found += decoder.write(torch.tensor([one[5], two[4]], device=model.device))
        decoder.drop(0)
        found += decoder.write(torch.tensor([two[5]], device=model.device))
        found += decoder.read([three[:4]])
        found += decoder.write(torch.tensor([two[6], three[4]], device=model.device))
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError):
        return False  # it does not take positions, masks of this shape, or such a cache
    places = ((0, 4), (1, 3), (0, 5), (1, 4), (1, 5), (2, 3), (1, 6), (2, 4))
    expected = torch.stack([plain[row, column] for row, column in places])
    apart = (torch.stack(found).float() - expected).norm() / (expected - expected.mean()).norm()
    return bool(apart <= LOGITS_DIFFER.get(model.dtype, LOGITS_DIFFER_16_BIT))

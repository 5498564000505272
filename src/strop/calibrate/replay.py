"""`Replay`: parts of a block made again from the inputs of their last layer, where all before it is as it was.

    attention   q, k, v -> scores -> o        returns what o returns: with o's inputs at hand, o(inputs)
    mlp         gate, up -> product -> down   returns what down returns: down(inputs)

A block is run over the same hidden states once for each set of layers that is measured together, and once more when all
of them are done. What was settled before is settled in the later passes too, so that they take up where it ends. Which
part ends in which layer is seen in the block's first pass: the part's hidden states must be the very tensor that the
layer returned. The results are bitwise those of the whole pass; inputs are kept as far as the budget goes, and batches
beyond it are run as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

REPLAY_BYTES: Final = 128 << 20
"""Of inputs kept for a block, at most."""


@dataclass(frozen=True)
class Ending:
    """A part of a block that returns what a layer in it returns, and nothing else.

    Attributes:
        part: The part, the outermost such.
        layer: The layer.
        returns: Length of the tuple that the part returns, all but the first of it None; 0 where it is the tensor.
    """

    part: nn.Module
    layer: nn.Module
    returns: int


@dataclass(frozen=True)
class _Tail:
    """An ending, and the layers whose first use is not before its layer's, itself included: none reaches its inputs."""

    ending: Ending
    after: frozenset[str]


@dataclass
class _Kept:
    """Inputs of a layer by number of the batch, with their version: whoever writes over them later spoils them.

    `changed` is what was in place of the block's own weights when they came.
    """

    changed: dict[str, Tensor]
    inputs: dict[int, tuple[Tensor, int]] = field(default_factory=dict[int, tuple[Tensor, int]])


class Replay:
    """Inputs of the last layers of a block's parts.

    Args:
        most_bytes: Of inputs kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self._left = most_bytes
        self._tails: dict[str, _Tail] = {}
        self._kept: dict[str, _Kept] = {}

    def learn(self, endings: Mapping[str, Ending], order: Sequence[tuple[str, ...]]) -> None:
        """Take over the endings seen in a first pass; `order` has the layers by first use, in sets of equal input."""
        for turn, group in enumerate(order):
            ending = endings.get(group[0])
            if ending is not None and len(group) == 1:
                after = frozenset(layer for later in order[turn:] for layer in later)
                self._tails[group[0]] = _Tail(ending, after)

    def keep(
        self, layer: str, number: int, x: Tensor, changed: Mapping[str, Tensor], all_layers: Iterable[str]
    ) -> None:
        """Keep the inputs of a layer, where a part ends in it and all layers before it have been settled."""
        tail = self._tails.get(layer)
        if tail is None or any(name not in changed and name not in tail.after for name in all_layers):
            return
        kept = self._kept.get(layer)
        if kept is None or not _same(kept.changed, changed, frozenset()):
            self._left += 0 if kept is None else sum(_nbytes(old) for old, _ in kept.inputs.values())
            kept = self._kept[layer] = _Kept(dict(changed))
        if number not in kept.inputs and _nbytes(x) <= self._left:
            self._left -= _nbytes(x)
            kept.inputs[number] = x, x._version

    def usable(self, changed: Mapping[str, Tensor]) -> list[str]:
        """The layers whose inputs are as they were when they were kept, with `changed` in place."""
        return [layer for layer, kept in self._kept.items() if _same(kept.changed, changed, self._tails[layer].after)]

    def showing(self, usable: Iterable[str], layers: Iterable[str]) -> list[str]:
        """Of `usable`, those whose parts may be shortened while the inputs of `layers` are watched: all still run."""
        watched = set(layers)
        return [layer for layer in usable if watched <= self._tails[layer].after]

    @contextmanager
    def shortened(self, layers: Sequence[str], number: int) -> Iterator[None]:
        """Let the parts that end in `layers` run those alone, on the inputs kept for this batch."""
        parts: list[nn.Module] = []
        try:
            for layer in layers:
                ending, (x, version) = self._tails[layer].ending, self._kept[layer].inputs.get(number, (None, 0))
                if x is not None and x._version == version:
                    ending.part.forward = _ending_in(ending, x)
                    parts.append(ending.part)
            yield
        finally:
            for part in parts:
                del part.forward  # the class's own again


@contextmanager
def seeing_endings(block: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Ending]]:
    """Gather, while the block runs once, the parts of it that end in one of `layers`; there when the block has run."""
    made: dict[int, tuple[str, Tensor, int]] = {}  # by identity: what a layer returned, held so that it stays unique
    calls: dict[nn.Module, int] = {}
    found: dict[str, Ending] = {}

    def layer_returned(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            made[id(output)] = name, output, output._version

    def part_returned(part: nn.Module, output: Any) -> None:
        calls[part] = calls.get(part, 0) + 1
        first, rest = (output[0], output[1:]) if isinstance(output, tuple) and output else (output, ())
        name, _, version = made.get(id(first), ("", None, -1))
        whole = isinstance(first, Tensor) and first._version == version
        if name and whole and all(other is None for other in rest):
            found[name] = Ending(part, layers[name], 1 + len(rest) if isinstance(output, tuple) else 0)

    def layer_hook(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            calls[module] = calls.get(module, 0) + 1
            layer_returned(name, output)

        return hook

    inside = set(layers.values())
    hooks = [module.register_forward_hook(layer_hook(name)) for name, module in layers.items()]
    hooks += [
        part.register_forward_hook(lambda module, _, output: part_returned(module, output))
        for part in block.modules()
        if part is not block and part not in inside and any(child in inside for child in part.modules())
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for name, ending in list(found.items()):
            if calls[ending.part] != 1 or calls[ending.layer] != 1:
                del found[name]


def _ending_in(ending: Ending, x: Tensor) -> Any:
    def forward(*_: Any, **__: Any) -> Any:
        output = ending.layer(x)
        return (output, *[None] * (ending.returns - 1)) if ending.returns else output

    return forward


def _same(before: Mapping[str, Tensor], now: Mapping[str, Tensor], free: frozenset[str]) -> bool:
    """Whether two sets of weights agree bit for bit, those in `free` aside."""
    names = {name for name in (*before, *now) if name not in free}
    return all(name in before and name in now and _equal(before[name], now[name]) for name in names)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

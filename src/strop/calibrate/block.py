"""`CalibrationBlock`: one block of a model over its calibration inputs, as the methods see it.

Two streams of hidden states reach a block: what the full-precision model gives there, and what the quantized blocks
before it give. Methods calibrate on the second (true sequential, as GPTQ has it) and compare with what the block makes
of the first. The block runs by `torch.func.functional_call`, so that other weights take the place of its own without
touching the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from strop.calibrate.activations import Activations
from strop.calibrate.replay import REPLAY_BYTES, Replay, seeing_endings
from strop.errors import DataError, ModelError
from strop.layers.base import dense_weight
from strop.layers.quant_experts import ExpertWeights, expert_weights, watching_experts
from strop.methods import Statistics

HESSIAN_BYTES: Final = 256 << 20
"""Of second moments that experts of one parameter may have together; more experts take more passes over the rows."""

_STRIPE: Final = 128
"""Rows of second moments that are summed in one matrix product."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one call of a block."""


@dataclass(frozen=True)
class Feed:
    """How a block is called for each batch.

    Attributes:
        call: Number of a batch and its hidden states [rows, length, hidden] to the arguments of the block's call.
        returned: Told what the block returned.
        hidden: The hidden states that the quantized blocks before give, by number.
        target: The hidden states after this block in the full-precision model, by number.
        tokens: Where real tokens stand, bool [rows, length], by number.
        numbers: The batches that calibrate.
    """

    call: Callable[[int, Tensor], Call]
    returned: Callable[[Any], None]
    hidden: Callable[[int], Tensor]
    target: Callable[[int], Tensor]
    tokens: Callable[[int], Tensor]
    numbers: Sequence[int]


class _Reached(Exception):
    """The last layer of interest has its inputs: no error, the pass has done what it was made for."""


class CalibrationBlock:
    """A `strop.methods.Block` over a module.

    Args:
        name: The block's full name.
        module: The block, in float32 and evaluation mode; left as it is.
        feed: Its inputs.
        layers: Full names of the layers to quantize, each inside the block; of experts, those of
            `ExpertWeights.names`, all of a parameter or none.
        replay_bytes: Of inputs kept between passes, which save running again what has been settled.

    Raises:
        ModelError: the block does not return hidden states of the size that it is given.
    """

    def __init__(
        self, name: str, module: nn.Module, feed: Feed, layers: Sequence[str], *, replay_bytes: int = REPLAY_BYTES
    ) -> None:
        self.name, self.batches = name, len(feed.numbers)
        self._module, self._feed = module, feed
        self._rounding: Mapping[str, Callable[[Tensor], Tensor]] = {}
        wanted = set(layers)
        self._experts = {
            own: (weights, expert)
            for weights in expert_weights(module, name).values()
            for expert, own in enumerate(weights.names)
            if own in wanted
        }
        self._linears = {
            layer: module.get_submodule(layer.removeprefix(f"{name}."))
            for layer in layers
            if layer not in self._experts
        }
        self._reached: dict[str, int] = {}
        self._replay = Replay(replay_bytes)
        self._exact: Activations | None = None
        self._exact_slots: dict[str, int] = {}
        order, unreached = self._order()
        self.shared: Sequence[tuple[str, ...]] = (*order, *((layer,) for layer in unreached))
        self.weights: Mapping[str, Tensor] = {
            layer: self._own_weight(layer).float() for group in self.shared for layer in group
        }
        own = {f"{layer}.weight" for layer in self._linears} | {weights.name for weights, _ in self._experts.values()}
        self.others: Mapping[str, Tensor] = {
            full: parameter.detach()
            for part, parameter in module.named_parameters()
            if (full := f"{name}.{part}") not in own and parameter.is_floating_point()
        }

    @property
    def token_count(self) -> int:
        """Number of real tokens that calibrate."""
        return sum(int(self._tokens(batch).sum()) for batch in range(self.batches))

    def stages(self, *, hessian: bool) -> list[tuple[str, ...]]:
        """Layers that are measured in one pass, in the order of use: one tuple of `shared`, or experts of a parameter.

        Args:
            hessian: Whether second moments are gathered, of which memory bounds how many there are at a time.
        """
        found: list[tuple[str, ...]] = []
        open_for: ExpertWeights | None = None
        for group in self.shared:
            weights = self._experts[group[0]][0] if group[0] in self._experts else None
            most = HESSIAN_BYTES // (4 * weights.shape[1] ** 2) if weights is not None and hessian else None
            if weights is not None and weights is open_for and (most is None or len(found[-1]) < most):
                found[-1] += group
            else:
                found.append(group)
            open_for = weights
        return found

    def expert_tokens(self) -> dict[str, int]:
        """How many of the tokens that calibrate each expert is given by the router; empty where there are none."""
        missing = [layer for layer in self._experts if layer not in self._reached]
        if missing:
            self.statistics(missing, {})
        return {layer: self._reached[layer] for layer in self._experts}

    def is_expert(self, layer: str) -> bool:
        """Whether a layer is an expert, that sees only the tokens which the router gives it."""
        return layer in self._experts

    def target(self, batch: int) -> Tensor:
        """What the block gave in full precision for the inputs of the full-precision model."""
        return _real(self._feed.target(self._feed.numbers[batch]), self._tokens(batch))

    def run(self, batch: int, changed: Mapping[str, Tensor]) -> Tensor:
        """The block's output for this batch with `changed` in place of its own; gradients reach `changed`."""
        number = self._feed.numbers[batch]
        return _real(self.forward(number, self._feed.hidden(number), changed), self._tokens(batch))

    def usable(self, changed: Mapping[str, Tensor]) -> list[str]:
        """Layers whose inputs, kept when they were measured, are what they would be with `changed` in place."""
        return self._replay.usable(changed)

    @torch.no_grad()
    def again(self, number: int, changed: Mapping[str, Tensor], usable: Sequence[str]) -> Tensor:
        """`forward` of the feed's own hidden states, from kept inputs where there are: `usable(changed)`; same bits."""
        with self._replay.shortened(usable, number):
            return self.forward(number, self._feed.hidden(number), changed)

    def forward(self, number: int, hidden: Tensor, changed: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [rows, length, hidden] after the block, for a batch of the feed whose hidden states go in."""
        args, kwargs = self._feed.call(number, hidden)
        with _rounding_inputs([(self._linears[layer], how) for layer, how in self._rounding.items()]):
            returned = functional_call(self._module, self._parameters(changed), args, kwargs)
        self._feed.returned(returned)
        output = hidden_states(returned)
        if output.shape != hidden.shape:
            raise ModelError(
                f"{self.name}: gives {list(output.shape)} where hidden states of {list(hidden.shape)} go in; the model "
                "is no chain of blocks, and cannot be calibrated block by block"
            )
        return output

    @torch.no_grad()
    def exact(self, number: int, hidden: Tensor, kept: Activations | None) -> Tensor:
        """`forward` in full precision, of hidden states of the full-precision model.

        Args:
            number: The batch.
            hidden: Its hidden states.
            kept: Where what the layers are given is kept, for their drift; None: nowhere.
        """
        if kept is None:
            return self.forward(number, hidden, {})
        mask, seen = self._feed.tokens(number), set[str]()
        slots = {group[0]: slot for slot, group in enumerate(self.shared) if group[0] in self._linears}

        def see(layer: str, x: Tensor) -> None:
            if layer not in seen:  # of a layer that is called again, the first call is what statistics are of
                seen.add(layer)
                kept.put(number * len(self.shared) + slots[layer], _rows(x, mask).clone())

        with listening({layer: self._linears[layer] for layer in slots}, see):
            after = self.forward(number, hidden, {})
        self._exact = kept
        self._exact_slots = slots
        return after

    def round_inputs(self, rounding: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """From now on layers compute with rounded inputs: layer to what its inputs [..., in] become."""
        self._rounding = dict(rounding)
        if rounding:
            self._replay = Replay(0)  # what was kept came through layers that did not round

    def statistics(
        self, layers: Sequence[str], changed: Mapping[str, Tensor], *, hessian: bool = False, drift: bool = False
    ) -> dict[str, Statistics]:
        """Statistics of the inputs of `layers` over all batches, with `changed` in place; unreached layers are out.

        What was kept for a layer's drift is let go on the way: the drift is there once.

        Raises:
            DataError: the inputs are not finite.
        """
        leaders = {group[0]: group for group in self.shared if any(layer in layers for layer in group)}
        sums: dict[str, InputSums] = {}

        usable = self.usable(changed)
        for number in range(self.batches):

            def see(layer: str, x: Tensor, number: int = number) -> None:
                exact = self._exact_inputs(layer, number) if drift else None
                own = sums.setdefault(layer, InputSums(x.shape[-1], hessian=hessian, drift=exact is not None))
                own.add(x, exact)

            self.observe(number, leaders, changed, see, usable)
            for layer in leaders if drift else ():
                self._let_go_of_exact(layer, number)
        found: dict[str, Statistics] = {}
        for leader, group in leaders.items():
            if leader in sums:
                statistics = sums[leader].statistics(leader)
                found.update({layer: statistics for layer in group if layer in layers})
        for layer in layers:
            if layer in self._experts:
                self._reached[layer] = found[layer].rows if layer in found else 0
        return found

    def inputs(self, layer: str, changed: Mapping[str, Tensor], *, most: int) -> Tensor:
        """At most `most` rows of a layer's inputs, float32 [rows, in], spread evenly over all batches."""
        parts: list[Tensor] = []
        each = max(1, most // max(1, self.batches))
        usable = self.usable(changed)
        for number in range(self.batches):
            self.observe(number, [layer], changed, lambda _, x: parts.append(_evenly(x, each)), usable)
        if not parts:
            return torch.empty(0, self.weights[layer].shape[1])
        return _evenly(torch.cat(parts), most)

    def let_go(self) -> None:
        """Free what was kept of earlier passes: later ones run the whole block, to the same bits, and have no drift."""
        self._replay = Replay(0)
        for batch in range(self.batches):
            for layer in self._exact_slots:
                self._let_go_of_exact(layer, batch)

    def _exact_inputs(self, layer: str, batch: int) -> Tensor | None:
        """The inputs [tokens, in] of a layer in full precision, where they are kept."""
        place = self._exact_place(layer, batch)
        return None if self._exact is None or place not in self._exact else self._exact.get(place)

    def _let_go_of_exact(self, layer: str, batch: int) -> None:
        if self._exact is not None:
            self._exact.drop(self._exact_place(layer, batch))

    def _exact_place(self, layer: str, batch: int) -> int:
        """Where the inputs of a layer in full precision are kept; -1, where nothing is, of layers without."""
        slot = self._exact_slots.get(layer)
        return -1 if slot is None else self._feed.numbers[batch] * len(self.shared) + slot

    def _tokens(self, batch: int) -> Tensor:
        return self._feed.tokens(self._feed.numbers[batch])

    def _parameters(self, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`changed` under the names that the module has for them, transposed where the module holds [in, out]."""
        parameters: dict[str, Tensor] = {}
        for weights in {weights.name: weights for full in changed for weights in self._expert_of(full)}.values():
            parts = [changed[own] if own in changed else self.weights[own] for own in weights.names]
            parameters[weights.name.removeprefix(f"{self.name}.")] = weights.stacked(parts)
        for full, tensor in changed.items():
            if full in self._experts:
                continue
            if full in self._linears:
                turned = tensor.t() if isinstance(self._linears[full], Conv1D) else tensor
                parameters[f"{full.removeprefix(f'{self.name}.')}.weight"] = turned
            else:
                parameters[full.removeprefix(f"{self.name}.")] = tensor
        return parameters

    def _expert_of(self, layer: str) -> list[ExpertWeights]:
        return [self._experts[layer][0]] if layer in self._experts else []

    def _own_weight(self, layer: str) -> Tensor:
        if layer not in self._experts:
            return dense_weight(self._linears[layer])
        weights, expert = self._experts[layer]
        return weights.dense(self._module.get_parameter(weights.name.removeprefix(f"{self.name}.")).detach(), expert)

    def _order(self) -> tuple[list[tuple[str, ...]], list[str]]:
        """Layers by the tensor that they receive, in the order of use, and those that the first batch did not reach."""
        seen: list[tuple[Tensor | None, list[str]]] = []
        entered: set[str] = set()

        def see(layer: str, x: Tensor) -> None:
            for tensor, names in seen:
                if tensor is not None and tensor.data_ptr() == x.data_ptr() and tensor.shape == x.shape:
                    names.append(layer)
                    return
            seen.append((x, [layer]))  # held, so that its memory is not used again while the pass goes on

        def enter(layer: str, *_: Any) -> None:
            owner = self._experts[layer][0].owner
            if owner not in entered:  # all of its experts together, in the order of use, whoever is given tokens here
                entered.add(owner)
                seen.extend((None, [own]) for own, (weights, _) in self._experts.items() if weights.owner == owner)

        if not self.batches:
            raise DataError("calibration: there are no rows to run the model over")
        with (
            listening(self._linears, see),
            self._watching(self._experts, enter),
            seeing_endings(self._module, self._linears) as endings,
            torch.no_grad(),
        ):
            self.forward(self._feed.numbers[0], self._feed.hidden(self._feed.numbers[0]), {})
        groups = [tuple(names) for _, names in seen]
        reached = {layer for group in groups for layer in group}
        self._replay.learn(endings, groups)
        return groups, [layer for layer in (*self._linears, *self._experts) if layer not in reached]

    @contextmanager
    def _watching(self, layers: Iterable[str], see: Callable[[str, Tensor, int, Tensor], None]) -> Iterator[None]:
        """Show `see` each of the experts among `layers` that is called: name, tokens, of how many, inputs."""
        wanted = {layer for layer in layers if layer in self._experts}
        if not wanted:
            yield
            return

        def seen(owner: str) -> Callable[[str, int, Tensor, int, Tensor], None]:
            def called(part: str, expert: int, token: Tensor, count: int, x: Tensor) -> None:
                layer = f"{owner}.{part}.{expert}"
                if layer in wanted:
                    see(layer, token, count, x)

            return called

        with watching_experts(self._module, seen, self.name):
            yield

    @torch.no_grad()
    def observe(
        self,
        batch: int,
        layers: Iterable[str],
        changed: Mapping[str, Tensor],
        see: Callable[[str, Tensor], None],
        usable: Sequence[str] = (),
    ) -> None:
        """Run one batch and show `see` the inputs [tokens, in] of each layer; the pass ends with the last of them."""
        mask = self._tokens(batch)
        left = set(layers)

        def done(layer: str) -> None:
            left.discard(layer)
            if not left:
                raise _Reached

        def hook(layer: str, x: Tensor) -> None:
            self._replay.keep(layer, self._feed.numbers[batch], x, changed, self.weights)
            see(layer, _rows(x, mask))
            done(layer)

        def expert_hook(layer: str, token: Tensor, count: int, x: Tensor) -> None:
            if count == mask.numel():
                x = x[mask.flatten().to(token.device)[token]]  # padding is routed too
            if len(x):
                see(layer, x.float())
            done(layer)

        try:
            linears = {layer: self._linears[layer] for layer in layers if layer in self._linears}
            with listening(linears, hook), self._watching(layers, expert_hook):
                self.again(self._feed.numbers[batch], changed, self._replay.showing(usable, layers))
        except _Reached:
            pass


class InputSums:
    """Running sums over a layer's inputs: float64 for each feature, float32 for the second moments and within a batch.

    Of the second moments, a symmetric matrix, only the part above the diagonal is summed, in stripes.
    """

    def __init__(self, width: int, *, hessian: bool, drift: bool = False) -> None:
        self.rows = 0
        self.square = torch.zeros(width, dtype=torch.float64)
        self.magnitude = torch.zeros(width, dtype=torch.float64)
        self.largest = torch.zeros(width)
        self.hessian = torch.zeros(width, width) if hessian else None
        self.drift = torch.zeros(width, width) if drift else None

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Take rows [tokens, in] in; `exact` are those of the full-precision model, where the drift is gathered."""
        magnitude = x.abs()
        self.square += x.square().sum(dim=0).cpu()
        self.magnitude += magnitude.sum(dim=0).cpu()
        self.largest = torch.maximum(self.largest, magnitude.amax(dim=0).cpu())
        if self.hessian is not None:
            x = x.cpu()
            for start in range(0, x.shape[1], _STRIPE):
                stripe = slice(start, start + _STRIPE)
                self.hessian[stripe, start:].addmm_(x[:, stripe].t(), x[:, start:])
        if self.drift is not None and exact is not None:
            x = x.cpu()
            self.drift.addmm_((exact - x).t(), x)
        self.rows += x.shape[0]

    def statistics(self, layer: str) -> Statistics:
        """What was seen; `layer` is for messages.

        Raises:
            DataError: the inputs are not finite.
        """
        if not torch.isfinite(self.square).all():
            raise DataError(
                f"calibration: the inputs of {layer} are not finite: the model overflows on these rows; check its "
                "weights"
            )
        hessian = None if self.hessian is None else self.hessian.triu() / self.rows
        if hessian is not None:
            hessian += hessian.triu(1).t()
        drift = None if self.drift is None else self.drift / self.rows
        mean_abs = (self.magnitude / self.rows).float()
        return Statistics((self.square / self.rows).float(), self.rows, mean_abs, self.largest, hessian, drift)


def hidden_states(output: Any) -> Tensor:
    """The hidden states in what a block returns: the tensor itself, or the first of a tuple.

    Raises:
        ModelError: it is neither.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise ModelError(f"a block returned {type(output).__name__}; hidden states are needed")
    return first


@contextmanager
def listening(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show `see` the name and the detached input of each module whenever it is called."""

    def listener(layer: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: see(layer, inputs[0].detach())

    hooks = [module.register_forward_pre_hook(listener(layer)) for layer, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _rounding_inputs(layers: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Let each module compute with what a function makes of its input."""

    def rounder(how: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, inputs: (how(inputs[0]), *inputs[1:])

    hooks = [module.register_forward_pre_hook(rounder(how)) for module, how in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rows(x: Tensor, mask: Tensor) -> Tensor:
    """What a layer is given, as float32 [tokens, in], padding left out where it has [rows, length, in]."""
    return (_real(x, mask) if x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])).float()


def _real(x: Tensor, mask: Tensor) -> Tensor:
    """[rows, length, width] to [tokens, width] without padding; no copy where there is none, nor its gradient's."""
    return x.reshape(-1, x.shape[-1]) if bool(mask.all()) else x[mask]


def _evenly(x: Tensor, most: int) -> Tensor:
    """At most `most` rows of x [rows, width], evenly spread."""
    if x.shape[0] <= most:
        return x.clone()
    return x[torch.linspace(0, x.shape[0] - 1, most).round().long()]

"""Finds the blocks of a model that can run as one piece (`strop.layers.fused_block`), and puts them in.

Nothing goes by name. One forward pass over a few tokens takes down which linear layers and norms a block calls, in
which order and on what: a norm of the block's input that three linear layers read, one that ends attention, a norm
that two read, and a last one; nothing else may hold parameters. Then a float32 copy of the block, its adapters' B made
random, is run both ways on what the block was given, forward and backward. Output and every gradient have to agree, or
the block keeps its own forward. A block that draws random numbers of its own in training (dropout) keeps it too, and so
does one that reads the places of its tokens besides cos and sin (a scale of queries beyond some length).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from strop.data.batches import BatchStream
from strop.kernels import block as kernels
from strop.layers.block_products import Part
from strop.layers.fused_block import BlockParts, FusedBlock, Norm
from strop.layers.lora_linear import LoraLinear
from strop.layers.surgery import block_lists
from strop.training.losses import TokenBatch, on_device
from strop.training.recompute import forward_as

TOLERANCE: Final = 2e-4
"""Largest root mean square of a difference between both ways, relative to that of what differs; both in float32."""

PROBE_TOKENS: Final = 48
"""Tokens of the forward pass that the blocks are looked at in."""

FAR: Final = 1 << 20
"""How far the places of tokens are moved, to see whether a block itself reads them."""


@dataclass(frozen=True)
class Call:
    """A layer's call: what, on what, with which result."""

    module: nn.Module
    x: Tensor
    y: Tensor


@dataclass
class Observed:
    """A block's call.

    Attributes:
        x: Its hidden states.
        options: Its other arguments.
        calls: Of its linear layers and norms, in their order.
    """

    x: Tensor
    options: dict[str, Any]
    calls: list[Call]


def fuse(model: nn.Module, stream: BatchStream) -> int:
    """Run every block that can be as one piece from now on; how many those are.

    Args:
        model: A causal language model, its layers in place.
        stream: What it is trained on; where it stands is left as it was.
    """
    blocks = decoder_blocks(model)
    found = _found(model, blocks, stream)
    for place, forward in found.items():
        blocks[place].forward = forward
    return len(found)


@contextlib.contextmanager
def fused_blocks(model: nn.Module, stream: BatchStream) -> Iterator[None]:
    """The same while the context lasts; a block that was given another forward before keeps it."""
    blocks = decoder_blocks(model)
    with in_one_piece(blocks, _found(model, blocks, stream)):
        yield


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The longest of a model's lists of blocks."""
    return max(([*found] for found in block_lists(model)), key=len, default=[])


def _given_forwards(blocks: list[nn.Module]) -> list[Any]:
    """The forwards that blocks were given in place of their class's."""
    return [vars(block)["forward"] for block in blocks if "forward" in vars(block)]


def _found(model: nn.Module, blocks: list[nn.Module], stream: BatchStream) -> dict[int, FusedBlock]:
    if any(not isinstance(given, FusedBlock) or given.in_place() for given in _given_forwards(blocks)):
        return {}
    place = stream.state_dict()
    inputs = probe_inputs(stream.next_step()[0])
    stream.load_state_dict(place)
    return find_fused(model, blocks, inputs)


def find_fused(model: nn.Module, blocks: list[nn.Module], inputs: Mapping[str, Any]) -> dict[int, FusedBlock]:
    """The blocks that can run as one piece, by their place in `blocks`.

    Args:
        model: What calls them, on its device, layers in place.
        blocks: Its decoder blocks.
        inputs: Of one forward pass, as a batch gives them; a few tokens of one row are enough.
    """
    device = next(model.parameters()).device
    if device.type != "cpu" or not kernels.available():
        return {}
    observed = observe(model, blocks, on_device(dict(inputs), device))
    found: dict[int, FusedBlock] = {}
    for place, block in enumerate(blocks):
        seen = observed.get(place)
        if seen is not None and (fused := _fused(block, seen)) is not None:
            found[place] = fused
    return found


@contextlib.contextmanager
def in_one_piece(blocks: list[nn.Module], fused: Mapping[int, FusedBlock]) -> Iterator[None]:
    """Let blocks run as one piece while the context lasts."""
    with contextlib.ExitStack() as stack:
        for place, forward in fused.items():
            stack.enter_context(forward_as(blocks[place], forward))
        yield


def probe_inputs(batch: TokenBatch) -> dict[str, Any]:
    """A few tokens of the first row of a batch, as the model takes them."""
    inputs = batch.inputs()
    count, rows = PROBE_TOKENS, len(batch.labels)

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(one) for name, one in value.items()}
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != rows:
            return value
        return value[:1, ..., :count, :count] if value.dim() == 4 else value[:1, :count]

    return {name: cut(value) for name, value in inputs.items()}


def observe(model: nn.Module, blocks: list[nn.Module], inputs: dict[str, Any]) -> dict[int, Observed]:
    """How each block is called in one forward pass, and what it calls."""
    observed: dict[int, Observed] = {}
    handles: list[Any] = []

    def watch_block(place: int, block: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor):
                observed[place] = Observed(args[0], options, [])

        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))

    def watch(place: int, module: nn.Module) -> None:
        def after(_: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            if place in observed and len(args) == 1 and isinstance(args[0], Tensor) and isinstance(y, Tensor):
                observed[place].calls.append(Call(module, args[0], y))

        handles.append(module.register_forward_hook(after))

    for place, block in enumerate(blocks):
        watch_block(place, block)
        for module in _working(block):
            watch(place, module)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(**inputs)
    except (RuntimeError, MemoryError):
        return {}  # what is the matter the loop says, which meets it again
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return observed


def _working(block: nn.Module) -> Iterator[nn.Module]:
    """The linear layers and norms of a block; none within another."""
    for child in block.children():
        if _is_norm(child) or Part.of(child) is not None:
            yield child
        else:
            yield from _working(child)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has one vector of parameters, and nothing below it."""
    parameters = list(module.parameters())
    return len(parameters) == 1 and parameters[0].dim() == 1 and not list(module.children())


def _fused(block: nn.Module, observed: Observed) -> FusedBlock | None:
    parts = block_parts(block, observed)
    if parts is None:
        return None
    unmasked = observed.options.get("attention_mask") is None
    trial = float_copy(block)
    trial_parts = block_parts(trial, moved(observed, block, trial))
    if trial_parts is None:
        return None
    options = {name: floats(value) for name, value in observed.options.items()}
    x = observed.x.detach().float()
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False), torch.enable_grad():
        given = trial.forward(x, **options)
        wrap = wrapper(given)
        if wrap is None or any(
            not torch.equal(hidden_of(given), hidden_of(trial.forward(x, **again)))
            for again in (options, far_places(options))
        ):
            return None
        fused = FusedBlock(trial, trial_parts, _refused, unmasked_is_causal=unmasked, wrap=wrap)
        try:
            agree = _agree(trial, fused, x, options)
        except _NotTakenError:
            return None
    if not agree:
        return None
    return FusedBlock(block, parts, _own_forward(block), unmasked_is_causal=unmasked, wrap=wrap)


def _own_forward(block: nn.Module) -> Callable[..., Any]:
    """The block's forward, not that of a piece which stood in for it before."""
    return block.forward.own if isinstance(block.forward, FusedBlock) else block.forward


class _NotTakenError(Exception):
    """The fused block handed its call on."""


def _refused(*_: Any, **__: Any) -> Any:
    raise _NotTakenError


def block_parts(block: nn.Module, observed: Observed) -> BlockParts | None:
    """What a block is made of, by its calls; None where they are not those of such a block."""
    norms = [call for call in observed.calls if _is_norm(call.module)]
    linears = [(call, part) for call in observed.calls if (part := Part.of(call.module)) is not None]
    if len(linears) != 7 or len(norms) not in (2, 4):
        return None
    calls, parts = [call for call, _ in linears], [part for _, part in linears]
    reads = [(norms[0], observed.x), *((call, norms[0].y) for call in calls[:3])]
    reads += [(call, norms[-1].y) for call in calls[4:6]]
    if any(call.x is not x for call, x in reads):
        return None
    held = {id(parameter) for call in observed.calls for parameter in call.module.parameters()}
    if any(id(parameter) not in held for parameter in block.parameters()):
        return None
    epsilons = [_epsilon(call.module) for call in norms]
    positions = observed.options.get("position_embeddings")
    if None in epsilons or not isinstance(positions, tuple | list) or len(positions) != 2:
        return None
    owner = next((module for module in block.modules() if calls[0].module in list(module.children())), block)
    size = getattr(owner, "head_dim", positions[0].shape[-1])
    scaling = getattr(owner, "scaling", None)
    heads = [part.shape[0] / size for part in parts[:3]]
    if any(count != int(count) for count in heads) or heads[1] != heads[2] or heads[0] % heads[1]:
        return None
    if parts[3].shape[1] != parts[0].shape[0] or parts[4].shape != parts[5].shape or positions[0].shape[-1] > size:
        return None
    found = [Norm(call.module, float(eps)) for call, eps in zip(norms, epsilons, strict=True) if eps is not None]
    widths = [observed.x.shape[-1], *([size, size] if len(found) == 4 else []), observed.x.shape[-1]]
    if [norm.gain.numel() for norm in found] != widths:  # kernels would read past a shorter one
        return None
    return BlockParts(
        qkv=(parts[0], parts[1], parts[2]),
        out=parts[3],
        gate_up=(parts[4], parts[5]),
        down=parts[6],
        norms=(found[0], found[-1]),
        head_norms=(found[1], found[2]) if len(found) == 4 else None,
        head_size=size,
        scaling=float(scaling) if isinstance(scaling, float) else size**-0.5,
    )


def _epsilon(norm: nn.Module) -> float | None:
    """The one small number that a norm has."""
    small = [value for value in vars(norm).values() if isinstance(value, float) and 0.0 < value < 1e-2]
    return small[0] if len(small) == 1 else None


def float_copy(block: nn.Module) -> nn.Module:
    """The block in float32, its adapters at work and without dropout."""
    trial = copy.deepcopy(block).float().train()
    vars(trial).pop("forward", None)  # its class's own, whatever stands in for that now
    generator = torch.Generator().manual_seed(0)
    for module in trial.modules():
        if isinstance(module, LoraLinear):
            module.dropout = 0.0
            with torch.no_grad():
                module.lora_B.normal_(0.0, 0.5 / module.rank**0.5, generator=generator)
    return trial


def moved(observed: Observed, block: nn.Module, trial: nn.Module) -> Observed:
    """The calls of a block as those of its copy."""
    copies = dict(zip(block.modules(), trial.modules(), strict=True))
    return Observed(observed.x, observed.options, [Call(copies[c.module], c.x, c.y) for c in observed.calls])


def floats(value: Any) -> Any:
    """An argument of a block with its tensors in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    return type(value)(floats(one) for one in value) if isinstance(value, tuple | list) else value


def far_places(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a block with its tokens at places far away, their cos and sin as they were."""
    places = options.get("position_ids")
    return options | {"position_ids": places + FAR} if isinstance(places, Tensor) else options


def hidden_of(given: Any) -> Tensor:
    """The hidden states of what a block gives back."""
    return given if isinstance(given, Tensor) else given[0]


def wrapper(given: Any) -> Callable[[Tensor], Any] | None:
    """What makes of hidden states what the block gives back."""
    if isinstance(given, Tensor):
        return lambda hidden: hidden
    return (lambda hidden: (hidden,)) if isinstance(given, tuple) and len(given) == 1 else None


def _agree(trial: nn.Module, fused: FusedBlock, x: Tensor, options: dict[str, Any]) -> bool:
    """Whether both ways give the same output and the same gradients."""
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(x.shape, generator=generator)
    results: list[list[Tensor]] = []
    trained = [parameter for parameter in trial.parameters() if parameter.requires_grad]
    for forward in (trial.forward, fused):
        start = x.clone().requires_grad_()
        y = hidden_of(forward(start, **options))
        grads = torch.autograd.grad((y * upstream).sum(), [start, *trained], allow_unused=True)
        results.append([y.detach() - x, grads[0] - upstream, *(g for g in grads[1:] if g is not None)])
    own, ours = results
    return len(own) == len(ours) and all(close(a, b) for a, b in zip(own, ours, strict=True))


def close(expected: Tensor, found: Tensor) -> bool:
    """Whether they differ by no more than `TOLERANCE`."""
    size = float(expected.square().mean().sqrt())
    return float((expected - found).square().mean().sqrt()) <= TOLERANCE * size + 1e-9

"""Finding, choosing and exchanging the linear layers of a model, by type and position.

The linear layers of a model are those inside its repeated blocks: the outermost `nn.ModuleList`s of its decoder. The
output head and the embeddings are never among them. No architecture's name is known here: what is not a plain linear
layer (the 3-D weights of experts, a router that is not an `nn.Linear`) is left as it is, and `experts` lists it.
Every change is made in place, one layer at a time; `replace` returns what stood there, so that it can be put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from strop.errors import FormatError, TargetError, nearest
from strop.layers.base import dense_weight, is_linear, linear_bias, linear_shape
from strop.layers.fake_quant_linear import FakeQuantLinear
from strop.layers.grids import Grid
from strop.layers.input_rounding import InputRounding
from strop.layers.lora_linear import LoraLinear
from strop.layers.qat_lora_linear import QatLoraLinear
from strop.layers.quant_experts import QuantExperts
from strop.layers.quantized import QUANTIZED, THROUGH_ROUNDING, quantized_linear
from strop.methods import METHODS, Statistics
from strop.numerics.groups import plan_shape
from strop.numerics.scheme import Scheme

ALL_LINEAR = "all-linear"
"""The target that stands for every linear layer inside the blocks."""


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer inside the model's blocks by its full name, in the model's order.

    A `LoraLinear` stands for itself; its base is not listed again. A model without a `ModuleList` is taken as one
    block.
    """
    kept_out = _heads_and_embeddings(model)
    found: dict[str, nn.Module] = {}
    for prefix, root in _blocks(model):
        for name, module in _outermost_linears(root, prefix):
            if id(module) not in kept_out:
                found[name] = module
    return found


def experts(model: nn.Module) -> list[str]:
    """Full names of the dense 3-D parameters inside the blocks: weights of experts, held as one tensor, in order."""
    names = []
    for prefix, root in _blocks(model):
        for owner, module in root.named_modules(prefix=prefix):
            if not isinstance(module, (_ConvNd, QuantExperts)):  # a kernel and stacked codes have three dimensions too
                own = module.named_parameters(prefix=owner, recurse=False)
                names.extend(name for name, parameter in own if parameter.dim() == 3)
    return names


def select(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers that `targets` asks for, in the model's order, each once.

    Args:
        model: any model.
        targets: `"all-linear"`, or one or several of: a full name, a suffix of whole parts (`q_proj`,
            `self_attn.q_proj`), a glob pattern over the full name or over such a suffix (`model.layers.[01].*`,
            `*_proj`). One string may hold several, separated by commas.

    Raises:
        TargetError: a target matches no linear layer; the message lists the suffixes that there are.
    """
    linears = linear_modules(model)
    wanted = [part.strip() for part in targets.split(",")] if isinstance(targets, str) else list(targets)
    wanted = [target for target in wanted if target]
    if not wanted:
        raise TargetError(f"no target was named; {_suffixes_there_are(linears)}")
    if not linears:
        raise TargetError(f"{type(model).__name__} has no linear layer inside its blocks; there is nothing to target")
    chosen: set[str] = set()
    problems = []
    for target in wanted:
        matched = list(linears) if target == ALL_LINEAR else [name for name in linears if _matches(name, target)]
        if not matched:
            problems.append(_no_match(model, linears, target))
        chosen.update(matched)
    if problems:
        raise TargetError("\n".join([*problems, _suffixes_there_are(linears)]))
    return [name for name in linears if name in chosen]


def coverage(model: nn.Module, names: Sequence[str]) -> float:
    """The share of the model's weights, counted before any packing, that the linear layers `names` hold; 0 to 1."""
    linears = linear_modules(model)
    counts = {name: _product(linear_shape(module)) for name, module in linears.items()}
    inside = {id(parameter) for module in linears.values() for parameter in module.parameters()}
    outside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    total = sum(counts.values()) + outside
    return sum(counts[name] for name in names) / total if total else 0.0


def replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` where `name` stands and return what stood there: `replace(model, name, old)` undoes it."""
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = parent.get_submodule(attribute)
    module.train(old.training)
    setattr(parent, attribute, module)
    return old


def attach_lora(
    model: nn.Module,
    targets: str | Sequence[str] = ALL_LINEAR,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    rank_stabilised: bool = False,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Freeze the model and put a `LoraLinear` over each selected layer; returns their names. A fresh adapter changes
    nothing.

    Raises:
        TargetError: a target matches nothing, or a selected layer has an adapter already.
        ConfigError: see `LoraLinear`.
    """
    names = select(model, targets)
    linears = linear_modules(model)
    taken = [name for name in names if isinstance(linears[name], LoraLinear)]
    if taken:
        raise TargetError(
            f"{taken[0]} and {len(taken) - 1} more have an adapter already; train that one, or detach it first"
        )
    wrapped = {
        name: LoraLinear(
            linears[name], rank, alpha, dropout=dropout, rank_stabilised=rank_stabilised, generator=generator
        )
        for name in names
    }
    adapters = {id(part) for module in lora_modules(model).values() for part in (module.lora_A, module.lora_B)}
    for parameter in model.parameters():
        if id(parameter) not in adapters:  # those of an earlier call go on training
            parameter.requires_grad = False
    for name, module in wrapped.items():
        replace(model, name, module)
    return names


def lora_modules(model: nn.Module) -> dict[str, LoraLinear]:
    """Every `LoraLinear` of the model by its full name (the name that the layer under it had)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def detach_lora(model: nn.Module) -> dict[str, LoraLinear]:
    """Put every adapted layer's base back and return the adapters by name; `replace` attaches one of them again."""
    adapters = lora_modules(model)
    for name, module in adapters.items():
        replace(model, name, module.base)
    return adapters


def attach_fake_quant(
    model: nn.Module,
    scheme: Scheme,
    targets: str | Sequence[str] = ALL_LINEAR,
    *,
    grid: Callable[[str, Tensor], Grid] | None = None,
    inputs: InputRounding | None = None,
) -> list[str]:
    """Exchange each selected dense layer for a `FakeQuantLinear` over the same weight; returns their names.

    Args:
        model: the model, changed in place.
        scheme: the grid's scheme.
        targets: see `select`.
        grid: what each layer trains through, by its name and weight; by default the `RangeGrid` of the scheme.
        inputs: how the layers' inputs are rounded in training.

    Raises:
        TargetError: a target matches nothing, or a selected layer is not dense.
        FormatError: shapes that do not fit the scheme, all of them listed.
    """
    names = _dense_targets(model, scheme, targets)
    for name in names:
        module = model.get_submodule(name)
        weight = dense_weight(module).contiguous()
        own = scheme if grid is None else grid(name, weight)
        replace(model, name, FakeQuantLinear(weight, linear_bias(module), own, inputs=inputs))
    return names


def attach_rounding(
    model: nn.Module, grid: Callable[[str, LoraLinear], Grid], inputs: InputRounding | None = None
) -> list[str]:
    """Put a `QatLoraLinear` around every `LoraLinear`, so that its sum is rounded; returns the layers' names."""
    adapters = lora_modules(model)
    for name, adapter in adapters.items():
        replace(model, name, QatLoraLinear(adapter, grid(name, adapter), inputs=inputs))
    return list(adapters)


@contextmanager
def adapters_alone(model: nn.Module) -> Iterator[None]:
    """Show every `QatLoraLinear` as the `LoraLinear` in it, as it is saved as an adapter."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QatLoraLinear)}
    try:
        for name, module in layers.items():
            replace(model, name, module.adapter)
        yield
    finally:
        for name, module in layers.items():
            replace(model, name, module)


def convert_fake_quant(model: nn.Module) -> list[str]:
    """Exchange every layer that trains through its rounding for the `QuantLinear` that stores the values it computed
    with; returns their names.

    Raises:
        TargetError: the model has none.
    """
    fakes = {name: module for name, module in model.named_modules() if isinstance(module, THROUGH_ROUNDING)}
    if not fakes:
        raise TargetError(f"{type(model).__name__} has no fake-quantized layer to convert; attach them before training")
    for name, module in fakes.items():
        replace(model, name, module.to_quant_linear())
    return list(fakes)


def quantize_linears(
    model: nn.Module,
    scheme: Scheme,
    targets: str | Sequence[str] = ALL_LINEAR,
    method: str = "rtn",
    *,
    statistics: Mapping[str, Statistics] | None = None,
    activation_scales: Mapping[str, float] | None = None,
) -> list[str]:
    """Exchange each selected dense layer for a `QuantLinear` (an `Int8Linear` where the scheme rounds activations too),
    one at a time; returns their names.

    Args:
        model: the model, changed in place.
        scheme: the grid.
        targets: see `select`.
        method: a name of `strop.methods.METHODS`.
        statistics: of the inputs of each layer, by name, for methods that use them.
        activation_scales: of the inputs of each layer, by name, for schemes with a static one.

    Raises:
        TargetError: a target matches nothing, or a selected layer is not dense.
        FormatError: shapes that do not fit the scheme (all listed), an unknown method, or a weight that is not finite.
    """
    if method not in METHODS:
        raise FormatError(f"method {method!r} is unknown{nearest(method, METHODS)}; there are {', '.join(METHODS)}")
    names = _dense_targets(model, scheme, targets)
    for name in names:
        module = model.get_submodule(name)
        seen = None if statistics is None else statistics.get(name)
        try:
            qtensor = METHODS[method](dense_weight(module), scheme, seen)
            qtensor = qtensor.with_activation_scale((activation_scales or {}).get(name))
            layer = quantized_linear(qtensor, linear_bias(module))
        except FormatError as error:
            raise FormatError(f"{name}: {str(error).removeprefix('weight: ')}") from error
        replace(model, name, layer)
    return names


def plan_linears(model: nn.Module, scheme: Scheme | Mapping[str, Scheme], names: Sequence[str]) -> None:
    """Check, before any work, that the shape of every named layer fits the scheme (or its own, where they differ).

    Raises:
        FormatError: one line for each layer that does not fit.
    """
    problems = []
    for name in names:
        own = scheme if isinstance(scheme, Scheme) else scheme[name]
        try:
            plan_shape(linear_shape(model.get_submodule(name)), own, where=name)
        except FormatError as error:
            problems.append(str(error))
    if problems:
        raise FormatError("\n".join(problems))


def _dense_targets(model: nn.Module, scheme: Scheme, targets: str | Sequence[str]) -> list[str]:
    names = select(model, targets)
    packed = [
        f"{name} is a {type(module).__name__}"
        for name in names
        if isinstance(module := model.get_submodule(name), (*QUANTIZED, *THROUGH_ROUNDING, LoraLinear))
    ]
    if packed:
        raise TargetError(
            f"{packed[0]}{f' (and {len(packed) - 1} more are not dense)' if len(packed) > 1 else ''}: "
            "only a dense layer can be quantized; open the full-precision model, or merge the adapter first"
        )
    plan_linears(model, scheme, names)
    return names


def _matches(name: str, target: str) -> bool:
    if any(character in target for character in "*?["):
        return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")
    return name == target or name.endswith(f".{target}")


def _no_match(model: nn.Module, linears: Mapping[str, nn.Module], target: str) -> str:
    in_experts = [name for name in experts(model) if _matches(name, target) or f".{target}." in f".{name}."]
    if in_experts:
        return (
            f"target {target!r} names weights of experts ({in_experts[0]}), held as one 3-D tensor; "
            "adapters and rounding reach the linear layers only"
        )
    for name, module in model.named_modules():
        if name and _matches(name, target) and id(module) in _heads_and_embeddings(model):
            return f"target {target!r} is the output head or an embedding, which stay in full precision"
    return f"target {target!r} matches no linear layer{nearest(target, {*_suffixes(linears), *linears, ALL_LINEAR})}"


def _suffixes(linears: Mapping[str, nn.Module]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linears))


def _suffixes_there_are(linears: Mapping[str, nn.Module]) -> str:
    return f"there are {', '.join([ALL_LINEAR, *_suffixes(linears)])}"


def _heads_and_embeddings(model: nn.Module) -> set[int]:
    ends = []
    for getter in ("get_output_embeddings", "get_input_embeddings"):
        if hasattr(model, getter):
            ends.append(getattr(model, getter)())
    return {id(module) for module in ends if module is not None}


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks by their full names, in the model's order; empty for a model that has none."""
    lists = [(name, module) for name, module in _blocks(model) if isinstance(module, nn.ModuleList)]
    return {f"{name}.{index}": block for name, module in lists for index, block in enumerate(module)}


def block_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost `ModuleList`s of the decoder that hold linear layers; their members are the repeated blocks."""
    return [module for _, module in _blocks(model) if isinstance(module, nn.ModuleList)]


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost `ModuleList`s of the decoder that hold linear layers, by name; the whole model if there is none."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    lists = [(name, module) for name, module in _outermost_lists(model, "") if not inside or id(module) in inside]
    if not lists and inside:
        lists = list(_outermost_lists(model, ""))
    return lists or [("", model)]


def _outermost_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        full = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList) and any(is_linear(inner) for inner in child.modules()):
            yield full, child
        else:
            yield from _outermost_lists(child, full)


def _outermost_linears(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        full = f"{prefix}.{name}" if prefix else name
        if is_linear(child):
            yield full, child
        else:
            yield from _outermost_linears(child, full)


def _product(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]

"""The experts of a mixture: 3-D parameters [experts, out, in], dense or as `QuantExperts`, and how they are computed.

transformers holds each projection of all experts as one parameter and computes them by one of several functions, which
its configuration names (its "experts interface", some 65 architectures). Each expert is a linear layer [out, in] of its
own here, called `<parameter>.<number>`: `model.layers.0.mlp.experts.down_proj.3`. `QuantExperts` holds the codes of all
experts of a parameter and stands in its place; `compute_experts` is the function that goes with it:

    y[token] = sum over its experts e of weight[token, e] * down_e(gate(gate_up_e(x[token])))

expert by expert, in the order of transformers' own loop, so that one expert's dense weight exists at a time, in the
backward pass too. Which dimension is the input, whether there are gates and biases, is what the module says of itself
(`is_transposed`, `has_gate`, `has_bias`). 3-D parameters of modules that do not compute through the interface (Llama 4)
are not reached; `surgery.experts` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from strop.errors import FormatError
from strop.layers.base import compute_dtype, held_back
from strop.layers.quant_linear import _QuantizedMatmul
from strop.numerics.groups import plan_shape
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme

IMPLEMENTATION: Final = "strop"
"""The name of `compute_experts` in transformers' table of implementations."""

PROJECTIONS: Final = ("gate_up_proj", "up_proj", "down_proj")
"""What transformers' experts interface calls the weights, in the order of use."""

Seen = Callable[[str, int, Tensor, int, Tensor], None]
"""(projection, expert, the tokens [n] that reach it, of how many, its inputs [n, in])."""

_SEEN: Final = "_strop_seen"


@dataclass(frozen=True)
class ExpertWeights:
    """One projection of all experts of a block.

    Attributes:
        name: Full name of the parameter.
        count: Number of experts.
        shape: (out, in) of each.
        transposed: Whether the parameter is [experts, in, out].
    """

    name: str
    count: int
    shape: tuple[int, int]
    transposed: bool

    @property
    def names(self) -> list[str]:
        """The experts' own names, `<parameter>.<number>`."""
        return [f"{self.name}.{expert}" for expert in range(self.count)]

    @property
    def owner(self) -> str:
        """Full name of the module that computes them."""
        return self.name.rpartition(".")[0]

    def dense(self, parameter: Tensor, expert: int) -> Tensor:
        """One expert's weight [out, in], a view of the dense parameter."""
        return parameter[expert].t() if self.transposed else parameter[expert]

    def stacked(self, weights: Sequence[Tensor]) -> Tensor:
        """The parameter of all experts' weights [out, in]."""
        return torch.stack([weight.t() if self.transposed else weight for weight in weights])


class QuantExperts(nn.Module):
    """One projection of all experts, each a `QuantizedTensor` [out, in] of the same scheme; frozen.

    Args:
        qtensors: The experts in their order. Their parts are stacked along a first dimension under their own names
            (`codes`, `scale`, ...) and keep their dtype whatever the model is cast to.
        transposed: Whether the dense parameter is [experts, in, out].

    Raises:
        FormatError: schemes or shapes differ, or the scheme rounds activations.
    """

    def __init__(self, qtensors: Sequence[QuantizedTensor], *, transposed: bool = False) -> None:
        super().__init__()
        first = qtensors[0]
        check_experts(first.scheme)
        if any(q.scheme != first.scheme or q.shape != first.shape for q in qtensors):
            kinds = sorted({f"{q.scheme.name} {list(q.shape)}" for q in qtensors})
            raise FormatError(f"the experts of one parameter need one format and shape; got {', '.join(kinds)}")
        self.count, self.scheme, self.transposed = len(qtensors), first.scheme, transposed
        self.out_features, self.in_features = first.shape
        parts = [q.tensors() for q in qtensors]
        self._names = tuple(parts[0])
        for name in self._names:
            stacked = torch.stack([part[name].detach() for part in parts])
            self.register_parameter(name, nn.Parameter(stacked, requires_grad=False))

    def qtensor(self, expert: int) -> QuantizedTensor:
        """One expert's weight as it is stored; shares memory with the layer."""
        parts = {name: self.get_parameter(name).detach()[expert] for name in self._names}
        return QuantizedTensor.from_tensors(parts, self.scheme, (self.out_features, self.in_features))

    def linear(self, expert: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """X [n, in] -> [n, out] by one expert, in the dtype of `x`, or autocast's."""
        dtype = compute_dtype(x)
        tensors = [self.get_parameter(name)[expert] for name in self._names]
        shape = (self.out_features, self.in_features)
        bias = None if bias is None else bias.to(dtype)
        return _QuantizedMatmul.apply(x.to(dtype), bias, self.scheme, shape, self._names, *tensors)

    def dense_parameter(self) -> Tensor:
        """The dequantized parameter of all experts, fp32, as the model would hold it dense."""
        dense = torch.stack([self.qtensor(expert).dequantize() for expert in range(self.count)])
        return dense.transpose(1, 2).contiguous() if self.transposed else dense

    def extra_repr(self) -> str:
        """Number, shape and scheme, for printing."""
        return f"{self.count} x [{self.out_features}, {self.in_features}], scheme={self.scheme.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantExperts:  # noqa: FBT001, FBT002
        with held_back(self, self._names, fn):  # a cast would take bits from the scales
            super()._apply(fn, recurse)
        return self


def expert_weights(root: nn.Module, prefix: str = "") -> dict[str, ExpertWeights]:
    """The projections of experts inside a module, dense or quantized, by full name, in the order of use.

    Those of modules that compute through transformers' experts interface; the module says so itself.

    Args:
        root: A model or a block.
        prefix: The full name of `root`.
    """
    found: dict[str, ExpertWeights] = {}
    for owner, module in root.named_modules(prefix=prefix):
        if not _through_interface(module):
            continue
        for part in PROJECTIONS:
            weight, name = getattr(module, part, None), f"{owner}.{part}"
            if isinstance(weight, QuantExperts):
                shape = (weight.out_features, weight.in_features)
                found[name] = ExpertWeights(name, weight.count, shape, weight.transposed)
            elif isinstance(weight, nn.Parameter) and weight.dim() == 3:
                count, out, columns = weight.shape
                transposed = bool(module.is_transposed)
                found[name] = ExpertWeights(name, count, (columns, out) if transposed else (out, columns), transposed)
    return found


def expert_names(root: nn.Module) -> list[str]:
    """The own names of all experts that can be quantized, in the model's order."""
    return [name for weights in expert_weights(root).values() for name in weights.names]


def quant_experts(model: nn.Module) -> dict[str, QuantExperts]:
    """The quantized projections by the names of the parameters in whose place they stand."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantExperts)}


def check_experts(scheme: Scheme, *, where: str = "experts") -> None:
    """Refuse schemes by which experts are not computed.

    Raises:
        FormatError: the scheme rounds activations.
    """
    if scheme.activations is not None:
        raise FormatError(
            f"{where}: the experts of a mixture are computed with the activations that come, and {scheme} rounds them; "
            "the nearest format is int8"
        )


def plan_experts(found: Mapping[str, ExpertWeights], schemes: Mapping[str, Scheme]) -> None:
    """Check, before any work, that the experts' shapes fit the scheme of their parameter.

    Raises:
        FormatError: one line for each parameter that does not fit.
    """
    problems: list[str] = []
    for name, scheme in schemes.items():
        try:
            check_experts(scheme, where=name)
            plan_shape(found[name].shape, scheme, where=name)
        except FormatError as error:
            problems.append(str(error))
    if problems:
        raise FormatError("\n".join(problems))


def install_experts(model: nn.Module, name: str, qtensors: Sequence[QuantizedTensor]) -> None:
    """Put `QuantExperts` where the parameter `name` stands, and let its module compute by `compute_experts`."""
    owner_name, _, part = name.rpartition(".")
    owner: Any = model.get_submodule(owner_name)
    made = QuantExperts(qtensors, transposed=bool(owner.is_transposed)).train(owner.training)
    delattr(owner, part)
    owner.add_module(part, made)
    _register()
    owner.config._experts_implementation = IMPLEMENTATION


def restore_experts(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Put the dequantized parameter back where `QuantExperts` stand."""
    owner_name, _, part = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    held = owner.get_submodule(part)
    assert isinstance(held, QuantExperts)
    delattr(owner, part)
    owner.register_parameter(part, nn.Parameter(held.dense_parameter().to(dtype), requires_grad=False))


def compute_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Hidden states [tokens, hidden] through the experts that the router chose; the module's docstring has the sum.

    Args:
        module: Holds the projections, dense or as `QuantExperts`.
        hidden_states: [tokens, hidden].
        top_k_index: Experts of each token, [tokens, k]; a number that is no expert's is nobody's.
        top_k_weights: Their weights, [tokens, k].
    """
    result = torch.zeros_like(hidden_states)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    count = len(hidden_states)
    for expert in top_k_index.unique().tolist():
        if not 0 <= expert < module.num_experts:
            continue
        position, token = torch.where(top_k_index.t() == expert)
        x = _project(module, first, expert, hidden_states[token], token, count)
        x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        x = _project(module, "down_proj", expert, x, token, count)
        if module.has_post_expert_norm:
            x = module.post_expert_norm(x)
        x = x * top_k_weights[token, position, None]
        result.index_add_(0, token, x.to(result.dtype))
    return result


@contextmanager
def watching_experts(root: nn.Module, see: Callable[[str], Seen], prefix: str = "") -> Iterator[None]:
    """Compute experts by `compute_experts` for a while, and show what reaches each of them.

    Args:
        root: A block.
        see: The full name of a module that holds experts to what is shown its inputs.
        prefix: The full name of `root`.
    """
    _register()
    owners: list[tuple[Any, str | None]] = []
    try:
        for name, module in root.named_modules(prefix=prefix):
            if _through_interface(module):
                owners.append((module, module.config._experts_implementation))  # type: ignore[union-attr]
                module.__dict__[_SEEN] = see(name)
        for module, _ in owners:  # after all were noted: they share a configuration
            module.config._experts_implementation = IMPLEMENTATION
        yield
    finally:
        for module, before in owners:
            module.__dict__.pop(_SEEN, None)
            module.config._experts_implementation = before


def _project(module: Any, part: str, expert: int, x: Tensor, token: Tensor, count: int) -> Tensor:
    seen = module.__dict__.get(_SEEN)
    if seen is not None:
        seen(part, expert, token, count, x.detach())
    weight = getattr(module, part)
    bias = getattr(module, f"{part}_bias")[expert] if module.has_bias else None
    if isinstance(weight, QuantExperts):
        return weight.linear(expert, x, bias)
    return functional.linear(x, weight[expert].t() if module.is_transposed else weight[expert], bias)


def _through_interface(module: nn.Module) -> bool:
    """Whether transformers' decorator is on the module's class: it leaves these marks on every instance."""
    marks = ("is_transposed", "has_gate", "has_bias", "has_post_expert_norm", "num_experts", "config", "_apply_gate")
    return all(hasattr(module, mark) for mark in marks)


def _register() -> None:
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, compute_experts)

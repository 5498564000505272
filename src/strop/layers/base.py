"""What the linear layers of this package have in common: a logical shape [out, in] and a dense weight.

A linear layer is one of `torch.nn.Linear` (weight [out, in]), transformers' `Conv1D` (GPT-2; weight [in, out], read
here as its transpose), and this package's `QuantLinear`, `FakeQuantLinear` and `LoraLinear`. They are told apart by
type and by what they offer, never by the name of an architecture. Convolutions, embeddings and the 3-D weights of
experts are not linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@runtime_checkable
class DenseWeight(Protocol):
    """A linear layer of this package: it knows its shape and can say which dense weight it computes with."""

    in_features: int
    out_features: int

    def dense_weight(self) -> Tensor:
        """The weight [out, in] that the layer multiplies with."""
        ...


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies by one dense 2-D weight that this package can read.

    Subclasses of `nn.Linear` count where their weight really is [out, in] (Falcon's does); bitsandbytes' packed weights
    do not.
    """
    if isinstance(module, nn.Linear):
        return tuple(module.weight.shape) == (module.out_features, module.in_features)
    return isinstance(module, (Conv1D, DenseWeight))


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """The logical shape (out, in) of a linear layer.

    Raises:
        TypeError: `module` is not a linear layer.
    """
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return int(out_features), int(in_features)
    if isinstance(module, (nn.Linear, DenseWeight)):
        return int(module.out_features), int(module.in_features)
    raise TypeError(f"{type(module).__name__} is not a linear layer")


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """`linear_shape`, or the shape (rows, width) of an embedding.

    Raises:
        TypeError: `module` is neither.
    """
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return linear_shape(module)


def dense_weight(module: nn.Module) -> Tensor:
    """The dense weight [out, in] of a linear layer, detached.

    `nn.Linear` and `Conv1D` give their own (a view, in its dtype), `QuantLinear` the dequantized one (fp32),
    `FakeQuantLinear` the fake-quantized one (in its dtype), `LoraLinear` the merged one (fp32, `W + scaling * B @ A`).

    Raises:
        TypeError: `module` is not a linear layer.
    """
    if isinstance(module, Conv1D):
        return module.weight.detach().t()  # [in, out] -> [out, in]
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    if isinstance(module, DenseWeight):
        return module.dense_weight()
    raise TypeError(f"{type(module).__name__} is not a linear layer")


def linear_bias(module: nn.Module) -> nn.Parameter | None:
    """The bias [out] of a linear layer, or None; the bias of a `LoraLinear` is its base's."""
    bias = getattr(getattr(module, "base", module), "bias", None)
    return bias if isinstance(bias, nn.Parameter) else None


@contextmanager
def held_back(
    module: nn.Module, names: Iterable[str], fn: Callable[[Tensor], Tensor], *, widen: bool = False
) -> Iterator[None]:
    """Keep the tensors `names` of `module` out of `nn.Module._apply`'s sight, then apply `fn` to them without
    narrowing.

    `_apply` is what `.to`, `.half` and `.cuda` go through, and it casts every floating-point tensor. Here a move to
    another device is followed, a cast is not, except to a wider dtype where `widen` is true. The tensors return in
    front of the module's others, parameters as the same objects where torch allows it, so that an optimizer keeps hold
    of them.
    """
    stores: list[dict[str, Any]] = [module._parameters, module._buffers]
    taken = [{name: store.pop(name) for name in names if name in store} for store in stores]
    try:
        yield
        taken = [{name: _moved(tensor, fn, widen=widen) for name, tensor in held.items()} for held in taken]
    finally:
        for store, held in zip(stores, taken, strict=True):
            others = dict(store)
            store.clear()
            store.update(held | others)


@torch.no_grad()
def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor], *, widen: bool) -> Tensor:
    moved = fn(tensor)
    if moved.dtype != tensor.dtype and not (widen and moved.dtype.itemsize > tensor.dtype.itemsize):
        moved = tensor.detach().to(moved.device)
    if not isinstance(tensor, nn.Parameter):
        return moved.detach()
    if moved.device.type == tensor.device.type:
        tensor.data = moved.detach()
        return tensor
    return nn.Parameter(moved.detach(), requires_grad=tensor.requires_grad)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in for activations `x`: autocast's where it is on, else that of `x`."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def extra_repr(module: Any, **details: object) -> str:
    """The line that a printed model shows for a layer: its shape, then `details`."""
    shown = {"in_features": module.in_features, "out_features": module.out_features} | details
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def refuse_second_derivative(where: str) -> None:
    """Called in a backward pass that makes no graph; what it leaves out of a second derivative would pass for zero.

    torch's `once_differentiable` says so only where the graph is followed to every leaf, not to chosen inputs.

    Raises:
        RuntimeError: The backward pass is to be differentiated itself (`create_graph=True`).
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{where}: the gradient is asked for with create_graph=True, and has no derivative of its own here; take "
            "the model's own forward and loss for second derivatives"
        )

"""`QuantEmbedding`: an embedding over a frozen `QuantizedTensor`; a row is dequantized when its token is looked up.

    y[...] = dequantize(codes[ids], scale[ids])          ids [...] of rows, y [..., width]

A head that is tied to the embedding is a `QuantLinear` over the very same parameters (`install_embedding`), so that
both stay one weight in memory and in files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from strop.errors import FormatError
from strop.layers.base import held_back, is_linear, linear_bias
from strop.layers.quant_linear import QuantLinear
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Granularity


class QuantEmbedding(nn.Module):
    """An embedding whose table is a `QuantizedTensor`.

    Args:
        qtensor: The table of logical shape (rows, width), each row with scales of its own (by channel or by group).
            Its tensors become frozen parameters under their own names, as in `QuantLinear`.
        dtype: Of the rows that are given out; `.to(dtype)` changes it, and leaves codes and scales as they are.

    Raises:
        FormatError: Rows share scales.
    """

    bias: None = None  # as quantized layers without one have it
    _given: Tensor  # empty, of the dtype that rows are given out in

    def __init__(self, qtensor: QuantizedTensor, dtype: torch.dtype) -> None:
        super().__init__()
        if qtensor.scheme.granularity not in (Granularity.CHANNEL, Granularity.GROUP):
            raise FormatError(
                f"{qtensor.scheme}: the rows of an embedding are looked up one by one, and need scales of their own; "
                "use a format by channel or by group (int8, int8-g32)"
            )
        self.num_embeddings, self.embedding_dim = qtensor.shape
        self.out_features, self.in_features = qtensor.shape  # as quantized layers have them
        self.scheme = qtensor.scheme
        self._names = tuple(qtensor.tensors())
        for name, tensor in qtensor.tensors().items():
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        self.register_buffer("_given", torch.empty(0, dtype=dtype, device=qtensor.codes.device), persistent=False)

    @property
    def qtensor(self) -> QuantizedTensor:
        """The table as it is stored; shares memory with the layer."""
        tensors = {name: self.get_parameter(name).detach() for name in self._names}
        return QuantizedTensor.from_tensors(tensors, self.scheme, (self.num_embeddings, self.embedding_dim))

    @property
    def weight(self) -> Tensor:
        """The dequantized table [rows, width] in the dtype of the rows, made anew for whoever reads it."""
        return self.qtensor.dequantize(self._given.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [..., width] of tokens [...]."""
        dtype, rows = self._given.dtype, ids.reshape(-1)
        if not len(rows):
            return torch.empty(*ids.shape, self.embedding_dim, dtype=dtype, device=ids.device)
        tensors = {name: self.get_parameter(name).detach()[rows] for name in self._names}
        looked_up = QuantizedTensor.from_tensors(tensors, self.scheme, (len(rows), self.embedding_dim))
        return looked_up.dequantize(dtype).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Sizes and scheme, for printing."""
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantEmbedding:  # noqa: FBT001, FBT002
        with held_back(self, self._names, fn):  # as in `QuantLinear`: moved, not cast
            super()._apply(fn, recurse)
        return self


@dataclass(frozen=True)
class Ends:
    """What stands before and behind a model's blocks, by full name.

    Attributes:
        embedding: The input embedding.
        head: The output head, where it is a linear layer.
        tied: Whether both are one weight.
    """

    embedding: str | None
    head: str | None
    tied: bool


def find_ends(model: nn.Module) -> Ends:
    """The embedding and the head of a model, by type and position."""
    found: list[tuple[str | None, Any]] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter)() if hasattr(model, getter) else None
        name = next((name for name, other in model.named_modules() if other is module), None)
        found.append((name, module))
    (embedding, table), (head, projection) = found
    held = _parameters(table)
    tied = projection is not None and any(id(one) in held for one in projection.parameters(recurse=False))
    if isinstance(table, nn.Embedding) and isinstance(projection, nn.Linear):
        tied = tied or f"{head}.weight" in getattr(
            model, "all_tied_weights_keys", {}
        )  # not done yet while it is opened
    return Ends(
        embedding if isinstance(table, nn.Embedding | QuantEmbedding) else None,
        head if projection is not None and is_linear(projection) else None,
        tied,
    )


def is_table(module: nn.Module) -> bool:
    """Whether a module only looks up the rows of a dense table: those of Gemma's are multiplied afterwards."""
    return type(module) is nn.Embedding and module.max_norm is None


def install_embedding(model: nn.Module, name: str, qtensor: QuantizedTensor) -> None:
    """Put a `QuantEmbedding` where the embedding `name` stands, and a `QuantLinear` over it where its tied head does.

    Raises:
        FormatError: As `QuantEmbedding`.
    """
    ends, old = find_ends(model), model.get_submodule(name)
    table = QuantEmbedding(qtensor, old.get_parameter("weight").dtype)
    if ends.tied and ends.head is not None:
        head = QuantLinear(qtensor, linear_bias(model.get_submodule(ends.head)))
        for part in qtensor.tensors():
            head.register_parameter(part, table.get_parameter(part))
        _replace(model, ends.head, head)
    _replace(model, name, table)


def restore_embedding(model: nn.Module) -> None:
    """Put a dense embedding (and its tied head) of the same values where a `QuantEmbedding` stands, if one does."""
    ends = find_ends(model)
    table = None if ends.embedding is None else model.get_submodule(ends.embedding)
    if ends.embedding is None or not isinstance(table, QuantEmbedding):
        return
    dense = nn.Embedding.from_pretrained(table.weight)
    if ends.tied and ends.head is not None:
        old = model.get_submodule(ends.head)
        head = nn.Linear(table.embedding_dim, table.num_embeddings, bias=False, device="meta")
        head.weight = dense.weight
        head.register_parameter("bias", linear_bias(old))
        _replace(model, ends.head, head)
    _replace(model, ends.embedding, dense)


def _parameters(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(parameter) for parameter in module.parameters(recurse=False)}


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    module.train(model.get_submodule(name).training)
    model.set_submodule(name, module)

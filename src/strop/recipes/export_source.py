"""The weights of a folder, one at a time, under the names of its files: dense tensors, or codes as they are stored.

Nothing of transformers is built: an export reads the files themselves, so that memory holds a tensor (of a large dense
one some rows), never a model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from strop.errors import FileFormatError
from strop.files.shards import Header, read_header, read_rows, read_tensor, tensor_files
from strop.models.containers import Container, container_for
from strop.models.sources import read_config
from strop.numerics.qtensor import QuantizedTensor

PIECE_BYTES: Final = 8 << 20
"""Bytes of a dense tensor that are read at a time."""


class Weights(Protocol):
    """A model's weights under the names of its checkpoint: a folder's, or those of a model in memory."""

    @property
    def folder(self) -> Path:
        """Where its tokenizer lies."""
        ...

    @property
    def config(self) -> Any:
        """Its configuration."""
        ...

    @property
    def container(self) -> Container | None:
        """Who reads its quantized layers from a file; None where nobody needs to."""
        ...

    @property
    def names(self) -> list[str]:
        """Every weight, quantized ones as the weight that they stand for."""
        ...

    def is_quantized(self, name: str) -> bool:
        """Whether a weight is codes."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """A weight's shape, [out, in] where it is quantized."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """A dense weight's dtype."""
        ...

    def quantized(self, name: str) -> QuantizedTensor:
        """A quantized weight, its codes bit for bit."""
        ...

    def dense(self, name: str) -> Tensor:
        """A dense weight, whole."""
        ...

    def rows(self, name: str) -> Iterator[Tensor]:
        """A dense weight's rows, a bounded number at a time."""
        ...


@dataclass(frozen=True)
class ModelWeights:
    """The weights of a model in memory.

    Attributes:
        folder: where its tokenizer lies.
        config: its configuration.
        tensors: its dense weights, by the checkpoint's names.
        codes: its quantized ones, by the names of the weights that they stand for.
        container: none.
    """

    folder: Path
    config: Any
    tensors: Mapping[str, Tensor]
    codes: Mapping[str, QuantizedTensor]
    container: None = None

    @property
    def names(self) -> list[str]:
        """See `Weights`."""
        return [*self.tensors, *self.codes]

    def is_quantized(self, name: str) -> bool:
        """See `Weights`."""
        return name in self.codes

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`."""
        return self.codes[name].shape if name in self.codes else tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """See `Weights`."""
        return self.tensors[name].dtype

    def quantized(self, name: str) -> QuantizedTensor:
        """See `Weights`."""
        return self.codes[name]

    def dense(self, name: str) -> Tensor:
        """See `Weights`."""
        return self.tensors[name]

    def rows(self, name: str) -> Iterator[Tensor]:
        """See `Weights`."""
        yield self.tensors[name]


@dataclass(frozen=True)
class Source:
    """A model's folder.

    Attributes:
        folder: where it lies.
        config: its configuration.
        container: who reads its quantized layers; None in full precision.
        files: tensor -> file.
        layers: quantized layer -> endings of its tensors.
    """

    folder: Path
    config: Any
    container: Container | None
    files: dict[str, Path]
    layers: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Every weight, quantized ones as the weight that they stand for."""
        inside = {f"{layer}.{ending}" for layer, endings in self.layers.items() for ending in endings}
        return [*(name for name in self.files if name not in inside), *(f"{layer}.weight" for layer in self.layers)]

    def is_quantized(self, name: str) -> bool:
        """Whether a weight is codes."""
        return name.removesuffix(".weight") in self.layers and name.endswith(".weight")

    def shape(self, name: str) -> tuple[int, ...]:
        """A weight's shape, [out, in] where it is quantized."""
        if not self.is_quantized(name):
            return self.header(self.files[name]).entries[name].shape
        layer = name.removesuffix(".weight")
        if "weight_shape" in self.layers[layer]:
            return tuple(int(size) for size in self._tensor(f"{layer}.weight_shape"))
        return self.quantized(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """A dense weight's dtype."""
        return self.header(self.files[name]).entries[name].dtype

    def quantized(self, name: str) -> QuantizedTensor:
        """A quantized weight, its codes bit for bit."""
        assert self.container is not None
        layer = name.removesuffix(".weight")
        parts = {ending: self._tensor(f"{layer}.{ending}") for ending in self.layers[layer]}
        return self.container.decode(layer, parts)

    def dense(self, name: str) -> Tensor:
        """A dense weight, whole.

        Raises:
            FileFormatError: it is of whole numbers, which no weight is.
        """
        tensor = self._tensor(name)
        if not tensor.is_floating_point():
            raise FileFormatError(f"{self.files[name]}: {name} is {tensor.dtype}; a weight has a float dtype")
        return tensor

    def rows(self, name: str) -> Iterator[Tensor]:
        """A dense weight's rows, a bounded number at a time."""
        header = self.header(self.files[name])
        entry = header.entries[name]
        count = entry.shape[0]
        step = max(1, PIECE_BYTES * count // max(1, entry.end - entry.start))
        for start in range(0, count, step):
            yield read_rows(self.files[name], name, start, min(start + step, count), header=header)

    def _tensor(self, name: str) -> Tensor:
        return read_tensor(self.files[name], name, header=self.header(self.files[name]))

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def header(path: Path) -> Header:
        """A file's header; it was checked when the folder was opened."""
        return read_header(path)


def open_source(folder: Path) -> Source:
    """Open a model's folder.

    Raises:
        ModelError, FileFormatError: as `read_config`, `tensor_files` and `container_for`.
    """
    config, quantization = read_config(folder)
    files = tensor_files(folder)
    Source.header.cache_clear()
    if quantization is None:
        return Source(folder, config, None, files)
    container = container_for(folder, quantization)
    return Source(folder, config, container, files, container.group(files))

"""A GGUF file as a base: its configuration, its weights for transformers' own loader, its tokenizer.

    codes that one of our schemes holds   bit for bit, in the linear layers and experts of the blocks: q4_0, q5_0,
                                          q8_0, q4_k, q3_k, q6_k; rows of queries and keys are moved whole
    all else                              decoded: f32, f16, bf16, embedding and head, q4_1, q5_1, q2_k, q5_k

The loader is given every tensor under its checkpoint's name, decoded at the moment when it asks for it, so that memory
holds the result and a few tensors. What is decoded although it was quantized is said with its share of the parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from strop.errors import FormatError, ModelError
from strop.files.gguf.architecture_table import Layout
from strop.files.gguf.architectures import Architecture
from strop.files.gguf.blocks import decode
from strop.files.gguf.configuration import configuration_of
from strop.files.gguf.reader import GgufFile
from strop.files.gguf.tokenization import tokenizer_of
from strop.files.gguf.transcoding import from_raw, scheme_of
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme

METHOD: Final = "gguf"
"""What stands for `quant_method` where a file's weights are quantized."""

_FLOATS: Final = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float32}
_FACTORS: Final = ("rope_freqs.", "rope_factors_")


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint's tensor lies: a tensor of the file, and which of the experts stacked in it."""

    tensor: str
    type: str
    shape: tuple[int, ...]
    expert: int | None
    layout: Layout


@dataclass(frozen=True)
class GgufBase:
    """A GGUF file that is opened as a base.

    Attributes:
        file: the file.
        config: transformers' configuration of its model.
        architecture: its names and layouts.
        places: checkpoint's name of every weight -> where it lies.
        dtype: what decoded weights are held in, unless another is asked for.
    """

    file: GgufFile
    config: PreTrainedConfig
    architecture: Architecture
    places: Mapping[str, _Place]
    dtype: torch.dtype

    name = METHOD

    @property
    def is_quantized(self) -> bool:
        """Whether any layer of the blocks is held as codes."""
        return bool(self.group(self.places))

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of all layers that are held as codes; None where there is none or they differ."""
        found = {scheme_of(self.places[f"{layer}.weight"].type) for layer in self.group(self.places)}
        return found.pop() if len(found) == 1 else None

    def group(self, keys: Iterable[str]) -> dict[str, list[str]]:
        """The layers among the names of a checkpoint's tensors whose codes are kept -> endings of their tensors."""
        return {
            key.removesuffix(".weight"): ["weight"]
            for key in keys
            if key in self.places and self._keeps(key, self.places[key])
        }

    def decode(self, layer: str, tensors: Mapping[str, Tensor], *, widened: bool = False) -> QuantizedTensor:
        """The quantized weight of `layer` from the bytes that `state` gave for it, codes and scales bit for bit."""
        place = self.places[f"{layer}.weight"]
        raw = tensors["weight"]
        quantized = from_raw(raw.cpu().numpy(), place.type, _matrix(place), where=f"{self.file.path}: {layer}")
        return _to(quantized, raw.device)

    def state(self, dtype: torch.dtype, *, codes: bool) -> dict[str, Any]:
        """Every tensor by its checkpoint's name, read and decoded when it is sliced.

        Args:
            dtype: of decoded matrices.
            codes: whether the layers of `group` come as bytes.
        """
        kept = {f"{layer}.weight" for layer in self.group(self.places)} if codes else set[str]()
        return {name: _Later(self, place, dtype, raw=name in kept) for name, place in self.places.items()}

    def renamed(self, name: Callable[[str], str]) -> GgufBase:
        """The same with other names of the checkpoint's tensors."""
        return dataclasses.replace(self, places={name(own): place for own, place in self.places.items()})

    def notes(self) -> list[str]:
        """What is decoded although it was quantized."""
        total = sum(math.prod(place.shape) for place in self.places.values())
        counts: dict[tuple[bool, str], int] = {}
        for name, place in self.places.items():
            if place.type not in _FLOATS and not self._keeps(name, place):
                kind = place.tensor.startswith("blk."), place.type
                counts[kind] = counts.get(kind, 0) + math.prod(place.shape)
        held = str(self.config.dtype).removeprefix("torch.")
        said = [
            f"{count / total:.1%} of the parameters ({kind} in the {'blocks' if inside else 'embedding or head'})"
            for (inside, kind), count in counts.items()
        ]
        return [f"{self.file.path}: {', '.join(said)} are held decoded, in {held}"] if said else []

    def bytes_of(self, place: _Place) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of a place in the checkpoint's order of rows, a view of the file or a copy."""
        raw = self.file.raw(place.tensor)
        if place.expert is not None:
            size = raw.size // self.file.tensors[place.tensor].shape[0]
            return raw[place.expert * size : (place.expert + 1) * size]
        order = self.architecture.row_order(place.layout, place.shape[0])
        if order is None:
            return raw
        return raw.reshape(place.shape[0], -1)[torch.argsort(order).numpy()].reshape(-1)

    def _keeps(self, name: str, place: _Place) -> bool:
        in_block = place.tensor.startswith("blk.") and len(place.shape) == 2 and name.endswith(".weight")
        if not in_block or scheme_of(place.type) is None or ".ffn_gate_inp" in place.tensor:
            return False
        other = {"ffn_gate_exps": "ffn_up_exps", "ffn_up_exps": "ffn_gate_exps"}
        for one, partner in other.items():  # one parameter of the model holds both
            if f".{one}." in place.tensor:
                return self.file.tensors[place.tensor.replace(one, partner)].type == place.type
        return True


class _Later:
    """A tensor that is made when it is sliced, as transformers' loader does with those of safetensors files."""

    def __init__(self, base: GgufBase, place: _Place, dtype: torch.dtype, *, raw: bool) -> None:
        self._base, self._place, self._dtype, self._raw = base, place, dtype, raw

    def get_dtype(self) -> str:
        """What it will be, by safetensors' names."""
        return "U8" if self._raw else "F32"

    def __getitem__(self, _: object) -> Tensor:
        place, base = self._place, self._base
        if self._raw:
            return torch.from_numpy(base.bytes_of(place).copy())
        where = f"{base.file.path}: {place.tensor}"
        dtype = torch.float32 if len(place.shape) == 1 else self._dtype
        tensor = decode(base.bytes_of(place), place.type, place.shape, dtype=dtype, where=where)
        if place.layout is Layout.PLUS_ONE:
            return tensor.float() - 1.0
        return tensor.t().contiguous() if place.layout is Layout.TRANSPOSED and tensor.ndim == 2 else tensor


def open_gguf(path: Path) -> GgufBase:
    """Open a GGUF file as a base.

    Raises:
        MissingInputError, FileFormatError: as `GgufFile.open`.
        FormatError: an architecture, a setting or a tensor type that strop does not know.
        ModelError: an adapter, or tensors that the architecture does not have.
    """
    file = GgufFile.open(path)
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise ModelError(f"{path}: is of the type {kind!r}, and a model is needed (an adapter goes with its base)")
    config, architecture = configuration_of(file)
    places: dict[str, _Place] = {}
    strangers = []
    for info in file.tensors.values():
        if info.name.startswith(_FACTORS):
            continue  # the configuration was checked against them
        try:
            names = architecture.checkpoint_names(info.name)
        except ModelError:
            strangers.append(info.name)
            continue
        layout = architecture.layout_of(names[0])
        stacked = info.name.split(".")[-2].endswith("_exps")
        for expert, name in enumerate(names):
            shape = info.shape[1:] if stacked else info.shape
            places[name] = _Place(info.name, info.type, shape, expert if stacked else None, layout)
    if strangers:
        raise ModelError(
            f"{path}: {len(strangers)} tensors that {architecture.name} does not have: {', '.join(strangers[:8])}"
            f"{', ...' if len(strangers) > 8 else ''}; leaving them out would be another model"
        )
    config.dtype = _dtype(file)
    return GgufBase(file, config, architecture, places, config.dtype)


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a GGUF file; None where it holds none.

    Raises:
        FormatError: as `tokenizer_of`.
    """
    file = GgufFile.open(path)
    return tokenizer_of(file.metadata, where=str(path))


def _dtype(file: GgufFile) -> torch.dtype:
    """What decoded weights are held in: the file's own 16 bits, float32 where nothing is smaller, else bfloat16."""
    matrices = {info.type for info in file.tensors.values() if len(info.shape) > 1}
    if "bf16" in matrices or not matrices <= _FLOATS.keys():
        return torch.float16 if "f16" in matrices and "bf16" not in matrices else torch.bfloat16
    return torch.float16 if "f16" in matrices else torch.float32


def _matrix(place: _Place) -> tuple[int, int]:
    if len(place.shape) != 2:
        raise FormatError(f"{place.tensor}: {list(place.shape)}; a layer's weight has two sizes")
    return place.shape[0], place.shape[1]


def _to(quantized: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    if device.type == "cpu":
        return quantized
    parts = {name: part.to(device) for name, part in quantized.tensors().items()}
    return QuantizedTensor.from_tensors(parts, quantized.scheme, quantized.shape)

"""Which of a checkpoint's tensors belong to quantized layers, and whose file format they are in.

The formats themselves (names, bytes) are modules of `strop.files`: `compressed_tensors`, `bnb4`, `bnb8`, `gptq` and
`awq`. A `Container` is one of them together with the `quantization_config` of a folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from strop.errors import FormatError, ModelError
from strop.files import awq, bnb4, bnb8, compressed_tensors, gptq, mixed
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme


class FileFormat(Protocol):
    """A module of `strop.files` that reads the quantized layers of one tool."""

    METHOD: str
    SUFFIXES: tuple[str, ...]

    def scheme_from_config(self, config: Mapping[str, Any]) -> Scheme | None:
        """The scheme that a `quantization_config` describes; None where its layers may differ."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, where: str) -> QuantizedTensor:
        """The quantized weight that a layer's tensors hold."""
        ...


_FORMATS: tuple[FileFormat, ...] = (compressed_tensors, bnb4, gptq, awq)  # type: ignore[assignment]  # modules stand for objects
_SCALE = "weight_scale"
_ENDING = f".{_SCALE}"
_EIGHT_BITS: FileFormat = bnb8  # type: ignore[assignment]  # as above


@dataclass(frozen=True)
class Container:
    """The quantized layers of one folder.

    Attributes:
        format: who reads them.
        config: the folder's `quantization_config`.
        scheme: what the configuration says of all layers; None where they differ. A single layer's tensors may say it
            more precisely.
    """

    format: FileFormat
    config: Mapping[str, Any]
    scheme: Scheme | None

    @property
    def name(self) -> str:
        """The name under which config.json announces the format."""
        return self.format.METHOD

    def group(self, keys: Iterable[str]) -> dict[str, list[str]]:
        """The quantized layers among the names of a checkpoint's tensors: layer name -> endings of its tensors.

        A layer is quantized where a companion of its weight is there (a scale, a quantization state); all others are
        left out, whatever the configuration says of them. So is a head that has scales but no codes: it is tied to
        the embedding (`repeated_scales`).
        """
        known = set(keys)
        found: dict[str, list[str]] = {}
        for key in sorted(known):
            for suffix in self.format.SUFFIXES:
                if key.endswith(f".{suffix}"):
                    found.setdefault(key.removesuffix(f".{suffix}"), []).append(suffix)
        for layer, suffixes in found.items():
            if f"{layer}.weight" in known:
                suffixes.append("weight")
        return {layer: suffixes for layer, suffixes in found.items() if suffixes != [_SCALE]}

    def repeated_scales(self, keys: Iterable[str]) -> list[str]:
        """The tensors that repeat the scales of an embedding for the head that is tied to it."""
        known = set(keys)
        inside = {f"{layer}.{suffix}" for layer, suffixes in self.group(known).items() for suffix in suffixes}
        return sorted(key for key in known - inside if self.name == compressed_tensors.METHOD and key.endswith(_ENDING))

    def decode(self, layer: str, tensors: Mapping[str, Tensor], *, widened: bool = False) -> QuantizedTensor:
        """The quantized weight of `layer`, codes and scales bit for bit, from its tensors by their endings.

        Args:
            layer: its name.
            tensors: its tensors.
            widened: whether scales in float32 may be narrower ones that were widened for the file, as experts' are.
        """
        config = mixed.config_of(self.config, layer)
        return self.format.decode(tensors, {**config, "dequantize": True} if widened else config, where=layer)


def container_for(folder: Path, config: Mapping[str, Any]) -> Container:
    """The container that a `quantization_config` describes.

    Raises:
        ModelError: the weights were quantized in a way that strop does not read; the message says which it does.
    """
    known = _format_of(config)
    if known is None:
        names = ", ".join(known.METHOD for known in _FORMATS)
        raise ModelError(
            f"{folder}: its weights are quantized as {config.get('quant_method')!r}; strop reads {names}. Open the "
            "model that it was quantized from"
        )
    try:
        schemes = [known.scheme_from_config(group) for group in mixed.groups_of(config)]
    except FormatError as error:
        raise ModelError(f"{folder}: {error}; open the model that it was quantized from") from error
    return Container(known, config, schemes[0] if len(schemes) == 1 else None)


def _format_of(config: Mapping[str, Any]) -> FileFormat | None:
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = bnb4.METHOD  # as bitsandbytes wrote it before the key existed
    if method == bnb8.METHOD and config.get("load_in_8bit"):
        return _EIGHT_BITS
    return next((known for known in _FORMATS if method == known.METHOD), None)

"""An embedding as compressed-tensors holds it, so that transformers opens it without strop: 8 bits, one code a byte.

    NAME.weight          int8 [rows, width]                 (`naive-quantized`, where layers are packed)
    NAME.weight_scale    [rows, width / g], or [rows, 1]
    HEAD.weight_scale    the same once more, for a head that is tied to it; `HEAD.weight` is not written

What transformers 5.23 with compressed-tensors 0.20 does (found by experiment, tests/files/test_embeddings.py): a packed
embedding has no `weight` when transformers looks for one to initialise or to tie, and opening fails. With one code a
byte it opens, tied or not; a tied head without scales of its own would multiply by codes, which is why the scale is
there twice. Once the library has dequantized both, they are two equal weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from strop.files.compressed_tensors import EMBEDDINGS, config_for
from strop.numerics.formats import IntFormat
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Granularity, Mode, Scheme


def inexpressible(scheme: Scheme) -> str | None:
    """Why no file can hold an embedding in the scheme; None where one can."""
    if (
        isinstance(scheme.format, IntFormat)
        and scheme.bits == 8
        and scheme.mode is not Mode.ASYMMETRIC
        and scheme.granularity in (Granularity.CHANNEL, Granularity.GROUP)
        and scheme.activations is None
    ):
        return None
    return (
        "an embedding, which transformers opens from compressed-tensors in 8 bits only, symmetric, by channel or "
        "group; the nearest format is int8-g32"
    )


def encode(qtensor: QuantizedTensor, name: str, tied_head: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of an embedding `name`, and the scales of the head that is tied to it.

    Args:
        qtensor: the table, in a scheme that `inexpressible` allows.
        name: the embedding's full name.
        tied_head: the head's; None where there is none.
    """
    assert qtensor.scale is not None  # only codebooks nest their scales
    tensors = {f"{name}.weight": (qtensor.codes ^ 0x80).view(torch.int8), f"{name}.weight_scale": qtensor.scale}
    return tensors if tied_head is None else tensors | {f"{tied_head}.weight_scale": qtensor.scale.clone()}


def group_for(scheme: Scheme, targets: Sequence[str]) -> dict[str, Any]:
    """The group of `config_groups`, by its name, that holds embeddings of one scheme."""
    ((name, group),) = config_for(scheme, [])["config_groups"].items()
    return {f"{name}{EMBEDDINGS}": {**group, "targets": list(targets), "format": "naive-quantized"}}

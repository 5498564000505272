"""What `--format gguf:NAME` makes of each tensor: the types that llama.cpp's quantizer would choose.

    f32 f16 bf16     every matrix in that type
    q8_0 ... q6_k    every matrix in that type; a head (or the embedding that is the head) in at least q6_k
    q4_k_m           q4_k, and q6_k where it pays: values (attn_v, attn_qkv) and ffn_down of the first and the last
                     eighth of the blocks and of every third between, after Q4_K_M of llama.cpp

Vectors, routers of experts and position embeddings stay f32. With eight experts a block's keys and values take q8_0 in
q4_k_m, and its output q6_k where llama.cpp takes q5_k. A row that is no whole number of blocks takes what
`types.fallback` says, and is listed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from strop.errors import FormatError, nearest
from strop.files.gguf.types import fallback

FILE_TYPES: Final = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q4_k": 14, "q4_k_m": 15, "q6_k": 18,
    "bf16": 32,
}  # fmt: skip
"""What strop writes itself, with llama.cpp's numbers of them (`general.file_type`)."""

RUNTIME_TYPES: Final = {
    "q2_k": 10, "q3_k_s": 11, "q3_k": 12, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q5_k_s": 16, "q5_k": 17,
    "q5_k_m": 17, "q2_k_s": 21,
}  # fmt: skip
"""What llama.cpp's own quantizer writes, where it is installed."""

_ENDS: Final = ("token_embd.weight", "output.weight")
_PLAIN: Final = ("f32", "f16", "bf16")
_KEPT: Final = re.compile(r"(position_embd|blk\.\d+\.ffn_gate_inp(_shexp)?)\.weight")


@dataclass(frozen=True)
class Chosen:
    """A tensor's type, and why it is not the one that was asked for; None where it is."""

    type: str
    reason: str | None = None


@dataclass(frozen=True)
class Mixture:
    """What a `gguf:` format makes of a model's tensors.

    Attributes:
        name: the format, without `gguf:`.
        blocks: of the model.
        experts: of a block; 0 without.
        tied: whether the embedding is the head.
        ends: the type of embedding and head, in the place of the format's own choice.
    """

    name: str
    blocks: int
    experts: int
    tied: bool
    ends: str | None = None

    def choose(self, tensor: str, shape: Sequence[int]) -> Chosen:
        """The type of a tensor, by its name in the file and its shape (the row last)."""
        if len(shape) < 2 or not tensor.endswith(".weight") or _KEPT.fullmatch(tensor):
            return Chosen("f32")
        wanted = self.ends if self.ends is not None and tensor in _ENDS else self.name
        if wanted in _PLAIN:
            return Chosen(wanted)
        wanted = wanted if wanted != self.name else self._wanted(tensor)
        fitting = fallback(wanted, shape[-1])
        if fitting != wanted:
            return Chosen(fitting, f"rows of {shape[-1]} values are no whole blocks of {wanted}")
        return Chosen(fitting)

    def _wanted(self, tensor: str) -> str:
        base = "q4_k" if self.name == "q4_k_m" else self.name
        if tensor == "output.weight" or (self.tied and tensor == "token_embd.weight"):
            return base if base == "q8_0" else "q6_k"
        block = re.match(r"blk\.(\d+)\.(\w+)\.", tensor)
        if self.name != "q4_k_m" or block is None:
            return base
        number, part = int(block[1]), block[2]
        if self.experts == 8 and part in ("attn_k", "attn_v"):
            return "q8_0"
        if self.experts == 8 and part == "attn_output":
            return "q6_k"
        if part in ("attn_v", "attn_qkv", "ffn_down", "ffn_down_exps") and self._gets_more(number):
            return "q6_k"
        return base

    def _gets_more(self, block: int) -> bool:
        eighth = self.blocks // 8
        return block < eighth or block >= 7 * self.blocks // 8 or (block - eighth) % 3 == 2


def parse_export_format(text: str) -> str:
    """The name behind `gguf:`.

    Raises:
        FormatError: another container, none, or an unknown name; the message says which there are.

    >>> parse_export_format("GGUF:Q4_K_M")
    'q4_k_m'
    """
    container, colon, name = text.strip().lower().partition(":")
    known = {**FILE_TYPES, **RUNTIME_TYPES}
    shown = f"gguf:{', gguf:'.join(FILE_TYPES)}; and, with strop[gguf] installed, gguf:{', gguf:'.join(RUNTIME_TYPES)}"
    if not colon:
        advice = f"did you mean gguf:{container}?" if container in known else "a container is needed"
        raise FormatError(f"--format {text}: {advice} There are {shown}")
    if container != "gguf":
        raise FormatError(f"--format {text}: files of the kind {container!r} are not written; there are {shown}")
    if name not in known:
        raise FormatError(f"--format {text}: unknown{nearest(name, known)}; there are {shown}")
    return name

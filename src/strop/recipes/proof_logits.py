"""How far two models' logits are apart, and what the codes of a GGUF file mean when transformers computes them.

    gap       KL(reference || file) = sum_v p(v) (log p(v) - log q(v)), nats per token, in float64; top-1 agreement
    effect    <file - base, tuned - base> / ||tuned - base||^2, over logits without their mean    (1: all, 0: none)

Adding a constant to all logits of a position changes no probability, so the mean is taken away before the projection.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from strop.errors import ModelError
from strop.files.gguf.architectures import architecture_of
from strop.files.gguf.reader import GgufFile
from strop.numerics.reductions import all_finite
from strop.recipes.probing import computing_in_fp32
from strop.scratch import Scratch, Stored

SHARD_BYTES: Final = 1 << 30
_NUMBERS: Final = 1 << 20
"""Logits compared at once, 8 MiB in float64."""


class Gap:
    """How far a file's logits are from a reference's; `add` takes them position by position.

    Attributes:
        positions: Tokens compared.
        kl_max: The largest divergence of a token, nats.
    """

    def __init__(self) -> None:
        self.positions, self.kl_max = 0, 0.0
        self._kl, self._same = 0.0, 0

    def add(self, reference: Tensor, found: Tensor) -> None:
        """Compare logits [tokens, vocabulary]."""
        step = max(1, _NUMBERS // reference.shape[1])
        for start in range(0, len(reference), step):
            expected = reference[start : start + step].double().log_softmax(-1)
            other = found[start : start + step].double().log_softmax(-1)
            kl = (expected.exp() * (expected - other)).sum(-1)
            self._kl += float(kl.sum())
            self.kl_max = max(self.kl_max, float(kl.max()))
            self._same += int((expected.argmax(-1) == other.argmax(-1)).sum())
        self.positions += len(reference)

    @property
    def kl(self) -> float:
        """Nats per token."""
        return self._kl / self.positions

    @property
    def top1(self) -> float:
        """Share of tokens at which both choose the same."""
        return self._same / self.positions


class Effect:
    """The share of what tuning changed that is in the file."""

    def __init__(self) -> None:
        self._along, self._size = 0.0, 0.0

    def add(self, base: Tensor, tuned: Tensor, found: Tensor) -> None:
        """Take logits [tokens, vocabulary] of the three."""
        step = max(1, _NUMBERS // base.shape[1])
        for start in range(0, len(base), step):
            part = slice(start, start + step)
            zero = _centred(base[part])
            change = _centred(tuned[part]) - zero
            self._along += float(((_centred(found[part]) - zero) * change).sum())
            self._size += float(change.square().sum())

    @property
    def share(self) -> float | None:
        """The projection; None where tuning changed no logit."""
        return self._along / self._size if self._size > 0 else None


def _centred(logits: Tensor) -> Tensor:
    wide = logits.double()
    return wide - wide.mean(-1, keepdim=True)


def set_aside(model: PreTrainedModel, prompts: Sequence[Sequence[int]], scratch: Scratch) -> list[Stored]:
    """The model's logits after every token of each prompt, computed in fp32, in a temporary file.

    Raises:
        ModelError: They are not finite, or the disk has no room.
    """
    kept = []
    with torch.inference_mode(), computing_in_fp32(model.eval()):
        for prompt in prompts:
            logits = prompt_logits(model, prompt)
            if not all_finite(logits):
                raise ModelError(f"{model.config.name_or_path}: the logits hold NaN or infinity; check its weights")
            stored = scratch.put(logits)
            if stored is None:
                raise ModelError("there is no room on the disk to set logits aside; free some, or compare fewer rows")
            kept.append(stored)
    return kept


def prompt_logits(model: PreTrainedModel, prompt: Sequence[int]) -> Tensor:
    """Logits after every token [tokens, vocabulary], float32."""
    ids = torch.tensor([list(prompt)], device=model.device)
    cache = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    return model(input_ids=ids, **cache).logits[0].float().cpu()


def write_codes(file: GgufFile, config: PreTrainedConfig, folder: Path) -> None:
    """Write what a file's codes mean as a folder that transformers opens, in float32, a shard at a time.

    Args:
        file: The file.
        config: The configuration of the model that it was made from.
        folder: An empty folder.

    Raises:
        ModelError: It holds a tensor that the architecture does not know.
        FormatError: It has a type that strop does not decode, or the architecture is not one of GGUF.
    """
    architecture = architecture_of(config)
    own = set(architecture.extra_tensors(config))
    tied = bool(getattr(config, "tie_word_embeddings", False))
    where: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        nonlocal held
        name = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
        shard.clear()
        held = 0

    for name in file.tensors:
        if name in own or (name == "output.weight" and tied):
            continue
        for theirs, tensor in architecture.from_gguf(name, file.tensor(name)).items():
            shard[theirs] = tensor.contiguous().clone()
            held += shard[theirs].nbytes
            total += shard[theirs].nbytes
        if held >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    plain: dict[str, Any] = config.to_dict()
    plain.pop("quantization_config", None)
    plain["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")


def decoded_bytes(file: GgufFile) -> int:
    """Bytes of the file's values in float32."""
    return sum(4 * _count(info.shape) for info in file.tensors.values())


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def free_memory() -> int:
    """Bytes of memory that are free for more."""
    import psutil

    return int(psutil.virtual_memory().available)


def free_disk(folder: str | os.PathLike[str]) -> int:
    """Bytes that are free where temporary files lie."""
    import shutil

    return shutil.disk_usage(folder).free

"""How many bytes of weights a model reads to write one token: what bounds its speed where memory is the limit.

Every weight is read once, except for the input embedding, of which one row is read (a head that shares it reads the
whole), and a mixture's experts, of which those count that work on a token. The cache of keys and values comes on top,
with every token that it holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from strop.evaluation.engines import Engine
from strop.files.gguf.reader import GgufFile
from strop.layers.base import linear_shape
from strop.layers.quant_embedding import find_ends
from strop.layers.quant_experts import QuantExperts
from strop.layers.surgery import experts, linear_modules


@dataclass(frozen=True)
class WeightCounts:
    """What a model's weights come to.

    Attributes:
        held_bytes: Of all of them, in the formats that they are held in.
        read_bytes: Of those that writing one token reads.
        multiplied: Weights of matrices in the blocks that a token of the prompt is multiplied with; the head, which a
            prompt needs once, is left out.
    """

    held_bytes: int
    read_bytes: int
    multiplied: int


def count_weights(engine: Engine) -> WeightCounts:
    """Count the weights of an open model."""
    return _of_file(GgufFile.open(Path(engine.source))) if engine.network is None else _of_network(engine.network)


def _of_network(model: PreTrainedModel) -> WeightCounts:
    active = int(getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 0)
    fused, ends = set(experts(model)), find_ends(model)
    seen: set[int] = set()
    held, read = 0, 0.0
    for path, module in model.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) in seen:  # a head that is the embedding
                continue
            seen.add(id(tensor))
            share = 1.0
            if isinstance(module, QuantExperts) or f"{path}.{name}" in fused:
                share = min(active or len(tensor), len(tensor)) / len(tensor)
            elif path == ends.embedding and not ends.tied:
                share = 1 / model.config.get_text_config().vocab_size
            held += tensor.nbytes
            read += share * tensor.nbytes
    linears = sum(math.prod(linear_shape(module)) for module in linear_modules(model).values())
    at_work = 0.0
    for path in fused:
        parameter = model.get_parameter(path)
        at_work += parameter.numel() * min(active or len(parameter), len(parameter)) / len(parameter)
    for module in model.modules():
        if isinstance(module, QuantExperts):
            at_work += module.out_features * module.in_features * min(active or module.count, module.count)
    return WeightCounts(held, round(read), round(linears + at_work))


def _of_file(file: GgufFile) -> WeightCounts:
    architecture = file.metadata.get("general.architecture")
    count, used = (file.metadata.get(f"{architecture}.expert_{what}") for what in ("count", "used_count"))
    active = used / count if isinstance(used, int) and isinstance(count, int) and 0 < used <= count else 1.0
    read = multiplied = 0.0
    for name, info in file.tensors.items():
        share = active if "_exps." in name else 1.0
        if name == "token_embd.weight" and "output.weight" in file.tensors:
            share = 1 / info.shape[0]
        read += share * info.nbytes
        if len(info.shape) > 1 and name.startswith("blk."):
            multiplied += share * math.prod(info.shape)
    return WeightCounts(sum(info.nbytes for info in file.tensors.values()), round(read), round(multiplied))

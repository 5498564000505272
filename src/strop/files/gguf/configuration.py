"""A transformers configuration from the keys of a GGUF file, the way back from `architectures.Architecture.metadata`.

    llama.attention.head_count_kv        -> num_key_value_heads, and so on by the table of the architecture
    token_embd.weight [rows, ...]        -> vocab_size
    no output.weight                     -> tie_word_embeddings
    blk.0.attn_q.bias, ffn_gate.bias     -> attention_bias, mlp_bias
    rope.*, rope_freqs, rope_factors_*   -> rope_parameters
    tokenizer.ggml.bos_token_id, ...     -> bos_token_id, eos_token_id (a list where several tokens end an answer)

The result is proved before it is returned: written as keys again, it must give every key of the file's own that says
something of the computation, and every tensor of frequency factors. A key that strop does not know is refused by name,
since a setting passed over would be another model in silence. Values that the file holds in float32 come back as the
shortest decimal that is the same float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from strop.errors import FormatError, ModelError
from strop.files.gguf.architectures import Architecture, architecture_in
from strop.files.gguf.reader import GgufFile
from strop.files.gguf.rope import llama3_factors

_NOT_COMPUTED: Final = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.value_length")
"""Keys below the architecture's name that say nothing that is not said elsewhere."""

_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every Llama 3 was trained with; GGUF holds only the factors that follow from it."""

_SOFTCAPS: Final = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
"""What llama.cpp takes for Gemma 2 where the file does not say."""

_BIASES: Final = (("attention_bias", ("attn_q", "attn_qkv")), ("mlp_bias", ("ffn_up",)))


def configuration_of(file: GgufFile) -> tuple[PreTrainedConfig, Architecture]:
    """The configuration of the model that a file holds, and its architecture there.

    Raises:
        FormatError: an architecture or a setting that strop does not know; all are named.
        ModelError: a setting that every such model has is missing or is no number.
    """
    try:
        architecture = architecture_in(file.metadata)
    except (FormatError, ModelError) as error:
        raise type(error)(f"{file.path}: {error}") from error
    keys = _Keys(file, architecture.name)
    fields = _settings(keys, architecture)
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path}: holds no token_embd.weight, so it is no language model")
    fields["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    fields |= {field: True for field, parts in _BIASES if any(f"blk.0.{part}.bias" in file.tensors for part in parts)}
    if architecture.name != "gpt2":
        fields |= _rope(keys, architecture, fields)
    fields |= _of_kind(keys, architecture, fields)
    fields |= _special_tokens(file)
    model_type = architecture.table.model_types[0]
    try:
        config = CONFIG_MAPPING[model_type](**fields)
    except Exception as error:  # whatever transformers makes of settings that do not go together
        raise ModelError(f"{file.path}: transformers makes no {model_type} of its settings: {error}") from error
    config.architectures = None
    problems = list(_problems(file, keys, architecture, config))
    if problems:
        raise FormatError(
            f"{file.path}: settings of {architecture.name} that strop does not carry over, so that another model would "
            "be opened:\n  " + "\n  ".join(problems)
        )
    return config, architecture


class _Keys:
    """The keys below the architecture's name."""

    def __init__(self, file: GgufFile, name: str) -> None:
        self.file, self.path, self.name, self._metadata = file, file.path, name, file.metadata

    def __iter__(self) -> Iterator[str]:
        prefix = f"{self.name}."
        return (key.removeprefix(prefix) for key in self._metadata if key.startswith(prefix))

    def get(self, key: str) -> Any:
        """A value, None where the file has none; float32 numbers as their shortest decimal."""
        value = self._metadata.get(f"{self.name}.{key}")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def number(self, key: str) -> float | None:
        """A number, None where the file has none.

        Raises:
            ModelError: it is something else.
        """
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelError(f"{self.path}: {self.name}.{key} is {value!r}; a number is needed")
        return value


def _settings(keys: _Keys, architecture: Architecture) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, field in architecture.table.settings:
        value = keys.number(key)
        if value is not None:
            fields[field] = value
        elif key in ("context_length", "embedding_length", "feed_forward_length", "block_count"):
            raise ModelError(f"{keys.path}: {architecture.name}.{key} is missing; the file is no whole model")
    fields.setdefault("num_key_value_heads", architecture.key_heads)
    if architecture.name == "gpt2":
        del fields["num_key_value_heads"]
    return fields


def _rope(keys: _Keys, architecture: Architecture, fields: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, and what goes with them."""
    theta = keys.number("rope.freq_base") or 10000.0
    kind, factor = keys.get("rope.scaling.type"), keys.number("rope.scaling.factor")
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    result: dict[str, Any] = {}
    if kind in ("linear", "yarn") and factor is not None:
        parameters |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            parameters |= _yarn(keys, factor)
    tensors = _factor_tensors(keys.file)
    if "rope_freqs.weight" in tensors:
        parameters |= _llama3(keys, tensors["rope_freqs.weight"], theta, fields)
    if "rope_factors_long.weight" in tensors and "rope_factors_short.weight" in tensors:
        original = int(keys.number("rope.scaling.original_context_length") or 4096)
        parameters |= {
            "rope_type": "longrope",
            "long_factor": _shortest(tensors["rope_factors_long.weight"]),
            "short_factor": _shortest(tensors["rope_factors_short.weight"]),
            "original_max_position_embeddings": original,
            "attention_factor": keys.number("rope.scaling.attn_factor"),
        }
        result["original_max_position_embeddings"] = original
    head = fields.get("head_dim") or fields["hidden_size"] // architecture.heads
    rotated = keys.number("rope.dimension_count")
    if rotated is not None and rotated != head:
        parameters["partial_rotary_factor"] = rotated / head
    result["rope_parameters"] = parameters
    return result


def _factor_tensors(file: GgufFile) -> dict[str, torch.Tensor]:
    """The tensors of frequency factors, float32."""
    return {name: file.tensor(name) for name in file.tensors if name.startswith(("rope_freqs.", "rope_factors_"))}


def _yarn(keys: _Keys, factor: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (original := keys.number("rope.scaling.original_context_length")) is not None:
        found["original_max_position_embeddings"] = int(original)
    if (attention := keys.number("rope.scaling.attn_factor")) is not None:
        found["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if (value := keys.number(f"rope.scaling.{theirs}")) is not None:
            found[ours] = value
    return found


def _llama3(keys: _Keys, factors: torch.Tensor, theta: float, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that these factors follow from.

    Raises:
        FormatError: they follow from none that a Llama 3 has.
    """
    parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": float(factors.max()), **_LLAMA3}
    originals = dict.fromkeys((8192, int(fields["max_position_embeddings"])))
    for original in originals:
        parameters["original_max_position_embeddings"] = original
        made = llama3_factors(parameters, 2 * factors.numel())
        if torch.allclose(made, factors, rtol=1e-4, atol=0):
            return parameters
    raise FormatError(
        f"{keys.path}: rope_freqs.weight divides the frequencies of positions in a way that no Llama 3 does "
        f"(factors {factors.min():g} to {factors.max():g}); open the folder that the file was made from"
    )


def _of_kind(keys: _Keys, architecture: Architecture, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What only some architectures have."""
    name = architecture.name
    found: dict[str, Any] = {}
    if name in ("gemma2", "gemma3"):
        long = {"gemma2": 46, "gemma3": 62}[name] == architecture.blocks
        found["query_pre_attn_scalar"] = (
            fields["hidden_size"] // architecture.heads if long else fields.get("head_dim", 256)
        )
        if isinstance(slides := keys.get("attention.sliding_window_pattern"), list):
            found["layer_types"] = ["sliding_attention" if own else "full_attention" for own in slides]
        elif (every := architecture.table.sliding_pattern) is not None:
            blocks = range(architecture.blocks)
            found["layer_types"] = [
                "sliding_attention" if at % every < every - 1 else "full_attention" for at in blocks
            ]
    if name == "gemma2":
        for key, default in _SOFTCAPS.items():
            found[key] = fields.get(key, default)
    if name == "gemma3":
        sliding = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa") or 10000.0}
        found["rope_parameters"] = {"full_attention": fields["rope_parameters"], "sliding_attention": sliding}
        if "sliding_window" not in fields:
            found |= {"sliding_window": None, "layer_types": ["full_attention"] * architecture.blocks}
    if name == "phi3":
        found["sliding_window"] = fields.get("sliding_window") or None
    if name == "qwen2moe":
        found["norm_topk_prob"] = False
    if name == "qwen3moe":
        found["norm_topk_prob"] = True
    return found


def _special_tokens(file: GgufFile) -> dict[str, Any]:
    ids = {
        name: value
        for name in ("bos", "eos", "eot", "eom", "padding")
        if type(value := file.metadata.get(f"tokenizer.ggml.{name}_token_id")) is int
    }
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    return {
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids.get("padding"),
    }


def _problems(file: GgufFile, keys: _Keys, architecture: Architecture, config: PreTrainedConfig) -> Iterator[str]:
    """Keys and tensors of the file that the configuration does not give back."""
    try:
        made = architecture.metadata(config)
    except FormatError as error:
        yield str(error)
        return
    for key in keys:
        full, value = f"{architecture.name}.{key}", keys.get(key)
        if key in _NOT_COMPUTED or (key == "rope.scaling.type" and value == "none"):
            continue
        if full not in made:
            yield f"{full} = {_short(value)}, which strop does not know"
        elif not _same(value, made[full]):
            yield f"{full} = {_short(value)}, which would become {_short(made[full])}"
    wanted = architecture.extra_tensors(config)
    found = _factor_tensors(file)
    for name in dict.fromkeys([*wanted, *found]):
        if name not in wanted or name not in found:
            yield f"{name} is {'not there' if name not in found else 'there, and nothing says what for'}"
        elif not torch.allclose(wanted[name], found[name], rtol=1e-4, atol=0):
            yield f"{name} holds other factors than the settings give"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool) or not isinstance(one, int | float):
        return bool(one == other)
    return isinstance(other, int | float) and bool(np.isclose(np.float32(one), np.float32(other), rtol=1e-6, atol=0))


def _shortest(tensor: torch.Tensor) -> list[float]:
    return [float(str(value)) for value in tensor.numpy()]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."

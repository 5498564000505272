"""Rotary positions as GGUF writes them: keys, and the tensors of factors that Llama 3 and Phi-3 bring along.

    default           rope.freq_base
    linear            ... and rope.scaling.type "linear", .factor
    yarn              ... and .type "yarn", .factor, .original_context_length, .attn_factor and the two betas
    llama3            rope_freqs.weight [dimensions / 2]: what each frequency is divided by (Llama alone)
    longrope          rope_factors_long.weight, rope_factors_short.weight [dimensions / 2] (Phi-3 alone)

What llama.cpp computes otherwise (dynamic scaling among them) is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from strop.errors import FormatError

Value = bool | int | float | str | bytes | list[str] | list[int] | list[float] | list[bool]
"""What a key of a GGUF file may hold."""


def rope_parameters(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The rotary settings of blocks that attend to everything, and of those with a window where theirs differ."""
    given = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in given:
        return dict(given["full_attention"]), dict(given.get("sliding_attention") or {}) or None
    return dict(given), None


def rope_dimensions(config: Any) -> int:
    """How many numbers of a head are rotated."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters, _ = rope_parameters(config)
    share = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    return int(head * (1.0 if share is None else share))


def rope_metadata(config: Any, architecture: str) -> dict[str, Value]:
    """The keys of rotary positions, without the architecture's name.

    Raises:
        FormatError: a kind of scaling that llama.cpp does not compute for this architecture.
    """
    parameters, sliding = rope_parameters(config)
    keys: dict[str, Value] = {
        "rope.dimension_count": rope_dimensions(config),
        "rope.freq_base": float(parameters.get("rope_theta", 10000.0)),
    }
    if sliding is not None:
        if sliding.get("rope_type", "default") != "default":
            raise FormatError(
                f"{config.model_type}: blocks with a sliding window scale their positions "
                f"({sliding['rope_type']}), which llama.cpp does not compute"
            )
        keys["rope.freq_base_swa"] = float(sliding.get("rope_theta", 10000.0))
    kind = str(parameters.get("rope_type", "default")).lower()
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}
    elif kind == "yarn":
        keys |= _yarn(config, parameters)
    elif kind == "longrope" and architecture == "phi3":
        keys |= _longrope(config, parameters)
    elif kind != "default" and not (kind == "llama3" and architecture == "llama"):
        raise FormatError(
            f"{config.model_type}: rope_type {kind!r} is not computed by llama.cpp for {architecture}; those it "
            "computes: default, linear, yarn, llama3 (Llama), longrope (Phi-3)"
        )
    return keys


def rope_tensors(config: Any) -> dict[str, Tensor]:
    """The tensors of factors, float32, by their names in the file; none where the settings say it all."""
    parameters, _ = rope_parameters(config)
    kind = str(parameters.get("rope_type", "default")).lower()
    if kind == "llama3":
        return {"rope_freqs.weight": llama3_factors(parameters, rope_dimensions(config))}
    if kind == "longrope":
        return {
            f"rope_factors_{which}.weight": torch.tensor(parameters[f"{which}_factor"], dtype=torch.float32)
            for which in ("long", "short")
        }
    return {}


def llama3_factors(parameters: Mapping[str, Any], dimensions: int) -> Tensor:
    """What Llama 3 divides each frequency by, float32 [dimensions / 2]; transformers' `rope_type` llama3.

    Wavelengths below original / high_freq_factor stay, those above original / low_freq_factor are stretched by
    `factor`, and between the two the frequencies are blended.
    """
    frequencies = 1.0 / (
        float(parameters.get("rope_theta", 10000.0))
        ** (torch.arange(0, dimensions, 2, dtype=torch.int64).float() / dimensions)
    )
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    turns = float(parameters["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    blend = (turns - low) / (high - low)
    blended = 1.0 / ((1.0 - blend) / factor + blend)
    stretched = torch.full_like(blended, factor)
    return torch.where(turns > high, torch.ones_like(blended), torch.where(turns < low, stretched, blended))


def _yarn(config: Any, parameters: Mapping[str, Any]) -> dict[str, Value]:
    factor = float(parameters["factor"])
    original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    keys: dict[str, Value] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(original),
    }
    if (attention := parameters.get("attention_factor")) is not None:  # llama.cpp multiplies it with its own default
        keys["rope.scaling.attn_factor"] = float(attention) / (0.1 * math.log(factor) + 1.0)
    for theirs, ours in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if parameters.get(theirs) is not None:
            keys[f"rope.scaling.{ours}"] = float(parameters[theirs])
    for unknown in ("mscale", "mscale_all_dim"):
        if parameters.get(unknown):
            raise FormatError(f"{config.model_type}: {unknown} of its yarn scaling is not computed by llama.cpp")
    return keys


def _longrope(config: Any, parameters: Mapping[str, Any]) -> dict[str, Value]:
    original = int(parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    stretch = config.max_position_embeddings / original
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(attention),
    }

"""Tiny random models of every architecture that GGUF files are read and written of, and a file's weights decoded by
others.

Hidden 256, so that every type of numbers fits; norms and biases are moved off their starting values, which would hide
that one is lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.tiny import COMMON, tiny_tokenizer

ROWS = 320  # some more than tokens, as published models have

_COMMON = COMMON | {"vocab_size": ROWS, "hidden_size": 256, "intermediate_size": 256}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
_GEMMA: dict[str, Any] = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8}


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 20000.0, **fields}}


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "llama-biased": lambda: LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-3": lambda: LlamaConfig(
        **_COMMON,
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    ),
    "llama-linear": lambda: LlamaConfig(**_COMMON, **_rope("linear", factor=2.0)),
    "llama-yarn": lambda: LlamaConfig(**_COMMON, **_rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_COMMON, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=32),
    "gemma": lambda: GemmaConfig(**_COMMON, head_dim=64),
    "gemma2": lambda: Gemma2Config(**_COMMON, **_GEMMA),
    "gemma3": lambda: Gemma3TextConfig(**_COMMON, **_GEMMA),
    "gemma3-pattern": lambda: Gemma3TextConfig(
        **_COMMON, **_GEMMA, layer_types=["full_attention", "sliding_attention"]
    ),
    "phi3": lambda: Phi3Config(**_COMMON, **_rope("default", partial_rotary_factor=0.5)),
    "phi3-long": lambda: Phi3Config(
        **_COMMON,
        original_max_position_embeddings=64,
        **_rope(
            "longrope",
            long_factor=[1.0 + 0.1 * place for place in range(32)],
            short_factor=[1.0 + 0.01 * place for place in range(32)],
            original_max_position_embeddings=64,
            partial_rotary_factor=1.0,
        ),
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=ROWS,
        n_embd=256,
        n_layer=2,
        n_head=4,
        n_inner=256,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    ),
    "mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen2moe": lambda: Qwen2MoeConfig(
        **_COMMON, **_EXPERTS, shared_expert_intermediate_size=256, norm_topk_prob=False
    ),
    "qwen3moe": lambda: Qwen3MoeConfig(**_COMMON, **_EXPERTS, head_dim=32, norm_topk_prob=True),
}


def family_folder(folder: Path, name: str) -> Path:
    """Save a random model of the family and the tiny tokenizer as `folder/name`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[name](), attn_implementation="eager")
        with torch.no_grad():
            for part, parameter in model.named_parameters():
                if part.endswith("bias") or "norm" in part or ".ln_" in part:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    path = folder / name
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def decoded_folder(file: Path, like: Path, target: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """The file's weights, decoded by the `gguf` package, as a folder of full precision with the source's configuration.

    Names and layouts go back by the tables of the exporter, which its own tests hold against llama.cpp.
    """
    from strop.files.gguf.architectures import architecture_of

    architecture = architecture_of(AutoConfig.from_pretrained(like))
    tensors: dict[str, torch.Tensor] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name.startswith("rope_f"):
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = torch.from_numpy(values).reshape(*reversed(tensor.shape.tolist()))
        for name, part in architecture.from_gguf(tensor.name, values).items():
            tensors[name] = part.to(dtype).contiguous().clone()
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((like / "config.json").read_text()) | {"dtype": "float32"}
    (target / "config.json").write_text(json.dumps(fields))
    return target

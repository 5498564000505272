"""Tiny models of every architecture that is written as GGUF, with gains and biases that differ from their start."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
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
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.tiny import COMMON, tiny_tokenizer

_COMMON = COMMON | {"vocab_size": 320}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + 0.3 * at for at in range(8)],
    "short_factor": [1.0 + 0.05 * at for at in range(8)],
    "original_max_position_embeddings": 256,
}

EXACT = 1e-9
"""Most KL, nats per token, where llama.cpp computes the same in float32."""

TABLE = 1e-6
"""Where it computes GELU by a table in 16 bits."""

CONFIGS: dict[str, tuple[PreTrainedConfig, float]] = {
    "llama": (LlamaConfig(**_COMMON), EXACT),
    "llama, biases, untied": (LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True), EXACT),
    "llama, tied, head 32": (LlamaConfig(**_COMMON, tie_word_embeddings=True, head_dim=32), EXACT),
    "llama 3 positions": (LlamaConfig(**_COMMON, head_dim=32, rope_parameters=dict(_LLAMA3)), EXACT),
    "linear positions": (
        LlamaConfig(**_COMMON, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        EXACT,
    ),
    "yarn positions": (Qwen3Config(**_COMMON, head_dim=16, rope_parameters=_YARN | {"attention_factor": 1.3}), EXACT),
    "mistral": (MistralConfig(**_COMMON, sliding_window=None), EXACT),
    "qwen2": (Qwen2Config(**_COMMON, tie_word_embeddings=True), EXACT),
    "qwen3": (Qwen3Config(**_COMMON, head_dim=32), EXACT),
    "gemma": (GemmaConfig(**_COMMON, head_dim=16), TABLE),
    "gemma2": (Gemma2Config(**_COMMON, **_GEMMA), TABLE),
    "gemma3": (Gemma3TextConfig(**(_COMMON | {"num_hidden_layers": 7}), **_GEMMA), TABLE),
    "gemma3, windows elsewhere": (
        Gemma3TextConfig(**_COMMON, **_GEMMA, layer_types=["full_attention", "sliding_attention"]),
        TABLE,
    ),
    "gpt2": (
        GPT2Config(
            vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_inner=128, n_positions=256, initializer_range=0.1,
            bos_token_id=1, eos_token_id=2,
        ),
        TABLE,
    ),
    "phi3": (Phi3Config(**_COMMON, original_max_position_embeddings=256), EXACT),
    "phi3, long": (
        Phi3Config(
            **(_COMMON | {"max_position_embeddings": 1024}),
            original_max_position_embeddings=256,
            rope_parameters=dict(_LONG),
        ),
        EXACT,
    ),
    "mixtral": (MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2, head_dim=16), EXACT),
    "qwen2_moe": (
        Qwen2MoeConfig(**_COMMON, **_EXPERTS, shared_expert_intermediate_size=96, norm_topk_prob=False),
        EXACT,
    ),
    "qwen3_moe": (Qwen3MoeConfig(**_COMMON, **_EXPERTS, head_dim=16, norm_topk_prob=True), EXACT),
}  # fmt: skip
"""Name to configuration and most KL against transformers in float32."""


def gguf_model(name: str) -> PreTrainedModel:
    """A random model of one of `CONFIGS`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CONFIGS[name][0]
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for part, parameter in model.named_parameters():
                if part.endswith("bias"):
                    parameter.normal_(std=0.05)
                elif parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def gguf_folder(folder: Path, model: PreTrainedModel) -> Path:
    """A model saved with the tiny tokenizer."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder

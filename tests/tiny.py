"""Small random models and a small tokenizer, made in memory from transformers' own configurations.

Every model has hidden 64, intermediate 128, 2 layers, 4 heads (2 key-value heads where the family has them), context
256, and as many rows in its embedding as `tiny_tokenizer()` has tokens, so that a model and the tokenizer fit together.
Weights are random, wide enough that logits differ visibly between tokens; nothing is downloaded.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

FAMILIES = ("llama", "qwen3", "gemma", "gpt2", "falcon", "mixtral")
"""One family per shape of block: grouped queries, query-key norms, embedding scaling, Conv1D, fused QKV, experts."""

PAD, BOS, EOS, START, END = "<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "set the alarm for half past six on weekdays and wake me up",
    "a model is trained, rounded, compared and saved by one command",
    "user assistant system question answer what is the time",
]


@functools.lru_cache(maxsize=1)
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=304,
        special_tokens=[PAD, BOS, EOS, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(*, chat_template: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 304 tokens that returns any text unchanged; ids: pad 0, bos 1, eos 2, start 3, end 4."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[START, END],
        clean_up_tokenization_spaces=False,
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
"""What tiny models of most families have alike; the vocabulary is the tokenizer's."""


def tiny_config(family: str, *, tied: bool | None = None, **changes: object) -> PreTrainedConfig:
    """The family's configuration in its tiny size; `tied`: is the head the embedding; `changes`: any other field."""
    common = COMMON | {"vocab_size": len(tiny_tokenizer())}
    if family == "llama":
        known = LlamaConfig
    elif family == "qwen3":
        known = Qwen3Config
        common |= {"head_dim": 16}
    elif family == "gemma":
        known = GemmaConfig
        common |= {"head_dim": 16}
    elif family == "gpt2":
        known = GPT2Config
        renamed = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        renamed |= {"intermediate_size": "n_inner", "max_position_embeddings": "n_positions"}
        common = {renamed.get(key, key): value for key, value in common.items() if key != "num_key_value_heads"}
        common |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    elif family == "falcon":
        known = FalconConfig
        common = {
            key: value for key, value in common.items() if key not in ("intermediate_size", "num_key_value_heads")
        }
        common |= {"ffn_hidden_size": 128, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}
    elif family == "mixtral":
        known = MixtralConfig
        common |= {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    elif family == "qwen3_moe":
        known = Qwen3MoeConfig
        common |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    else:
        raise ValueError(f"no tiny model of the family {family!r}; there are {', '.join((*FAMILIES, 'qwen3_moe'))}")
    if tied is not None:
        common["tie_word_embeddings"] = tied
    return known(**(common | changes))


def tiny_model(
    family: str, *, seed: int = 0, tied: bool | None = None, dtype: torch.dtype = torch.float32, **changes: object
) -> PreTrainedModel:
    """A random causal language model in eval mode, the same for the same arguments."""
    config = tiny_config(family, tied=tied, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # transformers starts biases at zero, which would hide a lost bias
                    parameter.normal_(std=0.05)
    return model.eval()


def tiny_folder(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    tied: bool | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **changes: object,
) -> Path:
    """Save a tiny model and its tokenizer into `folder/family` as transformers saves them; returns that path."""
    path = folder / family
    tiny_model(family, seed=seed, tied=tied, dtype=dtype, **changes).save_pretrained(path)
    (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return path


def tiny_input(*, rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, length] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, len(tiny_tokenizer()), (rows, length), generator=generator)


def tiny_chat_file(path: Path, *, rows: int = 8) -> Path:
    """Write a small jsonl file of two-turn conversations (`messages`) and return its path."""
    colours = ["red", "green", "blue", "brown", "black", "white", "pink", "grey"]
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"say {colours[row % len(colours)]} {row}"},
                    {"role": "assistant", "content": f"{colours[row % len(colours)]} {row}"},
                ]
            }
        )
        for row in range(rows)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path

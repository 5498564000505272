"""GGUF files of tiny Llama models, written with the `gguf` package alone: no reader here checks its own writer."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import tiny_folder

_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection as llama.cpp turns them: (0, half), (1, half + 1), ..."""
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2)  # [heads, half, 2, in]
    return np.ascontiguousarray(rows.reshape(weight.shape))


def write_llama(folder: Path, path: Path, kind: str = "f32", *, template: str | None = None) -> Path:
    """Write the Llama model of a folder, with its byte-level BPE tokenizer, as `path` in one type of numbers.

    Args:
        folder: A transformers folder.
        path: The GGUF file.
        kind: f32, f16, bf16, q8_0 or q4_0.
        template: The chat template; by default the tokenizer's, and an empty text writes none.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer, tokenizer, folder)
    text = tokenizer.chat_template if template is None else template
    if text:
        writer.add_chat_template(text)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            values = _paired(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        wanted = GGMLQuantizationType[kind.upper()]
        if values.ndim == 1 or wanted is GGMLQuantizationType.F32:
            writer.add_tensor(_name(name), values)
        elif wanted is GGMLQuantizationType.F16:
            writer.add_tensor(_name(name), values.astype(np.float16))
        else:
            writer.add_tensor(_name(name), gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer, folder: Path) -> None:
    backend = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["id"]: token["content"] for token in backend["added_tokens"]}
    tokens = {place: text for text, place in backend["model"]["vocab"].items()} | added
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens[place] for place in range(len(tokens))])
    writer.add_token_types([3 if place in added else 1 for place in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


def _name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in whole:
        return f"{whole[name]}.weight"
    _, _, layer, part = name.removesuffix(".weight").split(".", maxsplit=3)
    return f"blk.{layer}.{_PARTS[part]}.weight"


@functools.cache
def _llama(place: Path) -> Path:
    return tiny_folder(place, "llama")


def tiny_gguf(place: Path, kind: str = "f32", *, template: str | None = None) -> Path:
    """A file of tests.tiny's Llama in `place`; the folder that it comes from lies beside it as `llama`."""
    return write_llama(_llama(place), place / f"tiny-{kind}.gguf", kind, template=template)

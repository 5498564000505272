"""Names of tensors and settings in GGUF files, an entry for each kind of model; `architectures.py` reads it.

A line is (name in a checkpoint of transformers, name in GGUF, how its values are laid out there); `{n}` stands for the
number of a block, `{e}` for that of an expert: all experts of a block lie in one GGUF tensor. The endings `.weight` and
`.bias` are the same on both sides and left out. Settings are (key below the architecture's name, field of config.json).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Layout(Enum):
    """How GGUF lays out what transformers holds in a tensor."""

    SAME = "the same values in the same order"
    QUERY = "rows of each query head reordered: transformers rotates halves, llama.cpp pairs"
    KEY = "rows of each key head reordered likewise"
    PLUS_ONE = "one is added: transformers multiplies by 1 + weight"
    TRANSPOSED = "[in, out] becomes [out, in] (Conv1D)"


Line = tuple[str, str, Layout]


@dataclass(frozen=True)
class Table:
    """What GGUF calls the parts of one kind of model.

    Attributes:
        name: the architecture's name in the file.
        model_types: transformers' names of it.
        lines: the tensors.
        settings: (key, field) of plain numbers.
        activation: the activation function that llama.cpp computes for it, by transformers' names.
        prefix: what a checkpoint's names begin with; may be left out there.
        fused: names of experts stacked in one tensor, as transformers 5 holds them, to the lines they are made of.
        aliases: other names of the same tensors.
        untied_only: whether the file must hold a head of its own even where it is the embedding.
        tied_only: whether llama.cpp knows no head of its own.
        sliding_pattern: every so many blocks one attends to everything, where the window slides; None: no window.
    """

    name: str
    model_types: tuple[str, ...]
    lines: tuple[Line, ...]
    settings: tuple[tuple[str, str], ...]
    activation: tuple[str, ...] = ("silu", "swish")
    prefix: str = "model."
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    untied_only: bool = False
    tied_only: bool = False
    sliding_pattern: int | None = None


_SAME, _QUERY, _KEY, _PLUS = Layout.SAME, Layout.QUERY, Layout.KEY, Layout.PLUS_ONE


def _model(norm: Layout, *block: Line) -> tuple[Line, ...]:
    ends = (
        ("model.embed_tokens", "token_embd", _SAME),
        ("model.norm", "output_norm", norm),
        ("lm_head", "output", _SAME),
    )
    return (*ends, *((f"model.layers.{{n}}.{theirs}", f"blk.{{n}}.{ours}", layout) for theirs, ours, layout in block))


def _attention(query: Layout, key: Layout) -> tuple[Line, ...]:
    return (
        ("self_attn.q_proj", "attn_q", query),
        ("self_attn.k_proj", "attn_k", key),
        ("self_attn.v_proj", "attn_v", _SAME),
        ("self_attn.o_proj", "attn_output", _SAME),
    )


def _head_norms(layout: Layout) -> tuple[Line, ...]:
    return ("self_attn.q_norm", "attn_q_norm", layout), ("self_attn.k_norm", "attn_k_norm", layout)


_MLP: Final = (
    ("mlp.gate_proj", "ffn_gate", _SAME),
    ("mlp.up_proj", "ffn_up", _SAME),
    ("mlp.down_proj", "ffn_down", _SAME),
)
_NORMS: Final = (("input_layernorm", "attn_norm", _SAME), ("post_attention_layernorm", "ffn_norm", _SAME))
_FOUR_NORMS: Final = (
    ("input_layernorm", "attn_norm", _PLUS),
    ("post_attention_layernorm", "post_attention_norm", _PLUS),
    ("pre_feedforward_layernorm", "ffn_norm", _PLUS),
    ("post_feedforward_layernorm", "post_ffw_norm", _PLUS),
)
_EXPERTS: Final = (
    ("mlp.gate", "ffn_gate_inp", _SAME),
    ("mlp.experts.{e}.gate_proj", "ffn_gate_exps", _SAME),
    ("mlp.experts.{e}.up_proj", "ffn_up_exps", _SAME),
    ("mlp.experts.{e}.down_proj", "ffn_down_exps", _SAME),
)
_SHARED_EXPERT: Final = (
    ("mlp.shared_expert_gate", "ffn_gate_inp_shexp", _SAME),
    ("mlp.shared_expert.gate_proj", "ffn_gate_shexp", _SAME),
    ("mlp.shared_expert.up_proj", "ffn_up_shexp", _SAME),
    ("mlp.shared_expert.down_proj", "ffn_down_shexp", _SAME),
)
_FUSED_EXPERTS: Final = (
    (
        "model.layers.{n}.mlp.experts.gate_up_proj",
        ("model.layers.{n}.mlp.experts.{e}.gate_proj", "model.layers.{n}.mlp.experts.{e}.up_proj"),
    ),
    ("model.layers.{n}.mlp.experts.down_proj", ("model.layers.{n}.mlp.experts.{e}.down_proj",)),
)
_MIXTRAL: Final = "model.layers.{n}.block_sparse_moe"

_SIZES: Final = (
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("block_count", "num_hidden_layers"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
)
_HEAD: Final = (("attention.key_length", "head_dim"), ("attention.value_length", "head_dim"))
_EXPERT_COUNTS: Final = (("expert_used_count", "num_experts_per_tok"),)
_QWEN_EXPERTS: Final = (
    *_EXPERT_COUNTS,
    ("expert_count", "num_experts"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
)

TABLES: Final = (
    Table(
        "llama",
        ("llama", "mistral"),
        _model(_SAME, *_NORMS, *_attention(_QUERY, _KEY), *_MLP),
        (*_SIZES, *_HEAD, ("vocab_size", "vocab_size")),
    ),
    Table(
        "llama",
        ("mixtral",),
        (
            *_model(_SAME, *_NORMS, *_attention(_QUERY, _KEY)),
            (f"{_MIXTRAL}.gate", "blk.{n}.ffn_gate_inp", _SAME),
            (f"{_MIXTRAL}.experts.{{e}}.w1", "blk.{n}.ffn_gate_exps", _SAME),
            (f"{_MIXTRAL}.experts.{{e}}.w3", "blk.{n}.ffn_up_exps", _SAME),
            (f"{_MIXTRAL}.experts.{{e}}.w2", "blk.{n}.ffn_down_exps", _SAME),
        ),
        (*_SIZES, *_HEAD, ("vocab_size", "vocab_size"), *_EXPERT_COUNTS, ("expert_count", "num_local_experts")),
        fused=(
            (
                "model.layers.{n}.mlp.experts.gate_up_proj",
                (f"{_MIXTRAL}.experts.{{e}}.w1", f"{_MIXTRAL}.experts.{{e}}.w3"),
            ),
            ("model.layers.{n}.mlp.experts.down_proj", (f"{_MIXTRAL}.experts.{{e}}.w2",)),
        ),
        aliases=(("model.layers.{n}.mlp.gate", f"{_MIXTRAL}.gate"),),
    ),
    Table("qwen2", ("qwen2",), _model(_SAME, *_NORMS, *_attention(_SAME, _SAME), *_MLP), _SIZES),
    Table(
        "qwen3",
        ("qwen3",),
        _model(_SAME, *_NORMS, *_attention(_SAME, _SAME), *_head_norms(_SAME), *_MLP),
        (*_SIZES, *_HEAD),
    ),
    Table(
        "qwen2moe",
        ("qwen2_moe",),
        _model(_SAME, *_NORMS, *_attention(_SAME, _SAME), *_EXPERTS, *_SHARED_EXPERT),
        (*_SIZES, *_QWEN_EXPERTS, ("expert_shared_feed_forward_length", "shared_expert_intermediate_size")),
        fused=_FUSED_EXPERTS,
        untied_only=True,
    ),
    Table(
        "qwen3moe",
        ("qwen3_moe",),
        _model(_SAME, *_NORMS, *_attention(_SAME, _SAME), *_head_norms(_SAME), *_EXPERTS),
        (*_SIZES, *_HEAD, *_QWEN_EXPERTS),
        fused=_FUSED_EXPERTS,
    ),
    Table(
        "gemma",
        ("gemma",),
        _model(
            _PLUS,
            ("input_layernorm", "attn_norm", _PLUS),
            ("post_attention_layernorm", "ffn_norm", _PLUS),
            *_attention(_SAME, _SAME),
            *_MLP,
        ),
        (*_SIZES, *_HEAD),
        activation=("gelu_pytorch_tanh", "gelu_new", "gelu"),
        tied_only=True,
    ),
    Table(
        "gemma2",
        ("gemma2",),
        _model(_PLUS, *_FOUR_NORMS, *_attention(_SAME, _SAME), *_MLP),
        (
            *_SIZES,
            *_HEAD,
            ("attention.sliding_window", "sliding_window"),
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ),
        activation=("gelu_pytorch_tanh",),
        tied_only=True,
        sliding_pattern=2,
    ),
    Table(
        "gemma3",
        ("gemma3_text",),
        _model(_PLUS, *_FOUR_NORMS, *_attention(_SAME, _SAME), *_head_norms(_PLUS), *_MLP),
        (
            *_SIZES,
            *_HEAD,
            ("attention.sliding_window", "sliding_window"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ),
        activation=("gelu_pytorch_tanh",),
        sliding_pattern=6,
    ),
    Table(
        "phi3",
        ("phi3",),
        _model(
            _SAME,
            *_NORMS,
            ("self_attn.qkv_proj", "attn_qkv", _SAME),
            ("self_attn.o_proj", "attn_output", _SAME),
            ("mlp.gate_up_proj", "ffn_up", _SAME),
            ("mlp.down_proj", "ffn_down", _SAME),
        ),
        (*_SIZES, ("attention.sliding_window", "sliding_window")),
    ),
    Table(
        "gpt2",
        ("gpt2",),
        (
            ("transformer.wte", "token_embd", _SAME),
            ("transformer.wpe", "position_embd", _SAME),
            ("transformer.ln_f", "output_norm", _SAME),
            ("lm_head", "output", _SAME),
            ("transformer.h.{n}.ln_1", "blk.{n}.attn_norm", _SAME),
            ("transformer.h.{n}.attn.c_attn", "blk.{n}.attn_qkv", Layout.TRANSPOSED),
            ("transformer.h.{n}.attn.c_proj", "blk.{n}.attn_output", Layout.TRANSPOSED),
            ("transformer.h.{n}.ln_2", "blk.{n}.ffn_norm", _SAME),
            ("transformer.h.{n}.mlp.c_fc", "blk.{n}.ffn_up", Layout.TRANSPOSED),
            ("transformer.h.{n}.mlp.c_proj", "blk.{n}.ffn_down", Layout.TRANSPOSED),
        ),
        (
            ("context_length", "n_positions"),
            ("embedding_length", "n_embd"),
            ("block_count", "n_layer"),
            ("feed_forward_length", "n_inner"),
            ("attention.head_count", "n_head"),
            ("attention.layer_norm_epsilon", "layer_norm_epsilon"),
        ),
        activation=("gelu_new", "gelu_pytorch_tanh"),
        prefix="transformer.",
    ),
)

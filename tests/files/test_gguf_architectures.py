from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, LlamaConfig, PreTrainedModel

from strop.errors import FormatError, ModelError
from strop.files.gguf.architecture_table import TABLES, Layout
from strop.files.gguf.architectures import architecture_in, architecture_of
from strop.files.gguf.mixtures import Mixture
from strop.files.gguf.rope import llama3_factors
from strop.files.shards import iter_tensors
from strop.progress import SILENT
from strop.recipes.export import export
from strop.recipes.export_importance import measure_importance
from strop.recipes.export_source import open_source
from tests.files.gguf_models import CONFIGS, gguf_folder, gguf_model
from tests.tiny import tiny_chat_file

KINDS = list(CONFIGS)


def _tied(model: PreTrainedModel) -> bool:
    return bool(model.config.tie_word_embeddings)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_what_transformers_does(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from strop.runtime.llama_cpp import GgufModel

    model = gguf_model(kind)
    export(gguf_folder(tmp_path / "model", model), tmp_path / "m.gguf", format="gguf:f32", verify=False)
    ids = torch.randint(5, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(ids).logits[0].double().log_softmax(-1)
    with GgufModel.open(tmp_path / "m.gguf", threads=1, context=256) as opened:
        found = torch.from_numpy(opened.logits(ids[0].tolist())).double().log_softmax(-1)
    divergence = (wanted.exp() * (wanted - found)).sum(-1)
    assert float(divergence.max()) <= CONFIGS[kind][1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_comes_back_in_the_checkpoints_layout_and_under_its_name(kind: str, tmp_path: Path) -> None:
    model = gguf_model(kind)
    model.save_pretrained(tmp_path)
    held = dict(iter_tensors(tmp_path))
    ours = architecture_of(model.config)
    theirs = architecture_in(ours.metadata(model.config))
    assert theirs == ours
    back: dict[str, torch.Tensor] = {}
    for planned in ours.plan(held, tied=_tied(model)):
        parts = [ours.laid_out(piece.of(held[piece.source]), piece.layout) for piece in planned.pieces]
        if planned.name == "output.weight" and _tied(model):
            continue
        back |= theirs.from_gguf(planned.name, torch.stack(parts) if planned.stacked else parts[0])
    assert back.keys() == held.keys()
    for name, tensor in held.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_in_one_parameter_make_the_same_tensors_as_numbered_ones(kind: str, tmp_path: Path) -> None:
    model = gguf_model(kind)
    model.save_pretrained(tmp_path)
    numbered, stacked = dict(iter_tensors(tmp_path)), dict(model.named_parameters())
    assert any(".experts.0." in name for name in numbered)
    assert any(name.endswith("experts.gate_up_proj") for name in stacked)
    architecture = architecture_of(model.config)

    def made(held: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {
            planned.name: torch.stack([architecture.laid_out(p.of(held[p.source]), p.layout) for p in planned.pieces])
            for planned in architecture.plan(held, tied=_tied(model))
        }

    one, other = made(numbered), made(stacked)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.model_types[0])
def test_names_are_those_of_the_gguf_package(table: Any) -> None:
    import gguf

    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == table.name)
    names = gguf.get_tensor_name_map(number, 2)
    known = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "{n}") for tensor in gguf.MODEL_TENSORS[number]}
    for theirs, ours, _ in table.lines:
        assert ours in known | {"output"}
        own_head = theirs == "lm_head" and table.tied_only  # written by nothing: the embedding is the head
        if "{e}" not in theirs and not own_head:  # the package stacks experts by names of its own making
            assert names.get_name(theirs.replace("{n}", "1")) == ours.replace("{n}", "1")


def test_an_architecture_without_gguf_is_refused_by_name() -> None:
    with pytest.raises(FormatError, match=r"bloom: no GGUF file.*llama, mistral"):
        architecture_of(BloomConfig())
    with pytest.raises(FormatError, match=r"'gema2' \(did you mean 'gemma2'\?\)"):
        architecture_in({"general.architecture": "gema2"})
    with pytest.raises(ModelError, match=r"llama.block_count is 'x'"):
        architecture_in({"general.architecture": "llama", "llama.block_count": "x"})


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar 99; gemma2 has 16"),
        ("gemma2", {"attn_logit_softcapping": None}, "logits without softcaps"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "softcaps in the attention"),
        ("gemma", {"tie_word_embeddings": False}, "a head of its own"),
        ("gemma3", {"use_bidirectional_attention": True}, "both directions"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "attention scaled otherwise"),
        ("gpt2", {"add_cross_attention": True}, "cross attention"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False; qwen3moe has True"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "blocks without experts"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "'llama3' is not computed"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "yarn with beta_fast 16"),
    ],
)  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused(kind: str, changes: dict[str, Any], said: str) -> None:
    config = CONFIGS[kind][0].__class__.from_dict(CONFIGS[kind][0].to_dict())
    for field, value in changes.items():
        setattr(config, field, value)
    with pytest.raises(FormatError, match=said):
        architecture_of(config).metadata(config)


def test_a_window_that_llama_cpp_does_not_slide_is_noted_with_its_length() -> None:
    config = CONFIGS["mistral"][0].__class__(**(CONFIGS["mistral"][0].to_dict() | {"sliding_window": 64}))
    assert "past 64 tokens" in architecture_of(config).notes(config)[0]


@pytest.mark.parametrize("kind", ["gpt2", "qwen2_moe"])
def test_every_matrix_that_is_rounded_has_an_importance_but_heads_and_embeddings(kind: str, tmp_path: Path) -> None:
    folder = gguf_folder(tmp_path / "model", gguf_model(kind))
    source = open_source(folder)
    architecture = architecture_of(source.config)
    data = tiny_chat_file(tmp_path / "chats.jsonl")
    found = measure_importance(
        source, architecture, str(data), max_rows=8, max_length=None, chat_template=None, reporter=SILENT
    ).columns
    mixture = Mixture("q4_0", 2, 4, tied=False)
    for planned in architecture.plan(source.names, tied=_tied(gguf_model(kind))):
        shape = source.shape(planned.pieces[0].source)
        if mixture.choose(planned.name, shape).type != "f32" and planned.name.startswith("blk."):
            widths = {found[piece.line].numel() for piece in planned.pieces}
            assert widths == {shape[0] if piece_is_transposed(planned.pieces[0].layout) else shape[1]}


def piece_is_transposed(layout: Layout) -> bool:
    return layout is Layout.TRANSPOSED


def test_tensors_that_are_missing_or_strange_are_named() -> None:
    model = gguf_model("llama")
    names = [name for name, _ in model.named_parameters() if "layers.1.mlp.up" not in name]
    with pytest.raises(ModelError, match=r"(?s)model.layers.0.extra.weight.*1 missing: blk.1.ffn_up.weight"):
        architecture_of(model.config).plan([*names, "model.layers.0.extra.weight"], tied=False)
    mixture = gguf_model("qwen3_moe")
    names = [f"model.layers.{n}.mlp.experts.{e}.up_proj.weight" for n in range(2) for e in range(3)]
    with pytest.raises(ModelError, match=r"blk.0.ffn_up_exps.weight \(3 of 4 experts\)"):
        architecture_of(mixture.config).plan(names, tied=False)


def test_names_without_the_prefix_and_buffers_are_read_as_old_checkpoints_have_them() -> None:
    architecture = architecture_of(CONFIGS["gpt2"][0])
    assert architecture.tensor_name("h.1.attn.c_attn.bias") == "blk.1.attn_qkv.bias"
    assert architecture.tensor_name("transformer.h.1.attn.c_attn.bias") == "blk.1.attn_qkv.bias"
    assert architecture.tensor_name("h.0.attn.bias") is None
    assert architecture.tensor_name("h.0.attn.masked_bias") is None
    assert architecture_of(LlamaConfig()).tensor_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None


def test_factors_of_llama_3_are_those_that_transformers_divides_by() -> None:
    config = CONFIGS["llama 3 positions"][0]
    model = gguf_model("llama 3 positions")
    plain = 1.0 / 500000.0 ** (torch.arange(0, 32, 2).float() / 32)
    wanted = plain / model.model.rotary_emb.inv_freq
    torch.testing.assert_close(llama3_factors(config.rope_parameters, 32), wanted)

"""Packed documents do not see each other, shown on the models by perturbation, and models that leak are refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Llama4TextConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from strop.data.batches import Batch, BatchStream, padded_batch
from strop.data.packing import PackedAttention, block_mask, check_isolation, packed_attention
from strop.data.templates import IGNORED, Sample
from strop.errors import TrainingError
from strop.training.shapes import at_common_width
from tests.tiny import FAMILIES, tiny_config, tiny_model

LENGTHS = (14, 9, 11, 5)

COMMON: dict[str, Any] = {
    "vocab_size": 304,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Sample(ids, [IGNORED, *ids[1:]]) for ids in rows]


def packed(model: Any, *, max_length: int = 40, attention: PackedAttention | None = None) -> Batch:
    """One row that holds all four documents."""
    attention = attention or packed_attention(model, max_length)
    stream = BatchStream(make_samples(), batch_size=1, packing=True, max_length=max_length, attention=attention)
    batch = stream.next_step()[0]
    assert batch.document_count(0) == 4
    return batch


def build(config: Any, implementation: str, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe"])
def test_replacing_one_document_leaves_the_others_logits_bitwise_alone(family: str, implementation: str) -> None:
    model = build(tiny_config(family), implementation)
    batch = packed(model)
    assert batch.documents is not None
    with torch.no_grad():
        before = model(**batch.inputs()).logits
        for document in range(4):
            inside = batch.documents == document
            other = batch.with_ids(torch.where(inside, (batch.input_ids + 7) % 300, batch.input_ids))
            after = model(**other.inputs()).logits
            assert torch.equal(after[~inside], before[~inside])
            assert not torch.allclose(after[inside], before[inside], atol=1e-2)
    check_isolation(model, batch)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "falcon"])
def test_a_packed_document_reads_as_it_does_alone(family: str) -> None:
    model = tiny_model(family)
    samples = make_samples()
    batch = packed(model)
    assert batch.documents is not None
    with torch.no_grad():
        together = model(**batch.inputs()).logits
        for number, index in enumerate(batch.rows[0]):
            alone = model(**padded_batch([samples[index]], [index], pad_id=0).inputs()).logits[0]
            torch.testing.assert_close(together[batch.documents == number], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_it_holds_in_bf16_and_under_autocast(implementation: str) -> None:
    half = build(tiny_config("llama"), implementation, torch.bfloat16)
    check_isolation(half, packed(half))
    full = build(tiny_config("llama"), implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_isolation(full, packed(full))


def test_the_mask_is_causal_within_documents_and_padding_sees_padding_only() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]])
    mask = block_mask(documents, PackedAttention())
    assert isinstance(mask, torch.Tensor)
    assert mask.shape == (1, 1, 6, 6)
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert (mask[0, 0] == 0).int().tolist() == expected
    assert (mask[0, 0][mask[0, 0] != 0] == torch.finfo(torch.float32).min).all()
    near = block_mask(documents, PackedAttention(torch.bfloat16, window=2))
    assert isinstance(near, torch.Tensor)
    assert near.dtype == torch.bfloat16
    assert (near[0, 0, 2] == 0).int().tolist() == [0, 1, 1, 0, 0, 0]


def test_positions_restart_and_no_document_predicts_the_next_ones_first_token() -> None:
    batch = packed(tiny_model("llama"))
    assert batch.documents is not None
    assert batch.position_ids is not None
    for document in range(4):
        inside = batch.documents[0] == document
        assert batch.position_ids[0, inside].tolist() == list(range(int(inside.sum())))
        assert batch.labels[0, inside][0] == IGNORED
    assert batch.supervised_tokens == sum(length - 1 for length in LENGTHS)


SLIDING = {
    "mistral": lambda window: MistralConfig(**COMMON, sliding_window=window),
    "gemma2": lambda window: Gemma2Config(**COMMON, sliding_window=window),
    "gemma3": lambda window: Gemma3TextConfig(
        **COMMON, sliding_window=window, layer_types=["sliding_attention", "full_attention"]
    ),
    "qwen2": lambda window: Qwen2Config(
        **{key: value for key, value in COMMON.items() if key != "head_dim"},
        sliding_window=window,
        use_sliding_window=True,
        max_window_layers=1,
    ),
}


@pytest.mark.parametrize("name", SLIDING)
def test_a_short_sliding_window_stays_in_the_mask(name: str) -> None:
    model = build(SLIDING[name](6), "eager")
    attention = packed_attention(model, 40)
    assert attention.window == 6
    assert attention.mixed == (name != "mistral")
    batch = packed(model, attention=attention)
    check_isolation(model, batch)
    lost = replace(batch, attention=PackedAttention(torch.float32))
    with pytest.raises(TrainingError, match=r"does not read as it does alone: its logits differ by \d"):
        check_isolation(model, lost)


@pytest.mark.parametrize("name", SLIDING)
def test_a_window_as_long_as_a_row_needs_no_place_in_the_mask(name: str) -> None:
    model = build(SLIDING[name](40), "eager")
    attention = packed_attention(model, 40)
    assert attention == PackedAttention(torch.float32)
    check_isolation(model, packed(model, attention=attention))


def test_falcon_with_alibi_is_refused() -> None:
    config = tiny_config("falcon", alibi=True, new_decoder_architecture=False, multi_query=False)
    model = build(config, "eager")
    with pytest.raises(TrainingError, match=r"FalconForCausalLM does not take the mask.*packing: false"):
        check_isolation(model, packed(model))


def test_recurrent_layers_are_refused_by_name_and_by_measurement() -> None:
    config = Qwen3NextConfig(
        **COMMON,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"],
    )
    model = build(config, "eager")
    with pytest.raises(TrainingError, match=r"layers of the kind linear_attention.*packing: false"):
        packed_attention(model, 40)
    with pytest.raises(TrainingError, match=r"see each other: replacing one moved another's logits by \d"):
        check_isolation(model, packed(model, attention=PackedAttention()))


def test_chunked_attention_shorter_than_a_row_is_refused() -> None:
    config = Llama4TextConfig(**COMMON, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=64)
    model = build(config, "eager")
    with pytest.raises(TrainingError, match=r"chunks of 8 .*set max_length to 8 or less"):
        packed_attention(model, 40)
    assert packed_attention(model, 8) == PackedAttention(torch.float32)


def test_rows_of_one_document_need_no_check_and_the_models_mode_is_kept() -> None:
    model = build(tiny_config("llama"), "eager").train()
    alone = padded_batch(make_samples(), range(4), pad_id=0)
    check_isolation(model, alone)
    check_isolation(model, packed(model))
    assert model.training


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|eager"])
def test_an_attention_without_explicit_masks_is_refused_by_name(name: str) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = name
    with pytest.raises(TrainingError, match=rf"explicit attention mask.*'{re.escape(name)}'.*sdpa or eager"):
        packed_attention(model, 40)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_restarted_positions_alone_leak_through_the_default_cache_and_packed_inputs_have_none(
    implementation: str,
) -> None:
    model = build(MistralConfig(**COMMON, sliding_window=None), implementation)
    batch = packed(model)
    assert batch.inputs()["use_cache"] is False
    assert batch.position_ids is not None
    assert batch.documents is not None
    first = batch.documents == 0
    other = torch.where(first, (batch.input_ids + 7) % 300, batch.input_ids)
    with torch.no_grad():
        careless = [model(input_ids=ids, position_ids=batch.position_ids).logits for ids in (batch.input_ids, other)]
        careful = [model(**batch.with_ids(ids).inputs()).logits for ids in (batch.input_ids, other)]
    moved = [(after - before)[~first].abs().max() for before, after in (careless, careful)]
    assert moved[0] > 1e-3  # the hazard is real
    assert moved[1] == 0


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe"])
def test_the_loss_of_one_document_has_no_gradient_in_anothers_tokens(family: str, implementation: str) -> None:
    model = build(tiny_config(family), implementation)
    batch = at_common_width(packed(model, max_length=45), limit=256)  # with padding, as it is trained
    assert batch.documents is not None
    inputs = batch.inputs()
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, **inputs).logits
    for document in range(4):
        inside = batch.documents == document
        [gradient] = torch.autograd.grad(logits[inside].square().sum(), embedded, retain_graph=True)
        assert not gradient[~inside].any()
        assert gradient[inside].any()

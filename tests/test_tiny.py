"""The shared tiny models are what the other tests take them for."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import FAMILIES, tiny_folder, tiny_input, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe"])
def test_tiny_model_is_deterministic_and_its_logits_depend_on_the_seed(family):
    ids = tiny_input()
    with torch.no_grad():
        first, again, other = (tiny_model(family, seed=seed)(ids).logits for seed in (0, 0, 1))
    assert first.shape == (2, 12, len(tiny_tokenizer()))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_says_whether_the_head_is_the_embedding(family, tied):
    model = tiny_model(family, tied=tied)
    same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert same is tied


def test_tiny_tokenizer_returns_any_text_and_renders_chats():
    tokenizer = tiny_tokenizer()
    text = "wake me at 06:30 — schön, 日本\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_tokenizer(chat_template=False).chat_template is None


def test_tiny_folder_opens_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tiny_folder(tmp_path, "llama")
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert len(AutoTokenizer.from_pretrained(path)) == model.config.vocab_size

"""What strop saves, strop opens again bit for bit: every family, tied or not, resized or not, in every file format."""

from __future__ import annotations

import pytest

from strop.files.saving import save_model
from strop.layers.surgery import experts
from strop.models import load
from tests.models.common import logits, same_weights
from tests.tiny import FAMILIES, tiny_folder, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("form", [None, "int4-g32", "nf4-dq"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe"])
def test_a_saved_model_opens_bit_for_bit(tmp_path, family, form):
    if family == "gpt2" and form == "int4-g32":
        form = "nf4"  # compressed-tensors holds no Conv1D
    if family == "falcon" and form == "nf4-dq":
        form = "int8"  # transformers opens no FalconLinear as bitsandbytes
    kept = experts(tiny_model(family)) if form == "nf4-dq" else []  # bitsandbytes' files hold no experts
    opened = load(tiny_folder(tmp_path, family), form, keep=kept)
    save_model(opened.model, opened.tokenizer, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert same_weights(again.model, opened.model)
    assert again.scheme == opened.scheme
    assert logits(again.model).equal(logits(opened.model))
    assert again.tokenizer.chat_template == tiny_tokenizer().chat_template


@pytest.mark.parametrize("form", [None, "int8", "int4-g32-asym", "nf4"])
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_resized_embeddings_survive_every_format(tmp_path, tied, resized, form):
    model = tiny_model("llama", tied=tied)
    if resized:
        model.resize_token_embeddings(352, mean_resizing=False)
    model.save_pretrained(tmp_path / "plain")
    opened = load(tmp_path / "plain", form)
    save_model(opened.model, None, tmp_path / "saved")
    again = load(tmp_path / "saved").model
    assert same_weights(again, opened.model)
    assert again.get_input_embeddings().weight.equal(model.get_input_embeddings().weight)
    assert again.get_output_embeddings().weight.equal(model.get_output_embeddings().weight)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) is tied

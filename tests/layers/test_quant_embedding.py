"""A quantized embedding gives the rows of its dequantized table, and is one weight with a head that is tied to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from strop.errors import FormatError
from strop.layers.quant_embedding import Ends, QuantEmbedding, find_ends, install_embedding, is_table, restore_embedding
from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import linear_modules
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from tests.tiny import tiny_input, tiny_model


def table(rows: int = 40, width: int = 64) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grid", ["int8-g32", "int8", "int4-g32-asym", "int3-g32-full", "int5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_that_of_the_dequantized_table(grid: str, dtype: torch.dtype) -> None:
    qtensor = quantize_tensor(table(), parse_scheme(grid))
    layer = QuantEmbedding(qtensor, dtype)
    ids = torch.tensor([[3, 39, 0, 3], [7, 8, 9, 10]])
    assert layer(ids).dtype == dtype
    assert torch.equal(layer(ids), nn.functional.embedding(ids, qtensor.dequantize(dtype)))
    assert layer(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 64)


def test_a_cast_changes_what_is_given_out_and_no_bit_of_what_is_kept() -> None:
    layer = QuantEmbedding(quantize_tensor(table(), parse_scheme("int8-g32")), torch.float32)
    before = {name: part.clone() for name, part in layer.qtensor.tensors().items()}
    layer.to(torch.bfloat16)
    assert layer(torch.tensor([1])).dtype == layer.weight.dtype == torch.bfloat16
    assert set(layer.state_dict()) == set(before)
    assert all(torch.equal(part, before[name]) for name, part in layer.qtensor.tensors().items())
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("grid", ["int8-tensor", "nf4"])
def test_rows_that_share_scales_are_refused(grid: str) -> None:
    with pytest.raises(FormatError, match="scales of their own"):
        QuantEmbedding(quantize_tensor(table(), parse_scheme(grid)), torch.float32)


def test_the_ends_of_a_model_are_found_by_type_and_position() -> None:
    assert find_ends(tiny_model("llama", tied=False)) == Ends("model.embed_tokens", "lm_head", tied=False)
    assert find_ends(tiny_model("llama", tied=True)) == Ends("model.embed_tokens", "lm_head", tied=True)
    assert find_ends(tiny_model("gpt2")) == Ends("transformer.wte", "lm_head", tied=True)
    assert is_table(tiny_model("llama").get_input_embeddings())
    assert not is_table(tiny_model("gemma").get_input_embeddings())  # its rows are multiplied after they are looked up


def test_a_tied_head_shares_the_embeddings_memory_and_both_can_be_made_dense_again() -> None:
    model = tiny_model("llama", tied=True)
    qtensor = quantize_tensor(model.get_input_embeddings().weight, parse_scheme("int8-g32"))
    reference = tiny_model("llama", tied=True)
    reference.get_input_embeddings().weight.data = qtensor.dequantize()
    install_embedding(model, "model.embed_tokens", qtensor)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert isinstance(head, QuantLinear)
    assert all(head.get_parameter(name) is part for name, part in embedding.named_parameters())
    assert find_ends(model).tied
    assert "lm_head" not in linear_modules(model)
    with torch.no_grad():
        wanted = reference(tiny_input()).logits
        assert torch.equal(model(tiny_input()).logits, wanted)
        restore_embedding(model)
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert torch.equal(model(tiny_input()).logits, wanted)
    restore_embedding(model)  # there is nothing left to do


def test_a_head_of_its_own_stays_as_it_is() -> None:
    model = tiny_model("llama", tied=False)
    head = model.get_output_embeddings()
    weight = model.get_input_embeddings().weight
    install_embedding(model, "model.embed_tokens", quantize_tensor(weight, parse_scheme("int8")))
    assert model.get_output_embeddings() is head
    restore_embedding(model)
    assert model.get_output_embeddings() is head

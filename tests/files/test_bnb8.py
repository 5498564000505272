"""bitsandbytes' 8-bit layout: fixed bytes, the package as the other side, malformed tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from torch import Tensor

from strop.errors import FileFormatError, FormatError
from strop.files.bnb8 import decode, scheme_from_config


def config(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0} | fields


def layer() -> dict[str, Tensor]:
    values = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    codes, absmax, _ = int8_vectorwise_quant(values.half())
    return {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def test_a_row_is_its_codes_times_its_largest_magnitude_over_127() -> None:
    tensors = {
        "weight": torch.tensor([[127, -127, 0, 1]], dtype=torch.int8),
        "SCB": torch.tensor([2.54]),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    read = decode(tensors, config())
    assert read.stored_codes().tolist() == [[255, 1, 128, 129]]
    assert torch.allclose(read.dequantize(), torch.tensor([[2.54, -2.54, 0, 0.02]]), rtol=1e-6)


def test_what_bitsandbytes_quantizes_decodes_to_what_it_dequantizes() -> None:
    tensors = layer()
    read = decode(tensors, config())
    assert (read.stored_codes().to(torch.int16) - 128).to(torch.int8).equal(tensors["weight"])
    theirs = int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
    assert torch.allclose(read.dequantize(), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("threshold", "name"), [(6.0, "int8-a8-over6"), (4, "int8-a8-over4"), (0.0, "int8-a8")])
def test_the_threshold_says_how_inputs_are_rounded(threshold: float, name: str) -> None:
    assert scheme_from_config(config(llm_int8_threshold=threshold)).name == name


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"llm_int8_threshold": -1}, "llm_int8_threshold -1"),
        ({"llm_int8_threshold": "six"}, "llm_int8_threshold 'six'"),
        ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
    ],
)
def test_a_configuration_that_is_not_read_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        scheme_from_config(config(**fields))


MALFORMED: dict[str, tuple[str, Tensor | None, str]] = {
    "no scales": ("SCB", None, "are needed"),
    "no codes": ("weight", None, "are needed"),
    "one more": ("weight.absmax", torch.ones(1), r"weight\.absmax"),
    "codes of another dtype": ("weight", torch.zeros(24, 64), "weight is torch.float32"),
    "codes of one dimension": ("weight", torch.zeros(64, dtype=torch.int8), r"int8 \[out, in\]"),
    "too few scales": ("SCB", torch.ones(23), "SCB is torch.float32"),
    "16-bit scales": ("SCB", torch.ones(24).half(), "SCB is torch.float16"),
    "an infinite scale": ("SCB", torch.full((24,), torch.inf), "24 finite float32"),
    "the order of a GPU": ("weight_format", torch.tensor(1, dtype=torch.uint8), "weight_format 1; 0"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tensors_are_refused_with_layer_and_field(case: str) -> None:
    field, value, words = MALFORMED[case]
    tensors: dict[str, Tensor | None] = dict(layer()) | {field: value}
    with pytest.raises(FileFormatError, match=words) as caught:
        decode({name: part for name, part in tensors.items() if part is not None}, config(), where="a.q_proj")
    assert str(caught.value).startswith("a.q_proj: ")

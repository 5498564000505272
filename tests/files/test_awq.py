"""AutoAWQ's GEMM layout: byte fixtures, a slow decoder of its own, and malformed tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from strop.errors import FileFormatError, FormatError
from strop.files.awq import decode, scheme_from_config
from tests.files.packing_oracle import awq_layer, awq_weight, random_layer


def config(size: int = 32, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"} | fields


def layer(*, symmetric: bool = False, groups: int = 4) -> tuple[list[list[int]], dict[str, Tensor]]:
    codes, zeros, scales = random_layer(16, 128, groups, 4, symmetric=symmetric)
    return codes, awq_layer(codes, zeros, scales)


def test_the_nibbles_of_a_word_belong_to_outputs_0_2_4_6_1_3_5_7() -> None:
    tensors = {
        "qweight": torch.tensor([[0x75316420]] * 2, dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8).half(),
    }
    assert decode(tensors, config(-1)).dequantize().tolist() == [[output] * 2 for output in range(8)]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("size", "groups"), [(32, 4), (-1, 1)])
def test_every_kind_reads_as_the_slow_decoder_reads_it(size: int, groups: int, symmetric: bool) -> None:
    codes, tensors = layer(symmetric=symmetric, groups=groups)
    read = decode(tensors, config(size, zero_point=not symmetric))
    assert read.stored_codes().tolist() == codes
    assert read.scale.equal(tensors["scales"].T)
    assert read.dequantize().equal(awq_weight(tensors, 128 // groups))
    assert read.scheme.name == ("int4-g32" if size == 32 else "int4") + ("" if symmetric else "-asym") + (
        "" if size == 32 else "-sf16"
    )


def test_the_names_of_older_configurations_are_known() -> None:
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    assert scheme_from_config(old).name == "int4-g64-asym"


def test_zero_points_that_should_not_be_there_are_refused() -> None:
    with pytest.raises(FileFormatError, match="every zero point is stored as 8"):
        decode(layer()[1], config(zero_point=False))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"version": "gemv"}, "'gemv'; gemm is read"),
        ({"version": "gemv_fast"}, "'gemv_fast'"),
        ({"version": "marlin"}, "'marlin'"),
        ({"backend": "llm-awq"}, "'llm-awq'"),
        ({"bits": 3}, "bits 3; 4"),
        ({"group_size": 1}, "group_size 1"),
    ],
)
def test_a_configuration_that_is_not_read_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        scheme_from_config(config() | fields)


MALFORMED: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no scales": ({"scales": None}, "are needed"),
    "an order": ({"g_idx": torch.zeros(128, dtype=torch.int32)}, "g_idx"),
    "codes of another dtype": ({"qweight": torch.zeros(128, 2)}, "qweight is torch.float32"),
    "zero points of one dimension": ({"qzeros": torch.zeros(8, dtype=torch.int32)}, "two sizes"),
    "too few zero points": ({"qzeros": torch.zeros(3, 2, dtype=torch.int32)}, r"qzeros is \[3, 2\], needed \[4, 2\]"),
    "too few scales": ({"scales": torch.ones(4, 15).half()}, r"scales is \[4, 15\]"),
    "a NaN scale": ({"scales": torch.full((4, 16), torch.nan).half()}, "NaN or infinite"),
    "a short last group": ({"qweight": torch.zeros(100, 2, dtype=torch.int32)}, "100 inputs are no whole number"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tensors_are_refused_with_layer_and_field(case: str) -> None:
    changes, words = MALFORMED[case]
    tensors: dict[str, Tensor | None] = dict(layer()[1]) | changes
    with pytest.raises(FileFormatError, match=words) as caught:
        decode({name: tensor for name, tensor in tensors.items() if tensor is not None}, config(), where="a.q_proj")
    assert str(caught.value).startswith("a.q_proj: ")

"""GPTQ's layout: byte fixtures, a slow decoder of its own, every version, and malformed tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from strop.errors import FileFormatError, FormatError
from strop.files import compressed_tensors
from strop.files.gptq import decode, scheme_from_config
from strop.layers.quant_linear import QuantLinear
from tests.files.packing_oracle import gptq_layer, gptq_weight, random_layer

BITS = (2, 3, 4, 8)


def config(bits: int = 4, size: int = 32, *, symmetric: bool = True, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": False} | fields


def layer(bits: int = 4, *, symmetric: bool = True, version: str = "gptq", groups: int = 4, order: bool = False):
    codes, zeros, scales = random_layer(32, 128, groups, bits, symmetric=symmetric)
    index = None
    if order:
        shuffled = torch.randperm(128, generator=torch.Generator().manual_seed(1))
        index = [int(place) * groups // 128 for place in shuffled]
    return codes, gptq_layer(codes, zeros, scales, bits, version=version, index=index)


def test_the_bytes_of_a_column_are_the_codes_of_an_output_the_first_lowest() -> None:
    words = [0x76543210, 0x0FEDCBA9, 0x11111111, 0x22222222]  # inputs 0 to 7, 8 to 15, ... of the one group's outputs
    qweight = torch.tensor([[word] * 8 for word in words], dtype=torch.int64).to(torch.int32)
    tensors = {
        "qweight": qweight,
        "qzeros": torch.tensor([[0x77777777]], dtype=torch.int32),
        "scales": torch.full((1, 8), 0.5, dtype=torch.float16),
        "g_idx": torch.zeros(32, dtype=torch.int32),
    }
    read = decode(tensors, config(size=-1))
    first = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 0] + [1] * 8 + [2] * 8
    assert read.stored_codes()[0].tolist() == first
    assert read.dequantize()[0].tolist() == [(code - 8) * 0.5 for code in first]
    assert read.scheme.name == "int4-sf16"


def test_three_bits_run_on_across_words() -> None:
    codes = [[(7 * column + 3) % 8 for column in range(32)]] * 32
    tensors = gptq_layer(codes, [[4]] * 32, torch.ones(32, 1).half(), 3, version="gptq")
    # ten codes fill 30 bits, the eleventh is split 2 + 1, ten more, the next is split 1 + 2, ten more
    first, second, third = (int(word) & 0xFFFFFFFF for word in tensors["qweight"][:, 0])
    row = codes[0]
    assert [(first >> (3 * place)) & 7 for place in range(10)] == row[:10]
    assert (first >> 30) | (second & 1) << 2 == row[10]
    assert [(second >> (1 + 3 * place)) & 7 for place in range(10)] == row[11:21]
    assert (second >> 31) | (third & 3) << 1 == row[21]
    assert [(third >> (2 + 3 * place)) & 7 for place in range(10)] == row[22:]
    assert decode(tensors, config(3, -1)).stored_codes().tolist() == codes


@pytest.mark.parametrize("order", [False, True], ids=["in order", "activation order"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_every_kind_reads_as_the_slow_decoder_reads_it(bits: int, symmetric: bool, version: str, order: bool) -> None:
    codes, tensors = layer(bits, symmetric=symmetric, version=version, order=order)
    read = decode(tensors, config(bits, symmetric=symmetric, checkpoint_format=version, desc_act=order))
    assert read.stored_codes().tolist() == codes
    assert read.scale.equal(tensors["scales"].T)
    assert read.dequantize().equal(gptq_weight(tensors, bits, version=version))
    assert read.scheme.name == f"int{bits}-g32" + ("" if symmetric else "-asym")
    assert (read.group_index is not None) is order


@pytest.mark.parametrize("bits", BITS)
def test_one_group_for_a_row_and_no_order_read_too(bits: int) -> None:
    _, tensors = layer(bits, symmetric=False, groups=1)
    expected = gptq_weight(tensors, bits, version="gptq")
    del tensors["g_idx"]
    read = decode(tensors, config(bits, -1, symmetric=False))
    assert read.dequantize().equal(expected)
    assert read.scheme.name == f"int{bits}-asym-sf16"


def test_no_checkpoint_format_means_the_first_version() -> None:
    _, tensors = layer(symmetric=False)
    assert decode(tensors, config(symmetric=False)).dequantize().equal(gptq_weight(tensors, 4, version="gptq"))


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_symmetric_zero_points_of_either_version_are_known_whatever_the_label(version: str, label: str) -> None:
    _, tensors = layer(version=version)
    read = decode(tensors, config(checkpoint_format=label))
    assert read.dequantize().equal(gptq_weight(tensors, 4, version=version))


def test_symmetric_files_with_other_zero_points_are_refused() -> None:
    _, tensors = layer(symmetric=False)
    with pytest.raises(FileFormatError, match=r"says that the grid is symmetric.*7 \(v1\) or 8 \(v2\)"):
        decode(tensors, config())


def test_dynamic_rules_leave_bits_and_groups_to_each_layer() -> None:
    rules = {"+:.*down_proj": {"bits": 8, "group_size": 64}}
    assert scheme_from_config(config(dynamic=rules)) is None
    _, tensors = layer(8, groups=2)
    read = decode(tensors, config(dynamic=rules))
    assert read.scheme.name == "int8-g64"
    assert read.dequantize().equal(gptq_weight(tensors, 8, version="gptq"))


def test_a_layer_in_activation_order_computes_and_has_the_gradient_of_its_weight() -> None:
    _, tensors = layer(order=True)
    held = QuantLinear(decode(tensors, config(desc_act=True)))
    dense = gptq_weight(tensors, 4, version="gptq")
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = held(x)
    assert torch.allclose(y, x @ dense.T, atol=1e-5)
    y.square().sum().backward()
    assert torch.allclose(x.grad, 2 * (x.detach() @ dense.T) @ dense, atol=1e-4)
    held.to(torch.bfloat16)
    assert held.group_index.dtype == torch.int32
    assert held.dense_weight().equal(dense)
    state = held.state_dict()
    assert state["group_index"].tolist() == tensors["g_idx"].tolist()


def test_activation_order_is_not_written_to_compressed_tensors() -> None:
    _, tensors = layer(order=True)
    with pytest.raises(FormatError, match="activation order"):
        compressed_tensors.encode(decode(tensors, config(desc_act=True)), "a.b")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 5}, "bits 5; 2, 3, 4 and 8"),
        ({"bits": "4"}, "bits '4'"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": None}, "group_size None"),
        ({"checkpoint_format": "marlin"}, "'marlin'; gptq and gptq_v2"),
        ({"checkpoint_format": "bitblas"}, "'bitblas'"),
        ({"is_marlin_format": True}, "Marlin"),
    ],
)
def test_a_configuration_that_is_not_read_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        scheme_from_config(config() | fields)


def without(name: str) -> dict[str, Tensor | None]:
    return {name: None}


MALFORMED: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no scales": (without("scales"), "are needed"),
    "no zero points": (without("qzeros"), "are needed"),
    "one more": ({"extra": torch.ones(1)}, "extra"),
    "codes of another dtype": ({"qweight": torch.zeros(16, 32, dtype=torch.int64)}, "qweight is torch.int64"),
    "codes of one dimension": ({"qweight": torch.zeros(16, dtype=torch.int32)}, "two sizes"),
    "no codes": ({"qweight": torch.zeros(0, 32, dtype=torch.int32)}, "two sizes"),
    "too few codes": ({"qweight": torch.zeros(15, 32, dtype=torch.int32)}, r"qweight is \[15, 32\], needed \[16, 32\]"),
    "too few zero points": ({"qzeros": torch.zeros(3, 4, dtype=torch.int32)}, r"qzeros is \[3, 4\]"),
    "too few scales": ({"scales": torch.ones(3, 32).half()}, r"scales is \[3, 32\]"),
    "integer scales": ({"scales": torch.ones(4, 32, dtype=torch.int32)}, "scales is torch.int32"),
    "an infinite scale": ({"scales": torch.full((4, 32), torch.inf).half()}, "NaN or infinite"),
    "an order of another length": ({"g_idx": torch.zeros(130, dtype=torch.int32)}, "no whole number of"),
    "an order that is a float": ({"g_idx": torch.zeros(128)}, "g_idx is torch.float32"),
    "groups of unequal size": ({"g_idx": torch.zeros(128, dtype=torch.int32)}, "does not put 128 inputs"),
    "groups that are not there": ({"g_idx": torch.arange(128, dtype=torch.int32) // 32 + 1}, "does not put"),
    "negative groups": ({"g_idx": torch.arange(128, dtype=torch.int32) // 32 - 1}, "does not put"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tensors_are_refused_with_layer_and_field(case: str) -> None:
    changes, words = MALFORMED[case]
    tensors: dict[str, Tensor | None] = dict(layer()[1]) | changes
    with pytest.raises(FileFormatError, match=words) as caught:
        decode({name: tensor for name, tensor in tensors.items() if tensor is not None}, config(), where="a.q_proj")
    assert str(caught.value).startswith("a.q_proj: ")


def test_a_short_last_group_is_refused_with_the_reason() -> None:
    codes, zeros, scales = random_layer(32, 96, 2, 4, symmetric=True)
    tensors = gptq_layer(codes, zeros, scales, 4, version="gptq", index=[column // 64 for column in range(96)])
    with pytest.raises(FileFormatError, match="96 inputs are no whole number of groups of 64"):
        decode(tensors, config(size=64))

"""compressed-tensors' layout: byte fixtures, the compressed-tensors package as reader and writer, malformed tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strop.errors import FileFormatError, FormatError
from strop.files.compressed_tensors import config_for, decode, encode, scheme_from_config
from strop.numerics.packing import pack
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scheme import Mode, parse_format, parse_scheme

BITS = (2, 3, 4, 5, 6, 7, 8)
GRIDS = [
    f"int{bits}{share}{mode}" for bits in BITS for share in ("", "-g32", "-tensor") for mode in ("", "-full", "-asym")
] + ["fp8", "fp8-tensor", "fp8-g32", "mxfp4", "int4-g32-sbf16", "int4-sf16", "int4-g32-sf32", "int4-g32-asym-sbf16"]


def weight(rows: int = 33, columns: int = 96, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.01


def local(tensors: dict[str, Tensor], name: str = "a.b") -> dict[str, Tensor]:
    assert all(key.startswith(f"{name}.") for key in tensors)
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}


def same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return (
        one.scheme == other.scheme
        and one.shape == other.shape
        and mine.keys() == theirs.keys()
        and all(
            mine[name].dtype == theirs[name].dtype and mine[name].float().equal(theirs[name].float()) for name in mine
        )
    )


def test_the_bytes_of_a_symmetric_4_bit_row() -> None:
    # codes -8..7 in turn, scale 0.5: nibbles q + 8 from the lowest; 10 codes are 40 bits, so the second word is padded
    values = torch.tensor([[-8, -7, -1, 0, 1, 2, 3, 7, 5, -4]], dtype=torch.float32)
    qtensor = quantize_tensor(values * 0.5, parse_scheme("int4"), scale=torch.tensor([[0.5]]))
    tensors = encode(qtensor, "layer")
    assert [word & 0xFFFFFFFF for word in tensors["layer.weight_packed"][0].tolist()] == [0xFBA98710, 0x0000004D]
    assert tensors["layer.weight_scale"].equal(torch.tensor([[0.5]]))
    assert tensors["layer.weight_shape"].equal(torch.tensor([1, 10]))
    assert list(tensors) == ["layer.weight_packed", "layer.weight_scale", "layer.weight_shape"]


def test_the_bytes_of_an_asymmetric_3_bit_weight() -> None:
    # stored codes 0..7 are 3 bits each, least significant first; zero points of 2 rows are packed along dim 0
    codes = torch.tensor([[0, 1, 2, 3], [7, 6, 5, 4]])
    zero = torch.tensor([[1], [6]])
    qtensor = QuantizedTensor.from_tensors(
        {
            "codes": torch.tensor([[0b10001000, 0b0110], [0b01110111, 0b1001]], dtype=torch.uint8),
            "scale": torch.tensor([[1.0], [2.0]]),
            "zero_point": zero.to(torch.uint8),
        },
        parse_scheme("int3-asym"),
        (2, 4),
    )
    assert qtensor.stored_codes().equal(codes.to(torch.uint8))
    tensors = encode(qtensor, "x")
    assert tensors["x.weight_packed"].tolist() == [[0b011010001000], [0b100101110111]]
    assert tensors["x.weight_zero_point"].tolist() == [[0b110001]]
    assert tensors["x.weight_zero_point"].dtype == torch.int32


@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_encoded_decodes_to_the_same_codes_scales_and_scheme(grid: str) -> None:
    scheme = parse_scheme(grid)
    qtensor = quantize_tensor(weight(), scheme)
    assert same(decode(local(encode(qtensor, "a.b")), config_for(scheme, ["lm_head"])), qtensor)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from(BITS),
    mode=st.sampled_from(["", "-full", "-asym"]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
)
def test_any_shape_comes_back(bits: int, mode: str, rows: int, columns: int) -> None:
    scheme = parse_scheme(f"int{bits}{mode}")
    qtensor = quantize_tensor(weight(rows, columns, seed=rows), scheme)
    assert same(decode(local(encode(qtensor, "a.b")), config_for(scheme, [])), qtensor)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_library_decompresses_ours_to_the_same_weight_bit_for_bit(grid: str) -> None:
    scheme = parse_scheme(grid)
    qtensor = quantize_tensor(weight(), scheme)
    config = QuantizationConfig.model_validate(config_for(scheme, ["lm_head"]))
    (group,) = config.config_groups.values()
    tensors = local(encode(qtensor, "a.b"))
    if grid != "mxfp4":
        tensors["weight_scale"] = tensors["weight_scale"].float()  # as a float32 model holds it
    restored = BaseCompressor.get_value_from_registry(config.format).decompress(tensors, group)["weight"]
    assert restored.equal(qtensor.dequantize())


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if "-full" not in grid and "-s" not in grid])
def test_what_the_library_compresses_decodes_to_what_it_decompresses(grid: str) -> None:
    scheme = parse_scheme(grid)
    config = config_for(scheme, [])
    config["config_groups"] = {"group_0": next(iter(config["config_groups"].values()))}
    theirs = QuantizationConfig.model_validate(config)
    (group,) = theirs.config_groups.values()
    qtensor = quantize_tensor(weight(), scheme)
    assert qtensor.scale is not None
    state = {"weight": weight(), "weight_scale": qtensor.scale.float()}
    if scheme.granularity.value == "tensor":
        state["weight_scale"] = state["weight_scale"].reshape(1)
    if qtensor.zero_point is not None:
        zero = qtensor.zero_point.to(torch.int16) - (1 << (scheme.bits - 1))
        state["weight_zero_point"] = zero.to(torch.int8).reshape(state["weight_scale"].shape)
    compressor = BaseCompressor.get_value_from_registry(theirs.format)
    compressed = compressor.compress(state, group)
    restored = compressor.decompress(compressed, group)["weight"]
    read = decode(compressed, config)
    assert read.dequantize().equal(restored)
    assert read.scheme.mode is (Mode.ASYMMETRIC if "asym" in grid else Mode.SYMMETRIC)


@pytest.mark.parametrize("kind", ["int-quantized", "naive-quantized"])
def test_one_int8_per_weight_is_read(kind: str) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).reshape(4, 64)
    config = config_for(parse_scheme("int8"), []) | {"format": kind}
    read = decode({"weight": codes, "weight_scale": torch.full((4, 1), 0.5)}, config)
    assert read.dequantize().equal(codes.float() * 0.5)


def test_a_full_range_grid_keeps_its_name_and_its_negative_scales() -> None:
    scheme = parse_scheme("int4-g32-full")
    qtensor = quantize_tensor(weight(), scheme)
    tensors = encode(qtensor, "a.b")
    assert (tensors["a.b.weight_scale"] < 0).any()
    assert decode(local(tensors), config_for(scheme, [])).scheme == scheme


def test_a_group_with_another_name_is_described_by_its_fields() -> None:
    config = config_for(parse_scheme("int4-g32-full"), [])
    (group,) = config["config_groups"].values()
    assert scheme_from_config(config | {"config_groups": {"group_0": group}}).name == "int4-g32"
    assert scheme_from_config(config | {"config_groups": {"int8-g32": group}}).name == "int4-g32"
    group["weights"] |= {"strategy": None}
    assert scheme_from_config(config | {"config_groups": {"group_0": group}}).name == "int4-g32"


def test_the_bytes_of_mxfp4() -> None:
    values = torch.tensor([[0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 0.0] * 2]) / 4
    tensors = encode(quantize_tensor(values, parse_scheme("mxfp4")), "layer")
    assert list(tensors) == ["layer.weight_packed", "layer.weight_scale"]
    assert bytes(tensors["layer.weight_packed"][0].tolist()).hex() == "10325476a9cbed0f" * 2
    assert tensors["layer.weight_scale"].tolist() == [[125]]  # 2^-2
    assert tensors["layer.weight_scale"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("weight_scale", None, "are needed for mxfp4"),
        ("weight_scale", torch.ones(33, 3), "weight_scale is torch.float32"),
        ("weight_scale", torch.ones(33, 2, dtype=torch.uint8), r"scale is \[33, 2\]"),
        ("weight_scale", torch.full((33, 3), 255, dtype=torch.uint8), "NaN"),
        ("weight_packed", torch.ones(33, 47, dtype=torch.uint8), "in_features 94 is not divisible"),
        ("weight_packed", torch.ones(33, 48, dtype=torch.int32), "weight_packed is torch.int32"),
        ("weight_shape", torch.tensor([33, 96]), "weight_shape"),
    ],
)
def test_malformed_mxfp4_is_refused_with_layer_and_field(field: str, value: Tensor | None, words: str) -> None:
    scheme = parse_scheme("mxfp4")
    tensors: dict[str, Any] = local(encode(quantize_tensor(weight(), scheme), "a.b")) | {field: value}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(FileFormatError, match=words) as caught:
        decode(present, config_for(scheme, []), where="a.b")
    assert str(caught.value).startswith("a.b: ")


def test_mxfp4_of_other_blocks_is_refused() -> None:
    config = config_for(parse_scheme("mxfp4"), [])
    (group,) = config["config_groups"].values()
    group["weights"]["group_size"] = 16
    with pytest.raises(FormatError, match="'group_size': 16"):
        scheme_from_config(config)


@pytest.mark.parametrize("grid", ["nf4", "nf4-dq", "fp4", "fp8_e5m2"])
def test_what_the_format_cannot_express_is_refused_with_the_nearest(grid: str) -> None:
    scheme = parse_scheme(grid)
    for attempt in (lambda: config_for(scheme, []), lambda: encode(quantize_tensor(weight(64, 64), scheme), "a")):
        with pytest.raises(FormatError, match=r"int4-g32|nearest is fp8"):
            attempt()


def test_grids_of_gguf_files_are_refused_with_the_nearest() -> None:
    scheme = parse_format("gguf:q4_k").scheme
    for attempt in (lambda: config_for(scheme, []), lambda: encode(quantize_tensor(weight(2, 256), scheme), "a")):
        with pytest.raises(FormatError, match=r"q4_k: is a grid of GGUF files.*int4-g32-asym"):
            attempt()


def changed(**fields: Any) -> dict[str, Any]:
    return config_for(parse_scheme("int4-g32"), []) | fields


def group_with(**fields: Any) -> dict[str, Any]:
    config = config_for(parse_scheme("int4-g32"), [])
    (group,) = config["config_groups"].values()
    return config | {"config_groups": {"group_0": group | fields}}


def weights_with(**fields: Any) -> dict[str, Any]:
    (group,) = config_for(parse_scheme("int4-g32"), [])["config_groups"].values()
    return group_with(weights=group["weights"] | fields)


CONFIGS = {
    "no groups": (changed(config_groups={}), "config_groups is missing"),
    "two groups": (changed(config_groups={"a": {"weights": {}}, "b": {}}), r"2 groups .*a, b"),
    "a quantized cache": (changed(kv_cache_scheme={"num_bits": 8}), "cache"),
    "another format": (changed(format="marlin-24"), "marlin-24"),
    "not compressed": (changed(quantization_status="frozen"), "frozen"),
    "input activations": (group_with(input_activations={"num_bits": 8}), "input activations"),
    "no weights": (group_with(weights=None), "says nothing of weights"),
    "dynamic": (weights_with(dynamic=True), "dynamic"),
    "one bit": (weights_with(num_bits=1), "1 bits"),
    "sixteen bits": (weights_with(num_bits=16), "16 bits"),
    "a float of 4 bits": (weights_with(type="float"), "type float"),
    "blocks": (weights_with(strategy="block"), "strategy block"),
    "no group size": (weights_with(group_size=None), "group_size None"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_is_not_read_is_refused_by_name(case: str) -> None:
    config, words = CONFIGS[case]
    with pytest.raises(FormatError, match=words):
        scheme_from_config(config)


def good(grid: str = "int4-g32-asym") -> dict[str, Tensor]:
    return local(encode(quantize_tensor(weight(), parse_scheme(grid)), "a.b"))


MALFORMED: dict[str, tuple[str, Any, str]] = {
    "missing scale": ("weight_scale", None, "weight_scale"),
    "missing shape": ("weight_shape", None, "are needed"),
    "missing zero point": ("weight_zero_point", None, "weight_zero_point"),
    "scale of integers": ("weight_scale", torch.ones(33, 3, dtype=torch.int8), "weight_scale is torch.int8"),
    "scale of another shape": ("weight_scale", torch.ones(33, 4), "weight_scale is"),
    "scale turned": ("weight_scale", torch.ones(3, 33), "weight_scale is"),
    "words of another dtype": ("weight_packed", torch.zeros(33, 12, dtype=torch.int64), "weight_packed is torch.int64"),
    "too few words": ("weight_packed", torch.zeros(33, 11, dtype=torch.int32), "weight_packed is"),
    "a shape of three": ("weight_shape", torch.tensor([1, 2, 3]), "two sizes"),
    "a shape of fractions": ("weight_shape", torch.tensor([33.0, 96.0]), "two sizes"),
    "a negative shape": ("weight_shape", torch.tensor([-33, 96]), "two sizes"),
    "another shape": ("weight_shape", torch.tensor([33, 97]), "weight_packed is"),
    "zero points not packed": ("weight_zero_point", torch.zeros(33, 3, dtype=torch.int8), "weight_zero_point is"),
    "one more": ("weight_order", torch.zeros(96, dtype=torch.int32), "weight_order"),
    "groups of unequal size": ("weight_g_idx", torch.zeros(96, dtype=torch.int32), "weight_g_idx does not put"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tensors_are_refused_with_layer_and_field(case: str) -> None:
    field, value, words = MALFORMED[case]
    tensors = good() | ({} if value is None else {field: value})
    if value is None:
        del tensors[field]
    with pytest.raises(FileFormatError, match=words) as caught:
        decode(tensors, config_for(parse_scheme("int4-g32-asym"), []), where="model.layers.0.q_proj")
    assert str(caught.value).startswith("model.layers.0.q_proj: ")


@pytest.mark.parametrize("grid", ["int4-g32", "int4-g32-asym"])
def test_activation_order_by_group_is_read_with_codes_where_they_were(grid: str) -> None:
    scheme, order = parse_scheme(grid), torch.randperm(96, generator=torch.Generator().manual_seed(0))
    index = (order.argsort() // 32).to(torch.int32)
    held = quantize_tensor(weight()[:, order], scheme)  # as the calibration saw the columns
    codes = pack(held.stored_codes()[:, order.argsort()], 4)  # as the file holds them
    tensors = local(encode(dataclasses.replace(held, codes=codes), "a.b")) | {"weight_g_idx": index}
    config = config_for(scheme, [])
    config["config_groups"][grid]["weights"]["actorder"] = "group"
    read = decode(tensors, config)
    assert read.codes.equal(codes)
    assert read.group_index.equal(index)
    assert read.dequantize().equal(held.dequantize()[:, order.argsort()])
    with pytest.raises(FormatError, match="activation order"):
        encode(read, "a.b")
    with pytest.raises(FileFormatError, match="weight_g_idx"):
        decode({name: tensor for name, tensor in tensors.items() if name != "weight_g_idx"}, config)
    not_ordered = decode(tensors | {"weight_g_idx": torch.full((96,), -1, dtype=torch.int32)}, config)
    assert not_ordered.group_index is None


def test_one_int8_per_weight_that_does_not_fit_the_bits_is_refused() -> None:
    config = config_for(parse_scheme("int4"), []) | {"format": "int-quantized"}
    with pytest.raises(FileFormatError, match="do not fit 4 bits"):
        decode({"weight": torch.full((2, 8), 9, dtype=torch.int8), "weight_scale": torch.ones(2, 1)}, config)

"""bitsandbytes' 4-bit layout: byte fixtures, the bitsandbytes package as reader and writer, malformed tensors."""

from __future__ import annotations

import json
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor
from transformers import BitsAndBytesConfig

from strop.errors import FileFormatError, FormatError
from strop.files.bnb4 import check_shape, config_for, decode, encode, scheme_from_config
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scheme import parse_scheme

GRIDS = ["nf4", "nf4-dq", "fp4", "fp4-dq", "nf4-g128", "nf4-g32-dq", "fp4-g256"]
STATE = "weight.quant_state.bitsandbytes__nf4"


def weight(rows: int = 24, columns: int = 256, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def local(tensors: dict[str, Tensor], name: str = "a.b") -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}


def theirs(grid: str, values: Tensor) -> dict[str, Tensor]:
    scheme = parse_scheme(grid)
    packed, state = quantize_4bit(
        values, blocksize=scheme.group_size, compress_statistics=scheme.double_quant, quant_type=scheme.format.name
    )
    return {"weight": packed} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}


def state_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    (raw,) = (tensor for name, tensor in tensors.items() if "quant_state" in name)
    return json.loads(bytes(raw.tolist()))


def same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    mine, others = one.tensors(), other.tensors()
    return (
        one.scheme == other.scheme
        and one.shape == other.shape
        and mine.keys() == others.keys()
        and all(mine[name].dtype == others[name].dtype and mine[name].equal(others[name]) for name in mine)
    )


def test_the_bytes_of_a_row_have_the_first_code_in_the_high_nibble() -> None:
    scheme = parse_scheme("nf4")
    values = torch.tensor([[-1.0, 1.0, 0.0, 0.5626170039176941] + [0.0] * 60])  # codes 0, 15, 7, 13, then 7
    tensors = encode(quantize_tensor(values, scheme), "layer")
    assert tensors["layer.weight"].shape == (32, 1)
    assert tensors["layer.weight"][:3, 0].tolist() == [0x0F, 0x7D, 0x77]
    assert tensors["layer.weight.absmax"].tolist() == [1.0]
    raw = tensors["layer.weight.quant_state.bitsandbytes__nf4"]
    assert bytes(raw.tolist()) == b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [1, 64]}'


@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_encoded_decodes_to_the_same_codes_and_scales(grid: str) -> None:
    qtensor = quantize_tensor(weight(), parse_scheme(grid))
    assert same(decode(local(encode(qtensor, "a.b"))), qtensor)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 31), (1, 65), (5, 33)])
@pytest.mark.parametrize("grid", ["nf4", "nf4-dq"])
def test_shapes_that_fill_no_block_and_no_byte_come_back(grid: str, shape: tuple[int, int]) -> None:
    qtensor = quantize_tensor(weight(*shape), parse_scheme(grid))
    assert same(decode(local(encode(qtensor, "a.b"))), qtensor)
    read = decode(theirs(grid, weight(*shape)))
    assert read.codes.equal(qtensor.codes)
    assert read.dequantize().equal(qtensor.dequantize())


def test_rows_that_bitsandbytes_misreads_are_not_written() -> None:
    check_shape(parse_scheme("nf4"), (10, 128))
    with pytest.raises(FormatError, match=r"q_proj: in_features 96 is no multiple of the block 64"):
        check_shape(parse_scheme("nf4"), (10, 96), where="q_proj")


@pytest.mark.parametrize("grid", GRIDS)
def test_bitsandbytes_dequantizes_ours_to_the_same_weight_bit_for_bit(grid: str) -> None:
    qtensor = quantize_tensor(weight(), parse_scheme(grid))
    tensors = local(encode(qtensor, "a.b"))
    state = QuantState.from_dict(
        {key: part for key, part in tensors.items() if key != "weight"}, device=torch.device("cpu")
    )
    assert state.dtype == torch.float32
    assert dequantize_4bit(tensors["weight"], state).equal(qtensor.dequantize())


@pytest.mark.parametrize("grid", GRIDS)
def test_what_bitsandbytes_quantizes_decodes_to_what_it_dequantizes(grid: str) -> None:
    tensors = theirs(grid, weight())
    read = decode(tensors, config_for(parse_scheme(grid), []))
    state = QuantState.from_dict(
        {key: part.clone() for key, part in tensors.items() if key != "weight"}, device=torch.device("cpu")
    )
    assert read.scheme == parse_scheme(grid)
    assert read.dequantize().equal(dequantize_4bit(tensors["weight"], state))


@pytest.mark.parametrize("grid", ["nf4", "nf4-dq", "nf4-g128"])
def test_the_bytes_are_those_that_bitsandbytes_writes(grid: str) -> None:
    mine = local(encode(quantize_tensor(weight(), parse_scheme(grid)), "a.b"))
    others = theirs(grid, weight())
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == others[name].dtype
        assert tensor.shape == others[name].shape
        assert tensor.equal(others[name]), name


def test_transformers_understands_the_configuration() -> None:
    for grid in ("nf4", "nf4-dq", "fp4"):
        config = BitsAndBytesConfig.from_dict(config_for(parse_scheme(grid), ["lm_head"]))
        assert isinstance(config, BitsAndBytesConfig)
        assert config.quantization_method() == grid[:3]
        assert config.bnb_4bit_use_double_quant is grid.endswith("dq")
        assert config.bnb_4bit_compute_dtype is torch.float32
        assert config.llm_int8_skip_modules == ["lm_head"]


@pytest.mark.parametrize("grid", ["int4-g32", "int8", "fp8"])
def test_what_the_format_cannot_express_is_refused(grid: str) -> None:
    with pytest.raises(FormatError, match="compressed-tensors"):
        config_for(parse_scheme(grid), [])
    with pytest.raises(FormatError, match="nf4 and fp4 alone"):
        encode(quantize_tensor(weight(), parse_scheme(grid)), "a")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"load_in_8bit": True}, "8-bit"),
        ({"load_in_4bit": False}, "8-bit"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "stored as bfloat16"),
        ({"bnb_4bit_quant_type": "int4"}, "'int4'"),
    ],
)
def test_a_configuration_that_is_not_read_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        scheme_from_config(config_for(parse_scheme("nf4"), []) | fields)


def json_tensor(value: object) -> Tensor:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def state_with(**fields: Any) -> Tensor:
    return json_tensor(state_of(theirs("nf4-dq", weight())) | fields)


MALFORMED: dict[str, tuple[str, Tensor | None, str]] = {
    "no state": (STATE, None, "0 quant_state"),
    "two states": ("weight.quant_state.bitsandbytes__fp4", json_tensor({}), "2 quant_state"),
    "state no JSON": (STATE, json_tensor(b"{{{"), "quant_state is not the JSON"),
    "state not UTF-8": (STATE, json_tensor(b"\xff\xfe"), "quant_state is not the JSON"),
    "state no object": (STATE, json_tensor([1]), "quant_state is not the JSON"),
    "state too long": (STATE, json_tensor(b"[" * 20_000), "20000 values"),
    "another type": (STATE, state_with(quant_type="fp4"), "quant_type 'fp4'"),
    "three sizes": (STATE, state_with(shape=[1, 2, 3]), "shape"),
    "a negative size": (STATE, state_with(shape=[-24, -256]), "shape"),
    "another shape": (STATE, state_with(shape=[24, 257]), "weight is"),
    "blocks of 100": (STATE, state_with(blocksize=100), "blocksize 100"),
    "nested blocks of 64": (STATE, state_with(nested_blocksize=64), "nested_blocksize 64"),
    "an infinite offset": (STATE, state_with(nested_offset=float("inf")), "nested_offset inf"),
    "no offset": (STATE, state_with(nested_offset=None), "nested_offset None"),
    "another table": ("weight.quant_map", torch.linspace(-1, 1, 16), "quant_map is not the table"),
    "another dynamic map": ("weight.nested_quant_map", torch.linspace(-1, 1, 256), "nested_quant_map is not"),
    "scales not nested": ("weight.absmax", torch.ones(96), "nested_codes is"),
    "too few scales": ("weight.absmax", torch.ones(95, dtype=torch.uint8), "nested_codes is"),
    "too few codes": ("weight", torch.zeros(100, 1, dtype=torch.uint8), "weight is"),
    "codes of another dtype": ("weight", torch.zeros(24 * 128, 1, dtype=torch.int8), "weight is torch.int8"),
    "no table": ("weight.quant_map", None, "are needed"),
    "one more": ("weight.SCB", torch.ones(1), "weight.SCB"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tensors_are_refused_with_layer_and_field(case: str) -> None:
    field, value, words = MALFORMED[case]
    tensors = theirs("nf4-dq", weight())
    if value is None:
        del tensors[field]
    else:
        tensors[field] = value
    with pytest.raises(FileFormatError, match=words) as caught:
        decode(tensors, where="model.layers.0.q_proj")
    assert str(caught.value).startswith("model.layers.0.q_proj: ")


def test_the_package_whose_layout_this_is_is_the_one_that_was_tested() -> None:
    assert tuple(int(part) for part in bitsandbytes.__version__.split(".")[:2]) >= (0, 46)

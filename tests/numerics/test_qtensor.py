"""QuantizedTensor: the bytes it holds, the way back from its parts, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from strop.errors import FormatError
from strop.numerics import QuantizedTensor, Scheme, parse_format, parse_scheme, quantize_tensor
from strop.numerics.packing import pack

from .schemes import ALL_TEXTS, named


def weight(rows: int = 6, columns: int = 24) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))


def test_the_codes_of_a_small_weight_are_those_computed_by_hand() -> None:
    """int4: scale 15 / 7.5 = 2; codes q + 8, the first in the low nibble."""
    quantized = quantize_tensor(torch.tensor([[-15.0, 2.0, 4.0, 14.0]]), parse_scheme("int4"))
    assert quantized.scale is not None
    assert quantized.scale.tolist() == [[2.0]]
    assert quantized.stored_codes().tolist() == [[0, 9, 10, 15]]  # -7.5 is a tie, which goes to -8
    assert quantized.codes.tolist() == [[0x90, 0xFA]]
    assert quantized.dequantize().tolist() == [[-16.0, 2.0, 4.0, 14.0]]


def test_the_zero_point_is_stored_as_codes_are() -> None:
    quantized = quantize_tensor(torch.tensor([[-10.0, 0.0, 20.0, 5.0]]), parse_scheme("int4-asym"))
    assert quantized.zero_point is not None
    assert (quantized.zero_point.dtype, quantized.zero_point.tolist()) == (torch.uint8, [[5]])  # -3 + 8
    assert quantized.stored_codes().tolist() == [[0, 5, 15, 7]]
    assert quantized.dequantize().tolist() == [[-10.0, 0.0, 20.0, 4.0]]


@pytest.mark.parametrize("scheme", named(ALL_TEXTS), ids=str)
def test_shapes_and_dtypes_of_the_parts_are_as_documented(scheme: Scheme) -> None:
    quantized = quantize_tensor(weight(), scheme)
    rows, columns = quantized.shape
    assert (rows, columns) == (6, 24)
    is_codebook = scheme.granularity.value == "block"
    size = [-(-rows * columns * 4 // 8)] if is_codebook else [rows, -(-columns * scheme.bits // 8)]
    assert list(quantized.codes.shape) == size
    assert quantized.codes.dtype == torch.uint8
    assert (quantized.nested is not None) == scheme.double_quant == (quantized.scale is None)
    assert (quantized.zero_point is not None) == ("asym" in scheme.name)
    if quantized.scale is not None:
        assert quantized.scale.dtype == scheme.scale_dtype
        assert tuple(quantized.scale.shape) == scheme.scale_shape((rows, columns))
    assert quantized.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert quantized.nbytes == sum(part.nbytes for part in quantized.tensors().values())


@pytest.mark.parametrize("scheme", named(ALL_TEXTS), ids=str)
def test_a_tensor_is_rebuilt_from_its_parts(scheme: Scheme) -> None:
    quantized = quantize_tensor(weight(), scheme)
    parts = {name: part.clone() for name, part in quantized.tensors().items()}
    again = QuantizedTensor.from_tensors(parts, scheme, quantized.shape)
    assert torch.equal(again.dequantize(), quantized.dequantize())
    assert again.tensors().keys() == parts.keys()


def test_parts_that_do_not_fit_are_refused_all_at_once() -> None:
    scheme = parse_scheme("int4-g8-asym")
    parts = quantize_tensor(weight(), scheme).tensors()
    del parts["zero_point"]
    parts["scale"] = parts["scale"].float()
    parts["codes"] = parts["codes"][:, :-1]
    parts["nested_codes"] = parts["codes"]
    with pytest.raises(FormatError) as raised:
        QuantizedTensor.from_tensors(parts, scheme, (6, 24))
    assert str(raised.value) == (
        "a weight [6, 24] as int4-g8-asym: unexpected nested_codes; codes is [6, 11] torch.uint8, needed [6, 12] "
        "torch.uint8; scale is [6, 3] torch.float32, needed [6, 3] torch.float16; zero_point is missing"
    )


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_that_end_within_a_byte_are_restored(bits: int, columns: int) -> None:
    quantized = quantize_tensor(weight(4, columns), parse_scheme(f"int{bits}"))
    assert quantized.dequantize().shape == (4, columns)
    values = quantized.stored_codes().float().sub(2 ** (bits - 1)).mul(quantized.scales())
    assert torch.equal(quantized.dequantize(), values)


@pytest.mark.parametrize("scheme", named(ALL_TEXTS), ids=str)
def test_narrow_results_are_rounded_once_from_float32(scheme: Scheme) -> None:
    quantized = quantize_tensor(weight(), scheme)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(quantized.dequantize(dtype), quantized.dequantize().to(dtype))


@pytest.mark.parametrize("text", ["int3", "int4-g32", "nf4", "nf4-dq", "fp8", "int8-tensor"])
def test_a_large_weight_is_worked_on_in_pieces_with_the_same_result(text: str) -> None:
    scheme = parse_scheme(text)
    large = weight(1100, 1024)
    whole = quantize_tensor(large, scheme)
    if scheme.granularity.value == "tensor" or scheme.double_quant:
        assert whole.dequantize().shape == (1100, 1024)
        return
    parts = [quantize_tensor(large[start : start + 100], scheme) for start in range(0, 1100, 100)]
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))


@pytest.mark.parametrize(("text", "kind"), [("gguf:q4_0", "Q4_0"), ("gguf:q8_0", "Q8_0")])
def test_gguf_types_hold_our_grids_without_loss(text: str, kind: str) -> None:
    """Our codes and scales in llama.cpp's block layout, read by its own package, are our values bit for bit."""
    gguf = pytest.importorskip("gguf")
    quantized = quantize_tensor(weight(8, 96), parse_format(text).scheme)
    assert quantized.scale is not None
    codes = quantized.stored_codes().view(-1, 32)
    # After the float16 scale, Q4_0 has 16 bytes, byte j with element j low and element j + 16 high, as q + 8; Q8_0 has
    # 32 signed bytes, and ours are q + 128 (uint8 wraps around).
    body = codes[:, :16] | codes[:, 16:] << 4 if kind == "Q4_0" else codes - 128
    blocks = torch.cat([quantized.scale.view(-1, 1).view(torch.uint8), body], dim=1).view(8, -1)
    theirs = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(theirs), quantized.dequantize())


def test_integer_weights_are_refused() -> None:
    with pytest.raises(FormatError, match=r"a weight has a float dtype, got torch\.int32"):
        quantize_tensor(torch.ones(2, 2, dtype=torch.int32), parse_scheme("int4"))


def test_no_gradient_flows_into_stored_parts() -> None:
    quantized = quantize_tensor(weight().requires_grad_(), parse_scheme("int4-g8"))
    assert not any(part.requires_grad for part in quantized.tensors().values())


def test_it_is_frozen() -> None:
    quantized = quantize_tensor(weight(), parse_scheme("int4"))
    with pytest.raises(AttributeError):
        quantized.shape = (1, 1)  # type: ignore[misc]


@pytest.mark.parametrize("text", ["int4-g8", "int4-g8-asym", "int3-g8-full"])
def test_inputs_whose_groups_stand_apart_take_the_scale_of_their_own_group(text: str) -> None:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    held = quantize_tensor(weight()[:, order], parse_scheme(text))
    parts = held.tensors() | {"group_index": (order.argsort() // 8).to(torch.int32)}
    parts["codes"] = pack(held.stored_codes()[:, order.argsort()], held.scheme.bits)
    apart = QuantizedTensor.from_tensors(parts, held.scheme, held.shape)
    assert apart.dequantize().equal(held.dequantize()[:, order.argsort()])
    assert apart.nbytes == held.nbytes + 24 * 4
    assert apart.tensors().keys() == parts.keys()


@pytest.mark.parametrize("text", ["int4", "int4-tensor", "nf4", "fp8"])
def test_a_weight_without_groups_of_inputs_has_no_index_of_them(text: str) -> None:
    held = quantize_tensor(weight(), parse_scheme(text))
    with pytest.raises(FormatError, match="unexpected group_index"):
        QuantizedTensor.from_tensors(
            held.tensors() | {"group_index": torch.zeros(24, dtype=torch.int32)}, held.scheme, held.shape
        )

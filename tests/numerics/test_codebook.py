"""NF4 and FP4: the nearest level by brute force, and bitsandbytes as the peer, differences enumerated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strop.numerics import CodebookFormat, codebook, parse_scheme, quantize_tensor, unpack
from strop.numerics.codebook import dynamic_map, level_table, nest

from .schemes import CODEBOOK_TEXTS, hard_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 128), (7, 64), (30, 66), (2, 5), (3, 43)]  # the last three end in a short block, of 60, 10 and 1 values


@pytest.fixture(scope="module")
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes.functional")


def weights(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return (0.1 * torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator)).to(dtype)


def their_codes(packed: Tensor, count: int) -> Tensor:
    """bitsandbytes packs the first of two codes into the high nibble."""
    flat = packed.view(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).view(-1)[:count]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codes_and_scales_equal_those_of_bitsandbytes(
    bitsandbytes: Any, name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = weights(shape, dtype)
    ours = quantize_tensor(weight, parse_scheme(name))
    packed, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type=name)
    mine, theirs = unpack(ours.codes, 4, weight.numel()), their_codes(packed, weight.numel())
    assert ours.scale is not None
    assert torch.equal(ours.scale, state.absmax)
    # Enumerated: FP4 has two codes for zero, 0 and 8; theirs takes either, ours the first. Nothing else differs.
    both_zero = (mine == 0) & (theirs == 8) if name == "fp4" else torch.zeros_like(mine, dtype=torch.bool)
    assert torch.equal(mine[~both_zero], theirs[~both_zero])


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_values_on_the_midpoints_take_the_level_that_bitsandbytes_gives_them(bitsandbytes: Any, name: str) -> None:
    form = parse_scheme(name).format
    assert isinstance(form, CodebookFormat)
    levels = torch.tensor(sorted(form.levels))
    middle = (levels[:-1] + levels[1:]) / 2
    around = torch.cat(
        [middle, torch.nextafter(middle, torch.tensor(2.0)), torch.nextafter(middle, torch.tensor(-2.0))]
    )
    weight = torch.cat([torch.ones(1), around, torch.zeros(64 - 1 - around.numel())]).view(1, 64)
    mine = unpack(quantize_tensor(weight, parse_scheme(name)).codes, 4, 64)
    theirs = their_codes(bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type=name)[0], 64)
    differ = mine != theirs
    assert all(
        name == "fp4" and pair == (0, 8) for pair in zip(mine[differ].tolist(), theirs[differ].tolist(), strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_restored_weights_equal_those_of_bitsandbytes(bitsandbytes: Any, name: str, dtype: torch.dtype) -> None:
    weight = weights((64, 128), dtype)
    restored = quantize_tensor(weight, parse_scheme(name)).dequantize(dtype)
    assert torch.equal(restored, bitsandbytes.dequantize_4bit(*bitsandbytes.quantize_4bit(weight, quant_type=name)))


def test_the_dynamic_map_is_that_of_bitsandbytes(bitsandbytes: Any) -> None:
    assert torch.equal(dynamic_map(torch.device("cpu")), bitsandbytes.create_dynamic_map())


def test_tables_are_built_whatever_the_default_device_is() -> None:
    weight = weights((4, 64), torch.float32)
    expected = quantize_tensor(weight, parse_scheme("nf4-dq")).dequantize()
    for table in (codebook._cells, codebook._pair_table, level_table, dynamic_map):
        table.cache_clear()
    with torch.device("meta"):
        restored = quantize_tensor(weight, parse_scheme("nf4-dq")).dequantize()
    assert torch.equal(restored, expected)


def distance_to_midpoint(values: Tensor) -> Tensor:
    """How far each value is from the nearest midpoint between two levels of the dynamic map."""
    levels = dynamic_map(values.device)
    return (values.unsqueeze(-1) - (levels[:-1] + levels[1:]) / 2).abs().amin(-1)


@pytest.mark.parametrize("blocks", [1, 3, 255, 256, 257, 1000])
def test_nested_scales_equal_those_of_bitsandbytes(bitsandbytes: Any, blocks: int) -> None:
    weight = weights((blocks, 64), torch.float32)
    ours = quantize_tensor(weight, parse_scheme("nf4-dq")).nested
    state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)[1]
    assert ours is not None
    assert torch.equal(ours.offset, state.offset)
    assert torch.equal(ours.scale, state.state2.absmax)
    # Enumerated: its compiled routine looks a value up by its place among 65536, so that one within 2^-15 of a midpoint
    # can fall on either side; a block of equal scales (a single one) is all midpoint, and restored exactly by any code.
    differ = ours.codes != state.absmax
    centred = (weight.abs().amax(1) - ours.offset)[differ]
    relative = centred / ours.scale[differ.nonzero().view(-1) // 256].clamp(min=1e-38)
    assert (distance_to_midpoint(relative) <= 2.0**-15).all()
    assert differ.sum() <= max(1, blocks // 50)


@pytest.mark.parametrize("blocks", [2, 256, 1000])
def test_nested_codes_equal_the_reference_of_bitsandbytes(bitsandbytes: Any, blocks: int) -> None:
    """Its generic routine (for dtypes that the compiled one does not know) takes the nearest level, as ours does."""
    scale = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks))
    nested = nest(scale)
    quantize_blockwise = torch.ops.bitsandbytes.quantize_blockwise.default
    codes, _ = quantize_blockwise((scale - nested.offset).double(), bitsandbytes.create_dynamic_map(), 256)
    assert torch.equal(nested.codes, codes)


@given(hard_weights(), st.sampled_from([text for text in CODEBOOK_TEXTS if "dq" not in text]))
@settings(deadline=None, max_examples=200)
def test_codes_are_nearest_by_brute_force(weight: Tensor, text: str) -> None:
    scheme = parse_scheme(text)
    assert isinstance(scheme.format, CodebookFormat)
    levels = torch.tensor(scheme.format.levels, dtype=torch.float64)
    quantized = quantize_tensor(weight, scheme)
    assert quantized.scale is not None
    flat = weight.double().view(-1)
    scale = quantized.scale.double().repeat_interleave(scheme.group_size or 0)[: flat.numel()]
    if (scale < 1e-30).any():
        scale = scale.clamp(min=1e-38)  # smaller scales are taken as this, so that subnormal values fall short
    distances = (flat.unsqueeze(1) / scale.clamp(min=1e-38).unsqueeze(1) - levels).abs()
    chosen = distances.gather(1, quantized.stored_codes().view(-1, 1).long()).squeeze(1)
    assert (chosen <= distances.amin(1) + 1e-6).all()


def test_a_short_last_block_has_its_own_scale() -> None:
    weight = torch.ones(1, 70)
    weight[0, 64:] = torch.tensor([0.5, -0.25, 0.0, 0.5, 0.1, 0.2])
    quantized = quantize_tensor(weight, parse_scheme("nf4"))
    assert quantized.scale is not None
    assert quantized.scale.tolist() == [1.0, 0.5]
    assert quantized.codes.numel() == 35
    assert quantized.dequantize()[0, 64:68].tolist() == [0.5, pytest.approx(-0.25, abs=0.07), 0.0, 0.5]


def test_nested_scales_err_by_less_than_a_hundredth_of_their_spread() -> None:
    scale = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    error = (nest(scale).dequantize() - scale).abs()
    assert error.max() < 0.01 * (scale.max() - scale.min())


def test_a_block_of_zeros_is_restored_as_zeros_under_nested_scales() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    restored = quantize_tensor(weight, parse_scheme("nf4-dq")).dequantize()
    assert (restored[2] == 0).all()
    assert (restored[1] != 0).any()

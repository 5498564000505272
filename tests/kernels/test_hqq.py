"""HQQ's scales by the kernel: one result on every instruction set and thread count, as good as the reference's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strop import kernels
from strop.methods import hqq, rtn
from strop.methods.hqq import power_error
from strop.numerics import QuantizedTensor, parse_scheme

from .values import hard, plain

TEXTS = [
    *("int8", "int8-tensor", "int4", "int4-g16", "int4-g32-asym", "int4-g64-full", "int4-g32-sbf16", "int3-g24-asym"),
    *("int2-g32", "int2-g600-asym", "uint4-g32-asym", "int4-g31"),
]


def columns(text: str) -> int:
    return 2 * (parse_scheme(text).group_size or 75)


def group_errors(weight: Tensor, quantized: QuantizedTensor, p: float = 0.7) -> Tensor:
    size = quantized.scheme.group_size or weight.shape[1]
    error = (weight.double() - quantized.dequantize().double()).abs().pow(p)
    return error.view(-1, error.numel() if quantized.scheme.name.endswith("tensor") else size).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_no_group_is_worse_than_rounded_and_all_are_as_good_as_the_references(
    instruction_set: str, text: str, dtype: torch.dtype
) -> None:
    scheme, weight = parse_scheme(text), plain(64, columns(text)).to(dtype)
    found = hqq(weight, scheme)
    with kernels.forced("reference"):
        expected = hqq(weight, scheme)
    assert (group_errors(weight, found) <= group_errors(weight, rtn(weight, scheme)) * (1 + 1e-5)).all()
    assert power_error(weight, found) <= power_error(weight, expected) * 1.002
    assert (found.scales() == expected.scales()).float().mean() > 0.9  # decisions on a knife's edge go either way


@pytest.mark.parametrize("text", ["int4-g32-asym", "int3-g24-asym", "int4-g64-full", "int8"])
def test_every_instruction_set_has_the_portable_ones_bits(instruction_set: str, text: str) -> None:
    scheme, weight = parse_scheme(text), hard(48, columns(text))
    found = hqq(weight, scheme)
    with kernels.forced("portable"):
        expected = hqq(weight, scheme)
    assert all(torch.equal(value, expected.tensors()[name]) for name, value in found.tensors().items())


def test_the_threads_do_not_matter(instruction_set: str) -> None:
    scheme, weight, threads, found = parse_scheme("int4-g32-asym"), plain(512, 640), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(hqq(weight, scheme).scales())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30], ids=str)
def test_weights_of_any_size_are_not_made_worse(instruction_set: str, size: float) -> None:
    scheme, weight = parse_scheme("int4-g32-sf32"), plain(16, 64) * size
    weight[3] = 0.0
    found = hqq(weight, scheme)
    assert (group_errors(weight, found) <= group_errors(weight, rtn(weight, scheme)) * (1 + 1e-5)).all()
    assert not found.dequantize()[3].any()

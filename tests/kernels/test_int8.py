"""Rows rounded to int8 and their products: against PyTorch bit for bit, odd shapes, extreme codes, NaN, threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from strop.kernels import int8

pytestmark = pytest.mark.usefixtures("instruction_set")

SHAPES = [(1, 1, 1), (3, 5, 7), (4, 300, 33), (16, 64, 16), (33, 65, 129), (40, 1040, 72), (64, 576, 96), (487, 31, 34)]
"""Rows, columns, outputs."""
TYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def codes_of(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return x.long() @ weight.long().T


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scales_are_those_of_the_formula(shape, scaled, dtype):
    count, columns, _ = shape
    x, factor = random(count, columns, dtype=dtype), random(columns, seed=1).abs() if scaled else None
    values = x.float() if factor is None else x.float() * factor
    peak = values.abs().amax(1, keepdim=True)
    found = int8.round_rows(x, factor)
    assert torch.equal(found.scales[:, None], peak / 127)
    assert torch.equal(found.codes[:count, :columns].float(), (values * (torch.tensor(127.0) / peak)).round())
    assert not found.codes[:count, columns:].any()


def test_rows_that_are_not_finite_give_nan_and_rows_of_zeros_zeros():
    x = torch.ones(4, 70)
    x[0, 3], x[1, 69], x[2] = float("nan"), float("inf"), 0.0
    y = torch.empty(4, 5)
    int8.product(int8.round_rows(x), torch.ones(5, 70, dtype=torch.int8), y)
    assert y[:2].isnan().all()
    assert not y[2].any()
    assert torch.allclose(y[3], torch.tensor(70.0))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_the_exact_sum_times_both_scales(shape, back, dtype):
    count, columns, outputs = shape
    x, weight, channel = random(count, columns), codes_of(outputs, columns), random(outputs, seed=2)
    rows = int8.round_rows(x)
    stored = weight.t().contiguous() if back else weight
    y = torch.empty(count, outputs, dtype=dtype)
    int8.product(rows, stored, y, channel=channel, back=back)
    sums = exact(rows.codes[:count, :columns], weight)
    assert torch.equal(y, (sums.float() * rows.scales[:, None] * channel).to(dtype))
    int8.product(rows, stored, y, back=back)
    assert torch.equal(y, (sums.float() * rows.scales[:, None]).to(dtype))


def test_extreme_codes_do_not_saturate():
    rows = int8.round_rows(torch.ones(2, 4096))
    weight = torch.full((3, 4096), -128, dtype=torch.int8)
    y = torch.empty(2, 3)
    int8.product(rows, weight, y)
    assert torch.equal(y, torch.full((2, 3), -128.0 * 127 * 4096) * rows.scales[0])


@pytest.mark.parametrize("back", [False, True])
def test_tiles_and_torch_give_the_same_bits_whatever_the_threads(back):
    rows, weight = int8.round_rows(random(70, 512, dtype=torch.bfloat16)), codes_of(512, 512)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = torch.empty(70, 512, dtype=torch.bfloat16)
            int8.product(rows, weight, y, back=back)
            found.append(y)
    finally:
        torch.set_num_threads(threads)
    plain = torch.empty(70, 512, dtype=torch.bfloat16)
    int8.plain_product(rows, weight, plain, back=back)
    assert all(torch.equal(plain, y) for y in found)


def test_a_part_of_a_wider_matrix_is_written_and_no_more():
    rows, weight = int8.round_rows(random(5, 40)), codes_of(9, 40)
    wide = torch.full((5, 30), 7.0)
    int8.product(rows, weight, wide[:, 10:19])
    alone = torch.empty(5, 9)
    int8.product(rows, weight, alone)
    assert torch.equal(wide[:, 10:19], alone)
    assert (wide[:, :10] == 7.0).all()
    assert (wide[:, 19:] == 7.0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_alone_are_exact_wherever_rows_begin(shape, instruction_set):
    count, columns, outputs = shape
    x, weight = codes_of(count, columns + 3)[:, 1 : columns + 1], codes_of(outputs + 1, columns)[1:]
    found = int8.sums(x, weight)
    assert (found is not None) == (instruction_set == "avx2")  # elsewhere torch multiplies
    if found is not None:
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), exact(x, weight))


def test_sums_of_the_most_extreme_codes_fit():
    x, weight = torch.full((2, 1 << 16), -128, dtype=torch.int8), torch.full((1, 1 << 16), 127, dtype=torch.int8)
    found = int8.sums(x, weight)
    assert found is None or found.tolist() == [[-128 * 127 * 65536]] * 2


def test_tensors_without_bytes_have_no_sums():
    with FakeTensorMode():
        x = torch.empty(3, 64, dtype=torch.int8)
        assert int8.sums(x, x) is None

"""What rounding lost, against the same on whole tensors; what a grid can only clip; folded scales found again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from strop.numerics import loss, quantize_tensor
from strop.numerics.groups import CHUNK_VALUES
from strop.numerics.loss import fold_scales, rounding_loss
from strop.numerics.scheme import parse_scheme


def weights(rows: int = 48, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "name", ["int4-g32", "int3-g32-asym", "int4-g32-full", "int8-tensor", "nf4", "nf4-dq", "fp8", "mxfp4", "gguf:q4_k"]
)
def test_errors_are_those_of_the_whole_weight_whatever_the_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = parse_scheme(name.removeprefix("gguf:"))
    weight = weights().bfloat16()
    quantized = quantize_tensor(weight, scheme)
    error = quantized.dequantize().double() - weight.double()
    monkeypatch.setattr(loss, "row_chunks", lambda rows, _: [slice(i, min(i + 7, rows)) for i in range(0, rows, 7)])
    found = rounding_loss(weight, quantized)
    assert found.squared_error == pytest.approx(float(error.square().sum()), rel=1e-6)
    assert found.squared_weight == pytest.approx(float(weight.double().square().sum()), rel=1e-6)
    assert found.largest_error == pytest.approx(float(error.abs().max()), rel=1e-6)
    assert found.values == weight.numel()


@pytest.mark.parametrize(
    "name", ["int4-g32", "int4-g32-asym", "int8", "int8-g32", "int8-g32-sbf16", "nf4", "nf4-dq", "fp4", "fp8"]
)
def test_a_grid_that_covers_the_range_clips_nothing(name: str) -> None:
    weight = weights()
    assert rounding_loss(weight, quantize_tensor(weight, parse_scheme(name))).saturated == 0


def test_what_lies_more_than_half_a_step_beyond_the_ends_is_counted_and_nothing_else() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([7.0, 7.49, 7.51, -8.0, -8.49, -8.51])
    quantized = quantize_tensor(weight, parse_scheme("int4-g32"), scale=torch.ones(1, 1))
    assert rounding_loss(weight, quantized).saturated == 2
    assert rounding_loss(weight, quantized).saturation == 2 / 32
    shifted = quantize_tensor(
        weight + 8, parse_scheme("int4-g32-asym"), scale=torch.ones(1, 1), zero_point=torch.tensor([[-8]])
    )
    assert rounding_loss(weight + 8, shifted).saturated == 2
    full = torch.zeros(1, 32)
    full[0, :2] = torch.tensor([8.0, -8.0])  # one of the two ends is a step short
    assert rounding_loss(full, quantize_tensor(full, parse_scheme("int4-g32-full"))).saturated == 1


def test_the_last_level_of_a_codebook_reaches_half_its_gap_beyond() -> None:
    weight = torch.zeros(1, 64)
    weight[0, :3] = torch.tensor([1.0, 1.13, 1.15])  # nf4 ends in 0.7230 and 1
    quantized = quantize_tensor(weight, parse_scheme("nf4"), scale=torch.ones(1))
    assert rounding_loss(weight, quantized).saturated == 1


def test_a_weight_of_zeros_loses_nothing() -> None:
    for name in ("int4-g32", "nf4", "q4_k"):
        found = rounding_loss(torch.zeros(4, 256), quantize_tensor(torch.zeros(4, 256), parse_scheme(name)))
        assert (found.relative_error, found.saturated) == (0.0, 0)


def test_folded_scales_are_found_again_and_none_where_nothing_was_folded() -> None:
    weight, scheme = weights(96, 128), parse_scheme("int4-g32")
    generator = torch.Generator().manual_seed(1)
    rows, columns = (torch.rand(shape, generator=generator) * 3 + 0.3 for shape in ((96, 1), (1, 128)))
    scaled = weight * rows * columns
    quantized = quantize_tensor(scaled, scheme)
    found = fold_scales(weight, quantized)
    assert found is not None
    whole = weight * found[0] * found[1]
    assert float((whole - scaled).norm() / scaled.norm()) < 0.03
    assert rounding_loss(whole, quantized).relative_error == pytest.approx(
        rounding_loss(scaled, quantized).relative_error, rel=0.05
    )
    assert fold_scales(weight, quantize_tensor(weight, scheme)) is None
    assert fold_scales(weight, quantize_tensor(weight, parse_scheme("int2-g32"))) is None
    assert fold_scales(weight * 0, quantize_tensor(weight * 0, scheme)) is None


class _Floats(TorchDispatchMode):
    """The most float values that an operation made, views of the weight left out."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.place, self.most = weight.data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_floating_point() and made.data_ptr() != self.place:
            self.most = max(self.most, made.numel())
        return made


@pytest.mark.parametrize("name", ["int4-g32", "nf4", "int3-asym"])
def test_a_large_weight_is_never_copied_whole(name: str) -> None:
    weight = weights(1024, 1024).bfloat16()
    quantized = quantize_tensor(weight, parse_scheme(name))
    with _Floats(weight) as seen:
        rounding_loss(weight, quantized)
    assert 0 < seen.most <= CHUNK_VALUES < weight.numel()

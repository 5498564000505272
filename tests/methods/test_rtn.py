"""Rounding to nearest: with min-max it is the plain grid, with other observers the range they choose."""

from __future__ import annotations

import pytest
import torch

from strop.errors import FormatError
from strop.methods import METHODS, rtn, weighted_error
from strop.numerics import OBSERVERS, parse_scheme, quantize_tensor


def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 128, generator=generator) * torch.rand(16, 1, generator=generator)


TEXTS = ["int8", "int4", "int3-g32", "int4-g32-asym", "int4-g32-full", "int4-tensor", "nf4", "nf4-dq", "fp8"]


@pytest.mark.parametrize("text", TEXTS)
def test_minmax_is_the_plain_grid(text: str) -> None:
    scheme = parse_scheme(text)
    assert torch.equal(rtn(weight(), scheme).dequantize(), quantize_tensor(weight(), scheme).dequantize())
    assert torch.equal(METHODS["rtn"](weight(), scheme).dequantize(), rtn(weight(), scheme).dequantize())


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("observer", list(OBSERVERS))
def test_every_observer_serves_every_scheme(text: str, observer: str) -> None:
    scheme = parse_scheme(text)
    quantized = rtn(weight(), scheme, observer=observer)
    assert quantized.scheme == scheme
    assert weighted_error(weight(), quantized) < weight().square().mean().item()


@pytest.mark.parametrize("text", ["int4", "int3-g32", "int4-tensor", "int2-g32-asym"])
def test_mse_errs_less_than_minmax(text: str) -> None:
    scheme = parse_scheme(text)
    plain = weighted_error(weight(), rtn(weight(), scheme))
    assert weighted_error(weight(), rtn(weight(), scheme, observer="mse")) < 0.98 * plain


def test_an_outlier_in_ten_thousand_costs_percentile_nothing() -> None:
    outlying = torch.randn(100, 200, generator=torch.Generator().manual_seed(0))
    outlying[3, 3] = 500.0
    scheme = parse_scheme("int4-tensor")
    others = torch.ones_like(outlying, dtype=torch.bool)
    others[3, 3] = False
    errors = {
        observer: (rtn(outlying, scheme, observer=observer).dequantize() - outlying)[others].square().mean().item()
        for observer in ("minmax", "percentile")
    }
    assert errors["percentile"] < 0.05 * errors["minmax"]


def test_names_and_observers_that_are_wrong_are_refused() -> None:
    with pytest.raises(FormatError, match="unknown observer 'mean'"):
        rtn(weight(), parse_scheme("int4"), observer="mean")
    for observer in OBSERVERS:
        with pytest.raises(FormatError, match="layer 3: in_features 128 is not divisible by group size 48"):
            rtn(weight(), parse_scheme("int4-g48"), observer=observer, where="layer 3")
        broken = weight()
        broken[0, 0] = float("nan")
        with pytest.raises(FormatError, match="layer 3: holds NaN"):
            rtn(broken, parse_scheme("int4"), observer=observer, where="layer 3")

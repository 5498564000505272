"""The `-a8` part of a format: every name reads back, and what cannot be is refused with what can."""

from __future__ import annotations

import pytest
import torch

from strop.errors import FormatError
from strop.numerics.activations import ActivationRange, Activations, tensor_codes, tensor_scale, token_codes
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme

NAMES = ("int8-a8", "int8-a8-asym", "int8-a8-static", "int8-a8-over6", "int8-a8-over4.5", "int8-tensor-full-a8")


@pytest.mark.parametrize("text", NAMES)
def test_a_name_reads_back(text: str) -> None:
    assert parse_scheme(text).name == text


@pytest.mark.parametrize("text", ["llm.int8", "LLM-int8", "llm_int8"])
def test_llm_int8_is_known_by_its_own_names(text: str) -> None:
    assert parse_scheme(text).activations == Activations(threshold=6.0)


def test_a_weight_without_a8_leaves_activations_alone() -> None:
    assert parse_scheme("int8").activations is None
    assert parse_scheme("int8") != parse_scheme("int8-a8")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("int4-a8", "int8-a8"),
        ("int8-g32-a8", "int8-a8"),
        ("int8-asym-a8", "int8-a8"),
        ("nf4-a8", "int8-a8"),
        ("int8-a8-over", "over6"),
        ("int8-a8-over0", "positive"),
        ("int8-a8-stat", "static"),
        ("int8-a8-static-asym", "static"),
        ("int8-a9", "a8"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(text: str, told: str) -> None:
    with pytest.raises(FormatError, match=told):
        parse_scheme(text)


def test_outliers_are_split_off_per_token_alone() -> None:
    with pytest.raises(FormatError, match="per token"):
        Activations(ActivationRange.TENSOR, threshold=6.0)


def test_codes_at_a_static_scale_are_those_of_its_range() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5, 2.0]])
    scale = torch.tensor([tensor_scale(-2.0, 1.0)])
    codes, scales = tensor_codes(x, scale)
    dynamic, own = token_codes(x)
    assert codes.equal(dynamic)
    assert scales.equal(own)
    assert tensor_scale(0.0, 0.0) == 1.0


@pytest.mark.parametrize("scale", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_a_static_scale_must_be_a_positive_number(scale: float | None) -> None:
    qtensor = quantize_tensor(torch.ones(2, 4), parse_scheme("int8-a8-static"))
    with pytest.raises(FormatError, match="positive scale"):
        qtensor.with_activation_scale(scale)

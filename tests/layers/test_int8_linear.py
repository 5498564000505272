"""int8 layers against an int64 oracle, their gradient, their outliers, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from strop.errors import FormatError, TargetError
from strop.layers.int8_linear import Int8Linear, OutlierInt8Linear
from strop.layers.lora_linear import LoraLinear
from strop.layers.quantized import quantized_linear
from strop.layers.surgery import linear_modules, quantize_linears
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scheme import parse_scheme
from tests.tiny import FAMILIES, tiny_input, tiny_model

DYNAMIC = ("int8-a8", "int8-a8-asym", "int8-tensor-a8", "int8-full-a8")


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def layer(text: str, *, rows: int = 24, columns: int = 96, static: float | None = None) -> Int8Linear:
    qtensor = quantize_tensor(draw(rows, columns, seed=1, scale=0.1), parse_scheme(text)).with_activation_scale(static)
    made = quantized_linear(qtensor, draw(rows, seed=2))
    assert isinstance(made, Int8Linear)
    return made


def oracle(module: Int8Linear, x: Tensor, *, static: float | None = None) -> Tensor:
    """Token by token, sums in int64."""
    weight = module.qtensor.stored_codes().long() - 128
    scale = module.qtensor.scales().expand(weight.shape[0], 1).flatten()
    assert module.bias is not None
    rows = []
    for token in x.reshape(-1, x.shape[-1]).float():
        zero = torch.tensor(0.0)
        if module.scheme.name.endswith("asym"):
            low, high = token.min().clamp(max=0), token.max().clamp(min=0)
            step = (high - low) / 255
            zero = torch.round(-128 - low / step).clamp(-128, 127)
        else:
            step = token.abs().max() / 127.5 if static is None else torch.tensor(static)
        codes = (torch.round(token / step) + zero).clamp(-128, 127)
        sums = ((codes - zero).long()[None] * weight).sum(1)
        rows.append(sums.float() * step * scale + module.bias)
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("text", DYNAMIC)
def test_outputs_equal_an_int64_oracle_exactly(text: str) -> None:
    module, x = layer(text), draw(2, 5, 96) + 0.5
    assert module(x).equal(oracle(module, x))


def test_static_outputs_equal_the_oracle_and_clip_beyond_the_scale() -> None:
    module, x = layer("int8-a8-static", static=0.01), draw(2, 5, 96)
    assert (x.abs() > 1.275).any()
    assert module(x).equal(oracle(module, x, static=0.01))


@pytest.mark.parametrize("text", DYNAMIC)
def test_extreme_codes_with_a_zero_point_do_not_overflow(text: str) -> None:
    columns = 4096
    qtensor = quantize_tensor(torch.ones(4, columns), parse_scheme(text), scale=None)
    qtensor = QuantizedTensor(
        torch.full((4, columns), 255, dtype=torch.uint8), qtensor.scale, None, qtensor.scheme, (4, columns)
    )
    module = Int8Linear(qtensor, torch.zeros(4))
    x = torch.ones(1, columns)
    assert module(x).equal(oracle(module, x))


@pytest.mark.parametrize("text", DYNAMIC)
def test_the_error_is_that_of_8_bits(text: str) -> None:
    module, x = layer(text), draw(7, 96)
    assert module.bias is not None
    exact = x @ module.dense_weight().T + module.bias
    assert (module(x) - exact).norm() < 0.01 * exact.norm()


def test_a_token_does_not_depend_on_those_beside_it() -> None:
    module, x = layer("int8-a8"), draw(6, 96)
    assert module(x)[2].equal(module(x[2:3])[0])
    assert module(torch.zeros(1, 96)).equal(module.bias[None])  # type: ignore[index]
    assert module(x[:0]).shape == (0, 24)


@pytest.mark.parametrize("text", [*DYNAMIC, "int8-a8-static", "int8-a8-over6"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_and_in_its_token(text: str, value: float) -> None:
    qtensor = quantize_tensor(draw(8, 96, seed=1), parse_scheme(text)).with_activation_scale(0.05)
    x = draw(3, 96)
    clean = quantized_linear(qtensor)(x)
    x[1, 4] = value
    y = quantized_linear(qtensor)(x)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()
    assert (y[0] - clean[0]).abs().max() < 0.1 * clean.abs().max()


def test_the_gradient_of_the_input_passes_straight_through() -> None:
    module, x = layer("int8-a8"), draw(3, 96).requires_grad_()
    upstream = draw(3, 24, seed=5)
    (grad,) = torch.autograd.grad(module(x), x, upstream)
    assert grad.equal(upstream @ module.dense_weight())


def test_an_adapter_trains_on_top() -> None:
    adapted = LoraLinear(layer("int8-a8"), 2, 4, generator=torch.Generator().manual_seed(0))
    adapted(draw(3, 96)).sum().backward()
    assert adapted.lora_B.grad is not None
    assert adapted.lora_B.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in adapted.base.parameters())


@pytest.mark.parametrize("text", ["int8-a8", "int8-a8-static", "int8-a8-over6"])
def test_casting_the_model_leaves_codes_and_scales_as_they_are(text: str) -> None:
    qtensor = quantize_tensor(draw(8, 96, seed=1), parse_scheme(text)).with_activation_scale(0.0123)
    module = quantized_linear(qtensor, draw(8))
    module.to(torch.bfloat16)
    assert module.bias is not None
    assert module.bias.dtype == torch.bfloat16
    kept = module.qtensor.tensors()
    for name, tensor in qtensor.tensors().items():
        assert kept[name].dtype == tensor.dtype
        assert kept[name].equal(tensor)
    assert module(draw(2, 96).bfloat16()).dtype == torch.bfloat16


def test_autocast_changes_the_dtype_of_the_output_and_no_sum() -> None:
    module, x = layer("int8-a8"), draw(3, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert y.equal(module(x).bfloat16())


# --- outliers


def outlier_layer(rows: int = 24, columns: int = 96, threshold: str = "6") -> OutlierInt8Linear:
    made = quantized_linear(
        quantize_tensor(draw(rows, columns, seed=1, scale=0.1), parse_scheme(f"int8-a8-over{threshold}"))
    )
    assert isinstance(made, OutlierInt8Linear)
    return made


def planted(tokens: int = 9, columns: int = 96, places: tuple[int, ...] = (3, 50)) -> Tensor:
    x = draw(tokens, columns)
    x = x.clamp(-4, 4)
    for place in places:
        x[:, place] = 40 + 20 * draw(tokens, seed=place).abs()
    return x


def test_planted_outliers_cost_a_small_part_of_what_they_cost_without_the_split() -> None:
    split, x = outlier_layer(), planted()
    whole = Int8Linear(quantize_tensor(draw(24, 96, seed=1, scale=0.1), parse_scheme("int8-a8")))
    exact = x @ split.dense_weight().T
    error, error_without = (split(x) - exact).norm(), (whole(x) - x @ whole.dense_weight().T).norm()
    assert error < 0.1 * error_without
    assert error < 0.002 * exact.norm()


def test_the_split_equals_the_formula_of_llm_int8() -> None:
    split, x = outlier_layer(), planted()
    weight = split.qtensor.stored_codes().long() - 128
    outlier = torch.tensor([bool((x[:, column].abs() > 6).any()) for column in range(96)])
    rows = []
    for token in x:
        kept = token[~outlier]
        step = kept.abs().max() / 127
        sums = (torch.round(kept / step).long()[None] * weight[:, ~outlier]).sum(1)
        rows.append(sums.float() * step * split.qtensor.scales().flatten())
    rest = x[:, outlier] @ (weight[:, outlier].float() * split.qtensor.scales()).T
    assert torch.allclose(split(x), torch.stack(rows) + rest, rtol=1e-6, atol=1e-6)


def test_the_split_is_close_to_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    x = planted(columns=64).half().float()
    codes, absmax, _ = functional.int8_vectorwise_quant(draw(16, 64, seed=1, scale=0.1).half())
    scheme = parse_scheme("llm.int8")
    ours = QuantizedTensor(codes.view(torch.uint8) ^ 0x80, absmax.float()[:, None] / 127, None, scheme, (16, 64))
    x16, x_absmax, outliers = functional.int8_vectorwise_quant(x.half(), threshold=6.0)
    theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(x, x16, codes, x_absmax, absmax.float(), outliers, None)
    assert outliers.tolist() == [3, 50]
    assert (OutlierInt8Linear(ours)(x) - theirs.float()).norm() < 1e-4 * theirs.float().norm()


def test_the_threshold_decides_what_is_split_off() -> None:
    x = planted(places=(3,)).clamp(max=40.0)
    low, high = outlier_layer(threshold="6"), outlier_layer(threshold="100")
    exact = x @ low.dense_weight().T
    assert (low(x) - exact).norm() < 0.1 * (high(x) - exact).norm()


# --- exchanging layers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["int8-a8", "int8-a8-asym", "int8-a8-over6"])
def test_the_layers_of_a_model_are_exchanged_and_it_still_answers(family: str, text: str) -> None:
    model = tiny_model(family)
    with torch.inference_mode():
        before = model(tiny_input()).logits
        names = quantize_linears(model, parse_scheme(text))
        after = model(tiny_input()).logits
    assert names == list(linear_modules(model))
    assert all(type(module).__name__.endswith("Int8Linear") for module in linear_modules(model).values())
    assert 0 < (after - before).norm() < 0.1 * before.norm()


def test_a_static_scale_must_be_given_for_every_layer() -> None:
    model = tiny_model("llama")
    names = list(linear_modules(model))
    with pytest.raises(FormatError, match=rf"{names[1]}: int8-a8-static: calibration must give a positive scale"):
        quantize_linears(model, parse_scheme("int8-a8-static"), activation_scales={names[0]: 0.1})
    model = tiny_model("llama")
    quantize_linears(model, parse_scheme("int8-a8-static"), activation_scales=dict.fromkeys(names, 0.1))
    assert isinstance(model.get_submodule(names[0]), Int8Linear)
    with pytest.raises(TargetError, match="only a dense layer"):
        quantize_linears(model, parse_scheme("int8-a8"))


@pytest.mark.parametrize("text", ["int8", "int8-a8-over6"])
def test_a_layer_refuses_the_scheme_of_another(text: str) -> None:
    with pytest.raises(FormatError, match=r"int8-a8|OutlierInt8Linear"):
        Int8Linear(quantize_tensor(draw(8, 32), parse_scheme(text)))
    with pytest.raises(FormatError, match=r"int8-a8|threshold"):
        OutlierInt8Linear(quantize_tensor(draw(8, 32), parse_scheme(text.replace("-over6", ""))))


def test_a_layer_is_a_module_of_frozen_parameters() -> None:
    module = layer("int8-a8-static", static=0.1)
    assert isinstance(module, nn.Module)
    assert set(module.state_dict()) == {"codes", "scale", "activation_scale", "bias"}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert "int8-a8-static" in repr(module)

"""`QuantLinear` under torch.compile: one ordinary operator, with the numbers of an eager layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strop.layers import operators
from strop.layers.quant_linear import QuantLinear
from strop.numerics import parse_scheme, quantize_tensor

TEXTS = ["int8", "int4-g32", "int4-g16-asym", "int3-g32", "nf4", "nf4-dq", "fp8", "q4_k"]
# Dynamo's own doing: it makes a Function with an old constructor, and enters a deprecated module.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


def layer_of(text: str) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 512, generator=generator), torch.randn(24, generator=generator)
    return QuantLinear(quantize_tensor(weight, parse_scheme(text)), bias)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def compiled(layer: QuantLinear, backend: str = "aot_eager") -> torch.nn.Module:
    torch.compiler.reset()
    made = torch.compile(layer, fullgraph=True, backend=backend)
    assert isinstance(made, torch.nn.Module)
    return made


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_compiled_layer_gives_an_eager_one_s_numbers(text: str, dtype: torch.dtype) -> None:
    layer = layer_of(text)
    call = compiled(layer)
    for shape in ((1, 512), (2, 3, 512), (512,)):
        x, other = inputs(*shape, dtype=dtype).requires_grad_(), inputs(*shape, dtype=dtype).requires_grad_()
        y, expected = call(x), layer(other)
        assert y.dtype == dtype
        assert torch.equal(y, expected)
        y.float().square().sum().backward()
        expected.float().square().sum().backward()
        assert x.grad is not None
        assert other.grad is not None
        assert torch.equal(x.grad, other.grad)
        with torch.no_grad():
            assert torch.equal(call(x), layer(x))  # by the kernels, where there are any


def test_the_default_compiler_takes_it_whole() -> None:
    layer = layer_of("int4-g32")
    call = compiled(layer, "inductor")
    x, other = inputs(7, 512).requires_grad_(), inputs(7, 512).requires_grad_()
    call(x).sum().backward()
    layer(other).sum().backward()
    assert x.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(x.grad, other.grad)


def test_a_compiled_layer_computes_in_autocast_s_dtype() -> None:
    layer = layer_of("nf4")
    call = compiled(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = call(inputs(6, 512)), layer(inputs(6, 512))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


def test_a_bias_that_trains_gets_its_gradient() -> None:
    layer = layer_of("int4-g32")
    assert layer.bias is not None
    layer.bias.requires_grad_()
    compiled(layer)(inputs(6, 512)).sum().backward()
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((24,), 6.0))


def test_a_compiled_step_keeps_no_dense_weight() -> None:
    """What autograd saves for the backward pass: the codes with their scales, and nothing as large as the weight."""
    layer = layer_of("int4-g32")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        compiled(layer)(inputs(6, 512).requires_grad_())
    assert saved
    assert sum(tensor.nbytes for tensor in saved) <= layer.qtensor.nbytes + 6 * 512 * 4


@pytest.mark.parametrize("text", ["int4-g32", "nf4-dq"])
@pytest.mark.parametrize("rows", [1, 6])
def test_the_operators_keep_what_the_library_asks_of_them(text: str, rows: int) -> None:
    layer = layer_of(text)
    tensors = layer.qtensor.tensors()
    weight = (list(tensors.values()), ",".join(tensors), layer.scheme.name, 24, 512)
    x, bias = inputs(rows, 512).requires_grad_(), torch.zeros(24, requires_grad=True)
    torch.library.opcheck(operators.quant_linear, (x, bias, *weight, False))
    torch.library.opcheck(operators.quant_linear, (x.detach(), None, *weight, True))
    torch.library.opcheck(operators.dequantize, (*weight, torch.bfloat16))

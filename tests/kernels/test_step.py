"""A block's step against the formula in float64, on odd shapes and every instruction set; and what it leaves alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from strop.kernels.step import Step, StepShape
from strop.numerics import QuantizedTensor, parse_scheme, quantize_tensor
from strop.numerics.accelerated import PackedWeight

from .values import plain

SHAPES = [
    StepShape(3, 1, 6, 4, 31, (1e-5, 1e-6, 1e-5, 1e-6), 0.4),
    StepShape(4, 2, 33, 32, 255, (1e-6, 1e-5, 0.0, 0.0), 0.2),
    StepShape(8, 8, 16, 16, 257, (1e-6, 1e-5, 1e-6, 1e-5), 0.25),
]


@dataclass
class Block:
    """A block with random weights.

    Attributes:
        shape: Its shapes.
        weights: Quantized, in the order of the step.
        biases: One for each weight.
        gains: Of the norms.
        held: What the jobs of the step point to.
        step: The step.
    """

    shape: StepShape
    weights: list[QuantizedTensor]
    biases: list[Tensor]
    gains: list[Tensor]
    held: list[PackedWeight]
    step: Step

    @classmethod
    def of(cls, shape: StepShape, text: str, dtype: torch.dtype, hidden: int = 33) -> Block:
        q, kv = shape.heads * shape.size, shape.kv_heads * shape.size
        sizes = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (shape.inner, hidden), (shape.inner, hidden)]
        sizes.append((hidden, shape.inner))
        weights = [
            quantize_tensor(plain(rows, columns, seed=seed) / columns**0.5, parse_scheme(text))
            for seed, (rows, columns) in enumerate(sizes)
        ]
        biases = [0.1 * plain(1, rows, seed=9 + seed).view(-1).to(dtype) for seed, (rows, _) in enumerate(sizes)]
        head_norms = [shape.size, shape.size] if shape.eps[2] else []
        gains = [1 + 0.3 * plain(1, width, seed=width).view(-1) for width in (hidden, hidden, *head_norms)]
        held = []
        for weight, bias in zip(weights, biases, strict=True):
            packed = PackedWeight.of(weight.scheme, weight.shape, weight.tensors(), bias)
            assert packed is not None
            held.append(packed)
        grids, widths = [each.grid for each in held], [each.shape[1] for each in held]
        return cls(shape, weights, biases, gains, held, Step(shape, [each.job for each in held], grids, widths, gains))

    def expected(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, index: Tensor) -> Tensor:
        """What the step gives, by the formula, in float64; keys and values of the new tokens are put in."""
        shape, half = self.shape, self.shape.turned // 2

        def multiply(place: int, x: Tensor) -> Tensor:
            return x @ self.weights[place].dequantize().double().T + self.biases[place].double()

        def norm(place: int, x: Tensor) -> Tensor:
            return self.gains[place].double() * x / (x.square().mean(-1, keepdim=True) + shape.eps[place]).sqrt()

        def turned(x: Tensor) -> Tensor:
            a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
            c, s = cos.double()[:, None], sin.double()[:, None]
            return torch.cat(
                [a * c[..., :half] - b * s[..., :half], b * c[..., half:] + a * s[..., half:], rest], dim=-1
            )

        seen = norm(0, x.double())
        q, k, v = (multiply(place, seen).view(len(x), -1, shape.size) for place in range(3))
        if len(self.gains) == 4:
            q, k = norm(2, q), norm(3, k)
        keys.view(-1, *k.shape[1:])[index] = turned(k)
        values.view(-1, *v.shape[1:])[index] = v
        rows = []
        for query, place in zip(turned(q), index.tolist(), strict=True):
            slot, column = divmod(place, keys.shape[1])
            group = shape.heads // shape.kv_heads
            mine, worth = (each[slot, : column + 1].repeat_interleave(group, dim=1) for each in (keys, values))
            scores = torch.softmax(torch.einsum("hd,chd->hc", query, mine) * shape.scaling, dim=-1)
            rows.append(torch.einsum("hc,chd->hd", scores, worth).flatten())
        between = x.double() + multiply(3, torch.stack(rows))
        seen = norm(1, between)
        return between + multiply(6, torch.nn.functional.silu(multiply(4, seen)) * multiply(5, seen))


def given(block: Block, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A step's arguments: each text at a column of its own."""
    shape, hidden = block.shape, block.weights[0].shape[1]
    x, cos, sin = (plain(rows, width, seed=width) for width in (hidden, shape.turned, shape.turned))
    cache = plain(2 * (rows + 1) * columns, shape.kv_heads * shape.size, seed=3).to(dtype)
    keys, values = cache.view(2, rows + 1, columns, shape.kv_heads, shape.size)
    column = torch.tensor([(7 * row) % columns for row in range(rows)])
    return x.to(dtype), cos, sin, keys.clone(), values.clone(), torch.arange(rows) * columns + column


@pytest.mark.parametrize("text", ["int8", "int4", "int4-asym", "int3"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.heads}x{shape.size}")
def test_a_step_is_the_formula(instruction_set: str, shape: StepShape, text: str) -> None:
    block = Block.of(shape, text, torch.float32)
    for rows, columns in ((1, 1), (1, 40), (2, 17), (4, 9)):
        arguments = given(block, rows, columns, torch.float32)
        x, cos, sin, keys, values, index = arguments
        expected_keys, expected_values = keys.double(), values.double()
        expected = block.expected(x, cos, sin, expected_keys, expected_values, index)
        got = block.step(*arguments)
        assert got is not None
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(keys.double(), expected_keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values.double(), expected_values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4, 9, 20])
@pytest.mark.parametrize("text", ["int8", "int4"])
def test_a_step_in_bfloat16_is_the_formula_rounded(instruction_set: str, text: str, rows: int) -> None:
    block = Block.of(SHAPES[1], text, torch.bfloat16)
    arguments = given(block, rows, 12, torch.bfloat16)
    x, cos, sin, keys, values, index = arguments
    expected = block.expected(x, cos, sin, keys.double(), values.double(), index)
    got = block.step(*arguments)
    if got is None:
        assert rows > 4, "every instruction set takes four rows"
        return
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).norm() < 0.02 * (expected - x.double()).norm()


def test_columns_past_a_text_are_never_read(instruction_set: str) -> None:
    block = Block.of(SHAPES[0], "int4", torch.float32)
    x, cos, sin, keys, values, index = given(block, 2, 9, torch.float32)
    clean = block.step(x, cos, sin, keys.clone(), values.clone(), index)
    assert clean is not None
    for slot, place in enumerate(index.tolist()):
        keys[slot, place % 9 :] = values[slot, place % 9 :] = float("nan")
    keys[2], values[2] = float("nan"), float("nan")
    assert torch.equal(clean, block.step(x, cos, sin, keys, values, index))


def test_a_text_that_is_not_a_number_leaves_the_others_alone(instruction_set: str) -> None:
    block = Block.of(SHAPES[0], "int4", torch.float32)
    x, cos, sin, keys, values, index = given(block, 3, 9, torch.float32)
    clean = block.step(x, cos, sin, keys.clone(), values.clone(), index)
    x[1] = float("nan")
    got = block.step(x, cos, sin, keys, values, index)
    assert clean is not None
    assert got is not None
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert got[1].isnan().all()


def test_a_step_is_refused_where_no_kernel_takes_it(instruction_set: str) -> None:
    block = Block.of(SHAPES[0], "int4", torch.float32)
    assert block.step(*given(block, 65, 2, torch.float32)) is None
    assert block.step(*(each.double() for each in given(block, 1, 2, torch.float32)[:5]), torch.tensor([0])) is None
    wide = StepShape(129, 1, 33, 32, 31, (1e-5, 1e-6, 0.0, 0.0), 0.4)  # more queries than room for them
    block = Block.of(wide, "int4", torch.float32)
    assert block.step(*given(block, 1, 2, torch.float32)) is None

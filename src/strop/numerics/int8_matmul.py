"""Products of int8 matrices with int32 sums, exact on every machine.

    int8_matmul(x, w)[t, o] = sum over i of x[t, i] * w[o, i],    int8 [tokens, in] and [out, in] -> int32 [tokens, out]

`torch._int_mm` is the fast path where it is exact. It is not everywhere: on a CPU without VNNI instructions, oneDNN
multiplies 8-bit pairs into 16 bits and saturates there (127 * 255 + 127 * 255 > 32767), in silence, or torch's plain
loop takes its place. There our own kernel multiplies (`kernels.int8`, AVX2). Without it the first use on a kind of
device multiplies matrices of extreme values and compares; where one sum is off, or the operation is missing, float32
products over at most 1024 inputs stand in, whose sums stay within 2^24 and are therefore exact.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from strop.errors import FormatError
from strop.kernels import int8

MOST_INPUTS = 1 << 16
"""Inputs of a layer whose sums surely fit int32, a zero point's share included: 255 * 128 * 2^16 < 2^31."""

_EXACT_INPUTS = 1024  # 128 * 128 * 1024 = 2^24, up to which float32 holds every integer
_PROBES = ((1, 64, 16), (5, 33, 7), (40, 1040, 72))  # few rows and many, odd sizes and round ones


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """X [tokens, in] times weight [out, in] transposed, both int8: int32 [tokens, out], every sum exact.

    Raises:
        FormatError: More inputs than `MOST_INPUTS`.

    >>> int8_matmul(torch.tensor([[127, -128]], dtype=torch.int8), torch.tensor([[127, -128]], dtype=torch.int8)).item()
    32513
    """
    if x.shape[1] > MOST_INPUTS:
        raise FormatError(f"{x.shape[1]} inputs: sums of int8 products fit 32 bits up to {MOST_INPUTS}; use int8")
    if x.shape[0] == 0:
        return torch.zeros((0, weight.shape[0]), dtype=torch.int32, device=x.device)
    if (sums := int8.sums(x, weight)) is not None:
        return sums
    return native_product(x, weight) if native_is_exact(x.device.type) else float_product(x, weight)


@functools.cache
def native_is_exact(device_type: str) -> bool:
    """Whether `native_product` is there and exact on a kind of device, tried once per process."""
    generator = torch.Generator().manual_seed(0)
    for tokens, inputs, outputs in _PROBES:
        drawn = torch.randint(-128, 128, (tokens + outputs, inputs), generator=generator)
        for rows in (torch.full_like(drawn, 127), torch.full_like(drawn, -128), drawn):
            x, weight = rows[:tokens], rows[tokens:]
            expected = x @ weight.T
            try:
                product = native_product(x.to(device_type, torch.int8), weight.to(device_type, torch.int8))
            except RuntimeError:  # NotImplementedError is one
                return False
            if not torch.equal(product.cpu().long(), expected):
                return False
    return True


def native_product(x: Tensor, weight: Tensor) -> Tensor:
    """`torch._int_mm`, with zeros added where CUDA asks for more than 16 rows and multiples of 8."""
    tokens, inputs = x.shape
    outputs = weight.shape[0]
    if x.device.type == "cuda":
        x = torch.nn.functional.pad(x, (0, -inputs % 8, 0, max(0, 17 - tokens)))
        weight = torch.nn.functional.pad(weight, (0, -inputs % 8, 0, -outputs % 8))
    # torch has no public name for it
    product: Tensor = torch._int_mm(  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
        x.contiguous(), weight.contiguous().T
    )
    return product[:tokens, :outputs]


def float_product(x: Tensor, weight: Tensor) -> Tensor:
    """The same in float32, over so few inputs at a time that every sum is exact."""
    total = torch.zeros((x.shape[0], weight.shape[0]), dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], _EXACT_INPUTS):
        part = slice(start, start + _EXACT_INPUTS)
        with torch.autocast(x.device.type, enabled=False):
            total += (x[:, part].float() @ weight[:, part].float().T).to(torch.int32)
    return total

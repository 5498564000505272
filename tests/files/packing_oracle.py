"""GPTQ's and AWQ's layouts written and read bit by bit, in plain Python, from their descriptions alone.

Nothing of strop is used: these are the independent side of the readers' tests. Codes are lists [out][in] of integers,
zero points and scales [out][groups], `index` the group of each input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


def to_int32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def to_words(codes: Sequence[int], bits: int) -> list[int]:
    """Codes, the first lowest, one long number cut into int32 words."""
    total = 0
    for place, code in enumerate(codes):
        assert 0 <= code < 1 << bits
        total |= code << (place * bits)
    return [to_int32((total >> (32 * word)) & 0xFFFFFFFF) for word in range(-(-len(codes) * bits // 32))]


def gptq_layer(
    codes: list[list[int]],
    zeros: list[list[int]],
    scales: Tensor,
    bits: int,
    *,
    version: str,
    index: list[int] | None = None,
) -> dict[str, Tensor]:
    """A layer as GPTQ's files hold it; `scales` float16 [out, groups]."""
    rows, columns, groups = len(codes), len(codes[0]), len(zeros[0])
    mask = (1 << bits) - 1
    stored = [[(zero - 1) & mask if version == "gptq" else zero for zero in row] for row in zeros]
    qweight = torch.tensor([to_words(codes[row], bits) for row in range(rows)], dtype=torch.int32).T.contiguous()
    qzeros = torch.tensor(
        [to_words([stored[row][group] for row in range(rows)], bits) for group in range(groups)], dtype=torch.int32
    )
    index = [column * groups // columns for column in range(columns)] if index is None else index
    g_idx = torch.tensor(index, dtype=torch.int32)
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales.T.contiguous(), "g_idx": g_idx}


def gptq_weight(tensors: dict[str, Tensor], bits: int, *, version: str) -> Tensor:
    """W[o, i] = scale (code - zero) of such a layer, float32 [out, in]; every code is found by its own bits."""
    qweight, qzeros, scales = tensors["qweight"].tolist(), tensors["qzeros"].tolist(), tensors["scales"].float()
    index = tensors["g_idx"].tolist()
    mask = (1 << bits) - 1
    zero_bits = [sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words)) for words in qzeros]
    steps = []
    for row in range(scales.shape[1]):
        column_bits = sum((word[row] & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(qweight))
        zeros = [(bits_of_group >> (row * bits)) & mask for bits_of_group in zero_bits]
        zeros = [(zero + 1) & mask for zero in zeros] if version == "gptq" else zeros
        steps.append([((column_bits >> (column * bits)) & mask) - zeros[g] for column, g in enumerate(index)])
    return scales.T[:, index] * torch.tensor(steps)


def awq_layer(codes: list[list[int]], zeros: list[list[int]], scales: Tensor) -> dict[str, Tensor]:
    """A layer as AutoAWQ's GEMM layout holds it."""
    rows, columns, groups = len(codes), len(codes[0]), len(zeros[0])

    def words(values: list[int]) -> list[int]:
        packed = []
        for start in range(0, rows, 8):
            word = 0
            for nibble, output in enumerate(AWQ_NIBBLES):
                word |= values[start + output] << (4 * nibble)
            packed.append(to_int32(word))
        return packed

    return {
        "qweight": torch.tensor([words([codes[o][i] for o in range(rows)]) for i in range(columns)], dtype=torch.int32),
        "qzeros": torch.tensor([words([zeros[o][g] for o in range(rows)]) for g in range(groups)], dtype=torch.int32),
        "scales": scales.T.contiguous(),
    }


def awq_weight(tensors: dict[str, Tensor], group_size: int) -> Tensor:
    """The weight of such a layer, float32 [out, in]."""
    qweight, qzeros, scales = tensors["qweight"].tolist(), tensors["qzeros"].tolist(), tensors["scales"].float()
    groups = [column // group_size for column in range(len(qweight))]
    steps = []
    for row in range(scales.shape[1]):
        word, shift = row // 8, 4 * AWQ_NIBBLES.index(row % 8)
        zeros = [(words[word] >> shift) & 15 for words in qzeros]
        steps.append([((words[word] >> shift) & 15) - zeros[g] for words, g in zip(qweight, groups, strict=True)])
    return scales.T[:, groups] * torch.tensor(steps)


def random_layer(
    rows: int, columns: int, groups: int, bits: int, *, symmetric: bool, seed: int = 0
) -> tuple[list[list[int]], list[list[int]], Tensor]:
    """Codes [out][in], zero points [out][groups] and scales float16 [out, groups], random."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (rows, columns), generator=generator)
    zeros = torch.randint(1 << bits, (rows, groups), generator=generator)
    if symmetric:
        zeros = torch.full((rows, groups), 1 << (bits - 1))
    scales = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.005).half()
    return codes.tolist(), zeros.tolist(), scales

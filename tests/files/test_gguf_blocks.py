"""GGUF's blocks: bytes made by hand, the `gguf` package, and llama.cpp's own quantizers as oracles."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import strop.demo
from strop.errors import FileFormatError, FormatError
from strop.files.gguf import blocks
from strop.files.gguf.blocks import DECODED, ENCODED, decode, encode
from strop.files.gguf.types import TYPES, fallback
from strop.methods import rtn
from strop.numerics import parse_format
from tests.numerics.schemes import hard_weights

from .ggml_library import ggml_quantizer

PLAIN = ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
SEARCHED = ("q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q6_k")
"""The types that heed an importance."""


def kind_of(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def random_weight(rows: int = 24, columns: int = 512) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def some_importance(columns: int = 512) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 3


def error(weight: Tensor, raw: np.ndarray, name: str, importance: Tensor | None = None) -> float:
    square = (decode(raw, name, weight.shape) - weight).double().square()
    return (square if importance is None else square * importance).sum().item()


def test_types_are_those_of_the_gguf_package() -> None:
    theirs = {one.name.lower(): (one.value, *gguf.GGML_QUANT_SIZES[one]) for one in gguf.GGMLQuantizationType}
    theirs["q8_1"] = (9, 32, 36)  # two float16 numbers in ggml-common.h; the package has them in float32 still
    mine = {one.name: (one.number, one.block, one.block_bytes) for one in TYPES.values()}
    assert mine == theirs | {"q2_0": (42, 64, 18)}  # newer than the package


@pytest.mark.parametrize(
    ("name", "columns", "taken"),
    [
        ("q4_k", 2688, "q5_0"),
        ("q4_k", 256, "q4_k"),
        ("q5_k", 96, "q5_1"),
        ("q6_k", 32, "q8_0"),
        ("q3_k", 64, "q4_0"),
        ("q2_k", 64, "q4_0"),
        *[(name, columns, "f16") for name in ("q4_k", "q6_k", "q8_0", "q4_0") for columns in (1, 31, 33, 255, 257)],
        *[(name, columns, name) for name in ("f32", "f16", "bf16") for columns in (1, 33, 257)],
    ],
)
def test_a_row_that_is_no_whole_block_takes_the_type_that_llama_cpp_gives_it(
    name: str, columns: int, taken: str
) -> None:
    assert fallback(name, columns) == taken
    if taken != name:
        with pytest.raises(FormatError, match=rf"ffn: a row of {columns:,} values.*{taken} takes such a row"):
            TYPES[name].row_bytes(columns, where="ffn")
        with pytest.raises(FormatError, match="ffn: "):
            encode(torch.zeros(2, columns), name, where="ffn")
    assert encode(torch.zeros(2, columns), taken).shape == (2, TYPES[taken].row_bytes(columns))


def test_blocks_are_the_ones_made_by_hand() -> None:
    """The layouts of the docstrings, one value at a time."""
    row = torch.zeros(1, 32)
    row[0, 0], row[0, 1], row[0, 16] = 4.0, 1.0, -3.5  # d = -0.5 (0xb800)
    assert encode(row, "q4_0").tobytes().hex() == "00b8" + "f0" + "86" + "88" * 14
    row = torch.arange(32.0).view(1, 32)  # d = 1 and m = 0: a code is its value
    low = bytes(j | j << 4 for j in range(16))
    assert encode(row, "q5_1").tobytes() == struct.pack("<ee", 1, 0) + b"\0\0\xff\xff" + low
    assert encode(row - 16, "q5_0").tobytes() == struct.pack("<e", 1) + b"\0\0\xff\xff" + low
    half = torch.arange(16.0).repeat(2).view(1, 32) - 3
    assert encode(half, "q4_1").tobytes() == struct.pack("<ee", 1, -3) + low
    row = torch.arange(-127.0, 128.0, 8.0).view(1, 32)
    assert encode(row, "q8_0").tobytes() == struct.pack("<e32b", 1, *range(-127, 128, 8))
    assert encode(torch.tensor([1.0, -2.0]), "bf16").tobytes() == b"\x80\x3f\x00\xc0"


def test_superblocks_are_the_ones_made_by_hand() -> None:
    """Every group of q4_k with a scale and minimum of its own; every code of q6_k."""
    scales, minimums = range(1, 64, 8), range(63, 0, -8)
    values = [
        0.5 * scale * (j % 16) - 0.25 * low for scale, low in zip(scales, minimums, strict=True) for j in range(32)
    ]
    packed = [s & 63 | (t >> 4) << 6 for s, t in zip(scales[:4], scales[4:], strict=True)]
    packed += [s & 63 | (t >> 4) << 6 for s, t in zip(minimums[:4], minimums[4:], strict=True)]
    packed += [s & 15 | (t & 15) << 4 for s, t in zip(scales[4:], minimums[4:], strict=True)]
    raw = struct.pack("<ee", 0.5, 0.25) + bytes(packed) + bytes(j % 16 * 17 for j in range(32)) * 4
    assert decode(np.frombuffer(raw, np.uint8), "q4_k", (1, 256)).tolist() == [values]
    codes = [j % 64 for j in range(256)]
    low, high = bytearray(128), bytearray(64)
    for j, code in enumerate(codes):
        half, place = divmod(j, 128)
        low[64 * half + place % 64] |= (code & 15) << 4 * (place // 64)
        high[32 * half + place % 32] |= (code >> 4) << 2 * (place // 32)
    raw = bytes(low) + bytes(high) + struct.pack("<16b", *range(-8, 8)) + struct.pack("<e", 0.5)
    values = [0.5 * (j // 16 - 8) * (code - 32) for j, code in enumerate(codes)]
    assert decode(np.frombuffer(raw, np.uint8), "q6_k", (256,)).tolist() == values


@pytest.mark.parametrize("name", DECODED)
def test_any_bytes_are_decoded_to_the_bits_of_the_gguf_package(name: str) -> None:
    kind = TYPES[name]
    raw = np.random.default_rng(0).integers(0, 256, (2048, kind.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = raw.view("<f8") if name == "f64" else gguf.quants.dequantize(raw, kind_of(name))
        theirs = theirs.astype(np.float32).reshape(-1)
    mine = decode(raw, name, (2048, kind.block)).view(-1).numpy()
    real = ~np.isnan(theirs)
    assert (np.isnan(mine) == ~real).all()
    assert (mine.view(np.uint32) == theirs.view(np.uint32))[real].all()


def awkward_weight() -> Tensor:
    weight = random_weight(32)
    weight[0] = 0.0
    weight[1] = -0.0
    weight[2] = weight[2].sign() * 3
    weight[3], weight[4], weight[5] = weight[3] * 1e-6, weight[4] * 1e-7, weight[5] * 1e-30
    weight[6] = weight[6].round()
    weight[7] = 1.0
    weight[8, ::32] = 1e4
    return weight


@pytest.mark.parametrize("name", PLAIN)
def test_plain_rounding_gives_the_bytes_of_the_gguf_package(name: str) -> None:
    weight = awkward_weight()
    with np.errstate(all="ignore"):
        theirs = gguf.quants.quantize(weight.numpy(), kind_of(name)).view(np.uint8)
    assert np.array_equal(encode(weight, name), theirs)


def real_weights(material: Path) -> dict[str, Tensor]:
    """Layers of the bundled model, all of stories260K in rows of 512, and random ones."""
    demo = load_file(Path(strop.demo.__file__).parent / "model" / "model.safetensors")
    names = ("embed_tokens", "0.self_attn.v_proj", "1.mlp.down_proj", "2.mlp.up_proj")
    found = {name: weight.float() for name, weight in demo.items() if any(one in name for one in names)}
    stories = load_file(material / "models" / "stories260K" / "model.safetensors")
    flat = torch.cat([weight.reshape(-1) for weight in stories.values() if weight.ndim == 2])
    found["stories260K"] = flat[: flat.numel() // 512 * 512].view(-1, 512)
    found["normal"] = random_weight(128)
    found["heavy tails"] = random_weight(128) / torch.rand(128, 512, generator=torch.Generator().manual_seed(2)).sqrt()
    assert len(found) == 7
    return found


def test_errors_are_at_most_those_of_llama_cpps_own_quantizer(material: Path) -> None:
    """Plain types: the very bytes. Searched ones: at most 1.01 times the weighted error, on every weight."""
    theirs = ggml_quantizer()
    for where, weight in real_weights(material).items():
        importance = some_importance(weight.shape[1]) + 1e-3
        for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"):
            assert np.array_equal(encode(weight, name), theirs(weight, name, None)), (where, name)
        for name in SEARCHED:
            for seen in (None, importance):
                mine, other = encode(weight, name, seen), theirs(weight, name, seen)
                ratio = error(weight, mine, name, seen) / error(weight, other, name, seen)
                assert ratio <= 1.01, (where, name, seen is not None, ratio)


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_lowers_the_weighted_error(name: str) -> None:
    weight, importance = random_weight(), some_importance()
    without, seen = encode(weight, name), encode(weight, name, importance)
    assert error(weight, seen, name, importance) < 0.92 * error(weight, without, name, importance)
    for each, both in zip(decode(seen, name, weight.shape), decode(without, name, weight.shape), strict=True):
        assert not each.equal(both)


def plainly(weight: Tensor, name: str) -> Tensor:
    """What rounding without any search keeps."""
    if name == "q4_k":
        return rtn(weight, parse_format("gguf:q4_k").scheme).dequantize()
    if name != "q6_k":
        return decode(encode(weight, name), name, weight.shape)
    groups = weight.view(weight.shape[0], -1, 16, 16)
    high, low = groups.amax(-1), groups.amin(-1)
    scales = torch.where(high > -low, high, low) / -32
    d = (scales.gather(-1, scales.abs().argmax(-1, keepdim=True)) / -128).half().float()
    step = d * (scales / torch.where(d == 0, torch.inf, d)).round().clamp(-128, 127)
    step = step.unsqueeze(-1)
    return ((groups / torch.where(step == 0, torch.inf, step)).round().clamp(-32, 31) * step).view_as(weight)


@given(hard_weights(256), st.sampled_from(SEARCHED), st.booleans(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=80)
def test_the_weighted_error_is_never_more_than_that_of_plain_rounding(
    weight: Tensor, name: str, weighted: bool, seed: int
) -> None:
    draws = torch.rand(256, generator=torch.Generator().manual_seed(seed))
    importance = draws.mul(2).floor() * draws**4 if weighted else None  # half of the columns are never used
    try:
        found = encode(weight, name, importance)
    except FormatError:
        with pytest.raises(FormatError, match="overflow"):
            encode(weight, name, importance)
        return
    assert torch.isfinite(decode(found, name, weight.shape)).all()
    plainly_rounded = plainly(weight, name)
    if not torch.isfinite(plainly_rounded).all():  # its d overflowed over a column that does not count
        assert importance is not None
        return
    square = (plainly_rounded - weight).double().square()
    plain = (square if importance is None else square * importance).sum().item()
    assert error(weight, found, name, importance) <= plain * (1 + 1e-5) + 1e-30


def test_a_value_that_no_scale_reaches_spoils_nothing_where_its_column_is_never_used() -> None:
    weight, importance = random_weight(), torch.ones(512)
    expected = error(weight, encode(weight, "q6_k", importance), "q6_k", importance)
    weight[0, 0], importance[0] = 1e10, 0.0
    found = encode(weight, "q6_k", importance)
    assert torch.isfinite(decode(found, "q6_k", weight.shape)).all()
    assert error(weight, found, "q6_k", importance) < 1.1 * expected


@pytest.mark.parametrize("name", SEARCHED)
def test_columns_that_are_never_used_do_not_count(name: str) -> None:
    weight, importance = random_weight(), torch.ones(512)
    weight[:, ::32] *= 50
    importance[::32] = 0.0
    assert error(weight, encode(weight, name, importance), name, importance) < 0.1 * error(
        weight, encode(weight, name), name, importance
    )


@pytest.mark.parametrize("name", SEARCHED)
def test_groups_that_are_never_used_are_kept_all_the_same(name: str) -> None:
    """Not stored as zeros: another text may use them."""
    weight = random_weight()
    importance = some_importance()
    importance[:256] = 0.0
    for seen in (importance, torch.zeros(512)):
        kept = decode(encode(weight, name, seen), name, weight.shape)[:, :256]
        assert (kept - weight[:, :256]).square().mean() < 0.02


@pytest.mark.parametrize("name", ["q8_0", "f16", "f32", "bf16"])
def test_types_without_a_search_go_without_importance(name: str) -> None:
    weight = random_weight()
    assert np.array_equal(encode(weight, name, some_importance()), encode(weight, name))


@pytest.mark.parametrize("name", ENCODED)
def test_pieces_give_the_bytes_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = random_weight(5), some_importance()
    whole = encode(weight, name, importance)
    decoded = decode(whole, name, weight.shape)
    monkeypatch.setattr(blocks, "_PIECE", 512)
    assert np.array_equal(encode(weight, name, importance), whole)
    assert decode(whole, name, weight.shape).equal(decoded)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q4_k", "q6_k"])
def test_every_expert_has_its_own_importance(name: str) -> None:
    weight = random_weight(24).view(3, 8, 512)
    importance = torch.stack([some_importance().roll(shift) for shift in (0, 7, 99)])
    whole = encode(weight, name, importance)
    assert whole.shape == (3, 8, TYPES[name].row_bytes(512))
    for place in range(3):
        assert np.array_equal(whole[place], encode(weight[place], name, importance[place]))
    assert np.array_equal(encode(weight, name, importance[0])[2], encode(weight[2], name, importance[0]))


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.7, -3.0, 1e-8, 6e-8, -1e-38, 1e-45])
def test_constant_weights_and_the_smallest_there_are_stay_finite_and_near(name: str, value: float) -> None:
    weight = torch.full((2, 256), value)
    kept = decode(encode(weight, name), name, weight.shape)
    assert torch.isfinite(kept).all()
    assert (kept - weight).abs().max() <= 0.01 * abs(value) + 1e-6


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(name: str, value: float) -> None:
    weight = random_weight(2)
    weight[1, 3] = value
    with pytest.raises(FormatError, match=r"blk\.0: holds NaN or values that are infinite"):
        encode(weight, name, where="blk.0")


@pytest.mark.parametrize("name", [name for name in ENCODED if name not in ("f32", "bf16")])
@pytest.mark.parametrize("seen", [None, torch.ones(512)])
def test_what_overflows_float16_is_refused(name: str, seen: Tensor | None) -> None:
    weight = random_weight(2) * 1e9
    with pytest.raises(FormatError, match=r"blk\.0: .*(overflow|cannot hold)"):
        encode(weight, name, seen, where="blk.0")


def test_what_cannot_be_encoded_or_decoded_is_named() -> None:
    weight = random_weight(2)
    for call, words in [
        (lambda: encode(weight, "q2_k"), "q2_k is not written; these are: f32, "),
        (lambda: encode(weight, "q4_kk"), "'q4_kk' is not a type of GGUF files.*did you mean 'q4_k'"),
        (lambda: encode(weight[:, :0], "q4_0"), r"\[2, 0\] holds no value"),
        (lambda: encode(weight.int(), "q4_0"), "a float dtype, got torch.int32"),
        (lambda: decode(np.zeros(36, np.uint8), "q8_1", (32,)), "q8_1 is not read"),
        (lambda: encode(weight, "q4_0", torch.ones(3)), r"importance \[3\] does not fit a weight \[2, 512\]"),
        (lambda: encode(weight, "q4_0", torch.ones(2, 512)), r"importance \[2, 512\] does not fit"),
        (lambda: encode(weight, "q4_0", -torch.ones(512)), "must be finite and not negative"),
        (lambda: encode(weight, "q4_0", torch.full((512,), torch.nan)), "must be finite and not negative"),
    ]:
        with pytest.raises(FormatError, match=words):
            call()
    with pytest.raises(FileFormatError, match=r"17 items of uint8; q4_0 \[32\] takes 18 bytes"):
        decode(np.zeros(17, np.uint8), "q4_0", (32,))

"""`explain`: the notes' two worked examples, a number's bits against torch's own, a weight's picture and figures."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.errors import FormatError, MissingInputError, ModelError, UsageError
from strop.files.shards import Part, write_shards
from strop.numerics.affine import fake_quantize
from strop.numerics.formats import FORMATS, CodebookFormat, FloatFormat, IntFormat
from strop.numerics.scheme import parse_scheme
from strop.recipes.explain import explain_affine, explain_bits, explain_tensor
from strop.recipes.tensor_picture import read_weight
from tests.tiny import tiny_config, tiny_model

# those that torch has too; mxfp4 is in test_formats.py
FLOATS = [name for name, form in FORMATS.items() if isinstance(form, FloatFormat) and form.dtype is not None]

# --- bits -------------------------------------------------------------------------------------------------------------


def test_7_32_in_half_precision_is_a_binary_significand_and_an_exponent() -> None:
    shown = explain_bits(7.32, "fp16")
    assert shown.fields == (("sign", "0"), ("exponent", "10001"), ("significand", "1101010010"))
    assert shown.stored == 7.3203125 == torch.tensor(7.32, dtype=torch.float16).item()
    assert (shown.below, shown.above) == (7.31640625, 7.32421875)
    text = "\n".join(shown.lines())
    assert "17 - bias 15 = 2" in text
    assert "1 + 850 / 1024 = 1.830078125" in text
    assert "2^2 * 1.830078125 = 7.3203125" in text


def test_7_32_in_single_precision_has_8_exponent_and_23_significand_bits() -> None:
    shown = explain_bits(7.32, "fp32")
    assert [len(part) for _, part in shown.fields] == [1, 8, 23]
    assert shown.bits == f"{np.float32(7.32).view(np.uint32):032b}"
    assert shown.error == float(np.float32(7.32)) - 7.32


@pytest.mark.parametrize("name", FLOATS)
@given(value=st.floats(allow_nan=False, width=32))
@settings(max_examples=60, deadline=None)
def test_bits_and_neighbours_are_those_of_the_format(name: str, value: float) -> None:
    form = FORMATS[name]
    assert isinstance(form, FloatFormat)
    shown = explain_bits(value, name)
    cast = torch.tensor(value, dtype=torch.float32).to(form.dtype)
    stored = cast.float().item()
    if form.has_infinity or abs(value) <= form.max_value:  # beyond, torch's casts to e4m3 differ between versions
        assert shown.stored == stored
        assert f"{int(shown.bits, 2):x}" == f"{_pattern(cast):x}"
    if math.isfinite(shown.stored):
        sides = [side for side in (shown.below, shown.above) if side is not None]
        assert shown.below is None or shown.below < stored
        assert shown.above is None or shown.above > stored
        # A neighbour is a value of the format, and nothing lies between: the middle rounds to one of the two.
        for side in sides:
            assert torch.tensor(side, dtype=torch.float32).to(form.dtype).float().item() == side
            if form.bits <= 16:
                middle = torch.tensor((side + stored) / 2, dtype=torch.float64).to(form.dtype).double().item()
                assert middle in (side, stored)
    json.dumps(shown.to_dict(), allow_nan=False)
    assert shown.lines()


def _pattern(cast: torch.Tensor) -> int:
    width = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[cast.element_size()]
    return int(cast.view(width).item())


@pytest.mark.parametrize(
    ("value", "format", "stored"),
    [
        (70000.0, "fp16", "inf"),
        (-70000.0, "fp16", "-inf"),
        (math.nan, "bf16", "nan"),
        (math.inf, "fp16", "inf"),
    ],
)
def test_what_a_format_cannot_hold_is_said_and_stays_valid_json(value: float, format: str, stored: str) -> None:
    shown = explain_bits(value, format)
    assert shown.to_dict()["stored"] == stored
    json.dumps(shown.to_dict(), allow_nan=False)
    assert ("cannot hold" in "\n".join(shown.lines())) == (not math.isinf(value))


def test_a_value_beyond_fp8_is_kept_at_its_largest() -> None:
    assert explain_bits(1e6, "fp8").to_dict()["stored"] == 448.0


def test_integers_are_shown_in_twos_complement_and_kept_within_their_range() -> None:
    assert explain_bits(-3, "int8").bits == "11111101"
    assert explain_bits(7.32, "int8").stored == 7.0
    beyond = explain_bits(999, "int4")
    assert (beyond.bits, beyond.stored, beyond.above) == ("0111", 7.0, None)
    assert explain_bits(-5, "uint4").stored == 0.0


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if isinstance(form, IntFormat)])
def test_every_code_of_every_integer_format_reads_back(name: str) -> None:
    form = FORMATS[name]
    assert isinstance(form, IntFormat)
    patterns = {explain_bits(code, name).bits for code in form.values()}
    assert len(patterns) == 2**form.bits
    for code in form.values():
        bits = explain_bits(code, name).bits
        raw = int(bits, 2)
        assert (raw - 2**form.bits if form.signed and raw > form.qmax else raw) == code


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@given(value=st.floats(-1.5, 1.5, width=32))
@settings(max_examples=60, deadline=None)
def test_a_codebook_shows_its_nearest_level(name: str, value: float) -> None:
    form = FORMATS[name]
    assert isinstance(form, CodebookFormat)
    shown = explain_bits(value, name)
    assert form.levels[int(shown.bits, 2)] == shown.stored
    assert abs(shown.stored - value) <= min(abs(level - value) for level in form.levels) + 1e-7


@pytest.mark.parametrize(
    ("value", "format", "says"), [(1.0, "fp61", "did you mean 'fp16'"), (math.nan, "int8", "finite")]
)
def test_a_format_that_is_not_there_or_cannot_take_the_value_is_refused(value: float, format: str, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        explain_bits(value, format)


# --- affine -----------------------------------------------------------------------------------------------------------


def test_the_notes_symmetric_example() -> None:
    shown = explain_affine(0.0, 1000.0, "uint8", "symmetric", 250)
    found = shown.to_dict()
    assert found["scale"] == pytest.approx(1000 / 255, rel=1e-7)
    assert f"{found['scale']:.4f}" == "3.9216"
    assert str(found["scale"]).startswith("3.9215")
    assert (found["zero_point"], found["code"]) == (0, 64)
    assert found["restored"] == pytest.approx(64 * 1000 / 255, rel=1e-7)
    text = "\n".join(shown.lines())
    assert "(xmax - xmin) / (qmax - qmin) = (1000 - 0) / (255 - 0) = 3.92" in text
    assert "round(250 / 3.92" in text
    assert "= 64" in text


def test_the_notes_asymmetric_example() -> None:
    shown = explain_affine(-20.0, 1000.0, "uint8", "asymmetric", -20)
    found = shown.to_dict()
    assert (found["scale"], found["zero_point"], found["code"], found["restored"]) == (4.0, 5, 0, -20.0)
    text = "\n".join(shown.lines())
    assert "(1000 - (-20)) / (255 - 0) = 4" in text
    assert "round(0 - (-20) / 4) = 5" in text
    assert "round(-20 / 4) + 5 = -5 + 5 = 0" in text


INTS = [name for name, form in FORMATS.items() if isinstance(form, IntFormat)]


@given(
    ends=st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32)),
    at=st.floats(0, 1),
    format=st.sampled_from(INTS),
    scheme=st.sampled_from(["symmetric", "asymmetric"]),
)
@settings(max_examples=150, deadline=None)
def test_zero_is_exact_and_values_in_the_range_err_by_half_a_step(
    ends: tuple[float, float], at: float, format: str, scheme: str
) -> None:
    low, high = sorted(ends)
    if scheme == "symmetric" and format.startswith("u"):
        low, high = abs(low), max(abs(low), abs(high))
    zero = explain_affine(low, high, format, scheme, 0.0)
    assert zero.restored == 0.0
    value = float(np.float32(min(max(low + at * (high - low), low), high)))
    shown = explain_affine(low, high, format, scheme, value)
    # Half a step, and what rounding the zero point to a whole number moves both ends by: half a step more where it
    # clips.
    allowed = (1.0 if shown.clipped else 0.5) * abs(shown.scale)
    assert abs(shown.error) <= allowed * (1 + 1e-4) + 1e-3 * abs(shown.scale)
    form = FORMATS[format]
    assert isinstance(form, IntFormat)
    assert form.qmin <= shown.code <= form.qmax
    json.dumps(shown.to_dict(), allow_nan=False)
    assert len(shown.lines()) >= 7


def test_a_range_without_zero_is_widened_and_the_text_says_so() -> None:
    shown = explain_affine(5.0, 10.0, "uint8", "asymmetric", 12.0)
    assert shown.scale == pytest.approx(10 / 255, rel=1e-6)
    assert (shown.code, shown.clipped) == (255, True)
    text = "\n".join(shown.lines())
    assert "widened to [0, 10]" in text
    assert "clipped" in text


def test_the_full_range_scheme_spends_the_scales_sign_on_the_largest_magnitude() -> None:
    shown = explain_affine(-1.0, 2.0, "int4", "symmetric-full", 2.0)
    assert (shown.scale, shown.code, shown.restored) == (-0.25, -8, 2.0)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((0.0, 1.0, "uint8", "symetric", 0.0), FormatError, "did you mean 'symmetric'"),
        ((0.0, 1.0, "fp16", "symmetric", 0.0), FormatError, "no integer format"),
        ((0.0, 1.0, "uint9", "odd", 0.0), FormatError, "odd.*uint9"),
        ((-1.0, 1.0, "uint8", "symmetric", 0.0), FormatError, "asymmetric"),
        ((1.0, 0.0, "uint8", "asymmetric", 0.0), UsageError, "smaller number first"),
        ((math.nan, 1.0, "uint8", "asymmetric", math.inf), UsageError, "xmin.*value"),
        ((0.0, 1e39, "uint8", "asymmetric", 0.0), UsageError, "xmax"),
    ],
)
def test_what_cannot_be_worked_is_refused_by_name(arguments: tuple, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        explain_affine(*arguments)


# --- a tensor ---------------------------------------------------------------------------------------------------------

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "format",
    ["int4-g32", "int8", "int3-g32-asym", "int4-g32-full", "int8-tensor", "nf4", "nf4-dq", "fp8", "gguf:q4_0", "mxfp4"],
)
def test_figures_are_those_of_rounding_the_weight(folder: Path, tmp_path: Path, format: str) -> None:
    shown = explain_tensor(folder, NAME, format, tmp_path / "picture.png")
    _, weight = read_weight(folder, NAME)
    scheme = parse_scheme(format.replace("gguf:q4_0", "int4-g32-full"))
    difference = (fake_quantize(weight, scheme) - weight).double()
    relative = (difference.square().sum() / weight.double().square().sum()).item()
    assert shown.relative_squared_error == pytest.approx(relative, rel=1e-9)
    assert shown.snr_db == pytest.approx(-10 * math.log10(relative), rel=1e-9)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert os.listdir(tmp_path) == ["picture.png"]
    json.dumps(shown.to_dict(), allow_nan=False)
    assert shown.worst_group in "\n".join(shown.lines())


def test_more_bits_and_smaller_groups_lose_less(folder: Path, tmp_path: Path) -> None:
    errors = [
        explain_tensor(folder, NAME, format, tmp_path / "picture.svg").relative_squared_error
        for format in ("int2-g32", "int3-g32", "int4", "int4-g32", "int8")
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 100 * errors[-1]


def test_the_worst_group_is_the_one_that_was_made_worst(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.save_pretrained(tmp_path)
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    weight[17, 32:] = 0.06
    weight[17, 40] = 1.0  # takes the whole grid of its group: the step is 0.13, and 0.06 rounds to zero
    write_shards(tmp_path, [Part.of({NAME: weight})])
    shown = explain_tensor(tmp_path, NAME, "int4-g32", tmp_path / "picture.svg")
    assert shown.worst_group == "output channel 17, inputs 32 to 63"
    # The outlier errs by half a step, the 31 others by all they are.
    lost = 31 * 0.06**2 + (1 - 7 / 7.5) ** 2
    assert shown.worst_group_error == pytest.approx(lost / (31 * 0.06**2 + 1), rel=2e-3)


def test_a_weight_that_the_format_holds_exactly_has_no_error_and_no_snr(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    weight = torch.zeros(64, 64)
    weight[::2] = 0.5
    write_shards(tmp_path, [Part.of({NAME: weight})])
    shown = explain_tensor(tmp_path, NAME, "nf4", tmp_path / "picture.png")
    assert (shown.relative_squared_error, shown.snr_db, shown.worst_group_error) == (0.0, None, 0.0)
    assert "nothing was lost" in "\n".join(shown.lines())
    json.dumps(shown.to_dict(), allow_nan=False)


def test_an_svg_is_the_same_file_every_time(folder: Path, tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        explain_tensor(folder, NAME, "int4-g32", tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()


def test_conv1d_weights_are_read_as_out_by_in(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    key, weight = read_weight(tmp_path, "transformer.h.0.mlp.c_fc")
    assert key == "transformer.h.0.mlp.c_fc.weight"
    assert weight.shape == (128, 64)
    assert torch.equal(weight, model.transformer.h[0].mlp.c_fc.weight.detach().t())
    assert read_weight(tmp_path, "transformer.wte.weight")[1].shape[1] == 64


def test_an_unknown_tensor_lists_the_nearest_names(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"nearest are: .*model\.layers\.0\.mlp\.up_proj\.weight"):
        explain_tensor(folder, "model.layers.0.mlp.upproj.weight", "int8", tmp_path / "picture.png")
    with pytest.raises(MissingInputError, match=r"model\.layers\.0\.self_attn\.k_proj"):
        explain_tensor(folder, "k_proj", "int8", tmp_path / "picture.png")
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_drawn_is_refused_before_any_file_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        explain_tensor(folder, NAME, "int8", tmp_path / "picture.pdf")
    with pytest.raises(MissingInputError, match="no folder"):
        explain_tensor(folder, NAME, "int8", tmp_path / "nowhere" / "picture.png")
    with pytest.raises(FormatError, match="not divisible by group size 48"):
        explain_tensor(folder, NAME, "int8-g48", tmp_path / "picture.png")
    with pytest.raises(ModelError, match="not a matrix"):
        explain_tensor(folder, "model.norm.weight", "int8", tmp_path / "picture.png")
    assert os.listdir(tmp_path) == []


def test_a_real_weight(material: Path, tmp_path: Path) -> None:
    shown = explain_tensor(material / "models" / "stories260K", NAME, "int4-g32", tmp_path / "picture.png")
    assert shown.shape == (172, 64)
    assert shown.bits_per_weight == 4.5
    assert 20 < (shown.snr_db or 0) < 21
    assert abs(shown.mean) < 0.01 * shown.standard_deviation
    assert shown.largest_error_steps == pytest.approx(0.503, abs=1e-3)

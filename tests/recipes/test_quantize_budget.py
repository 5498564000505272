"""Bits under a budget: kept, no worse than uniform, opened again as chosen, refused with what would do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from strop.errors import ConfigError, FormatError, GateError, UsageError
from strop.layers.quant_embedding import QuantEmbedding, find_ends
from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import linear_modules
from strop.models import load
from strop.recipes.budget import parse_budget
from strop.recipes.calibration import calibration_rows
from strop.recipes.quantize import quantize
from tests.recipes.test_quantize import Listener, logits
from tests.recipes.test_quantize_calibrated import divergence
from tests.tiny import tiny_chat_file, tiny_folder, tiny_tokenizer

FORMATS = ("int2-g32-full", "int4-g32-full", "int8-g32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("budget"), "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_chat_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows=24))


def test_the_bits_are_within_the_budget_and_the_model_opens_as_it_was_chosen(
    tmp_path: Path, source: Path, data: str
) -> None:
    result = quantize(source, output=tmp_path / "out", budget="5bits", formats=FORMATS, data=data, method="search")
    assert result.receipt["requested"] == "5bits"
    assert result.receipt["bits_per_weight"] <= 5.0
    chosen = json.loads((tmp_path / "out" / "budget.json").read_text())
    assert (tmp_path / "out" / "budget.png").stat().st_size > 10_000
    opened = load(tmp_path / "out")
    layers = linear_modules(opened.model)
    assert {tensor["name"]: tensor["actual"] for tensor in result.receipt["tensors"]} == {
        name: layer["format"] for name, layer in chosen["layers"].items()
    }
    for name, module in layers.items():
        assert isinstance(module, QuantLinear)
        assert module.scheme.name == chosen["layers"][name]["format"]
    assert len({module.scheme for module in layers.values()}) > 1  # type: ignore[union-attr]
    assert opened.scheme is None
    assert opened.format.startswith("mixed: ")
    trials = {trial["name"]: trial["kl"] for trial in chosen["trials"]}
    assert trials["by sensitivity"] <= min(kl for name, kl in trials.items() if "everywhere" in name)
    assert any("bits per weight over 15 layers" in line for line in result.lines())


def test_transformers_alone_opens_a_mixed_model(tmp_path: Path, source: Path, data: str) -> None:
    quantize(
        source, output=tmp_path / "out", budget="4bits", formats=("int2-g32", "int8-g32"), data=data, method="search"
    )
    ours = load(tmp_path / "out").model
    assert len({module.scheme for module in linear_modules(ours).values()}) == 2  # type: ignore[union-attr]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-4


def test_a_limit_on_the_kl_gives_the_smallest_size_tried_that_keeps_it(tmp_path: Path, source: Path, data: str) -> None:
    loose = quantize(source, output=tmp_path / "a", budget="kl<0.05", formats=FORMATS, data=data, method="search")
    tight = quantize(source, output=tmp_path / "b", budget="kl<0.0005", formats=FORMATS, data=data, method="search")
    assert loose.receipt["bits_per_weight"] < tight.receipt["bits_per_weight"]
    for name, limit in (("a", 0.05), ("b", 0.0005)):
        chosen = json.loads((tmp_path / name / "budget.json").read_text())
        kept = [trial["bits_per_weight"] for trial in chosen["trials"] if trial["kl"] <= limit]
        assert chosen["bits_per_weight"] == pytest.approx(min(kept))
    with pytest.raises(GateError, match="largest formats everywhere"):
        quantize(source, output=tmp_path / "c", budget="kl<1e-12", formats=FORMATS, data=data)
    assert sorted(path.name for path in tmp_path.iterdir() if "blocks" in path.name) == []


@pytest.mark.parametrize("tied", [False, True], ids={False: "untied", True: "tied"}.get)
def test_a_size_may_be_reached_through_the_embedding_and_the_head(tmp_path: Path, data: str, *, tied: bool) -> None:
    source = tiny_folder(tmp_path, "llama", tied=tied)
    dense = (source / "model.safetensors").stat().st_size
    outside = 4 * 304 * 64 * (1 if tied else 2)  # a tenth and more of so small a model
    limit = (dense - outside) * 5 // 32 + outside * 9 // 32 + 5_000
    result = quantize(source, output=tmp_path / "out", budget=f"{limit}B", formats=FORMATS, data=data, method="search")
    taken = sum(tensor.nbytes for tensor in load_file(result.path / "model.safetensors").values())
    assert 0.7 * limit < taken <= limit + 1_000  # the shapes of the layers
    opened = load(result.path)
    embedding, head = opened.model.get_input_embeddings(), opened.model.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert isinstance(head, QuantLinear)
    assert embedding.scheme.name == "int8-g32"
    assert find_ends(opened.model).tied is tied
    by_name = {tensor["name"]: tensor for tensor in result.receipt["tensors"]}
    assert by_name["model.embed_tokens"]["actual"] == "int8-g32"
    assert ("lm_head" in by_name) is not tied
    assert result.receipt["layers"] == len(by_name) == (15 if tied else 16)
    theirs, info = AutoModelForCausalLM.from_pretrained(result.path, output_loading_info=True)
    assert {name: keys for name, keys in info.items() if keys} == {}
    assert (logits(opened.model) - logits(theirs)).abs().max() < 1e-4


def test_the_receipts_figures_count_what_embedding_and_head_lost(tmp_path: Path, data: str) -> None:
    source = tiny_folder(tmp_path, "llama", tied=False)
    result = quantize(
        source, output=tmp_path / "out", budget="110KB", formats=("int3-g32-full", "int8-g32"), data=data, method="gptq"
    )
    assert {tensor["name"] for tensor in result.receipt["tensors"]} >= {"model.embed_tokens", "lm_head"}
    kl, _ = divergence(source, result.path, calibration_rows(data, tiny_tokenizer(), max_rows=128, max_length=256))
    assert result.receipt["held_out"]["kl"] == pytest.approx(kl, rel=1e-3)


def test_what_stays_in_its_dtype_is_named_with_its_share_and_why(tmp_path: Path, data: str) -> None:
    tied = tiny_folder(tmp_path, "llama", tied=True)
    result = quantize(tied, output=tmp_path / "a", budget="4bits", formats=FORMATS, data=data, method="search")
    (line,) = [line for line in result.lines() if line.startswith("model.embed_tokens: ")]
    assert "% of the weights, tied to lm_head, stay in float32: an average of bits does not count it" in line
    coarse = ("int2-g32-full", "int4-g32-full")
    result = quantize(tied, output=tmp_path / "b", budget="200KB", formats=coarse, data=data, method="search")
    assert any("files hold it in (an embedding: int8 or int8-g32)" in line for line in result.lines())
    gemma = tiny_folder(tmp_path, "gemma")  # multiplies the rows that it looks up
    result = quantize(gemma, output=tmp_path / "c", budget="200KB", formats=FORMATS, data=data, method="search")
    assert any(line.startswith("model.embed_tokens: ") and "tied to lm_head" in line for line in result.lines())
    assert not isinstance(load(result.path).model.get_input_embeddings(), QuantEmbedding)


def test_a_head_of_its_own_is_among_the_layers_whose_bits_are_averaged(tmp_path: Path, data: str) -> None:
    source = tiny_folder(tmp_path, "llama", tied=False)
    result = quantize(source, output=tmp_path / "out", budget="4bits", formats=FORMATS, data=data, method="gptq")
    assert result.receipt["bits_per_weight"] <= 4.0
    (head,) = [tensor for tensor in result.receipt["tensors"] if tensor["name"] == "lm_head"]
    assert head["reason"] is None
    assert load(result.path).model.get_output_embeddings().scheme.name == head["actual"]


def test_a_size_counts_what_is_not_quantized(tmp_path: Path, source: Path, data: str) -> None:
    result = quantize(source, output=tmp_path / "out", budget="200KB", formats=FORMATS, data=data, method="search")
    weights = (result.path / "model.safetensors").stat().st_size
    assert 100_000 < weights <= 200_000 + 20_000  # the header, with the names of the tensors
    with pytest.raises(UsageError, match=r"budget: 1,000 bytes, and what is not quantized takes 1,280"):
        quantize(source, output=tmp_path / "none", budget="1KB", formats=FORMATS, data=data)
    with pytest.raises(UsageError, match=r"smallest choice of formats needs [\d,]+"):
        quantize(source, output=tmp_path / "none", budget="10KB", formats=FORMATS, data=data)
    with pytest.raises(UsageError, match=r"smallest choice of formats needs [\d,]+"):
        quantize(source, output=tmp_path / "none", budget="1bits", formats=FORMATS, data=data)


def test_a_repair_gives_bits_until_the_gate_passes(tmp_path: Path, source: Path, data: str) -> None:
    options = {"data": data, "method": "search", "formats": FORMATS, "max_kl": 0.005}
    with pytest.raises(GateError):
        quantize(source, "int2-g32-full", output=tmp_path / "out", **options)  # type: ignore[arg-type]
    listener = Listener()
    result = quantize(
        source, "int2-g32-full", output=tmp_path / "out", repair=True, overwrite=True, reporter=listener, **options
    )  # type: ignore[arg-type]
    assert result.receipt["held_out"]["kl"] <= 0.005
    assert result.receipt["bits_per_weight"] < 8.5
    assert any(note.startswith("repair: KL") for note in listener.notes)
    assert len({tensor["actual"] for tensor in result.receipt["tensors"]}) > 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, UsageError, "one of the two"),
        ({"format": "int4-g32", "budget": "4bits"}, UsageError, "one of the two"),
        ({"budget": "four"}, ConfigError, r"3\.5bits.*300MB.*kl<0\.02"),
        ({"budget": "4bits", "formats": ("nf4", "int4-g32")}, FormatError, "codebooks stand alone"),
        ({"budget": "4bits", "formats": ("fp8", "int4-g32")}, FormatError, "packed differently"),
        ({"budget": "4bits", "formats": ("int4-g32-asym", "int8-g32")}, FormatError, "dequantizes int4-g32-asym"),
        ({"budget": "4bits", "formats": ("int4-g96",)}, UsageError, "can have none of int4-g96"),
        ({"format": "int4-g32", "repair": True}, UsageError, "say which"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, source: Path, data: str, arguments: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantize(source, output=tmp_path / "out", data=data, **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_budgets_are_read_in_three_ways() -> None:
    assert parse_budget("3.5 bits").bits == 3.5
    assert parse_budget("1.5GiB").total_bytes == 3 << 29
    assert parse_budget("kl<=2e-3").kl == 0.002

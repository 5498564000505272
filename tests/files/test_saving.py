"""Saved models: transformers opens them without strop, no key missing and none left, codes bitwise, logits within
1e-5."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from strop.errors import FormatError, ModelError, UsageError
from strop.files import bnb4, compressed_tensors
from strop.files.receipts import Receipt, TensorReceipt
from strop.files.saving import save_model
from strop.files.shards import Part, iter_tensors, read_header, tensor_files
from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import attach_fake_quant, attach_lora, linear_modules, quantize_linears
from strop.models import load
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from tests.tiny import tiny_folder, tiny_input, tiny_model, tiny_tokenizer

INTEGERS = [
    "int8",
    "int4-g32",
    "int4-g32-full",
    "int3-g32",
    "int2-g32",
    "int4-g32-asym",
    "int8-tensor",
    "int5",
    "int6-asym",
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """compressed-tensors and transformers draw bars otherwise."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def logits(model: Any) -> Tensor:
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")  # as the tiny models have it; the others differ in the last bits
    with torch.no_grad():
        return model(tiny_input()).logits.float()


def same_logits(one: Any, other: Any) -> bool:
    if not one._can_set_attn_implementation():
        return bool((logits(one) - logits(other)).abs().max() <= 1e-5)
    return torch.equal(logits(one), logits(other))


def quantized(family: str, grid: str, **options: Any) -> Any:
    model = tiny_model(family, **options)
    quantize_linears(model, parse_scheme(grid))
    return model


def opened_by_transformers(folder: Path, **options: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    assert {name: keys for name, keys in info.items() if keys} == {}
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # on such CPUs, evaluation would round the scales to bf16
    return model.eval()


def layers(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def assert_same_codes(one: Any, other: Any) -> None:
    assert layers(one).keys() == layers(other).keys()
    for name, module in layers(one).items():
        again = layers(other)[name]
        assert again.scheme == module.scheme
        mine, theirs = module.qtensor.tensors(), again.qtensor.tensors()
        assert mine.keys() == theirs.keys()
        for part in mine:
            assert mine[part].dtype == theirs[part].dtype
            assert mine[part].float().equal(theirs[part].float()), f"{name}.{part}"


@pytest.mark.parametrize(
    ("family", "grid"),
    [("llama", grid) for grid in [*INTEGERS, "fp8", "mxfp4"]]
    + [(family, "int4-g32") for family in ("qwen3", "gemma", "falcon", "mixtral", "qwen3_moe")]
    + [("qwen3_moe", "int4-g32-asym"), ("falcon", "fp8"), ("falcon", "mxfp4")],
)
def test_integers_open_in_transformers_as_compressed_tensors(tmp_path: Path, family: str, grid: str) -> None:
    model = quantized(family, grid)
    expected = logits(model)
    save_model(model, tiny_tokenizer(), tmp_path / "out")
    theirs = opened_by_transformers(tmp_path / "out")
    tensors = dict(iter_tensors(tmp_path / "out"))
    packed = {name: tensor for name, tensor in theirs.state_dict().items() if name.endswith("weight_packed")}
    if (
        "asym" not in grid and grid not in ("fp8", "mxfp4") and family != "falcon"
    ):  # those are dequantized while loading, or hold no words
        assert packed.keys() == {f"{name}.weight_packed" for name in layers(model)}
        assert all(tensor.equal(tensors[name]) for name, tensor in packed.items())
    assert (logits(theirs) - expected).abs().max() <= 1e-5
    for name, module in layers(model).items():
        assert theirs.get_submodule(name).weight.equal(module.dense_weight()), name


@pytest.mark.parametrize(
    ("family", "grid"),
    [("llama", grid) for grid in ("nf4", "nf4-dq", "fp4", "fp4-dq", "nf4-g32")]
    + [(family, "nf4-dq") for family in ("qwen3", "gemma", "mixtral", "gpt2")],
)
def test_codebooks_open_in_transformers_as_bitsandbytes(tmp_path: Path, family: str, grid: str) -> None:
    model = quantized(family, grid)
    expected = logits(model)
    save_model(model, tiny_tokenizer(), tmp_path / "out")
    theirs = opened_by_transformers(tmp_path / "out")
    found = {name for name, module in theirs.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert found == layers(model).keys()
    tensors = dict(iter_tensors(tmp_path / "out"))
    for name, module in layers(model).items():
        weight = theirs.get_submodule(name).weight
        assert weight.data.equal(tensors[f"{name}.weight"])
        assert bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).equal(module.dense_weight())
    assert (logits(theirs) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("family", "grid"),
    [
        ("llama", grid)
        for grid in [*INTEGERS, "fp8", "fp8-g32", "mxfp4", "nf4", "nf4-dq", "fp4-dq", "nf4-g32", "int4-g32-sbf16"]
    ]
    + [(family, "int4-g32-full") for family in ("qwen3", "gemma", "falcon", "mixtral", "qwen3_moe")]
    + [("gpt2", "nf4")],
)
def test_a_saved_model_opens_again_bit_for_bit(tmp_path: Path, family: str, grid: str) -> None:
    model = quantized(family, grid)
    save_model(model, tiny_tokenizer(), tmp_path / "out")
    again = load(tmp_path / "out", dtype="float32")
    assert again.scheme == parse_scheme(grid)
    assert_same_codes(model, again.model)
    assert same_logits(again.model, model)


@pytest.mark.parametrize("grid", [None, "int4-g32", "nf4"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_heads_and_resized_embeddings_survive(tmp_path: Path, tied: bool, grid: str | None) -> None:
    model = tiny_model("llama", tied=tied)
    model.resize_token_embeddings(320, mean_resizing=False)
    if grid is not None:
        quantize_linears(model, parse_scheme(grid))
    save_model(model, tiny_tokenizer(), tmp_path / "out")
    assert ("lm_head.weight" in tensor_files(tmp_path / "out")) is not tied
    for again in (opened_by_transformers(tmp_path / "out"), load(tmp_path / "out", dtype="float32").model):
        head, embedding = again.get_output_embeddings().weight, again.get_input_embeddings().weight
        assert head.shape == embedding.shape == (320, 64)
        assert (head is embedding) is tied
        assert head.equal(model.get_output_embeddings().weight)
        assert embedding.equal(model.get_input_embeddings().weight)
        assert (logits(again) - logits(model)).abs().max() <= 1e-5


def test_a_tie_that_was_undone_is_not_tied_again(tmp_path: Path) -> None:
    model = tiny_model("llama", tied=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    expected = logits(model)
    save_model(model, None, tmp_path / "out")
    assert logits(opened_by_transformers(tmp_path / "out")).equal(expected)
    assert logits(load(tmp_path / "out", tokenizer=False).model).equal(expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2", "falcon", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_model_is_saved_as_transformers_saves_it(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    model.save_pretrained(tmp_path / "theirs")
    save_model(model, None, tmp_path / "ours")
    theirs, ours = dict(iter_tensors(tmp_path / "theirs")), dict(iter_tensors(tmp_path / "ours"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and ours[name].equal(theirs[name]) for name in ours)
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == json.loads(
        (tmp_path / "theirs" / "config.json").read_text()
    )


@pytest.mark.parametrize("grid", ["int4-g32", "nf4-dq"])
def test_a_model_opened_from_shards_of_16_bits_keeps_their_dtype(tmp_path: Path, grid: str) -> None:
    folder = tiny_folder(tmp_path, "llama", dtype=torch.bfloat16)
    opened = load(folder, grid)
    save_model(opened.model, opened.tokenizer, tmp_path / "out", max_shard_bytes=30_000)
    files = set(tensor_files(tmp_path / "out").values())
    assert len(files) > 2
    dtypes = {entry.dtype for file in files for name, entry in read_header(file).entries.items() if "norm" in name}
    assert dtypes == {torch.bfloat16}
    again = load(tmp_path / "out")
    assert again.model.dtype == torch.bfloat16
    assert_same_codes(opened.model, again.model)
    assert same_logits(again.model, opened.model)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_transformers_and_bitsandbytes_save_opens_here(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    for kind in ("nf4", "fp4"):
        for double in (True, False):
            options = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=kind,
                bnb_4bit_use_double_quant=double,
                bnb_4bit_compute_dtype=torch.float32,
            )
            theirs = opened_by_transformers(folder, quantization_config=options)
            theirs.save_pretrained(tmp_path / f"{kind}-{double}")
            again = load(tmp_path / f"{kind}-{double}", dtype="float32", tokenizer=False)
            assert again.scheme == parse_scheme(kind + ("-dq" if double else ""))
            assert (logits(again.model) - logits(theirs)).abs().max() <= 1e-5


def test_what_transformers_saves_again_of_ours_opens_here(tmp_path: Path) -> None:
    model = quantized("llama", "int4-g32")
    save_model(model, None, tmp_path / "ours")
    opened_by_transformers(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load(tmp_path / "theirs", dtype="float32", tokenizer=False)
    for name, module in layers(model).items():
        assert layers(again.model)[name].qtensor.codes.equal(module.qtensor.codes)
    assert (logits(again.model) - logits(model)).abs().max() <= 1e-5


def test_tokenizer_chat_template_and_generation_settings_are_saved(tmp_path: Path) -> None:
    model = quantized("llama", "int8")
    model.generation_config = GenerationConfig(
        temperature=0.6, top_p=0.9, do_sample=False, eos_token_id=[2, 4]
    )  # sampling set, yet off
    save_model(model, tiny_tokenizer(), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert tokenizer("set the alarm")["input_ids"] == tiny_tokenizer()("set the alarm")["input_ids"]
    again = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (again.temperature, again.eos_token_id) == (0.6, [2, 4])


def test_layers_that_stay_are_listed_in_the_configuration(tmp_path: Path) -> None:
    model = tiny_model("llama")
    quantize_linears(model, parse_scheme("int4-g32"), targets="q_proj,k_proj")
    save_model(model, None, tmp_path / "out")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert set(ignored) == {"lm_head"} | {
        name for name, module in linear_modules(model).items() if isinstance(module, nn.Linear)
    }
    assert (logits(opened_by_transformers(tmp_path / "out")) - logits(model)).abs().max() <= 1e-5
    quantize_linears(nf4 := tiny_model("llama"), parse_scheme("nf4"), targets="model.layers.1.*")
    save_model(nf4, None, tmp_path / "nf4")
    assert (logits(opened_by_transformers(tmp_path / "nf4")) - logits(nf4)).abs().max() <= 1e-5


def test_formats_that_no_file_holds_together_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model("llama")
    quantize_linears(model, parse_scheme("int4-g32"), targets="q_proj")
    quantize_linears(model, parse_scheme("nf4"), targets="up_proj")
    with pytest.raises(FormatError, match="cannot mix int4-g32, nf4: codebooks stand alone"):
        save_model(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_conv1d_cannot_be_held_as_compressed_tensors(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"c_attn: a Conv1D .*nearest format that can is nf4"):
        save_model(quantized("gpt2", "int8"), None, tmp_path / "out")


def test_grids_of_gguf_files_are_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    model = quantized("llama", "q4_k", hidden_size=256, intermediate_size=512)
    with pytest.raises(FormatError, match=r"q4_k: is a grid of GGUF files.*the nearest.*int4-g32-asym"):
        save_model(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rows_that_bitsandbytes_misreads_are_refused(tmp_path: Path) -> None:
    model = quantized("llama", "nf4", intermediate_size=96)
    with pytest.raises(FormatError, match=r"down_proj: in_features 96 is no multiple of the block 64"):
        save_model(model, None, tmp_path / "out")


def test_layers_that_transformers_does_not_open_as_bitsandbytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"a FalconLinear, .* the nearest format is int4-g32"):
        save_model(quantized("falcon", "nf4"), None, tmp_path / "out")


def test_adapters_and_layers_still_in_training_are_refused(tmp_path: Path) -> None:
    attach_lora(adapted := tiny_model("llama"), rank=2, alpha=2.0, generator=torch.Generator())
    with pytest.raises(ModelError, match="merge the adapter"):
        save_model(adapted, None, tmp_path / "out")
    attach_fake_quant(fake := tiny_model("llama"), parse_scheme("int4-g32"))
    with pytest.raises(ModelError, match="convert the layers first"):
        save_model(fake, None, tmp_path / "out")


def test_a_failure_while_writing_leaves_the_old_model_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized("llama", "int4-g32")
    save_model(model, tiny_tokenizer(), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    encode, calls = compressed_tensors.encode, []

    def fails_in_the_middle(qtensor: Any, name: str, **options: Any) -> dict[str, Tensor]:
        calls.append(name)
        if len(calls) == 20:  # 14 layers are announced first, then written
            raise KeyboardInterrupt
        return encode(qtensor, name, **options)

    monkeypatch.setattr(compressed_tensors, "encode", fails_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, tiny_tokenizer(), tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UsageError, match="already holds files"):
        save_model(model, None, tmp_path / "out")


def test_the_receipt_compares_each_weight_with_what_it_became(tmp_path: Path) -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0] * 8, [-4.0, 0.1, 0.2, 0.3] * 8])
    qtensor = quantize_tensor(weight, parse_scheme("int4-g32"))
    entry = TensorReceipt.of("layer", weight, qtensor, "int4-g32")
    lost = (qtensor.dequantize() - weight).double()
    assert entry.relative_error == pytest.approx(float(lost.pow(2).sum() / weight.double().pow(2).sum()), rel=1e-6)
    assert entry.max_error == float(lost.abs().max())
    assert entry.nbytes == 2 * 16 + 2 * 2
    kept = TensorReceipt.kept("other", weight.bfloat16(), (2, 32), "int4-g32", "because")
    receipt = Receipt("base", "int4-g32", {"method": "rtn"}, [entry, kept])
    assert receipt.bits_per_weight == (4.5 + 16) / 2
    receipt.write(tmp_path)
    written = json.loads((tmp_path / "receipt.json").read_text())
    assert written["fallbacks"] == ["other"]
    assert [tensor["actual"] for tensor in written["tensors"]] == ["int4-g32", "bfloat16"]
    assert (
        TensorReceipt.of("zero", weight * 0, quantize_tensor(weight * 0, parse_scheme("int4")), "int4").relative_error
        == 0.0
    )


@pytest.mark.parametrize("grid", ["int4-g32", "int3", "nf4-dq", "int8-asym"])
def test_a_layer_is_encoded_without_a_dense_copy(grid: str) -> None:
    qtensor = quantize_tensor(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), parse_scheme(grid))
    encode = bnb4.encode if grid.startswith("nf4") else compressed_tensors.encode
    assert Part.of(encode(qtensor, "x")).nbytes <= qtensor.nbytes + 2048

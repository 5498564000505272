"""GGUF files are bases: the configuration, the tokenizer and the very codes come from the file, or it is refused.

Files of Llama are written by the `gguf` package alone (tests/runtime/files.py), those of the other architectures by
the exporter; what they hold is decoded by the `gguf` package.
"""

from __future__ import annotations

import shutil

import gguf
import numpy as np
import pytest
import torch

from strop.errors import FileFormatError, FormatError, MissingInputError, ModelError, StropError
from strop.files.gguf.transcoding import scheme_of
from strop.files.saving import save_model
from strop.layers.quant_experts import quant_experts
from strop.layers.surgery import linear_modules
from strop.memory import PeakMemory, release_unused_memory, steady_allocation
from strop.models import load
from strop.models.sources import read_config
from strop.recipes.compare import compare
from strop.recipes.export import export
from strop.recipes.merge import merge
from strop.recipes.quantize import quantize
from tests.models.common import logits, quant_linears
from tests.models.gguf_families import FAMILIES, decoded_folder, family_folder
from tests.recipes.helpers import short
from tests.runtime.files import tiny_gguf, write_llama
from tests.tiny import tiny_chat_file, tiny_folder, tiny_model, tiny_tokenizer

TEXTS = [
    "hello world, it's 12345 o'clock",
    "  two  spaces\n\n\tand a tab ",
    "<|im_start|>user\nhi<|im_end|>\n",
    "ünï 漢字 🙂 don't I'LL",
    "",
]
PARTS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
PARTS |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def decoded(path, name):
    """A tensor as the gguf package decodes it."""
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))


def halves(weight, heads):
    """Rows of a query or key projection from llama.cpp's pairs (0, half), (1, half + 1) to transformers' halves."""
    rows = weight.view(heads, -1, 2, weight.shape[1])
    return torch.cat([rows[:, :, 0], rows[:, :, 1]], dim=1).reshape(weight.shape)


@pytest.mark.parametrize(("kind", "form"), [("q4_0", "int4-g32-full"), ("q8_0", "int8-g32")])
def test_codes_are_kept_bit_for_bit_and_compute_what_the_gguf_package_decodes(tmp_path, kind, form):
    path = tiny_gguf(tmp_path, kind)
    opened = load(path, dtype="float32")
    assert opened.format == form
    assert opened.scheme == scheme_of(kind)
    layers = quant_linears(opened.model)
    assert list(layers) == list(linear_modules(load(tmp_path / "llama").model))
    expected = load(tmp_path / "llama", dtype="float32").model
    for name, layer in layers.items():
        _, _, block, _, part = name.split(".")
        weight = decoded(path, f"blk.{block}.{PARTS[part]}.weight")
        if part in ("q_proj", "k_proj"):
            weight = halves(weight, 4 if part == "q_proj" else 2)
        assert layer.dense_weight().equal(weight), name
        expected.get_submodule(name).weight.data.copy_(weight)
    expected.get_input_embeddings().weight.data.copy_(decoded(path, "token_embd.weight"))
    expected.lm_head.weight.data.copy_(decoded(path, "output.weight"))
    assert torch.allclose(logits(opened.model), logits(expected), atol=1e-5)
    (note,) = opened.notes
    assert f"34.4% of the parameters ({kind} in the embedding or head)" in note


@pytest.mark.parametrize(("kind", "dtype"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_file_in_full_precision_opens_dense_in_its_own_dtype(tmp_path, kind, dtype):
    opened = load(tiny_gguf(tmp_path, kind))
    assert opened.model.dtype == dtype
    assert opened.scheme is None
    assert opened.notes == []
    source = load(tmp_path / "llama", dtype=dtype)
    assert torch.equal(logits(opened.model), logits(source.model))


def test_the_tokenizer_of_the_file_gives_the_ids_and_the_template_of_the_folders(tmp_path):
    opened = load(tiny_gguf(tmp_path, "q8_0"))
    source = load(tmp_path / "llama")
    assert opened.tokenizer.chat_template == source.tokenizer.chat_template
    for text in TEXTS:
        ids = source.tokenizer(text)["input_ids"]
        assert opened.tokenizer(text)["input_ids"] == ids, text
        assert opened.tokenizer.decode(ids) == source.tokenizer.decode(ids)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(opened.tokenizer, name) == getattr(source.tokenizer, name)
    assert opened.model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_comes_back_as_it_went_out(tmp_path, family):
    folder = family_folder(tmp_path, family)
    export(folder, tmp_path / "out.gguf", format="gguf:f32", verify=False)
    opened, source = load(tmp_path / "out.gguf"), load(folder, dtype="float32")
    assert torch.equal(logits(opened.model), logits(source.model))
    assert opened.model.config.eos_token_id == [2, 4]  # what the chat template closes an answer with is one too
    for field in ("tie_word_embeddings", "num_hidden_layers", "vocab_size", "bos_token_id"):
        assert getattr(opened.model.config, field) == getattr(source.model.config, field), field


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mixtral", "qwen3moe"])
def test_mixed_types_are_held_as_codes_in_layers_and_experts(tmp_path, family):
    folder = family_folder(tmp_path, family)
    export(folder, tmp_path / "out.gguf", format="gguf:q4_k_m", verify=False)
    opened = load(tmp_path / "out.gguf", dtype="float32")
    assert opened.scheme is None
    assert opened.format.startswith("mixed: ")
    assert "q4_k" in opened.format
    left = [name for name in linear_modules(opened.model) if name not in quant_linears(opened.model)]
    assert all(name.endswith((".gate", ".shared_expert_gate")) for name in left)
    assert len(quant_experts(opened.model)) == (4 if family in ("mixtral", "qwen3moe") else 0)
    plain = load(decoded_folder(tmp_path / "out.gguf", folder, tmp_path / "plain"), dtype="float32")
    assert torch.allclose(logits(opened.model), logits(plain.model), atol=2e-5)


def test_types_that_no_scheme_holds_are_decoded_and_said(tmp_path):
    folder = family_folder(tmp_path, "llama")
    export(folder, tmp_path / "out.gguf", format="gguf:q4_1", verify=False)
    opened = load(tmp_path / "out.gguf")
    assert (opened.scheme, opened.model.dtype) == (None, torch.bfloat16)
    assert "(q4_1 in the blocks)" in opened.notes[0]
    assert "in bfloat16" in opened.notes[0]
    exact = load(tmp_path / "out.gguf", dtype="float32")
    plain = load(decoded_folder(tmp_path / "out.gguf", folder, tmp_path / "plain"), dtype="float32")
    assert torch.allclose(logits(exact.model), logits(plain.model), atol=2e-5)


def test_a_file_is_trained_over_merged_and_compared(tmp_path):
    path, data = tiny_gguf(tmp_path, "q4_0"), tiny_chat_file(tmp_path / "chat.jsonl")
    run = short(path, data, tmp_path / "run", method="qlora", learning_rate=1e-2)
    assert run.report["format"] == "int4-g32-full"
    assert run.report["base"]["base"] == str(path)
    opened, base = load(run.path, dtype="float32"), load(path, dtype="float32")
    layer = opened.model.model.layers[0].mlp.up_proj.base
    assert layer.codes.equal(base.model.model.layers[0].mlp.up_proj.codes)
    assert (logits(opened.model) - logits(base.model)).abs().max() > 1e-3
    assert opened.tokenizer.chat_template == tiny_tokenizer().chat_template
    merged = merge(run.path, tmp_path / "merged", force=True)
    assert not merged.warnings
    assert merged.arithmetic_error <= 1e-5
    assert merged.stored == "bfloat16"
    again = load(tmp_path / "merged", dtype="float32")
    assert (logits(again.model) - logits(opened.model)).norm() < 0.05 * logits(opened.model).norm()
    assert len(compare([run.path, tmp_path / "merged"], data, speed=False).models) == 2


@pytest.mark.parametrize(("method", "extra"), [("lora", {}), ("qlora", {"format": "nf4"})])
def test_a_file_in_full_precision_is_trained_as_a_folder_is(tmp_path, method, extra):
    path, data = tiny_gguf(tmp_path, "f32"), tiny_chat_file(tmp_path / "chat.jsonl")
    ours = short(path, data, tmp_path / "ours", method=method, **extra)
    theirs = short(tmp_path / "llama", data, tmp_path / "theirs", method=method, **extra)
    assert torch.equal(logits(load(ours.path).model), logits(load(theirs.path).model))


def test_a_file_in_full_precision_is_rounded_and_becomes_a_folder(tmp_path):
    path = tiny_gguf(tmp_path, "f32")
    quantize(path, format="int4-g32", output=tmp_path / "rounded")
    assert torch.equal(logits(load(tmp_path / "rounded").model), logits(load(tmp_path / "llama", "int4-g32").model))
    data = tiny_chat_file(tmp_path / "chat.jsonl")
    with pytest.raises(ModelError, match=r"tiny-f32\.gguf: is a file.*make a folder of it first"):
        quantize(path, format="int4-g32", method="gptq", data=data, output=tmp_path / "other")
    opened = load(path)
    save_model(opened.model, opened.tokenizer, tmp_path / "folder")
    quantize(tmp_path / "folder", format="int4-g32", method="gptq", data=data, output=tmp_path / "other")
    assert load(tmp_path / "other").format == "int4-g32"


def test_an_adapter_over_another_file_is_said_when_it_is_merged(tmp_path):
    path = tiny_gguf(tmp_path, "q8_0")
    run = short(path, tiny_chat_file(tmp_path / "chat.jsonl"), tmp_path / "run", method="qlora")
    shutil.copy(tiny_gguf(tmp_path, "q4_0"), path)
    result = merge(run.path, tmp_path / "merged", force=True)
    assert "holds other files than the base that the adapter was trained on" in result.warnings[0]


def test_a_folder_that_holds_one_file_opens_and_one_that_holds_two_asks_which(tmp_path):
    path, home = tiny_gguf(tmp_path, "q8_0"), tmp_path / "home"
    home.mkdir()
    shutil.copy(path, home / "one.GGUF")
    assert load(home).source == str(home / "one.GGUF")
    shutil.copy(path, home / "two.gguf")
    with pytest.raises(ModelError, match=r"holds 2 GGUF files \(one.GGUF, two.gguf\); name one"):
        load(home)


def test_codes_are_not_rounded_again(tmp_path):
    path = tiny_gguf(tmp_path, "q4_0")
    assert load(path, "int4-g32-full").format == "int4-g32-full"
    with pytest.raises(FormatError, match="is quantized already, as int4-g32-full"):
        load(path, "nf4")
    with pytest.raises(FormatError, match="is quantized already"):
        quantize(path, format="int8", output=tmp_path / "out")
    assert read_config(path)[1] == {"quant_method": "gguf"}
    assert read_config(tiny_gguf(tmp_path, "f16"))[1] is None


# --- what is refused -------------------------------------------------------------------------------------------------


def rewritten(source, target, *, keys=None, tensors=None):
    """Copy a file with keys changed (None: left out) and tensors renamed (None: left out), by the gguf package."""
    keys, tensors = keys or {}, tensors or {}
    reader = gguf.GGUFReader(source)
    arch = keys.get("general.architecture", "llama")
    writer = gguf.GGUFWriter(target, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in keys or name == "general.architecture":
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for name, value in keys.items():
        if value is not None and name != "general.architecture":
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        name = tensors.get(tensor.name, tensor.name)
        if name is not None:
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


REFUSED = {
    "another architecture": ({"general.architecture": "llamb"}, {}, FormatError, r"'llamb' \(did you mean 'llama'\?\)"),
    "a setting that is not known": ({"llama.logit_scale": 0.5}, {}, FormatError, r"llama\.logit_scale = 0\.5, which"),
    "another scaling": ({"llama.rope.scaling.type": "dynamic"}, {}, FormatError, r"rope\.scaling\.type = 'dynamic'"),
    "a part of several": ({"split.count": 3}, {}, FileFormatError, "one of 3 parts of a model; join them"),
    "an adapter": ({"general.type": "adapter"}, {}, ModelError, "is of the type 'adapter', and a model"),
    "no block count": ({"llama.block_count": None}, {}, ModelError, r"llama\.block_count is None"),
    "a width that is a text": ({"llama.embedding_length": "x"}, {}, ModelError, "embedding_length is 'x'; a number"),
    "another width": (
        {"llama.embedding_length": 128},
        {},
        ModelError,
        r"file's weight is \(64, 128\), the model needs",
    ),
    "a tensor of no model": ({}, {"blk.1.ffn_up.weight": "blk.1.ffn_side.weight"}, ModelError, r"blk\.1\.ffn_side"),
    "a tensor that is missing": ({}, {"blk.1.ffn_up.weight": None}, ModelError, r"missing.*layers\.1\.mlp\.up_proj"),
    "no embedding": ({}, {"token_embd.weight": None}, ModelError, r"holds no token_embd\.weight"),
    "another pre-tokenizer": ({"tokenizer.ggml.pre": "qwen3"}, {}, FormatError, "'qwen3'.*which strop does not know"),
    "no pre-tokenizer": ({"tokenizer.ggml.pre": None}, {}, FormatError, "none is named, as in files from before 2024"),
    "another kind of vocabulary": ({"tokenizer.ggml.model": "rwkv"}, {}, FormatError, "tokenizer.ggml.model is 'rwkv'"),
    "an end that is no token": ({"tokenizer.ggml.eos_token_id": 999}, {}, FormatError, "eos_token_id is 999"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_another_model_is_refused_by_name(tmp_path, case):
    keys, tensors, kind, words = REFUSED[case]
    path = rewritten(tiny_gguf(tmp_path, "q8_0"), tmp_path / "bad.gguf", keys=keys, tensors=tensors)
    with pytest.raises(kind, match=words) as caught:
        load(path)
    assert "bad.gguf" in str(caught.value)


def test_factors_of_positions_that_no_llama_3_has_are_refused(tmp_path):
    export(family_folder(tmp_path, "llama-3"), tmp_path / "out.gguf", format="gguf:f32", verify=False)
    tensor = next(one for one in gguf.GGUFReader(tmp_path / "out.gguf").tensors if one.name == "rope_freqs.weight")
    raw = bytearray((tmp_path / "out.gguf").read_bytes())
    raw[tensor.data_offset : tensor.data_offset + 4] = np.float32(3.0).tobytes()
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises(FormatError, match=r"bad\.gguf: rope_freqs\.weight divides .* in a way that no Llama 3 does"):
        load(tmp_path / "bad.gguf")


def test_opening_a_file_holds_the_result_and_a_few_layers(tmp_path):
    wide = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8}
    path = write_llama(tiny_folder(tmp_path, "llama", tied=True, **wide), tmp_path / "wide.gguf", "q8_0")
    load(tiny_gguf(tmp_path / "warm-up", "q8_0"))
    release_unused_memory()
    with steady_allocation(), PeakMemory() as peak:
        opened = load(path)
    held = [*opened.model.parameters(), *opened.model.buffers()]
    result_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
    block_bytes = 4 * sum(parameter.numel() for parameter in tiny_model("llama", **wide).model.layers[0].parameters())
    assert 10e6 < result_bytes < 15e6
    assert peak.peak_bytes < result_bytes + block_bytes


def test_truncated_and_absent_files_are_refused(tmp_path):
    path = tiny_gguf(tmp_path, "q8_0")
    short_file = tmp_path / "short.gguf"
    short_file.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FileFormatError, match=r"short\.gguf"):
        load(short_file)
    with pytest.raises(MissingInputError):
        load(tmp_path / "absent.gguf")


def test_a_scale_that_is_infinite_names_the_layer(tmp_path):
    path = tiny_gguf(tmp_path, "q8_0")
    tensor = next(one for one in gguf.GGUFReader(path).tensors if one.name == "blk.1.ffn_up.weight")
    raw = bytearray(path.read_bytes())
    raw[tensor.data_offset : tensor.data_offset + 2] = b"\x00\x7c"  # infinity in float16
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises(FileFormatError, match=r"bad\.gguf.*layers\.1\.mlp\.up_proj.*infinite"):
        load(tmp_path / "bad.gguf")


@pytest.mark.parametrize("seed", range(6))
def test_changed_bytes_in_the_header_give_a_model_or_an_error_of_ours(tmp_path, seed):
    path = tiny_gguf(tmp_path, "q8_0")
    raw = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        raw[int(torch.randint(24, 1500, (1,), generator=generator))] ^= 1 << seed
    (tmp_path / "bad.gguf").write_bytes(raw)
    try:
        load(tmp_path / "bad.gguf")
    except StropError as error:
        assert "bad.gguf" in str(error)  # noqa: PT017  opening may as well succeed

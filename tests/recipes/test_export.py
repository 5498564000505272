from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strop.errors import DiskFullError, FileFormatError, FormatError, MissingInputError, UsageError
from strop.files.gguf.blocks import decode
from strop.files.gguf.mixtures import FILE_TYPES
from strop.files.gguf.reader import GgufFile
from strop.files.gguf.types import TYPES
from strop.files.gguf.writer import write_gguf
from strop.files.shards import iter_tensors
from strop.memory import PeakMemory
from strop.models import load
from strop.recipes import export as recipe
from strop.recipes import export_check, export_tensors
from strop.recipes.export import ExportResult, export
from strop.recipes.merge import merge
from strop.recipes.quantize import quantize
from strop.recipes.tune import tune
from strop.runtime.library import library
from strop.runtime.llama_cpp import GgufModel
from tests.files.gguf_models import gguf_folder, gguf_model
from tests.fresh import in_fresh_process
from tests.recipes.helpers import Notes
from tests.tiny import tiny_chat_file, tiny_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole blocks of every type."""
    folder = tmp_path_factory.mktemp("wide")
    return tiny_folder(folder, "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=3, head_dim=64)


def _export(model: Path | str, output: Path, format: str = "q8_0", **options: Any) -> ExportResult:
    return export(model, output, format=f"gguf:{format}", **({"verify": False} | options))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- what is written --------------------------------------------------------------------------------------------------


def test_f32_holds_every_weight_exactly_and_reads_back_in_two_readers(wide: Path, tmp_path: Path) -> None:
    def without(*_: Any, **__: Any) -> None:
        raise MissingInputError("llama-cpp-python is not installed; `pip install 'strop[gguf]'`")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recipe, "library", without)
        result = _export(wide, tmp_path / "m.gguf", "f32", verify=True)
    assert "every key and every tensor" in result.proof[0]
    assert "NOT RUN in llama.cpp" in result.proof[1]
    assert "pip install 'strop[gguf]'" in result.proof[1]
    file, held = GgufFile.open(tmp_path / "m.gguf"), dict(iter_tensors(wide))
    assert torch.equal(file.tensor("blk.1.ffn_down.weight"), held["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(file.tensor("token_embd.weight"), held["model.embed_tokens.weight"])
    assert all(record.how == "kept" and record.loss == 0 for record in result.tensors)


@pytest.mark.parametrize("name", ["f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q6_k", "q4_k_m"])
def test_every_type_is_written_with_the_loss_that_its_reader_finds(name: str, wide: Path, tmp_path: Path) -> None:
    result = _export(wide, tmp_path / "m.gguf", name)
    file, held = GgufFile.open(tmp_path / "m.gguf"), dict(iter_tensors(wide))
    weight = held["model.layers.1.mlp.up_proj.weight"].double()
    stored = file.tensor("blk.1.ffn_up.weight").double()
    record = next(record for record in result.tensors if record.name == "blk.1.ffn_up.weight")
    assert record.type == file.tensors["blk.1.ffn_up.weight"].type == ("q4_k" if name == "q4_k_m" else name)
    assert record.loss == pytest.approx(float((stored - weight).square().sum() / weight.square().sum()), rel=1e-6)
    limits = {"f16": 1e-7, "bf16": 1e-5, "q8_0": 1e-4, "q6_k": 1e-3}
    assert 0 < record.loss < limits.get(name, 1.2e-2)
    norms = {info.type for tensor, info in file.tensors.items() if "norm" in tensor}
    assert norms == {"f32"}


@pytest.mark.parametrize("name", ["q4_k_m", "q4_0", "q8_0"])
def test_types_are_those_that_llama_cpps_own_quantizer_chooses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lib = pytest.importorskip("llama_cpp.llama_cpp")
    library()
    model = tiny_folder(tmp_path, "llama", tied=True, hidden_size=256, intermediate_size=96, num_hidden_layers=9)
    _export(model, tmp_path / "full.gguf", "f32")

    def nothing(weight: torch.Tensor, kind: str, *_: Any, **__: Any) -> np.ndarray:  # types alone are compared
        return np.zeros((*weight.shape[:-1], TYPES[kind].row_bytes(weight.shape[-1])), np.uint8)

    monkeypatch.setattr(export_tensors, "encode", nothing)
    _export(model, tmp_path / "ours.gguf", name)
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[name], 1
    source, target = (str(tmp_path / f"{one}.gguf").encode() for one in ("full", "theirs"))
    assert lib.llama_model_quantize(source, target, params) == 0
    ours, theirs = GgufFile.open(tmp_path / "ours.gguf"), GgufFile.open(tmp_path / "theirs.gguf")
    assert {key: info.type for key, info in ours.tensors.items()} == {
        key: info.type for key, info in theirs.tensors.items()
    }


def test_the_other_k_quants_come_from_llama_cpps_quantizer(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    result = _export(wide, tmp_path / "m.gguf", "q5_k_m")
    kinds = {record.type for record in result.tensors}
    assert kinds == {"f32", "q5_k", "q6_k"}
    assert all(0 < record.loss < 1e-2 for record in result.tensors if record.type != "f32")
    assert _names(tmp_path) == {"m.gguf", "m.gguf.md", "m.gguf.json"}
    weighed = _export(wide, tmp_path / "w.gguf", "q5_k_m", data=tiny_chat_file(tmp_path / "c.jsonl"), max_rows=8)
    changed = [
        one.name for one, other in zip(weighed.tensors, result.tensors, strict=True) if one.sha256 != other.sha256
    ]
    assert len(changed) >= 20  # every matrix of the blocks, or nearly


def test_without_llama_cpp_its_types_are_refused_with_the_extra_and_those_there_are(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without() -> None:
        raise MissingInputError("llama-cpp-python is not installed; `pip install 'strop[gguf]'`.")

    monkeypatch.setattr(recipe, "library", without)
    with pytest.raises(UsageError, match=r"q5_k_m.*strop\[gguf\].*gguf:q4_k_m"):
        _export(wide, tmp_path / "m.gguf", "q5_k_m")
    assert _names(tmp_path) == set()


def test_an_importance_of_the_columns_lowers_the_error_where_they_are_used(wide: Path, tmp_path: Path) -> None:
    data = tiny_chat_file(tmp_path / "chats.jsonl", rows=12)
    plain = _export(wide, tmp_path / "plain.gguf", "q4_0")
    weighed = _export(wide, tmp_path / "weighed.gguf", "q4_0", data=data, max_rows=12)
    assert weighed.receipt["importance"]["rows"] > 0
    assert len(weighed.receipt["importance"]["sha256"]) == 64
    assert plain.receipt["importance"] is None
    one, other = GgufFile.open(tmp_path / "plain.gguf"), GgufFile.open(tmp_path / "weighed.gguf")
    weight = dict(iter_tensors(wide))["model.layers.0.mlp.down_proj.weight"]
    inputs = _inputs_of_down_proj(wide, data)
    errors = [
        float(((file.tensor("blk.0.ffn_down.weight") - weight) @ inputs.t()).square().sum()) for file in (one, other)
    ]
    assert errors[1] < 0.97 * errors[0]
    provenance = json.loads(str(other.metadata["strop.provenance"]))
    assert provenance["importance"]["sha256"] == weighed.receipt["importance"]["sha256"]


def _inputs_of_down_proj(folder: Path, data: Path) -> torch.Tensor:
    opened = load(folder)
    seen: list[torch.Tensor] = []
    layer = opened.model.get_submodule("model.layers.0.mlp.down_proj")
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach()))
    for line in data.read_text(encoding="utf-8").splitlines():
        ids = opened.require_tokenizer().apply_chat_template(json.loads(line)["messages"], return_dict=False)
        with torch.no_grad():
            opened.model(torch.tensor([ids]))
    return torch.cat(seen)


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "name"), [("int4-g32-full", "q4_0"), ("int8-g32", "q8_0")])
def test_codes_on_the_same_grid_are_taken_over_bit_for_bit(scheme: str, name: str, wide: Path, tmp_path: Path) -> None:
    quantize(wide, scheme, output=tmp_path / "quantized")
    result = _export(tmp_path / "quantized", tmp_path / "m.gguf", name)
    moved = [record for record in result.tensors if record.how == "moved"]
    assert len(moved) == 3 * 7
    assert not any(record.how == "rounded again" for record in result.tensors)
    assert any("taken over bit for bit" in line for line in result.lines())
    model, file = load(tmp_path / "quantized").model, GgufFile.open(tmp_path / "m.gguf")
    for layer, tensor in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        wanted = model.get_submodule(f"model.layers.1.{layer}").qtensor.dequantize()
        assert torch.equal(file.tensor(f"blk.1.{tensor}.weight"), wanted)
    queries = model.get_submodule("model.layers.1.self_attn.q_proj").qtensor.dequantize()
    assert torch.equal(file.tensor("blk.1.attn_q.weight").sort(0).values, queries.sort(0).values)


def test_codes_of_another_grid_are_rounded_again_and_that_is_said_aloud(wide: Path, tmp_path: Path) -> None:
    quantize(wide, "int4-g32-asym", output=tmp_path / "quantized")
    result = _export(tmp_path / "quantized", tmp_path / "m.gguf", "q4_0")
    assert sum(record.how == "rounded again" for record in result.tensors) == 21
    assert any("WARNING" in line and "ROUNDED A SECOND TIME" in line for line in result.lines())
    assert "ROUNDED A SECOND TIME" in (tmp_path / "m.gguf.md").read_text(encoding="utf-8")
    assert "quantized before | int4-g32-asym by rtn" in (tmp_path / "m.gguf.md").read_text(encoding="utf-8")
    decoded = _export(tmp_path / "quantized", tmp_path / "f32.gguf", "f32")
    assert {record.how for record in decoded.tensors} == {"kept", "decoded"}
    with pytest.raises(FormatError, match="quantized already, and data would weigh a second rounding"):
        _export(tmp_path / "quantized", tmp_path / "x.gguf", "q4_0", data=tiny_chat_file(tmp_path / "c.jsonl"))


def test_nf4_is_decoded_and_its_second_rounding_said(wide: Path, tmp_path: Path) -> None:
    quantize(wide, "nf4", output=tmp_path / "quantized")
    result = _export(tmp_path / "quantized", tmp_path / "m.gguf", "q6_k")
    assert sum(record.how == "rounded again" for record in result.tensors) == 21


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_quantized_one_by_one_are_stacked_code_by_code(kind: str, tmp_path: Path) -> None:
    gguf_folder(tmp_path / "model", gguf_model(kind))
    quantize(tmp_path / "model", "int8-g32", output=tmp_path / "quantized")
    result = _export(tmp_path / "quantized", tmp_path / "m.gguf", "q8_0")
    stacked = [record for record in result.tensors if record.name.endswith("_exps.weight")]
    assert len(stacked) == 6
    assert {(record.how, len(record.sources)) for record in stacked} == {("moved", 4)}
    wanted = load(tmp_path / "quantized").model.get_submodule("model.layers.1.mlp.experts").down_proj
    file = GgufFile.open(tmp_path / "m.gguf").tensor("blk.1.ffn_down_exps.weight")
    assert all(torch.equal(file[expert], wanted.qtensor(expert).dequantize()) for expert in range(4))


def test_a_run_is_exported_with_the_hashes_of_what_made_it(tmp_path: Path) -> None:
    base, data = tiny_folder(tmp_path, "llama"), tiny_chat_file(tmp_path / "chats.jsonl")
    tuned = tune(base, data, output=tmp_path / "run", method="full", max_steps=2, batch_size=4, dtype="float32")
    with pytest.raises(UsageError, match="was trained for no GGUF format"):
        tuned.export(tmp_path / "m.gguf")
    result = tuned.export(tmp_path / "m.gguf", format="gguf:f16", verify=False)
    run = result.receipt["origin"]["run"]
    assert len(run["rows_sha256"]) == len(run["base"]["sha256"]) == 64
    text = (tmp_path / "m.gguf.md").read_text(encoding="utf-8")
    assert f"SHA-256 of the rendered rows `{run['rows_sha256']}`" in text
    assert run["base"]["sha256"] in text
    assert "| method | full |" in text
    told = json.dumps(result.receipt["origin"]) + str(GgufFile.open(tmp_path / "m.gguf").metadata["strop.provenance"])
    assert '"path"' not in told


def test_a_name_that_llama_cpp_takes_for_another_models_is_changed(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model = tiny_folder(tmp_path, "llama").rename(tmp_path / "My-Phi-3-tiny")
    _export(model, tmp_path / "m.gguf")
    assert GgufFile.open(tmp_path / "m.gguf").metadata["general.name"] == "my-phi_3-tiny"
    with GgufModel.open(tmp_path / "m.gguf", threads=1) as opened:  # it would miss </s> otherwise
        assert opened.tokenize("the lazy dog", add_special=True) == tiny_tokenizer()("the lazy dog")["input_ids"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run over a base of grouped queries, with an effect that shows."""
    folder = tmp_path_factory.mktemp("adapter")
    base, data = tiny_folder(folder, "llama"), tiny_chat_file(folder / "chats.jsonl")
    tune(
        base, data, output=folder / "run", method="lora", rank=4, alpha=32, learning_rate=0.02, max_steps=6,
        batch_size=4, dtype="float32", rank_stabilised=True,
    )  # fmt: skip
    return folder


def test_an_adapter_is_merged_first_and_its_effect_is_in_the_file(adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    notes = Notes()
    result = _export(adapter / "run", tmp_path / "m.gguf", "f32", verify=True, reporter=notes)
    assert notes.said("of the adapter's effect kept")
    assert any("of what tuning changed is in the file" in line for line in result.proof)
    assert result.receipt["run"]["passed"]
    assert result.receipt["run"]["file"] == "m.gguf"
    assert _names(tmp_path) == {"m.gguf", "m.gguf.md", "m.gguf.json"}


def test_what_was_merged_by_hand_is_held_against_its_base_and_says_what_trained_it(
    adapter: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    merge(adapter / "run", tmp_path / "merged")
    result = _export(tmp_path / "merged", tmp_path / "m.gguf", "f32", verify=True)
    assert result.receipt["run"]["effect"] == pytest.approx(1, abs=1e-3)
    assert "the run's own rows" in result.proof[1]
    assert result.receipt["origin"]["run"]["method"]["name"] == "lora"
    record = json.loads((tmp_path / "merged" / "merge.json").read_text(encoding="utf-8"))
    (tmp_path / "merged" / "merge.json").write_text(json.dumps(record | {"source_sha256": "0" * 64}))
    again = _export(tmp_path / "merged", tmp_path / "again.gguf", "f32")  # that adapter is another one by now
    assert again.receipt["origin"] == {}


def test_an_adapter_alone_does_in_llama_cpp_what_it_does_here(adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    result = _export(adapter / "run", tmp_path / "a.gguf", "f32", adapter_only=True, verify=True)
    assert "read back" in result.proof[0]
    card = (tmp_path / "a.gguf.md").read_text(encoding="utf-8")
    assert "llama-cli -m BASE.gguf --lora a.gguf" in card
    with pytest.raises(UsageError, match=r"is an adapter alone, which llama\.cpp takes with --lora"):
        GgufModel.open(tmp_path / "a.gguf", threads=1)
    assert "strop chat" not in card
    assert "| method | lora: rank 4" in card
    _export(adapter / "llama", tmp_path / "base.gguf", "f32")
    metadata = GgufFile.open(tmp_path / "a.gguf").metadata
    assert (metadata["general.type"], metadata["adapter.type"]) == ("adapter", "lora")
    ids = list(range(5, 45))
    with torch.no_grad():
        wanted = load(adapter / "run").model(torch.tensor([ids])).logits[0]
        without = load(adapter / "llama").model(torch.tensor([ids])).logits[0]
    lib = library()
    with GgufModel.open(tmp_path / "base.gguf", threads=1) as opened:
        loaded = lib.llama_adapter_lora_init(opened._model, str(tmp_path / "a.gguf").encode())
        assert loaded
        adapters = (type(loaded) * 1)(loaded)
        assert lib.llama_set_adapters_lora(opened._context, adapters, 1, (lib.ctypes.c_float * 1)(1.0)) == 0
        found = torch.from_numpy(opened.logits(ids))
    assert float((wanted - without).abs().max()) > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_options_that_contradict_each_other_are_refused(adapter: Path, wide: Path, tmp_path: Path) -> None:
    data = tiny_chat_file(tmp_path / "c.jsonl")
    for model, name, options, said in (
        (wide, "f32", {"adapter_only": True}, "takes an adapter, and this is a whole model"),
        (adapter / "run", "q8_0", {"adapter_only": True}, "use gguf:f32"),
        (adapter / "run", "f32", {"adapter_only": True, "modelfile": True}, "goes without --data and --modelfile"),
        (wide, "q8_0", {"data": data}, "gguf:q8_0 has none"),
        (wide, "q8_0", {"max_kl": 0.1}, "--max-kl is judged by the proof"),
    ):
        with pytest.raises(UsageError, match=said):
            _export(model, tmp_path / "m.gguf", name, **options)
    with pytest.raises(MissingInputError, match="is a file"):
        _export(tmp_path / "c.jsonl", tmp_path / "m.gguf", "q8_0")
    assert _names(tmp_path) == {"c.jsonl"}


def test_a_chat_template_is_embedded_in_a_model_that_has_none(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path, "llama", tokenizer=tiny_tokenizer(chat_template=False))
    _export(model, tmp_path / "plain.gguf")
    assert "tokenizer.chat_template" not in GgufFile.open(tmp_path / "plain.gguf").metadata
    assert "-p 'Once upon a time'" in (tmp_path / "plain.gguf.md").read_text(encoding="utf-8")
    (tmp_path / "own.jinja").write_text(str(tiny_tokenizer().chat_template), encoding="utf-8")
    _export(model, tmp_path / "m.gguf", chat_template=tmp_path / "own.jinja")
    metadata = GgufFile.open(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.chat_template"] == tiny_tokenizer().chat_template
    assert metadata["tokenizer.ggml.eot_token_id"] == 4  # what the template ends an answer with


def test_codes_that_would_not_read_back_as_they_are_are_not_moved(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(wide, "int4-g32-full", output=tmp_path / "quantized")
    real = export_tensors.transcode

    def wrong(quantized: Any) -> Any:
        found = real(quantized)
        return None if found is None else (found[0], found[1] ^ 1)

    monkeypatch.setattr(export_tensors, "transcode", wrong)
    result = _export(tmp_path / "quantized", tmp_path / "m.gguf", "q4_0")
    assert not any(record.how == "moved" for record in result.tensors)


def test_a_tokenizer_model_alone_is_enough(tmp_path: Path, material: Path) -> None:
    shutil.copytree(material / "models" / "stories260K", tmp_path / "model")
    (tmp_path / "model").chmod(0o755)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "model" / name).unlink()
    result = _export(tmp_path / "model", tmp_path / "m.gguf", "f32")
    assert any("read from tokenizer.model" in note for note in result.receipt["notes"])
    _export(material / "models" / "stories260K", tmp_path / "whole.gguf", "f32")
    one, other = GgufFile.open(tmp_path / "m.gguf").metadata, GgufFile.open(tmp_path / "whole.gguf").metadata
    for key in ("tokens", "scores", "token_type", "eos_token_id", "add_bos_token", "add_space_prefix"):
        assert one[f"tokenizer.ggml.{key}"] == other[f"tokenizer.ggml.{key}"]


# --- what is refused, and what a failure leaves -----------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    output = tmp_path / "out" / "m.gguf"
    with pytest.raises(FormatError, match="falcon: no GGUF file is written of this architecture"):
        _export(tiny_folder(tmp_path, "falcon"), output)
    model = tiny_folder(tmp_path, "llama")
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"]["use_regex"] = False
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(FormatError, match=r"no pre-tokenizer of llama\.cpp"):
        _export(model, output)
    assert not output.parent.exists()


def test_what_stands_at_the_output_or_beside_it_is_kept_unless_it_may_be_replaced(wide: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf.md").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=r"m.gguf.md: stands there already"):
        _export(wide, tmp_path / "m.gguf")
    assert _names(tmp_path) == {"m.gguf.md"}
    _export(wide, tmp_path / "m.gguf", overwrite=True)
    assert "mine" not in (tmp_path / "m.gguf.md").read_text(encoding="utf-8")


def test_a_disk_without_room_is_found_before_anything_is_written(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100_000}))
    with pytest.raises(DiskFullError, match="100,000 are free"):
        _export(wide, tmp_path / "m.gguf")
    assert _names(tmp_path) == set()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_stop_in_the_middle_leaves_nothing(
    stop: type[BaseException], wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = export_tensors.encode

    def encode(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise stop
        return real(*args, **options)

    monkeypatch.setattr(export_tensors, "encode", encode)
    with pytest.raises(stop):
        _export(wide, tmp_path / "m.gguf")
    assert _names(tmp_path) == set()


def test_a_byte_that_changes_between_writing_and_reading_is_found(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: Any, *args: Any, **options: Any) -> None:
        write_gguf(file, *args, **options)
        file.seek(-100, 2)
        file.write(b"\x01")

    monkeypatch.setattr(recipe, "write_gguf", broken)
    with pytest.raises(FileFormatError, match=r"output_norm.weight: its bytes changed"):
        _export(wide, tmp_path / "m.gguf", "f32", verify=True)
    assert _names(tmp_path) == set()


def test_the_gguf_package_must_decode_what_we_do(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = _export(wide, tmp_path / "m.gguf", "q4_0")
    records = {record.name: record for record in result.tensors}
    export_check.read_back(tmp_path / "m.gguf", {}, records)
    monkeypatch.setattr(export_check, "decode", lambda *args, **options: decode(*args, **options) * 1.01)
    with pytest.raises(FileFormatError, match="decodes other values"):
        export_check.read_back(tmp_path / "m.gguf", {}, records)
    monkeypatch.undo()
    changed = records | {"blk.0.attn_q.weight": replace(records["blk.0.attn_q.weight"], type="q8_0")}
    with pytest.raises(FileFormatError, match=r"(?s)the key a.b reads None.*blk.0.attn_q.weight: q4_0"):
        export_check.read_back(tmp_path / "m.gguf", {"a.b": 1}, changed)


# --- memory -----------------------------------------------------------------------------------------------------------


def _peak(warm: str, model: str, output: str) -> int:
    _export(Path(warm), Path(output).with_name("warm.gguf"), "q8_0")
    with PeakMemory() as memory:
        _export(Path(model), Path(output), "q8_0")
    return memory.peak_bytes


def test_memory_holds_a_piece_of_a_tensor_never_the_model(wide: Path, tmp_path: Path) -> None:
    model = tiny_folder(tmp_path, "llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=8, tied=True)
    whole = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert whole > 60e6
    assert in_fresh_process(_peak, str(wide), str(model), str(tmp_path / "m.gguf")) < whole / 3


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line_exports_and_refuses(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from strop.app.cli import main

    arguments = ["export", str(wide), "-f", "gguf:q8_0", "-o", str(tmp_path / "m.gguf"), "--no-verify", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["format"] == "gguf:q8_0"
    for changed, code, said in (
        (arguments, 2, "stands there already"),
        (["export", str(wide), "-f", "q8_0", "-o", "x.gguf"], 2, "did you mean gguf:q8_0?"),
        (["export", str(tmp_path / "none"), "-f", "gguf:q8_0", "-o", "x.gguf"], 2, "no such folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(changed)
        assert ended.value.code == code
        assert said in capsys.readouterr().err.replace("\n", " ")

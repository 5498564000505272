"""What cannot be opened is refused with what, where and what to do; nothing leaks from below, no code runs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from strop.errors import ConfigError, FileFormatError, FormatError, MissingInputError, ModelError, StropError
from strop.models import load
from tests.models.common import edit_json, edit_weights, quantized_copy, rounded
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path, "llama", tied=False)


class _Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["no/such/folder", "./gone", "org/name", "gone", "a b/c"])
def test_a_name_that_is_nowhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingInputError, match="no such folder"):
        load(name)


def test_a_file_instead_of_a_folder(folder):
    with pytest.raises(MissingInputError, match="is a file"):
        load(folder / "model.safetensors")


def test_a_folder_that_holds_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"neither config\.json.*nor adapter_config\.json"):
        load(tmp_path / "empty")


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights|holds no"):
        load(folder)


def test_pickled_weights_are_refused_by_name_and_not_opened(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Canary(tmp_path / "ran")))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", [None, "int4-g32"])
def test_a_missing_and_an_unexpected_tensor_are_both_listed(folder, form):
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_projection.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
        del tensors["model.norm.weight"]

    edit_weights(folder, edit)
    with pytest.raises(ModelError) as caught:
        load(folder, form)
    message = str(caught.value)
    assert "2 missing" in message
    assert "model.layers.0.mlp.up_proj.weight" in message
    assert "model.norm.weight" in message
    assert "1 unexpected" in message
    assert "up_projection" in message


def test_each_renamed_tensor_is_refused(tmp_path):
    folder = tiny_folder(tmp_path, "gpt2", n_layer=1)
    names = list(load_file(folder / "model.safetensors"))
    for name in names:
        edit_weights(folder, lambda tensors, name=name: tensors.update({f"x.{name}": tensors.pop(name)}))
        with pytest.raises(ModelError, match="missing"):
            load(folder)
        edit_weights(folder, lambda tensors, name=name: tensors.update({name: tensors.pop(f"x.{name}")}))
    load(folder)


def test_a_tied_head_may_be_missing_and_an_untied_one_may_not(tmp_path, folder):
    load(tiny_folder(tmp_path / "tied", "llama", tied=True))
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"1 missing.*lm_head\.weight"):
        load(folder)


@pytest.mark.parametrize("form", [None, "int4-g32"])
def test_a_shape_that_config_does_not_give_is_refused(folder, form):
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 64)}))
    with pytest.raises(ModelError, match=r"up_proj\.weight.*\(64, 64\).*\(128, 64\)"):
        load(folder, form)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_a_truncated_file_is_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match=r"model\.safetensors"):
        load(folder)


def test_a_corrupt_header_is_refused(folder):
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8:40] = b"\xff" * 32
    path.write_bytes(raw)
    with pytest.raises(FileFormatError, match="header"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff\xfe"])
def test_a_broken_configuration_is_refused(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(FileFormatError, match=r"config\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": None}, "model_type"),
        ({"model_type": "lama"}, r"'lama'.*did you mean 'llama'"),
        ({"model_type": "t5"}, "not a causal language model"),
        ({"hidden_size": "many"}, "hidden_size|cannot"),
        ({"transformers_weights": "../other.safetensors"}, "transformers_weights"),
        ({"quantization_config": 4}, "quantization_config"),
    ],
)
def test_a_configuration_that_is_no_language_model_of_transformers_is_refused(folder, changes, reason):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=reason):
        load(folder)


def test_remote_code_is_refused_by_name_and_never_run(folder, tmp_path):
    (folder / "modeling_own.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    auto_map = {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    edit_json(folder / "config.json", model_type="own_thing", auto_map=auto_map)
    with pytest.raises(ModelError, match=r"'own_thing'.*auto_map.*never run"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_code_beside_an_architecture_that_transformers_has_is_not_run(folder, tmp_path):
    (folder / "modeling_own.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    auto_map = {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    edit_json(folder / "config.json", auto_map=auto_map)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "modeling_own.T"]})
    opened = load(folder)
    assert type(opened.model).__module__.startswith("transformers.models.llama")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 5},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": "six"},
        {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
        {"quant_method": "hqq"},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"group_0": {}}},
        {"quant_method": "of-tomorrow"},
    ],
)
def test_weights_quantized_in_a_way_that_strop_does_not_read_are_refused(folder, quantization):
    edit_json(folder / "config.json", quantization_config=quantization)
    with pytest.raises(ModelError, match=r"[Oo]pen the model"):
        load(folder)


def test_rounding_a_quantized_model_to_another_format_is_refused(folder, tmp_path):
    quantized = quantized_copy(folder, rounded("llama", "int4-g32", tied=False), tmp_path / "quantized")
    with pytest.raises(FormatError, match=r"is quantized already, as int4-g32"):
        load(quantized, "int8")


@pytest.mark.parametrize("scheme", ["int4-g32", "nf4-dq"])
def test_each_lost_or_misshapen_tensor_of_a_quantized_layer_is_refused(folder, tmp_path, scheme):
    quantized = quantized_copy(folder, rounded("llama", scheme, tied=False), tmp_path / "quantized")
    layer = "model.layers.1.mlp.down_proj."
    whole = load_file(quantized / "model.safetensors")
    parts = [name for name in whole if name.startswith(layer)]
    assert len(parts) >= 3
    for part in parts:
        for change in (None, whole[part].flatten()[:-1].clone()):
            tensors = {name: tensor for name, tensor in whole.items() if name != part}
            if change is not None:
                tensors[part] = change
            save_file(tensors, quantized / "model.safetensors")
            with pytest.raises((ModelError, FileFormatError), match=r"model\.layers\.1\.mlp\.down_proj"):
                load(quantized)


def test_a_quantized_weight_without_a_linear_layer_is_refused(folder, tmp_path):
    quantized = quantized_copy(folder, rounded("llama", "int4-g32", tied=False), tmp_path / "quantized")
    old, new = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.experts.0.down_proj"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{old}.")]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    edit_weights(quantized, edit)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.experts\.0\.down_proj"):
        load(quantized)


def test_every_layer_that_is_not_finite_is_named_when_rounding(folder):
    broken = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in broken:
            tensors[f"{name}.weight"][3, 3] = float("inf")

    edit_weights(folder, edit)
    with pytest.raises(FormatError) as caught:
        load(folder, "int4-g32")
    assert all(name in str(caught.value) for name in broken)


def test_every_shape_that_does_not_divide_is_named_before_a_weight_is_read(folder):
    with pytest.raises(FormatError) as caught:
        load(folder, "int4-g48")
    assert str(caught.value).count("is not divisible") == 14


def test_a_broken_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer"):
        load(folder)
    assert load(folder, tokenizer=False).tokenizer is None


def test_text_without_a_tokenizer_says_what_to_do(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load(tmp_path / "bare").require_tokenizer()
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    assert load(tmp_path / "bare").require_tokenizer() is not None


@pytest.mark.parametrize(
    ("options", "kind", "reason"),
    [
        ({"format": "int9"}, FormatError, "int9"),
        ({"dtype": "bfloat"}, ConfigError, "did you mean 'bfloat16'"),
        ({"dtype": torch.int8}, ConfigError, "dtype"),
        ({"device": "abacus"}, ConfigError, "abacus"),
    ],
)
def test_options_that_mean_nothing_are_refused(folder, options, kind, reason):
    with pytest.raises(kind, match=reason):
        load(folder, **options)


@pytest.mark.parametrize("seed", range(12))
def test_a_changed_configuration_gives_a_model_or_an_error_of_ours(folder, seed):
    generator = torch.Generator().manual_seed(seed)
    fields = json.loads((folder / "config.json").read_text())
    name = list(fields)[int(torch.randint(len(fields), (1,), generator=generator))]
    for value in (None, -1, 0, "x", [], {"a": 1}, 1e30):
        (folder / "config.json").write_text(json.dumps(fields | {name: value}))
        try:
            load(folder, tokenizer=False)
        except StropError as error:
            assert str(folder) in str(error)  # noqa: PT017  opening may as well succeed

"""PEFT's adapter layout: PEFT as independent reader and writer, every key renamed, every unsupported variant
refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from strop.errors import FileFormatError, FormatError, MissingInputError, ModelError, UsageError
from strop.files.peft_adapter import BaseRecord, base_digest, load_adapter, read_adapter_config, save_adapter
from strop.layers.surgery import attach_lora, detach_lora, lora_modules, quantize_linears
from strop.numerics.scheme import parse_scheme
from tests.tiny import tiny_folder, tiny_input, tiny_model, tiny_tokenizer

# PEFT asks transformers about checkpointing by a name that transformers gave up
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

BASE = BaseRecord("org/base")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tiny_input()).logits


def trained(family: str = "llama", *, targets: Any = "all-linear", **settings: Any) -> nn.Module:
    """A tiny model whose adapters visibly change the logits."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(3)
    attach_lora(model, targets, **({"rank": 4, "alpha": 8.0} | settings), generator=generator)
    for module in lora_modules(model).values():
        with torch.no_grad():
            module.lora_B.normal_(std=0.1, generator=generator)
    return model


def peft_folder(path: Path, family: str = "llama", **settings: Any) -> tuple[Path, Tensor]:
    """An adapter that PEFT wrote, and the logits of the pair."""
    config = LoraConfig(
        task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        pair = get_peft_model(tiny_model(family), config).eval()
        for name, parameter in pair.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    pair.save_pretrained(path)
    return path, logits(pair)


def edit(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"rank_stabilised": True}),
        ("llama", {"targets": "q_proj,v_proj"}),
        ("llama", {"targets": "model.layers.1.*"}),
        ("qwen3", {"alpha": 5.5}),
        ("gemma", {}),
        ("gpt2", {}),
        ("falcon", {}),
        ("mixtral", {"targets": "q_proj,o_proj"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "plain",
)
def test_what_is_saved_opens_in_peft_with_the_same_logits(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    model = trained(family, **settings)
    save_adapter(model, tmp_path / "adapter", base=BASE)
    pair = PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter").eval()
    loaded = {name for name, _ in pair.named_parameters() if "lora_" in name}
    assert len(loaded) == 2 * len(lora_modules(model))
    assert (logits(pair) - logits(model)).abs().max() <= 1e-5
    assert (logits(model) - logits(tiny_model(family))).abs().max() > 0.1


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "lora_alpha": 3}),
        ("llama", {"target_modules": "all-linear", "lora_dropout": 0.1}),
        ("llama", {"target_modules": r"model\.layers\.1\..*_proj"}),
        ("llama", {"layers_to_transform": [1]}),
        ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]}),
        ("llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.v_proj": 16}}),
        ("llama", {"init_lora_weights": "gaussian"}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("falcon", {"target_modules": ["query_key_value"]}),
        ("mixtral", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_what_peft_saves_opens_with_the_same_logits(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    folder, expected = peft_folder(tmp_path / "adapter", family, **settings)
    model = tiny_model(family)
    assert load_adapter(model, folder).base == ""  # PEFT was not told where the model came from
    assert (logits(model) - expected).abs().max() <= 1e-5


def test_an_adapter_comes_back_bit_for_bit_and_alone_is_trainable(tmp_path: Path) -> None:
    model = trained(rank=3, alpha=7.0, dropout=0.25)
    save_adapter(model, tmp_path / "adapter", base=BASE)
    again = tiny_model("llama")
    config = load_adapter(again, tmp_path / "adapter")
    assert (config.base, config.rank, config.alpha, config.dropout) == ("org/base", 3, 7.0, 0.25)
    mine, theirs = lora_modules(model), lora_modules(again)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert theirs[name].lora_A.equal(mine[name].lora_A)
        assert theirs[name].lora_B.equal(mine[name].lora_B)
        assert theirs[name].dropout == 0.25
    trainable = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.lora_{half}" for name in theirs for half in "AB"}
    detach_lora(again)
    assert logits(again).equal(logits(tiny_model("llama")))


def test_layers_of_different_rank_and_alpha_open_in_peft(tmp_path: Path) -> None:
    model = trained(targets="q_proj,k_proj", rank=4)
    attach_lora(model, "model.layers.1.mlp.up_proj", rank=2, alpha=3.0, generator=torch.Generator())
    nn.init.normal_(lora_modules(model)["model.layers.1.mlp.up_proj"].lora_B)
    save_adapter(model, tmp_path / "adapter", base=BASE)
    pair = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter").eval()
    again = tiny_model("llama")
    load_adapter(again, tmp_path / "adapter")
    assert (logits(pair) - logits(model)).abs().max() <= 1e-5
    assert logits(again).equal(logits(model))


def test_the_bases_own_tensors_are_not_in_the_file(tmp_path: Path) -> None:
    model = trained(targets="q_proj")
    save_adapter(model, tmp_path / "adapter", base=BASE)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {(name, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        (f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{half}.weight", shape)
        for i in (0, 1)
        for half, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["q_proj"]


def test_targets_are_full_names_where_the_last_part_would_reach_other_modules(tmp_path: Path) -> None:
    save_adapter(trained(targets="model.layers.0.self_attn.q_proj"), tmp_path / "adapter", base=BASE)
    assert read_adapter_config(tmp_path / "adapter").targets == ("model.layers.0.self_attn.q_proj",)


def test_an_adapter_over_a_quantized_base_opens_over_it_again(tmp_path: Path) -> None:
    model = tiny_model("llama")
    quantize_linears(model, parse_scheme("nf4-dq"))
    attach_lora(model, rank=4, alpha=8.0, generator=torch.Generator().manual_seed(0))
    for module in lora_modules(model).values():
        nn.init.normal_(module.lora_B, std=0.1)
    save_adapter(model, tmp_path / "adapter", base=BaseRecord("org/base", "nf4-dq", "abc"))
    again = tiny_model("llama")
    quantize_linears(again, parse_scheme("nf4-dq"))
    config = load_adapter(again, tmp_path / "adapter")
    assert logits(again).equal(logits(model))
    assert config.record == BaseRecord("org/base", "nf4-dq", "abc")


def test_the_tokenizer_with_its_chat_template_is_saved_beside(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_adapter(trained(), tmp_path / "adapter", base=BASE, tokenizer=tiny_tokenizer())
    again = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert again.chat_template == tiny_tokenizer().chat_template


def test_an_existing_folder_is_kept_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    save_adapter(trained(rank=4), tmp_path / "adapter", base=BASE)
    with pytest.raises(UsageError, match="already holds files"):
        save_adapter(trained(rank=2), tmp_path / "adapter", base=BASE)
    assert read_adapter_config(tmp_path / "adapter").rank == 4
    save_adapter(trained(rank=2), tmp_path / "adapter", base=BASE, overwrite=True)
    assert read_adapter_config(tmp_path / "adapter").rank == 2


def test_a_relative_base_is_looked_for_beside_the_adapter(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path, "llama")
    save_adapter(trained(), tmp_path / "adapter", base=BaseRecord("../llama"))
    assert read_adapter_config(tmp_path / "adapter").base == str(base.resolve())
    save_adapter(trained(), tmp_path / "adapter", base=BaseRecord(str(base)), overwrite=True)
    assert read_adapter_config(tmp_path / "adapter").base == str(base)


def test_the_digest_of_a_base_changes_with_any_of_its_weights(tmp_path: Path) -> None:
    one = base_digest(tiny_folder(tmp_path / "one", "llama"))
    assert one == base_digest(tiny_folder(tmp_path / "same", "llama"))
    assert one != base_digest(tiny_folder(tmp_path / "other", "llama", seed=1))
    with pytest.raises(MissingInputError):
        base_digest(tmp_path / "one")


def keys() -> list[str]:
    return [
        f"base_model.model.{name}.lora_{half}.weight"
        for name in lora_modules(trained(targets="v_proj"))
        for half in "AB"
    ]


@pytest.mark.parametrize(
    "rename", [lambda key: f"{key}x", lambda key: key.replace("layers", "blocks"), lambda key: key[11:]]
)
@pytest.mark.parametrize("key", keys())
def test_every_renamed_key_is_refused_and_the_model_is_as_it_was(tmp_path: Path, key: str, rename: Any) -> None:
    save_adapter(trained(targets="v_proj"), tmp_path / "adapter", base=BASE)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[rename(key)] = tensors.pop(key)
    save_file(tensors, path)
    model = tiny_model("llama")
    with pytest.raises(ModelError) as caught:
        load_adapter(model, tmp_path / "adapter")
    assert rename(key) in str(caught.value)
    assert f"{key}: missing" in str(caught.value)
    assert not lora_modules(model)
    assert logits(model).equal(logits(tiny_model("llama")))


@pytest.mark.parametrize("key", keys())
def test_every_missing_key_is_refused(tmp_path: Path, key: str) -> None:
    save_adapter(trained(targets="v_proj"), tmp_path / "adapter", base=BASE)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[key]
    save_file(tensors, path)
    with pytest.raises(ModelError, match="missing"):
        load_adapter(tiny_model("llama"), tmp_path / "adapter")


def test_a_layer_that_the_targets_ask_for_must_have_its_tensors(tmp_path: Path) -> None:
    save_adapter(trained(targets="v_proj"), tmp_path / "adapter", base=BASE)
    edit(tmp_path / "adapter", target_modules=["v_proj", "up_proj"])
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj: target_modules asks for it"):
        load_adapter(tiny_model("llama"), tmp_path / "adapter")


def test_shapes_ranks_and_types_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    save_adapter(trained(targets="v_proj"), tmp_path / "adapter", base=BASE)
    edit(tmp_path / "adapter", r=5)
    with pytest.raises(ModelError, match=r"shape \[4, 64\], the layer and r need \[5, 64\]") as caught:
        load_adapter(tiny_model("llama"), tmp_path / "adapter")
    assert str(caught.value).count("the layer and r need") == 4
    edit(tmp_path / "adapter", r=4)
    with pytest.raises(ModelError, match="does not fit"):
        load_adapter(tiny_model("llama", hidden_size=32), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ModelError, match="a float is needed"):
        load_adapter(tiny_model("llama"), tmp_path / "adapter")


def test_a_second_adapter_on_the_same_layers_is_refused(tmp_path: Path) -> None:
    save_adapter(trained(targets="v_proj"), tmp_path / "adapter", base=BASE)
    with pytest.raises(ModelError, match="has an adapter already"):
        load_adapter(trained(targets="v_proj"), tmp_path / "adapter")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_saved_nor_opened(tmp_path: Path, value: float) -> None:
    model = trained(targets="v_proj")
    save_adapter(model, tmp_path / "good", base=BASE)
    path = tmp_path / "good" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[keys()[0]][0, 0] = value
    save_file(tensors, path)
    with pytest.raises(ModelError, match="NaN or infinite"):
        load_adapter(tiny_model("llama"), tmp_path / "good")
    next(iter(lora_modules(model).values())).lora_A.data[0, 0] = value
    with pytest.raises(ModelError, match="NaN or infinite"):
        save_adapter(model, tmp_path / "bad", base=BASE)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base"),
        ({"init_lora_weights": "olora"}, "'olora' changes the base"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_variants_that_peft_writes_and_strop_does_not_compute_are_refused(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    folder, _ = peft_folder(tmp_path / "adapter", **settings)
    with pytest.raises(FormatError, match=words):
        load_adapter(tiny_model("llama"), folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": "LOHA"},
        {"peft_type": None},
        {"layer_replication": [[0, 1]]},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"a_setting_of_tomorrow": {"a": 1}},
        {"init_lora_weights": "corda"},
        {"use_qalora": True},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_any_setting_that_is_not_known_is_refused_by_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    save_adapter(trained(), tmp_path / "adapter", base=BASE)
    with pytest.raises(FormatError, match=next(iter(fields))):
        read_adapter_config(edit(tmp_path / "adapter", **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0},
        {"r": 2.5},
        {"r": True},
        {"lora_alpha": "8"},
        {"lora_alpha": float("nan")},
        {"lora_dropout": 1.0},
        {"use_rslora": "yes"},
        {"base_model_name_or_path": 3},
        {"target_modules": 3},
        {"target_modules": [3]},
        {"rank_pattern": {"q_proj": 1.5}},
        {"alpha_pattern": [1]},
    ],
    ids=str,
)
def test_a_field_of_the_wrong_type_is_refused_by_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    save_adapter(trained(), tmp_path / "adapter", base=BASE)
    with pytest.raises(FileFormatError, match=next(iter(fields))):
        read_adapter_config(edit(tmp_path / "adapter", **fields))


def test_a_pattern_that_is_no_regular_expression_is_refused(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path / "adapter", base=BASE)
    for fields in ({"rank_pattern": {"(": 4}}, {"rank_pattern": {}, "target_modules": "("}):
        edit(tmp_path / "adapter", **fields)
        with pytest.raises(FileFormatError, match="not a regular expression"):
            load_adapter(tiny_model("llama"), tmp_path / "adapter")


def test_an_adapter_that_serves_only_merged_is_refused_unmerged(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path / "adapter", base=BASE, merge_only=True)
    with pytest.raises(ModelError, match="trained to be merged"):
        load_adapter(tiny_model("llama"), tmp_path / "adapter")
    assert load_adapter(tiny_model("llama"), tmp_path / "adapter", to_merge=True).merge_only


@pytest.mark.parametrize("lost", ["strop_base.json", "adapter_config.json"])
def test_the_mark_of_an_adapter_that_serves_only_merged_stands_in_both_files(tmp_path: Path, lost: str) -> None:
    save_adapter(trained(), tmp_path / "adapter", base=BASE, merge_only=True)
    if lost == "strop_base.json":
        (tmp_path / "adapter" / lost).unlink()
    else:
        edit(tmp_path / "adapter", merge_only=None)
    assert read_adapter_config(tmp_path / "adapter").merge_only
    with pytest.raises(ModelError, match="trained to be merged"):
        load_adapter(tiny_model("llama"), tmp_path / "adapter")
    edit(tmp_path / "adapter", merge_only="yes")
    with pytest.raises(FileFormatError, match="true or false"):
        read_adapter_config(tmp_path / "adapter")


def test_folders_without_an_adapter_and_pickled_ones_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"adapter_config\.json"):
        load_adapter(tiny_model("llama"), tmp_path)
    save_adapter(trained(), tmp_path / "adapter", base=BASE)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        load_adapter(tiny_model("llama"), tmp_path / "adapter")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path / "adapter", base=BASE)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match="truncated"):
        load_adapter(tiny_model("llama"), tmp_path / "adapter")


def test_a_model_without_adapters_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no LoRA layer"):
        save_adapter(tiny_model("llama"), tmp_path / "adapter", base=BASE)

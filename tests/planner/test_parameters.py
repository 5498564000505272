"""Counts of trainable parameters: the notes' table from its formula, true counts against transformers and peft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import FAMILIES, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from strop.errors import MissingInputError, ModelError, UsageError
from strop.planner.parameters import (
    abbreviate,
    block_of,
    lora_parameters,
    parse_rank,
    parse_size,
    read_shape,
    square_matrix_parameters,
)

CONFIGS = (
    "Llama-2-13b-hf",
    "Llama-2-70b-hf",
    "Llama-2-7b-hf",
    "Meta-Llama-3-8B",
    "Mistral-7B-v0.1",
    "Qwen2-72B",
    "Qwen2-7B",
    "Qwen2.5-0.5B",
    "Qwen2.5-7B",
    "Qwen3-0.6B",
    "Qwen3-8B",
    "falcon-180B",
    "gemma-2-2b",
    "gemma-2-9b",
    "gemma-3-1b-it",
    "gpt2",
)

PRINTED = {
    1: {"7B": "167K", "13B": "228K", "70B": "529K", "180B": "849K"},
    2: {"7B": "334K", "13B": "456K", "70B": "1M", "180B": "2M"},
    8: {"7B": "1M", "13B": "2M", "70B": "4M", "180B": "7M"},
    16: {"7B": "3M", "13B": "4M", "70B": "8M", "180B": "14M"},
    512: {"7B": "86M", "13B": "117M", "70B": "270M", "180B": "434M"},
}
"""The table as the notes print it."""

CELLS = [(rank, size, printed) for rank, row in PRINTED.items() for size, printed in row.items()]


@pytest.mark.parametrize(("rank", "size", "printed"), CELLS)
def test_every_cell_of_the_notes_is_the_formula_rounded_or_truncated(rank: int, size: str, printed: str) -> None:
    count = square_matrix_parameters(parse_size(size), rank)
    unit = {"K": 1000, "M": 10**6}[printed[-1]]
    assert int(printed[:-1]) in {count // unit, round(count / unit)}


def test_the_formula_gives_the_notes_exact_figures() -> None:
    assert square_matrix_parameters(7 * 10**9, 1) == 167_332
    assert square_matrix_parameters(7 * 10**9, 2) == 334_664
    assert square_matrix_parameters(70 * 10**9, 512) == 270_924_934


def test_rounding_to_the_nearest_differs_from_the_notes_in_the_two_cells_that_they_truncated() -> None:
    different = {
        (rank, size): abbreviate(square_matrix_parameters(parse_size(size), rank))
        for rank, size, printed in CELLS
        if abbreviate(square_matrix_parameters(parse_size(size), rank)) != printed
    }
    assert different == {(2, "7B"): "335K", (512, "70B"): "271M"}


@given(st.integers(1, 10**15), st.integers(1, 4096))
def test_the_formula_is_exact_to_half_a_parameter(parameters: int, rank: int) -> None:
    count = square_matrix_parameters(parameters, rank)
    target = 4 * rank * rank * parameters  # |count - sqrt(target)| <= 1/2, without leaving the integers
    assert (2 * count - 1) ** 2 <= 4 * target <= (2 * count + 1) ** 2


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("7B", 7 * 10**9),
        ("1.5b", 15 * 10**8),
        (" 350M", 350 * 10**6),
        ("260K", 260_000),
        ("0.5B", 5 * 10**8),
        ("42", 42),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["", "7", "7BB", "B", "-7B", "0B", "7 B", "1e9", "1.2345", "nan", "7X", "٧B", "9" * 40 + "T"]
)
def test_a_size_that_is_no_count_is_refused_by_name(text: str) -> None:
    if text == "7":
        assert parse_size(text) == 7
        return
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "r", "2**3"])
def test_a_rank_that_is_no_rank_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rank(text)
    assert repr(text) in str(caught.value)


def test_abbreviations_round_over_the_border_of_a_unit() -> None:
    assert [abbreviate(n) for n in (7, 999, 1000, 999_499, 999_999, 2_600_000_000)] == [
        "7",
        "999",
        "1K",
        "999K",
        "1M",
        "3B",
    ]


def test_a_block_is_the_name_up_to_its_first_number() -> None:
    assert block_of("model.layers.11.mlp.experts.3.up_proj") == "model.layers.11"
    assert block_of("transformer.h.0.attn.c_attn") == "transformer.h.0"
    assert block_of("lm_head") == ""


# --- true counts ------------------------------------------------------------------------------------------------------


def test_llama_2_7b_with_adapters_of_rank_16_on_all_linear_layers(material: Path) -> None:
    shape = read_shape(material / "configs" / "Llama-2-7b-hf")
    assert lora_parameters(shape.linears, 16) == 39_976_960
    assert len(shape.linears) == 32 * 7
    assert not shape.tied


@pytest.mark.parametrize("name", CONFIGS)
def test_total_parameters_and_tying_equal_the_recorded_ones(material: Path, name: str) -> None:
    recorded = {
        line.split()[0]: (int(line.split()[1].replace(",", "")), line.split()[2])
        for line in (material / "configs" / "parameter_counts.txt").read_text().splitlines()
        if line.strip()
    }
    assert set(recorded) == set(CONFIGS)
    shape = read_shape(material / "configs" / name)
    assert (shape.parameters, "tied" if shape.tied else "untied") == recorded[name]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # raised inside peft
@pytest.mark.parametrize("name", CONFIGS)
def test_adapter_counts_equal_those_of_peft_on_the_meta_device(material: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    fields = json.loads((material / "configs" / name / "config.json").read_text())
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.num_hidden_layers = 3  # peft's own walk over 80 layers takes longer than the comparison is worth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:3]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        settings = peft.LoraConfig(
            r=16, target_modules="all-linear", fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM"
        )
        theirs, _ = peft.get_peft_model(model, settings).get_nb_trainable_parameters()
    short = read_shape(config)
    assert lora_parameters(short.linears, 16) == theirs
    whole = read_shape(material / "configs" / name)
    assert lora_parameters(whole.linears, 16) * 3 == theirs * whole.layers


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_outside_and_inside_the_linear_layers_add_up(family: str) -> None:
    config = tiny_config(family)
    shape = read_shape(config)
    outside = shape.parameters - shape.linear_weights - shape.expert_weights
    ends = shape.embedding_parameters + (0 if shape.tied else shape.head_parameters)
    # What is left is norms, biases, positions and routers: small beside the rest, and never negative.
    assert 0 <= outside - ends < 0.2 * shape.parameters
    assert shape.hidden_size == 64
    assert shape.layers == 2
    assert shape.norms == 2 * 2
    assert shape.query_features == 64


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_of_a_mixture_are_counted_apart_and_carry_no_adapter(family: str) -> None:
    shape = read_shape(tiny_config(family))
    width = 128 if family == "mixtral" else 64
    assert shape.expert_weights == 2 * 4 * 3 * 64 * width  # layers, experts, gate and up and down
    assert shape.active_experts == 2
    assert {linear.name.rpartition(".")[2] for linear in shape.linears} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_quantized_folder_is_counted_as_the_model_it_stands_for(tmp_path: Path) -> None:
    config = tiny_config("llama")
    plain = read_shape(config)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    assert read_shape(tmp_path).parameters == plain.parameters


def test_a_config_file_its_folder_and_the_configuration_give_the_same_shape(tmp_path: Path) -> None:
    config = tiny_config("qwen3")
    config.save_pretrained(tmp_path)
    shapes = [read_shape(source) for source in (tmp_path, tmp_path / "config.json", str(tmp_path), config)]
    assert len({(shape.parameters, shape.linears, shape.norms, shape.vocabulary) for shape in shapes}) == 1


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("{", ModelError, "not a JSON file"),
        ("[]", ModelError, "model_type"),
        ("{}", ModelError, "model_type"),
        ('{"model_type": 3}', ModelError, "model_type"),
        ('{"model_type": "lama"}', ModelError, "did you mean 'llama'"),
        ('{"model_type": "llama", "hidden_size": "wide"}', ModelError, "hidden_size"),
        ('{"model_type": "llama", "hidden_size": 0}', ModelError, "causal language model"),
        ('{"model_type": "t5"}', ModelError, "causal language model"),
    ],
)
def test_a_bad_configuration_is_named_with_its_file(tmp_path: Path, text: str, error: type, says: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(error) as caught:
        read_shape(tmp_path)
    assert says in str(caught.value)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        read_shape(tmp_path)
    with pytest.raises(MissingInputError, match="no such file or folder"):
        read_shape(tmp_path / "nowhere")
    with pytest.raises(MissingInputError, match="nobody/nothing"):
        read_shape("nobody/nothing")


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "canary.py").write_text("raise SystemExit('ran')\n")
    fields = {
        "model_type": "own-code",
        "auto_map": {"AutoConfig": "canary.Canary", "AutoModelForCausalLM": "canary.Canary"},
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="is not run"):
        read_shape(tmp_path)


def test_an_adapters_folder_stands_for_its_base_and_a_run_for_its_model(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.save_pretrained(tmp_path / "base")
    config.save_pretrained(tmp_path / "run" / "best")
    for name, base in (("adapter", "../base"), ("twice", "../adapter")):
        (tmp_path / name).mkdir()
        fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": base}))
    plain = read_shape(config)
    for folder in ("base", "run", "adapter"):
        assert read_shape(tmp_path / folder).parameters == plain.parameters
    with pytest.raises(ModelError, match="is an adapter too"):
        read_shape(tmp_path / "twice")

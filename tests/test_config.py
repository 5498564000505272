"""The settings of `tune`: names, types, combinations, layers, and the round trip through YAML and JSON schema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.config import (
    ALIASES,
    KEYS,
    Epochs,
    Full,
    Lora,
    Minutes,
    Qat,
    QLora,
    Steps,
    TuneConfig,
    json_schema,
    load_config,
    to_yaml,
)
from strop.errors import ConfigError, MissingInputError, UsageError

BASE = {"model": "m", "data": "d.jsonl"}


def build(**settings: object) -> TuneConfig:
    return load_config(None, BASE | settings)


def refused(**settings: object) -> str:
    with pytest.raises(ConfigError) as error:
        build(**settings)
    return str(error.value)


def test_defaults_are_lora_for_one_epoch_with_alpha_twice_the_rank():
    config = build()
    assert config.method == Lora(rank=16, alpha=32.0)
    assert config.length == Epochs(epochs=1.0)
    assert config.samples.train_on == "answers"


def test_alpha_follows_a_rank_that_was_chosen():
    assert build(rank=4).method == Lora(rank=4, alpha=8.0)
    assert build(rank=4, alpha=3).method == Lora(rank=4, alpha=3.0)


@pytest.mark.parametrize(
    ("method", "extra", "kind"),
    [("full", {}, Full), ("lora", {}, Lora), ("qlora", {}, QLora), ("qat", {"format": "int3-g32"}, Qat)],
)
def test_each_method_holds_its_own_settings_only(method, extra, kind):
    assert type(build(method=method, **extra).method) is kind


@pytest.mark.parametrize("key", ["rank", "alpha", "dropout", "targets", "rank_stabilised", "adapter", "format"])
def test_adapter_and_grid_settings_are_refused_for_full(key):
    message = refused(method="full", **{key: "x"})
    assert f"{key}: a setting of" in message
    assert "the method is full" in message


def test_format_is_refused_for_lora_and_required_for_qat():
    assert "format: a setting of qlora, qat, qat-lora, and the method is lora" in refused(method="lora", format="nf4")
    assert "format: missing" in refused(method="qat")


def test_lengths_exclude_each_other():
    assert "max_steps and epochs both set how long to train" in refused(max_steps=3, epochs=1)
    assert build(max_steps=3).length == Steps(max_steps=3)
    assert build(minutes=0.5).length == Minutes(minutes=0.5)


def test_an_unknown_key_is_refused_with_the_nearest_name():
    assert "learning_rat: unknown setting (did you mean 'learning_rate'?)" in refused(learning_rat=1e-3)
    assert "gradient_acumulation_steps: unknown setting (did you mean 'gradient_accumulation_steps'?)" in refused(
        gradient_acumulation_steps=2
    )


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(None, {"batch_size": "eight", "seed": True, "sede": 1, "method": "qat", "rank": 3, "dtype": "int8"})
    message = str(error.value)
    for part in ["model: missing", "data: missing", "batch_size: got 'eight' (str)", "seed: got True (bool)", "sede"]:
        assert part in message
    for part in ["format: missing", "rank: a setting of lora, qlora", "dtype: got 'int8'"]:
        assert part in message
    assert message.startswith("8 settings are wrong")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 2.0),
        ("rank", True),
        ("rank", 0),
        ("alpha", "much"),
        ("alpha", float("nan")),
        ("dropout", 1.0),
        ("targets", [1]),
        ("targets", []),
        ("targets", ["all-linear", "q_proj"]),
        ("packing", "yes"),
        ("max_steps", 0),
        ("epochs", -1),
        ("minutes", float("inf")),
        ("learning_rate", "fast"),
        ("schedule", "square"),
        ("warmup_ratio", 1.0),
        ("train_on", "questions"),
        ("max_length", 1),
        ("batch_size", 1.5),
        ("seed", -1),
        ("seed", 2**64),
        ("device", "tpu"),
        ("model", ""),
        ("model", 3),
        ("resume", 1),
        ("chat_template", ["chatml"]),
        ("method", ["lora"]),
    ],
)
def test_wrong_types_and_values_are_named_with_what_was_got(key, value):
    message = refused(**{key: value})
    assert f"{key}: got " in message
    assert "needs" in message or "at least one" in message or "stands alone" in message


@pytest.mark.parametrize(("alias", "key"), sorted(ALIASES.items()))
def test_every_alias_sets_its_key(alias, key):
    values: dict[str, object] = {
        "model": "other", "data": "other", "output": "o", "method": "qlora", "rank": 5, "alpha": 7.0, "dropout": 0.25,
        "targets": ["q_proj"], "rank_stabilised": True, "adapter": "a", "max_steps": 7, "epochs": 2.0, "max_length": 77,
        "packing": True, "chat_template": "chatml", "valid_fraction": 0.5, "learning_rate": 0.5, "schedule": "linear",
        "clip_norm": 0.5, "batch_size": 3, "accumulation": 4, "eval_steps": 5, "save_steps": 6, "patience": 7,
        "checkpointing": "all", "optimizer": "adamw-8bit", "dtype": "float32", "seed": 9, "teacher": "t",
    }  # fmt: skip
    settings_by_alias = {name: value for name, value in BASE.items() if name != key}
    assert load_config(None, settings_by_alias | {alias: values[key]}).flat()[key] == values[key]


def test_an_alias_and_its_key_together_are_refused():
    assert "lora_r and rank both set rank" in refused(rank=3, lora_r=3)


@pytest.mark.parametrize("text", ["all", "all-linear"])
def test_all_is_a_word_for_all_linear(text):
    assert build(lora_target=text).method == build().method


def test_targets_may_be_one_text_with_commas():
    method = build(targets="q_proj, v_proj").method
    assert isinstance(method, Lora)
    assert method.targets == ("q_proj", "v_proj")


def test_an_adapter_to_train_further_brings_its_own_shape():
    message = refused(adapter="run", rank=4, targets="q_proj")
    assert "rank: the adapter to train further brings its own" in message
    assert "targets: the adapter" in message
    config = build(adapter="run", dropout=0.1)
    assert TuneConfig.from_flat(config.flat()) == config


def test_arguments_beat_the_file_which_beats_the_defaults(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("base_model: m\ndataset: d.jsonl\nlora_r: 4\nbatch_size: 2\nepochs: 3\nlearning_rate: 2e-5\n")
    plain = load_config(file)
    assert (plain.method, plain.optimization.batch_size) == (Lora(rank=4, alpha=8.0), 2)
    assert plain.optimization.learning_rate == 2e-5  # YAML 1.1 reads 2e-5 as text
    beaten = load_config(file, {"rank": 6, "max_steps": 9, "batch_size": None})
    assert beaten.method == Lora(rank=6, alpha=12.0)
    assert beaten.length == Steps(max_steps=9)
    assert beaten.optimization.batch_size == 2
    assert beaten.optimization.accumulation == 1


def test_a_problem_says_whether_it_stands_in_the_file_or_in_the_arguments(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nrank: four\n")
    with pytest.raises(ConfigError) as error:
        load_config(file, {"alpha": "x"})
    assert f"{file}: rank: got 'four'" in str(error.value)
    assert "arguments: alpha: got 'x'" in str(error.value)


def test_a_path_is_taken_as_text(tmp_path: Path):
    assert build(output=tmp_path).output == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "got list"),
        ("", "got NoneType"),
        ("model: [", "not a valid YAML file"),
        ("model: !!python/object/apply:os.system ['true']\n", "not a valid YAML file"),
        ("model: m\nmodel: n\n", "model: given twice, in lines 1 and 2"),
        ("3: m\n", "3: a setting's name is a word"),
    ],
)
def test_a_malformed_file_is_a_config_error_that_names_it(tmp_path: Path, text: str, says: str):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert str(file) in str(error.value)
    assert says in str(error.value)


def test_a_missing_file_and_a_binary_one_are_named(tmp_path: Path):
    with pytest.raises(MissingInputError, match=r"no\.yaml"):
        load_config(tmp_path / "no.yaml")
    (tmp_path / "b.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "b.yaml")


def test_every_problem_is_misuse_with_exit_code_two():
    with pytest.raises(UsageError) as error:
        build(nonsense=1)
    assert error.value.exit_code == 2


METHODS = st.sampled_from(
    [
        {"method": "full"},
        {"method": "lora", "rank": 3, "targets": ["a", "b"], "dropout": 0.125},
        {"method": "lora", "adapter": "folder"},
        {"method": "qlora", "format": "int4-g32", "rank_stabilised": True},
        {"method": "qat", "format": "int3-g32", "targets": "mlp"},
    ]
)
LENGTHS = st.one_of(
    st.builds(lambda n: {"max_steps": n}, st.integers(1, 10**6)),
    st.builds(lambda n: {"epochs": n}, st.floats(1e-3, 1e3)),
    st.builds(lambda n: {"minutes": n}, st.floats(1e-3, 1e3)),
)
OTHERS = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": st.floats(1e-12, 1.0),
        "schedule": st.sampled_from(["linear", "cosine", "constant"]),
        "output": st.text(min_size=1, max_size=20),
        "seed": st.integers(0, 2**63 - 1),
        "packing": st.booleans(),
        "max_length": st.integers(2, 10**5),
        "chat_template": st.sampled_from(["chatml", "no", "1e5", "null", "2:3"]),
        "patience": st.integers(1, 9),
        "dtype": st.sampled_from(["bf16", "float32", "auto"]),
    },
)


@settings(deadline=None, max_examples=60)
@given(method=METHODS, length=LENGTHS, others=OTHERS)
def test_yaml_of_a_configuration_reads_back_to_the_same(tmp_path_factory, method, length, others):
    config = build(**method, **length, **others)
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file) == config


def test_replace_changes_flat_settings_and_none_takes_a_default_back():
    config = build(rank=4, max_steps=3, output="x")
    changed = config.replace(output=None, learning_rate=0.5, max_steps=None, epochs=2)
    assert (changed.output, changed.optimization.learning_rate, changed.length) == (None, 0.5, Epochs(epochs=2.0))
    assert changed.method == config.method


def test_the_schema_knows_every_key_and_alias():
    schema = json_schema()
    properties = schema["properties"]
    assert isinstance(properties, dict)
    assert set(properties) == set(KEYS) | set(ALIASES) | {"stages"}
    assert all(value.get("description") for value in properties.values())


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ({"model": "m", "lora_r": 8, "epochs": 1}, True),
        ({"method": "full", "rank": 8}, False),
        ({"format": "nf4"}, False),
        ({"method": "qlora", "format": "nf4"}, True),
        ({"method": "full", "lora_dropout": 0.1}, False),
        ({"epochs": 1, "max_steps": 3}, False),
        ({"num_train_epochs": 1, "iters": 3}, False),
        ({"unknown": 1}, False),
        ({"batch_size": "x"}, False),
        ({"targets": "q_proj"}, True),
    ],
)
def test_the_schema_agrees_with_the_checks(values, fits):
    jsonschema = pytest.importorskip("jsonschema")
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(values) is fits
    settings = BASE | values
    if fits:
        load_config(None, settings)
    else:
        with pytest.raises(ConfigError):
            load_config(None, settings)


def test_reading_settings_does_not_import_torch():
    code = "import sys, strop.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

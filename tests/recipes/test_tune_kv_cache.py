"""`tune` with a rounded cache of keys and values: it changes the run, resumes bit for bit, is refused by name."""

from __future__ import annotations

import pytest
import torch

from strop.config import TuneConfig
from strop.errors import ConfigError, ModelError
from strop.recipes.doctor import doctor
from tests.recipes.helpers import Killed, Notes, same, short, tensors


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("settings", [{"method": "lora"}, {"method": "qat", "format": "int4-g32"}], ids=["lora", "qat"])
def test_killed_and_resumed_runs_end_in_the_same_files(base, data, tmp_path, settings, packing):
    asked = settings | {
        "kv_cache": "int4",
        "packing": packing,
        "max_length": 128,
        "dtype": "bfloat16" if packing else "float32",
        "save_steps": 1,
    }

    def kill(step: int) -> None:
        if step == 2:
            raise Killed

    straight = short(base, data, tmp_path / "straight", **asked)
    with pytest.raises(Killed):
        short(base, data, tmp_path / "killed", reporter=Notes(kill), **asked)
    resumed = short(base, data, tmp_path / "killed", resume=True, **asked)
    assert same(tensors(resumed.last_path), tensors(straight.last_path))
    assert [row["loss"] for row in resumed.metrics] == [row["loss"] for row in straight.metrics]


def test_each_form_of_the_cache_trains_another_model(base, data, tmp_path):
    runs = [short(base, data, tmp_path / str(form), kv_cache=form) for form in (None, "int8")]
    assert not same(*(tensors(run.last_path) for run in runs))
    assert [run.config.serving.kv_cache for run in runs] == [None, "int8"]


def test_it_goes_together_with_a_teacher_and_doctor(base, data, tmp_path):
    settings = {"kv_cache": "int8", "teacher": "base", "distill": 0.5}
    run = short(base, data, tmp_path / "run", **settings)
    assert run.metrics[-1]["valid_divergence"] > 0
    assert not doctor(str(base), str(data), dtype="float32", **settings).refused


def test_a_model_without_keys_and_values_is_refused(data, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    from tests.tiny import tiny_tokenizer

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=304, hidden_size=32, num_hidden_layers=2, pad_token_id=0))
    model.save_pretrained(tmp_path / "mamba")
    tiny_tokenizer().save_pretrained(tmp_path / "mamba")
    with pytest.raises(ModelError, match="MambaForCausalLM"):
        short(tmp_path / "mamba", data, tmp_path / "run", method="full", kv_cache="int8")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "says"), [({"kv_cache": "int3"}, "kv_cache: got 'int3'"), ({"rank": "auto"}, "races without it")]
)
def test_what_does_not_go_together_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        TuneConfig.from_flat({"model": "m", "data": "d", "kv_cache": "int8", **settings})

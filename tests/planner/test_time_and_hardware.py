"""The floor of a step's time against the figures that were worked out by hand, and what is read of this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from tests.tiny import tiny_config
from transformers import LlamaConfig

from strop.errors import UsageError
from strop.planner import hardware
from strop.planner.disk import run_bytes
from strop.planner.hardware import Accelerator, Machine, Rate, measure_matmul, named_rate, this_machine
from strop.planner.memory import Step, plan_memory
from strop.planner.parameters import ModelShape, lora_parameters, read_shape
from strop.planner.time import active_expert_weights, step_flops

H200 = Rate("H200, measured", "bfloat16", 790e12, measured=True)
CPU = Rate("two cores, measured", "bfloat16", 420e9, measured=True)


@pytest.fixture(scope="module")
def small() -> ModelShape:
    """135M parameters: 30 layers, hidden 576, vocabulary 49,152."""
    return read_shape(
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            tie_word_embeddings=True,
        )
    )


@pytest.mark.parametrize(("checkpointing", "seconds"), [(False, 0.175), (True, 0.253)])
def test_an_8b_qlora_step_of_4096_tokens_on_an_h200(material: Path, checkpointing: bool, seconds: float) -> None:
    shape = read_shape(material / "configs" / "Meta-Llama-3-8B")
    flops = step_flops(shape, rows=1, length=4096, adapters=shape.linears, rank=16, checkpointing=checkpointing)
    assert flops.floor_seconds(H200) == pytest.approx(seconds, rel=0.02)


def test_a_135m_step_of_512_tokens_on_two_cores(small: ModelShape) -> None:
    assert small.parameters == pytest.approx(135e6, rel=0.01)
    lora = step_flops(small, rows=1, length=512, adapters=[], rank=0)
    full = step_flops(small, rows=1, length=512)
    assert lora.linear / CPU.flops == pytest.approx(0.66, rel=0.01)
    assert full.linear / CPU.flops == pytest.approx(0.98, rel=0.01)


def test_adapters_add_six_operations_a_parameter_and_token(small: ModelShape) -> None:
    without = step_flops(small, rows=2, length=64, adapters=[], rank=16)
    with_them = step_flops(small, rows=2, length=64, adapters=small.linears, rank=16)
    assert with_them.linear - without.linear == 6 * lora_parameters(small.linears, 16) * 128


def test_attention_grows_with_the_square_of_the_length_and_the_rest_does_not(small: ModelShape) -> None:
    short, long = (step_flops(small, rows=rows, length=length) for rows, length in ((4, 256), (1, 1024)))
    assert short.linear == long.linear
    assert long.attention == 4 * short.attention
    # Scores and values, 2 * h_q * S each for S^2 / 2 pairs, forward once and backward two and a half times.
    assert long.attention == 3.5 * 2 * 576 * 1024 * 1024 * 30


def test_experts_count_with_those_at_work() -> None:
    shape = read_shape(tiny_config("mixtral"))
    assert active_expert_weights(shape) == shape.expert_weights // 2  # 2 of 4
    assert active_expert_weights(replace(shape, active_experts=8)) == shape.expert_weights


def test_a_run_needs_room_for_three_exports_and_three_checkpoints() -> None:
    shape = read_shape(tiny_config("llama"))
    lora = plan_memory(shape, "lora", Step(rank=8))
    assert run_bytes(shape, lora) == (3 * 4 + 3 * 12) * lora.trainable_parameters
    assert run_bytes(shape, plan_memory(shape, "full", Step())) == (3 * 2 + 3 * 12) * shape.parameters
    qat = plan_memory(shape, "qat", Step(format="int4-g32"))
    assert run_bytes(shape, qat) < run_bytes(shape, plan_memory(shape, "full", Step()))


def test_this_machine_is_read_with_its_limits(tmp_path: Path) -> None:
    machine = this_machine(tmp_path)
    assert 0 < machine.available_bytes <= machine.memory_bytes <= psutil.virtual_memory().total
    assert machine.cores >= 1
    assert 0 < machine.disk_free_bytes <= psutil.disk_usage(str(tmp_path)).total
    assert machine.to_dict()["training_bytes"] == machine.training_bytes


def test_a_containers_limit_counts_and_not_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(hardware, "_CGROUP_LIMITS", ((str(limit), str(used)),))
    limit.write_text("104857600\n")
    used.write_text("20971520\n")
    machine = this_machine(tmp_path)
    assert (machine.memory_bytes, machine.available_bytes) == (104857600, 83886080)
    limit.write_text("max\n")
    assert this_machine(tmp_path).memory_bytes == psutil.virtual_memory().total


def test_training_runs_on_the_accelerator_with_the_most_free_memory() -> None:
    machine = Machine(64, 32, 8, 8, 100, ())
    assert (machine.training_device, machine.training_bytes) == ("CPU", 32)
    gpus = (Accelerator("small", "cuda", 24, 20), Accelerator("large", "cuda", 80, 70))
    machine = replace(machine, accelerators=gpus)
    assert (machine.training_device, machine.training_bytes) == ("large", 70)


def test_a_measured_rate_is_a_plausible_one() -> None:
    rate = measure_matmul("float32", size=128, seconds=0.01)
    assert rate.measured
    assert 1e6 < rate.flops < 1e16


@pytest.mark.parametrize("name", ["H200", "h200", "RTX 4090", "rtx-4090"])
def test_a_named_device_has_its_printed_peak(name: str) -> None:
    rate = named_rate(name)
    assert not rate.measured
    assert rate.flops in (989e12, 165e12)


def test_an_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'H100'.*known: A100"):
        named_rate("H101")

"""Bytes of a training step: published formulas and points, and what autograd really keeps for strop's own layers."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.tiny import FAMILIES, tiny_config
from transformers import AutoModelForCausalLM

from strop.errors import FormatError
from strop.layers.grids import RangeGrid
from strop.layers.surgery import attach_fake_quant, attach_lora, attach_rounding, quantize_linears
from strop.numerics.scheme import parse_scheme
from strop.planner.activations import Precision, blocks
from strop.planner.fit import changes_to_fit, missing_bytes
from strop.planner.memory import GIB, LOGIT_BYTES, METHODS, RUNTIME_BYTES, Method, Step, format_bytes, plan_memory
from strop.planner.parameters import ModelShape, lora_parameters, read_shape
from strop.training.optimizers import widen_trained


@pytest.fixture
def llama3(material: Path) -> ModelShape:
    return read_shape(material / "configs" / "Meta-Llama-3-8B")


# --- published figures ------------------------------------------------------------------------------------------------


def test_a_llama_block_keeps_4h_2hq_2hkv_2i_numbers_a_token(llama3: ModelShape) -> None:
    h, hq, hkv, i = 4096, 4096, 1024, 14336
    for block in blocks(llama3).values():
        assert block.kept_features(product=False) == 4 * h + 2 * hq + 2 * hkv + 2 * i
        assert 2 * block.kept_features(product=False) == pytest.approx(110.6e3, rel=1e-3)
        assert block.kept_features() == 4 * h + 2 * hq + 2 * hkv + 3 * i
        # One block's working set with checkpointing: what it keeps, and three gradients of width i.
        assert 2 * block.kept_features() + block.backward_bytes(2) == pytest.approx(225e3, rel=5e-3)
    assert len(blocks(llama3)) == 32


def test_qlora_on_8b_holds_3_60_gb_and_2_10_gb_of_embedding_and_head(llama3: ModelShape) -> None:
    held, kept_wide = format_bytes(llama3, parse_scheme("nf4-dq"))
    assert kept_wide == ()
    ends = 2 * (llama3.embedding_parameters + llama3.head_parameters)
    assert ends == pytest.approx(2.10e9, rel=2e-3)
    assert held - ends == pytest.approx(3.60e9, rel=2e-3)
    assert held / GIB == pytest.approx(5.31, abs=0.005)
    plan = plan_memory(llama3, "qlora", Step())
    assert plan.trainable_parameters == pytest.approx(41.9e6, rel=2e-3)
    assert plan.weights_bytes == held + 4 * plan.trainable_parameters
    assert plan.gradients_bytes + plan.optimizer_bytes == 12 * plan.trainable_parameters
    assert plan.scratch_bytes == 2 * 14336 * 4096


@pytest.mark.parametrize(("method", "bytes_each"), [("full", 16), ("qat", 16), ("full-bf16", 8)])
def test_whole_weights_take_16_bytes_a_parameter_and_8_in_pure_bf16(
    llama3: ModelShape, method: Method, bytes_each: int
) -> None:
    plan = plan_memory(llama3, method, Step())
    assert plan.weights_bytes + plan.gradients_bytes + plan.optimizer_bytes == bytes_each * llama3.parameters
    assert plan.trainable_parameters == llama3.parameters


@pytest.mark.parametrize(
    ("name", "slope"),
    [("Meta-Llama-3-8B", 2.57e6), ("Llama-2-7b-hf", 0.838e6)],
)
def test_bytes_a_token_with_checkpointing_and_whole_logits_are_those_of_the_published_points(
    material: Path, name: str, slope: float
) -> None:
    shape = replace(read_shape(material / "configs" / name), whole_logits=True)
    short, long = (plan_memory(shape, "qlora", Step(length=n, checkpointing=True)) for n in (20_000, 40_000))
    grown = (long.activations_bytes + long.logits_bytes) - (short.activations_bytes + short.logits_bytes)
    assert grown / 20_000 == pytest.approx(slope, rel=1e-3)
    assert grown / 20_000 == 2 * shape.hidden_size * 32 + LOGIT_BYTES * shape.vocabulary


def test_torchtunes_published_8b_qlora_point_is_within_a_tenth(llama3: ModelShape) -> None:
    # 7.4 GiB measured on an RTX 4090: 2 rows of 2,048 packed tokens, checkpointing, logits in pieces.
    plan = plan_memory(llama3, "qlora", Step(rows=2, length=2048, checkpointing=True, rank=8))
    assert plan.peak_bytes / GIB == pytest.approx(7.6, rel=0.1)


# --- what autograd keeps ----------------------------------------------------------------------------------------------


def kept_by_autograd(model: torch.nn.Module, dtype: torch.dtype, length: int) -> int:
    """Bytes of all tensors saved for the backward pass, parameters and buffers left out, each storage once."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # held, so that no other can take its place
        return tensor

    ids = torch.zeros(1, length, dtype=torch.long)
    mask = torch.zeros(1, 1, length, length, dtype=dtype)
    narrow = dtype != torch.float32
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype) if narrow else contextlib.nullcontext(),
    ):
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        hidden.float().sum()
    return sum(storage.nbytes() for storage in saved.values())


def opened(family: str, method: str, dtype: torch.dtype, layers: int, attention: str) -> torch.nn.Module:
    """A tiny model as `tune` prepares it."""
    config = tiny_config(family, num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if method == "qat":
        attach_fake_quant(model, parse_scheme("int4-g32"))
    elif method == "qat-lora":
        model.to(dtype)
        attach_lora(model, rank=8, alpha=16.0, generator=torch.Generator().manual_seed(0))
        scheme = parse_scheme("int4-g32")
        attach_rounding(model, lambda name, adapter: RangeGrid(scheme, (adapter.out_features, adapter.in_features)))
    elif method != "full":
        model.to(dtype)
        if method == "qlora":
            quantize_linears(model, parse_scheme("nf4"))
        attach_lora(model, rank=8, alpha=16.0, generator=torch.Generator().manual_seed(0))
    widen_trained(model)
    return model.train()


@pytest.mark.parametrize("attention", ["fused", "plain"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "qat", "qat-lora"])
def test_what_a_llama_block_keeps_is_predicted_to_2_percent(method: Method, dtype: str, attention: str) -> None:
    length = 128
    step = Step(length=length, rank=8, dtype=dtype, format="int4-g32", attention=attention)  # type: ignore[arg-type]
    implementation = {"fused": "sdpa", "plain": "eager"}[attention]
    measured, planned = [], []
    for layers in (1, 3):
        model = opened("llama", method, getattr(torch, dtype), layers, implementation)
        measured.append(kept_by_autograd(model, getattr(torch, dtype), length))
        plan = plan_memory(read_shape(tiny_config("llama", num_hidden_layers=layers)), method, step)
        planned.append(plan.activations_bytes + plan.copies_bytes)
    assert planned[1] - planned[0] == pytest.approx(measured[1] - measured[0], rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_other_architectures_keep_is_predicted_to_a_third(family: str) -> None:
    length = 128
    measured, planned = [], []
    for layers in (1, 3):
        model = opened(family, "lora", torch.float32, layers, "sdpa")
        measured.append(kept_by_autograd(model, torch.float32, length))
        plan = plan_memory(
            read_shape(tiny_config(family, num_hidden_layers=layers)),
            "lora",
            Step(length=length, rank=8, dtype="float32"),
        )
        planned.append(plan.activations_bytes)
    assert planned[1] - planned[0] == pytest.approx(measured[1] - measured[0], rel=1 / 3)


# --- relations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_part_is_counted_in_the_peak_and_none_is_negative(llama3: ModelShape, method: Method) -> None:
    plan = plan_memory(llama3, method, Step(rows=2, length=2048))
    fields = plan.to_dict()
    parts = {name: value for name, value in fields.items() if name.endswith("_bytes") and name != "peak_bytes"}
    assert all(value >= 0 for value in parts.values())
    phase = parts.pop("logits_bytes"), parts.pop("block_backward_bytes")
    assert fields["peak_bytes"] == sum(parts.values()) + max(phase)


def test_methods_are_ordered_as_people_expect(llama3: ModelShape) -> None:
    peak = {method: plan_memory(llama3, method, Step()).peak_bytes for method in METHODS}
    assert peak["qlora"] < peak["lora"] < peak["full-bf16"] < peak["full"] <= peak["qat"]


def test_checkpointing_shorter_rows_and_fewer_rows_never_need_more(llama3: ModelShape) -> None:
    step = Step(rows=4, length=2048)
    easier = [
        replace(step, checkpointing=True),
        replace(step, rows=1),
        replace(step, length=512),
        replace(step, rank=4),
    ]
    for method in METHODS:
        before = plan_memory(llama3, method, step).peak_bytes
        for other in easier:
            assert plan_memory(llama3, method, other).peak_bytes <= before


def test_fewer_bits_hold_less_and_layers_that_do_not_divide_are_named(material: Path) -> None:
    small = read_shape(material / "models" / "stories260K")
    sizes = [
        format_bytes(small, parse_scheme(text))[0] for text in ("int8", "nf4", "nf4-dq", "int3-tensor", "int2-tensor")
    ]
    assert sizes == sorted(sizes, reverse=True)
    # in_features 172 of the down projections is not divisible by 32.
    _, kept_wide = format_bytes(small, parse_scheme("int4-g32"))
    assert kept_wide == tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(5))
    assert plan_memory(small, "qlora", Step(format="int4-g32")).kept_wide == kept_wide


def test_adapters_on_some_layers_count_those_layers_only(llama3: ModelShape) -> None:
    some = [linear for linear in llama3.linears if linear.name.endswith(("q_proj", "v_proj"))]
    plan = plan_memory(llama3, "lora", Step(rank=8), adapted=some)
    assert plan.trainable_parameters == lora_parameters(some, 8) == 32 * 8 * (4096 + 4096 + 4096 + 1024)


def test_an_unknown_format_is_refused(llama3: ModelShape) -> None:
    with pytest.raises(FormatError):
        plan_memory(llama3, "qlora", Step(format="int5-x"))


def test_experts_are_rounded_where_files_hold_them_and_only_the_active_ones_keep_activations() -> None:
    shape = read_shape(tiny_config("mixtral"))
    saved = 2 * shape.parameters - format_bytes(shape, parse_scheme("int8"))[0]
    assert 0.9 * (shape.linear_weights + shape.expert_weights) < saved < shape.linear_weights + shape.expert_weights
    for grid in ("nf4", "int4-asym"):
        assert 2 * shape.parameters - format_bytes(shape, parse_scheme(grid))[0] < 2 * shape.linear_weights
    own_way = replace(shape, experts=tuple(replace(expert, linear=None) for expert in shape.experts))
    step = Step(format="int4-g32")
    kept = plan_memory(own_way, "qlora", step).weights_bytes - plan_memory(shape, "qlora", step).weights_bytes
    assert kept == shape.expert_weights * (16 - 4.5) / 8
    busy = replace(shape, active_experts=4)
    precision = Precision(2, 2, trained=False)
    kept = [sum(block.kept_bytes(precision) for block in blocks(each).values()) for each in (shape, busy)]
    assert kept[0] < kept[1]


# --- what would make it fit -------------------------------------------------------------------------------------------


def test_a_step_that_fits_needs_no_change(llama3: ModelShape) -> None:
    assert changes_to_fit(llama3, "qlora", Step(), 100 * GIB) == []


def test_changes_are_tried_in_order_until_the_step_fits(llama3: ModelShape) -> None:
    step = Step(rows=4, length=2048)
    changes = changes_to_fit(llama3, "lora", step, 22 * GIB)
    assert [change.fits for change in changes] == [False] * (len(changes) - 1) + [True]
    peaks = [change.plan.peak_bytes for change in changes]
    assert peaks == sorted(peaks, reverse=True)
    assert "micro batches of 1 row" in changes[0].text
    assert changes[-1].plan.peak_bytes + RUNTIME_BYTES <= 22 * GIB


def test_where_no_setting_is_enough_the_next_method_is_named(llama3: ModelShape) -> None:
    changes = changes_to_fit(llama3, "full", Step(), 20 * GIB)
    assert [change.plan.method for change in changes] == ["lora"]
    assert "LoRA of rank 16" in changes[0].text
    smaller = changes_to_fit(llama3, "full", Step(), 8 * GIB)
    assert smaller[0].plan.method == "qlora"
    assert smaller[-1].fits


def test_where_nothing_is_enough_the_last_change_says_how_much_is_missing(llama3: ModelShape) -> None:
    changes = changes_to_fit(llama3, "full", Step(length=4096), 2 * GIB)
    assert not any(change.fits for change in changes)
    assert changes[-1].plan.method == "qlora"
    assert missing_bytes(changes[-1].plan, 2 * GIB) > 2 * GIB
    assert missing_bytes(changes[-1].plan, 100 * GIB) == 0

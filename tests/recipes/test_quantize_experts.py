"""Experts of mixtures quantized like any linear layer: calibrated on what the router gives them, starved ones named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from strop.calibrate.block import CalibrationBlock
from strop.calibrate.quantizing import STARVED, layer_by_layer
from strop.calibrate.stream import BlockStream
from strop.data.batches import eval_batches
from strop.errors import FormatError, UsageError
from strop.layers.quant_experts import expert_names, expert_weights, quant_experts
from strop.layers.surgery import experts, linear_modules
from strop.methods import BlockResult, rtn, search
from strop.models import load
from strop.models.blocks import BlockwiseModel
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from strop.recipes.calibration import calibration_rows
from strop.recipes.quantize import quantize
from tests.files.test_saving import same_logits
from tests.models.common import edit_weights, rounded, same_weights
from tests.recipes.test_quantize import Listener
from tests.recipes.test_quantize_calibrated import equal
from tests.tiny import tiny_chat_file, tiny_folder, tiny_model

ROUTERS = {"mixtral": "block_sparse_moe.gate.weight", "qwen3_moe": "mlp.gate.weight"}


def starving(folder: Path, family: str) -> Path:
    """A mixture of 8 experts, 1 a token, whose second expert is never chosen in the first block."""
    count = "num_local_experts" if family == "mixtral" else "num_experts"
    path = tiny_folder(folder, family, num_experts_per_tok=1, **{count: 8})

    def edit(tensors: dict[str, Tensor]) -> None:
        router = tensors[f"model.layers.0.{ROUTERS[family]}"]
        router[1] = -router[0]  # with expert 2 like it but longer, whatever is chosen beats it
        router[2] = 2 * router[1]
        router[0] = 2 * router[0]

    edit_weights(path, edit)
    return path


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_without_data_the_model_is_its_source_rounded_to_nearest(tmp_path: Path, family: str) -> None:
    result = quantize(tiny_folder(tmp_path, family), "int4-g32", output=tmp_path / "out")
    opened, expected = load(result.path).model, rounded(family, "int4-g32")
    assert same_weights(opened, expected)
    assert same_logits(opened, expected)
    receipt, model = result.receipt, tiny_model(family)
    assert receipt["left_alone"] == receipt["fallbacks"] == []
    names = [tensor["name"] for tensor in receipt["tensors"]]
    assert sorted(names) == sorted([*linear_modules(model), *expert_names(model)])
    assert receipt["experts"] == len(expert_names(model)) == 16
    assert receipt["bits_per_weight"] == 4.5
    weights = next(iter(expert_weights(model).values()))
    entry = next(tensor for tensor in receipt["tensors"] if tensor["name"] == f"{weights.name}.3")
    own = model.get_parameter(weights.name)[3].detach()
    lost = quantize_tensor(own, parse_scheme("int4-g32")).dequantize() - own
    assert entry["shape"] == list(weights.shape)
    assert entry["relative_error"] == pytest.approx(float(lost.square().sum() / own.square().sum()), rel=1e-5)
    assert entry["calibration_tokens"] is None
    assert any("24 of 24 linear layers (16 of them experts)" in line for line in result.lines())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_each_experts_statistics_are_those_of_the_tokens_that_the_router_gives_it(tmp_path: Path, family: str) -> None:
    folder, data = tiny_folder(tmp_path, family), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    whole = load(folder, dtype="float32").model
    rows = calibration_rows(data, load(folder).require_tokenizer(), max_rows=8, max_length=64).calibrating
    seen: dict[str, list[Tensor]] = {}

    def count(owner: str, module: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
        x, index, _ = args
        for expert in range(module.num_experts):
            mine = x[(index == expert).any(dim=1)]
            gate, up = torch.nn.functional.linear(mine, module.gate_up_proj[expert]).chunk(2, dim=-1)
            seen.setdefault(f"{owner}.gate_up_proj.{expert}", []).append(mine)
            seen.setdefault(f"{owner}.down_proj.{expert}", []).append(module.act_fn(gate) * up)

    for weights in expert_weights(whole).values():
        if weights.name.endswith("down_proj"):
            owner = whole.get_submodule(weights.owner)
            owner.register_forward_pre_hook(lambda m, args, name=weights.owner: count(name, m, args))
    with torch.no_grad():
        for row in rows:  # one at a time: no padding
            whole(torch.tensor([row.input_ids]))
    model = BlockwiseModel(folder)
    stream = BlockStream(model, list(eval_batches(rows, 4)), 2)

    def check(block: CalibrationBlock) -> dict[str, Tensor]:
        mine = [name for name in expert_names(model.model) if name.startswith(f"{block.name}.")]
        found = block.statistics(mine, {}, hessian=True)
        tokens = block.expert_tokens()
        assert block.token_count == sum(len(row) for row in rows)
        assert sum(tokens[name] for name in mine if "gate_up" in name) == 2 * block.token_count  # two for each
        for name in mine:
            inputs = torch.cat(seen[name])
            assert tokens[name] == len(inputs)
            if len(inputs):
                assert found[name].rows == len(inputs)
                torch.testing.assert_close(found[name].mean_square, inputs.square().mean(0), rtol=1e-3, atol=1e-6)
                hessian = inputs.t() @ inputs / len(inputs)
                torch.testing.assert_close(found[name].hessian, hessian, rtol=1e-3, atol=1e-5)
                assert len(block.inputs(name, {}, most=5)) <= 5
        stages = block.stages(hessian=False)
        assert [len(stage) for stage in stages[-2:]] == [4, 4]
        assert all("gate_up" in name for name in stages[-2])
        return {}

    for name in model.blocks:
        mine = [own for own in [*linear_modules(model.model), *expert_names(model.model)] if own.startswith(f"{name}.")]
        assert model.model.config._experts_implementation != "strop"
        stream.through(name, mine, check)


def test_second_moments_of_many_experts_are_gathered_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strop.calibrate.block.HESSIAN_BYTES", 2 * 4 * 128 * 128)
    folder, data = tiny_folder(tmp_path, "mixtral"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    rows = calibration_rows(data, load(folder).require_tokenizer(), max_rows=8, max_length=64).calibrating
    model = BlockwiseModel(folder)
    stages: list[int] = []

    def check(block: CalibrationBlock) -> dict[str, Tensor]:
        stages.extend(len(stage) for stage in block.stages(hessian=True))
        return {}

    mine = [name for name in expert_names(model.model) if ".0.mlp" in name]
    BlockStream(model, list(eval_batches(rows, 4)), 2).through("model.layers.0", mine, check)
    assert stages == [4, 2, 2]  # 64 inputs of gate_up_proj, 128 of down_proj


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_starved_expert_is_named_and_searched_without_data(tmp_path: Path, family: str) -> None:
    source, data = starving(tmp_path, family), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    listener = Listener()
    result = quantize(source, "int3-g32", output=tmp_path / "out", method="search", data=data, reporter=listener)
    by_name = {tensor["name"]: tensor for tensor in result.receipt["tensors"]}
    starved = "model.layers.0.mlp.experts.gate_up_proj.1"
    assert by_name[starved]["calibration_tokens"] == 0
    assert by_name[starved]["calibration_share"] == 0
    assert any("starved" in note and f"{starved} (0)" in note for note in listener.notes)
    shares = [tensor["calibration_share"] for name, tensor in by_name.items() if name.startswith(starved[:-1])]
    assert sum(shares) == pytest.approx(1)
    printed = next(note for note in listener.notes if note.startswith("model.layers.0.mlp.experts: of "))
    assert ", ".join(f"{100 * share:.1f}%" for share in shares) in printed
    held = quant_experts(load(result.path).model)[starved[:-2]]
    weights = load(source, dtype="float32").model.get_parameter(starved[:-2]).detach()
    scheme = parse_scheme("int3-g32")
    assert held.qtensor(1).codes.equal(search(weights[1], scheme).codes)
    fed = next(e for e in range(8) if by_name[f"{starved[:-1]}{e}"]["calibration_tokens"] >= STARVED)
    assert not held.qtensor(fed).codes.equal(search(weights[fed], scheme).codes)
    assert not any("of 24" in note and f"{starved[:-1]}{fed} (" in note for note in listener.notes)


def test_a_killed_run_goes_on_with_the_same_bits_and_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = tiny_folder(tmp_path, "qwen3_moe"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    options: dict[str, Any] = {"method": "search", "data": data}
    whole = quantize(source, "int3-g32", output=tmp_path / "whole", **options)

    def killed(block: Any, *arguments: Any, **more: Any) -> BlockResult:
        if block.name == "model.layers.1":
            raise KeyboardInterrupt
        return layer_by_layer(block, *arguments, **more)

    monkeypatch.setattr("strop.recipes.quantize.layer_by_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, "int3-g32", output=tmp_path / "out", **options)
    monkeypatch.undo()
    listener = Listener()
    again = quantize(source, "int3-g32", output=tmp_path / "out", reporter=listener, **options)
    assert any("1 of 2 blocks were finished before" in note for note in listener.notes)
    assert equal(again.path, whole.path)
    assert again.receipt["tensors"] == whole.receipt["tensors"]
    assert again.receipt["blocks"] == whole.receipt["blocks"]


def test_one_experts_weight_is_rounded_at_a_time(tmp_path: Path) -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []

    def rounding(name: str, weight: Tensor) -> Any:
        seen.append((name, tuple(weight.shape)))
        return rtn(weight, parse_scheme("int4-g32"), where=name)

    model = load(tiny_folder(tmp_path, "mixtral"), "int4-g32", rounding=rounding).model
    assert {name for name, _ in seen} == {*linear_modules(model), *expert_names(tiny_model("mixtral"))}
    assert {shape for name, shape in seen if ".experts." in name} == {(256, 64), (64, 128)}
    dense = [
        name for name, parameter in model.named_parameters() if parameter.is_floating_point() and "experts" in name
    ]
    assert all(name.endswith("scale") for name in dense)


def test_what_files_cannot_hold_is_refused_or_kept_and_listed(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "mixtral")
    with pytest.raises(FormatError, match=r"16 layer\(s\).*\n  .*experts\.gate_up_proj: .*zero points.*\n"):
        quantize(source, "int4-g32-asym", output=tmp_path / "out")
    with pytest.raises(FormatError, match="not divisible"):
        quantize(tiny_folder(tmp_path / "odd", "mixtral", intermediate_size=72), "int8-g16", output=tmp_path / "out")
    with pytest.raises(UsageError, match="repair"):
        quantize(source, "int4-g32", output=tmp_path / "out", max_kl=0.1, repair=True, data="rows.jsonl")
    assert not (tmp_path / "out").exists()
    result = quantize(source, "nf4", output=tmp_path / "kept", keep_indivisible=True)
    kept = [tensor for tensor in result.receipt["tensors"] if tensor["reason"]]
    assert {tensor["name"] for tensor in kept} == set(expert_names(tiny_model("mixtral")))
    assert {tensor["actual"] for tensor in kept} == {"float32"}
    assert "bitsandbytes" in kept[0]["reason"]
    assert len(experts(load(result.path).model)) == 4


def test_a_budget_leaves_experts_and_says_so(tmp_path: Path) -> None:
    data, listener = str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24)), Listener()
    source = tiny_folder(tmp_path, "mixtral")
    result = quantize(source, budget="5bits", data=data, output=tmp_path / "out", reporter=listener)
    assert len(result.receipt["left_alone"]) == 4
    assert any("4 tensors of experts stay in their dtype" in note for note in listener.notes)
    assert load(result.path).model.config._experts_implementation != "strop"

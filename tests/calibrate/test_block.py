"""A block over its calibration inputs against the whole model run plainly, padding left out."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from strop.calibrate import BlockStream, CalibrationBlock
from strop.calibrate.activations import Activations
from strop.data.batches import eval_batches
from strop.data.templates import Sample
from strop.errors import DataError
from strop.files.saving import save_model
from strop.layers.base import dense_weight
from strop.layers.quant_experts import expert_names
from strop.layers.surgery import linear_modules
from strop.models import load
from strop.models.blocks import BlockwiseModel
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from tests.tiny import tiny_folder, tiny_input

FAMILIES = ["llama", "qwen3", "gemma", "gemma3", "gpt2", "falcon", "mixtral"]


def samples(lengths: list[int]) -> list[Sample]:
    ids = tiny_input(rows=len(lengths), length=max(lengths)).tolist()
    return [Sample(ids[row][:length], ids[row][:length], index=row) for row, length in enumerate(lengths)]


def folder_of(path: Path, family: str) -> Path:
    """A tiny model; Gemma 3 has blocks of two kinds, each with its own mask and rotary table."""
    if family != "gemma3":
        return tiny_folder(path, family)
    tokenizer = load(tiny_folder(path, "llama")).require_tokenizer()
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=4, max_position_embeddings=256,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    return save_model(Gemma3ForCausalLM(config), tokenizer, path / family)


def layers_of(model: BlockwiseModel, block: str) -> list[str]:
    names = [*linear_modules(model.model), *expert_names(model.model)]
    return [name for name in names if name.startswith(f"{block}.")]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_at_a_time_give_the_logits_of_the_whole_model(tmp_path: Path, family: str) -> None:
    folder = folder_of(tmp_path, family)
    whole = load(folder, dtype="float32").model
    batches = list(eval_batches(samples([12, 5, 9, 3]), 2))
    streamed = BlockwiseModel(folder)
    stream = BlockStream(streamed, batches, 1)
    for block in streamed.blocks:
        error = stream.through(block, layers_of(streamed, block), lambda _: {})
        assert error.calibration == 0
        assert error.held_out == 0
    for number, batch in enumerate(batches):
        mask = torch.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]
        with torch.no_grad():
            expected = whole(**batch.inputs()).logits[mask]
        for quantized in (False, True):
            found = stream.after(number, quantized=quantized)(**batch.inputs()).logits[mask]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_stream_is_the_quantized_model(tmp_path: Path, family: str) -> None:
    folder, scheme = folder_of(tmp_path, family), parse_scheme("int4")
    whole = load(folder, scheme, dtype="float32").model
    batches = list(eval_batches(samples([12, 5, 9, 3]), 2))
    streamed = BlockwiseModel(folder)
    stream = BlockStream(streamed, batches, 2)

    def rounded(block: CalibrationBlock) -> dict[str, Tensor]:
        return {name: quantize_tensor(weight, scheme).dequantize() for name, weight in block.weights.items()}

    for block in streamed.blocks:
        assert stream.through(block, layers_of(streamed, block), rounded).calibration > 0
    mask = torch.arange(batches[0].input_ids.shape[1])[None] < batches[0].lengths[:, None]
    with torch.no_grad():
        expected = whole(**batches[0].inputs()).logits[mask]
    found = stream.after(0, quantized=True)(**batches[0].inputs()).logits[mask]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_statistics_are_those_of_the_real_tokens(tmp_path: Path, family: str) -> None:
    folder, rows = tiny_folder(tmp_path, family), samples([12, 5, 9, 3])
    whole = load(folder, dtype="float32").model
    seen: dict[str, list[Tensor]] = {name: [] for name in linear_modules(whole)}
    for name, module in linear_modules(whole).items():
        module.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0].reshape(-1, x[0].shape[-1])))
    for row in rows:  # one at a time: no padding
        with torch.no_grad():
            whole(torch.tensor([row.input_ids]))
    streamed = BlockwiseModel(folder)
    stream = BlockStream(streamed, list(eval_batches(rows, 2)), 2)

    def check(block: CalibrationBlock) -> dict[str, Tensor]:
        found = block.statistics(list(block.weights), {}, hessian=True)
        assert list(found) == list(block.weights)
        for name, statistics in found.items():
            inputs = torch.cat(seen[name]).double()
            assert statistics.rows == len(inputs) == 29
            expected = {
                "mean_square": inputs.square().mean(0),
                "mean_abs": inputs.abs().mean(0),
                "largest": inputs.abs().amax(0),
                "hessian": inputs.t() @ inputs / len(inputs),
            }
            for part, value in expected.items():
                torch.testing.assert_close(getattr(statistics, part).double(), value, rtol=1e-4, atol=1e-6)
            few = block.inputs(name, {}, most=7)
            assert len(few) <= 7
            for row in few:
                assert torch.isclose(inputs.float(), row, rtol=1e-4, atol=1e-6).all(1).any()
        return {}

    for name in streamed.blocks:
        stream.through(name, layers_of(streamed, name), check)


def test_layers_that_share_their_input_stand_together_in_the_order_of_use(tmp_path: Path) -> None:
    streamed = BlockwiseModel(tiny_folder(tmp_path, "llama"))
    stream = BlockStream(streamed, list(eval_batches(samples([6, 4]), 2)), 1)
    shared: list[list[str]] = []

    def note(block: CalibrationBlock) -> dict[str, Tensor]:
        shared.extend([name.rpartition(".")[2] for name in group] for group in block.shared)
        return {}

    first = next(iter(streamed.blocks))
    stream.through(first, layers_of(streamed, first), note)
    assert shared == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_gradients_reach_what_was_changed(tmp_path: Path) -> None:
    streamed = BlockwiseModel(tiny_folder(tmp_path, "gpt2"))
    stream = BlockStream(streamed, list(eval_batches(samples([6, 4]), 2)), 1)

    def follow(block: CalibrationBlock) -> dict[str, Tensor]:
        weights = {name: weight.clone().requires_grad_() for name, weight in block.weights.items()}
        gain = next(name for name in block.others if "ln_1.weight" in name)
        other = block.others[gain].clone().requires_grad_()
        (block.run(0, {**weights, gain: other}) - 2 * block.target(0)).square().sum().backward()
        for tensor in (*weights.values(), other):
            assert tensor.grad is not None
            assert tensor.grad.abs().sum() > 0
        return {}

    first = next(iter(streamed.blocks))
    stream.through(first, layers_of(streamed, first), follow)


def test_only_one_block_is_in_memory(tmp_path: Path) -> None:
    streamed = BlockwiseModel(tiny_folder(tmp_path, "mixtral"))
    for name, block in streamed.blocks.items():
        assert all(parameter.is_meta for parameter in block.parameters() if parameter.dim() > 1)
        with streamed.brought(name) as brought:
            assert not any(parameter.is_meta for parameter in brought.parameters())
            others = [b for other, b in streamed.blocks.items() if other != name]
            assert all(p.is_meta for b in others for p in b.parameters() if p.dim() > 1)
        assert all(parameter.is_meta for parameter in block.parameters() if parameter.dim() > 1)


def test_a_block_brought_is_the_one_in_the_files(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "gpt2")
    whole, streamed = load(folder, dtype="float32").model, BlockwiseModel(folder)
    for name in streamed.blocks:
        with streamed.brought(name):
            for layer in layers_of(streamed, name):
                ours = dense_weight(streamed.model.get_submodule(layer))
                assert ours.equal(dense_weight(whole.get_submodule(layer)))


def test_inputs_that_overflow_are_an_error_by_name(tmp_path: Path) -> None:
    broken = load(tiny_folder(tmp_path, "llama"))
    broken.model.get_parameter("model.layers.0.input_layernorm.weight").data.fill_(float("inf"))
    streamed = BlockwiseModel(save_model(broken.model, broken.tokenizer, tmp_path / "broken"))
    stream = BlockStream(streamed, list(eval_batches(samples([4]), 1)), 1)

    def measure(block: CalibrationBlock) -> dict[str, Tensor]:
        block.statistics(list(block.weights), {})
        return {}

    with pytest.raises(DataError, match=r"layers\.0\.self_attn\.q_proj are not finite"):
        stream.through("model.layers.0", layers_of(streamed, "model.layers.0"), measure)


@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "on the disk"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_drift_is_that_of_the_same_tokens_in_the_two_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, *, in_memory: bool
) -> None:
    monkeypatch.setattr("strop.calibrate.stream.KEPT_BYTES", 1 << 20 if in_memory else 0)
    folder, rows, scheme = folder_of(tmp_path, family), samples([12, 5, 9, 3]), parse_scheme("int4")
    seen: list[dict[str, list[Tensor]]] = []
    for format in (None, scheme):
        whole = load(folder, format, dtype="float32").model
        inputs: dict[str, list[Tensor]] = {name: [] for name in linear_modules(whole)}
        for name, module in linear_modules(whole).items():
            module.register_forward_pre_hook(
                lambda _, x, name=name, inputs=inputs: inputs[name].append(x[0].reshape(-1, x[0].shape[-1]))
            )
        for row in rows:
            with torch.no_grad():
                whole(torch.tensor([row.input_ids]))
        seen.append(inputs)
    streamed = BlockwiseModel(folder)
    stream = BlockStream(streamed, list(eval_batches(rows, 2)), 2, drift=True)

    def check(block: CalibrationBlock) -> dict[str, Tensor]:
        rounded = {name: quantize_tensor(weight, scheme).dequantize() for name, weight in block.weights.items()}
        found = block.statistics(list(block.weights), rounded, hessian=True, drift=True)
        for name, statistics in found.items():
            exact, x = (torch.cat(inputs[name]).double() for inputs in seen)
            assert statistics.drift is not None
            wanted = ((exact - x).t() @ x / len(x)).float()
            torch.testing.assert_close(statistics.drift, wanted, rtol=1e-3, atol=1e-5)
        assert block.statistics([next(iter(block.weights))], rounded).popitem()[1].drift is None
        return rounded

    for name in streamed.blocks:
        stream.through(name, layers_of(streamed, name), check)


@pytest.mark.parametrize("all_at_once", [True, False], ids=["let go", "measured"])
def test_inputs_in_full_precision_are_held_until_their_drift_is_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, all_at_once: bool
) -> None:
    streamed = BlockwiseModel(tiny_folder(tmp_path, "llama"))
    first, second, *_ = streamed.blocks
    stream = BlockStream(streamed, list(eval_batches(samples([12, 9, 4]), 2)), 2, drift=True)
    held: list[weakref.ref[Tensor]] = []
    put = Activations.put

    def watched(self: Activations, number: int, tensor: Tensor) -> None:
        held.append(weakref.ref(tensor))
        put(self, number, tensor)

    def alive() -> int:
        return sum(tensor() is not None for tensor in held) - stream.calibrating  # what the block gave stays

    def check(block: CalibrationBlock) -> dict[str, Tensor]:
        assert alive() == stream.calibrating * len(block.shared)
        if all_at_once:
            block.let_go()
            assert alive() == 0
        for done, (layer, *_) in enumerate(block.shared, start=1):
            for again in (False, True):
                seen = block.statistics([layer], {}, drift=True)[layer]
                assert (seen.drift is not None) == (not again and not all_at_once)
            assert alive() == (0 if all_at_once else stream.calibrating * (len(block.shared) - done))
        return {}

    def without(block: CalibrationBlock) -> dict[str, Tensor]:
        assert alive() == 0
        assert all(seen.drift is None for seen in block.statistics(list(block.weights), {}, drift=True).values())
        return {}

    monkeypatch.setattr(Activations, "put", watched)
    stream.through(first, layers_of(streamed, first), check)
    held.clear()
    stream.through(second, layers_of(streamed, second), without, drift=False)


def test_experts_and_streams_that_keep_nothing_have_no_drift(tmp_path: Path) -> None:
    streamed = BlockwiseModel(tiny_folder(tmp_path, "mixtral"))
    name = next(iter(streamed.blocks))
    for keeps in (False, True):
        stream = BlockStream(streamed, list(eval_batches(samples([12, 9]), 2)), 1, drift=keeps)

        def check(block: CalibrationBlock, keeps: bool = keeps) -> dict[str, Tensor]:
            found = block.statistics(list(block.weights), {}, hessian=True, drift=True)
            assert {block.is_expert(layer) for layer in found} == {True, False}
            for layer, statistics in found.items():
                assert (statistics.drift is not None) == (keeps and not block.is_expert(layer))
            return {}

        stream.through(name, layers_of(streamed, name), check)

"""Later passes of a block from kept inputs: the bits of whole passes, for less work, and never from stale inputs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from strop.calibrate import BlockStream, CalibrationBlock
from strop.calibrate import stream as streams
from strop.calibrate.replay import seeing_endings
from strop.data.batches import eval_batches
from strop.methods import gptq
from strop.methods.sequential import layer_by_layer
from strop.models.blocks import BlockwiseModel
from strop.numerics.scheme import parse_scheme
from tests.calibrate.test_block import FAMILIES, folder_of, layers_of, samples
from tests.tiny import tiny_folder

LENGTHS = [12, 5, 9, 3, 7, 7]


def quantized_hidden(folder: Path, replay_bytes: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], Counter]:
    """Hidden states after every block quantized by GPTQ, of calibrating and held-out rows, and calls by layer."""
    monkeypatch.setattr(streams, "REPLAY_BYTES", replay_bytes)
    model, calls = BlockwiseModel(folder), Counter[str]()
    stream = BlockStream(model, list(eval_batches(samples(LENGTHS), 2)), 2)
    for name in model.blocks:
        layers = layers_of(model, name)

        def work(block: CalibrationBlock, layers: list[str] = layers) -> dict[str, Tensor]:
            for layer in block.weights:
                if not block.is_expert(layer):
                    part = layer.removeprefix(f"{block.name}.")
                    module = block._module.get_submodule(part)
                    module.register_forward_hook(lambda *_, part=part: calls.update([part]))
            schemes = {layer: parse_scheme("int4") for layer in layers}
            made = layer_by_layer(block, schemes, gptq, hessian=True).weights
            return {layer: weight.dequantize() for layer, weight in made.items()}

        stream.through(name, layers, work)
    return [stream._quantized.get(number) for number in range(3)], calls


def test_a_block_that_lets_go_runs_whole_passes_to_the_same_bits(tmp_path: Path) -> None:
    model = BlockwiseModel(tiny_folder(tmp_path, "llama"))
    stream = BlockStream(model, list(eval_batches(samples(LENGTHS), 2)), 2)
    name = next(iter(model.blocks))

    def work(block: CalibrationBlock) -> dict[str, Tensor]:
        schemes = {layer: parse_scheme("int4") for layer in block.weights}
        made = layer_by_layer(block, schemes, gptq, hessian=True).weights
        changed = {layer: weight.dequantize() for layer, weight in made.items()}
        assert block.usable(changed)
        shortened = [block.again(number, changed, block.usable(changed)) for number in range(2)]
        block.let_go()
        assert not block.usable(changed)
        assert all(torch.equal(block.again(number, changed, []), shortened[number]) for number in range(2))
        block.statistics(list(block.weights), changed)
        assert not block.usable(changed)
        return changed

    stream.through(name, layers_of(model, name), work)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_inputs_give_the_bits_of_whole_passes(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, family)
    whole, many = quantized_hidden(folder, 0, monkeypatch)
    shortened, few = quantized_hidden(folder, 128 << 20, monkeypatch)
    some, _ = quantized_hidden(folder, 12 << 10, monkeypatch)  # a batch fits, two do not
    for one, two, three in zip(whole, shortened, some, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert sum(few.values()) < sum(many.values())


def test_what_comes_before_attentions_last_layer_runs_once_and_for_held_out_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path, "llama")
    blocks = len(BlockwiseModel(folder).blocks)
    _, whole = quantized_hidden(folder, 0, monkeypatch)
    _, calls = quantized_hidden(folder, 128 << 20, monkeypatch)
    # 2 batches calibrate: measured for o, for gate and up, for down, and run at last; 1 is held out.
    assert whole["self_attn.q_proj"] == blocks * (2 * 4 + 1)
    assert calls["self_attn.q_proj"] == blocks * (2 + 1)
    assert whole["mlp.gate_proj"] == blocks * (2 * 2 + 1)
    assert calls["mlp.gate_proj"] == blocks * (2 + 1)


def test_inputs_are_not_used_again_once_something_before_the_layer_has_changed(tmp_path: Path) -> None:
    model = BlockwiseModel(tiny_folder(tmp_path, "llama"))
    stream = BlockStream(model, list(eval_batches(samples(LENGTHS), 2)), 2)
    name = next(iter(model.blocks))

    def work(block: CalibrationBlock) -> dict[str, Tensor]:
        output = f"{name}.self_attn.o_proj"
        settled = {f"{name}.self_attn.{part}_proj": block.weights[f"{name}.self_attn.{part}_proj"] for part in "qkv"}
        block.statistics([output], {})
        assert not block.usable({})  # nothing was settled yet
        block.statistics([output], settled)
        later = {output: block.weights[output] * 2, f"{name}.mlp.down_proj": block.weights[f"{name}.mlp.down_proj"] * 2}
        copies = {layer: weight.clone() for layer, weight in settled.items()}
        assert block.usable(settled) == block.usable(copies | later) == [output]
        assert not block.usable({**settled, f"{name}.self_attn.q_proj": later[output]})
        assert not block.usable(settled | {f"{name}.input_layernorm.weight": torch.ones(64)})
        for number in range(2):
            hidden = stream._quantized.get(number)
            expected = block.forward(number, hidden, settled | later)
            assert torch.equal(block.again(number, settled | later, [output]), expected)
        for kept, _ in block._replay._kept[output].inputs.values():
            kept.mul_(2)  # as a block that works in place would
        assert torch.equal(block.again(0, settled, [output]), block.forward(0, stream._quantized.get(0), settled))
        return {}

    stream.through(name, layers_of(model, name), work)


def test_layers_inside_a_part_that_could_be_shortened_are_still_seen(tmp_path: Path) -> None:
    """Everything is settled, so that each part could run its last layer alone; the first layers are asked for."""
    model = BlockwiseModel(tiny_folder(tmp_path, "llama"))
    stream = BlockStream(model, list(eval_batches(samples(LENGTHS), 2)), 2)
    name = next(iter(model.blocks))

    def work(block: CalibrationBlock) -> dict[str, Tensor]:
        settled = dict(block.weights)
        first = block.statistics(list(block.weights), settled, hessian=True)
        assert block.usable(settled)
        again = block.statistics(list(block.weights), settled, hessian=True)
        assert first.keys() == again.keys() == block.weights.keys()
        queries = f"{name}.self_attn.q_proj"
        assert torch.equal(block.statistics([queries], settled, hessian=True)[queries].hessian, first[queries].hessian)
        assert block.inputs(queries, settled, most=1000).shape[0] == block.token_count
        return {}

    stream.through(name, layers_of(model, name), work)


def test_rounded_inputs_make_what_was_kept_useless(tmp_path: Path) -> None:
    model = BlockwiseModel(tiny_folder(tmp_path, "llama"))
    stream = BlockStream(model, list(eval_batches(samples(LENGTHS), 2)), 2)
    name = next(iter(model.blocks))

    def work(block: CalibrationBlock) -> dict[str, Tensor]:
        settled = dict(block.weights)
        block.statistics(list(block.weights), settled)
        assert block.usable(settled)
        block.round_inputs({f"{name}.self_attn.v_proj": torch.round})
        assert not block.usable(settled)
        return {}

    stream.through(name, layers_of(model, name), work)


class Ends(nn.Module):
    """A part of a block that does something more to what its last layer returned, or not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.last, self.kind = nn.Linear(4, 4), kind

    def forward(self, x: Tensor) -> Any:
        made = self.last(x)
        if self.kind == "added to":
            return made + x
        if self.kind == "written over":
            return made.mul_(2)
        if self.kind == "with more":
            return made, x
        if self.kind == "called twice":
            return self.last(made)
        return made


@pytest.mark.parametrize("kind", ["added to", "written over", "with more", "called twice", "as it is"])
def test_a_part_ends_in_a_layer_only_where_it_returns_that_layers_result_alone(kind: str) -> None:
    block = nn.Sequential(Ends(kind))
    with torch.no_grad(), seeing_endings(block, {"last": block[0].last}) as endings:
        block(torch.ones(2, 4)) if kind != "with more" else block[0](torch.ones(2, 4))
    assert list(endings) == (["last"] if kind == "as it is" else [])

"""8-bit AdamW: its arithmetic, its bytes, real training beside fp32 moments, its state in checkpoints; lost updates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from strop.memory import PeakMemory, release_unused_memory, steady_allocation
from strop.numerics.codebook import dynamic_map
from strop.training import adamw8bit
from strop.training.adamw8bit import SMALL
from strop.training.optimizers import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    trained_parameters,
    vanishing_share,
)
from tests.fresh import in_fresh_process
from tests.tiny import tiny_model
from tests.training.helpers import exported, run_loop


def stored(values: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """Values after a round trip through 8 bits, one block and one level at a time."""
    levels = dynamic_map(torch.device("cpu"), signed=signed)
    result = torch.zeros_like(values)
    for start in range(0, len(values), 256):
        block = values[start : start + 256]
        largest = block.abs().max()
        if largest == 0:
            continue
        codes = ((block * (1 / largest)).unsqueeze(1).double() - levels.double()).abs().argmin(dim=1)
        if not signed:
            codes = torch.where(block > 0, codes.clamp(min=1), codes)
        result[start : start + 256] = levels[codes] * largest
    return result


@pytest.mark.parametrize("shape", [(80, 64), (4097,), (70, 59)])
def test_steps_follow_the_formula_with_moments_rounded_between_them(shape, monkeypatch):
    monkeypatch.setitem(adamw8bit._PIECE, "cpu", 1024)  # several pieces, the last one short
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = make_optimizer("adamw-8bit", {"w": parameter}, learning_rate=0.01, weight_decay=0.1)
    decay = 0.1 if len(shape) > 1 else 0.0
    weight = parameter.detach().clone().flatten()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 5):
        gradient = torch.randn(shape, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.step()
        flat = gradient.flatten()
        first = first.lerp(flat, 1 - 0.9)
        second = second * 0.999 + (1 - 0.999) * flat * flat
        mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
        weight = weight * (1 - 0.01 * decay) - 0.01 * mean / (square.sqrt() + 1e-8)
        first, second = stored(first, signed=True), stored(second, signed=False)
        assert torch.allclose(parameter.detach().flatten(), weight, rtol=1e-5, atol=1e-6)


def test_the_state_takes_2_bytes_and_a_32nd_a_parameter_and_small_ones_8():
    large, small = nn.Parameter(torch.ones(100, 512)), nn.Parameter(torch.ones(SMALL - 1))
    parameters = {"large": large, "small": small}
    optimizer = make_optimizer("adamw-8bit", parameters, learning_rate=1e-3, weight_decay=0.0)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    sizes = {name: 0 for name in parameters}
    for name, tensor in optimizer_tensors(optimizer, parameters).items():
        if not name.endswith(".step"):
            sizes[name.split(".")[0]] += tensor.nbytes
    assert sizes == {"large": large.numel() * (2 + 8 / 256), "small": 8 * small.numel()}


def memory_of_a_step() -> dict[str, int]:
    """Peak bytes of making an optimizer and one step over 30 million parameters."""
    grown = {}
    weight = nn.Parameter(torch.ones(30, 1000, 1000))
    weight.grad = torch.ones_like(weight)
    with steady_allocation():
        for name in ("adamw", "adamw-8bit"):
            release_unused_memory()
            with PeakMemory() as memory:
                optimizer = make_optimizer(name, {"w": weight}, learning_rate=1e-3, weight_decay=0.0)
                optimizer.step()
                memory.sample()
            grown[name] = memory.peak_bytes
            del optimizer
    return grown


def test_the_memory_of_a_step_falls_by_what_the_state_says():
    """30 million parameters: fp32 moments take 240 MB, 8-bit ones 61 MB and some 10 MB of scratch."""
    grown = in_fresh_process(memory_of_a_step)
    state = 30e6 * (2 + 8 / 256)
    assert state <= grown["adamw-8bit"] <= state + 16e6
    assert grown["adamw"] == pytest.approx(240e6, rel=0.05)
    assert grown["adamw"] - grown["adamw-8bit"] == pytest.approx(240e6 - state, rel=0.1)


def stories_run(material, name: str) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """60 steps of stories260K on text of another kind; losses, weights before and after."""
    folder = material / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (material / "data" / "tinyshakespeare.txt").read_text()[:200_000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    parameters = trained_parameters(model)
    before = {key: value.detach().clone() for key, value in parameters.items()}
    optimizer = make_optimizer(name, parameters, learning_rate=1e-3, weight_decay=0.0)
    losses = []
    for step in range(60):
        rows = ids[step * 512 : (step + 1) * 512].view(8, 64)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, before, parameters


def test_a_real_model_learns_as_with_fp32_moments(material):
    """60 steps: every step's loss within 0.02 nats, the weights' move within a tenth of its length."""
    plain, before, exact = stories_run(material, "adamw")
    eight, _, near = stories_run(material, "adamw-8bit")
    assert max(abs(one - other) for one, other in zip(plain, eight, strict=True)) < 0.02
    assert sum(plain[-10:]) / 10 < sum(plain[:10]) / 10 - 0.5
    apart = math.sqrt(sum(float((near[key] - exact[key]).detach().square().sum()) for key in before))
    moved = math.sqrt(sum(float((exact[key] - before[key]).detach().square().sum()) for key in before))
    length = math.sqrt(sum(float(value.detach().square().sum()) for value in exact.values()))
    assert apart / moved < 0.1
    assert apart / length < 0.01


def test_rows_that_rarely_have_a_gradient_do_not_jump():
    """Without the guard the second moment of a quiet row rounds to zero, and its first moment divides by epsilon."""
    weight = nn.Parameter(torch.zeros(64, 128))
    optimizer = make_optimizer("adamw-8bit", {"w": weight}, learning_rate=1e-3, weight_decay=0.0)
    for step in range(10):
        weight.grad = torch.zeros_like(weight)
        weight.grad[0] = 1.0
        if step == 0:
            weight.grad[1] = 1e-5
        optimizer.step()
    assert weight.detach().abs().max() < 10 * 1e-3 * 1.01


def test_state_put_back_goes_on_to_the_same_bits():
    def run(stop: int | None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        parameters = {"a": nn.Parameter(torch.ones(80, 64)), "b": nn.Parameter(torch.ones(4))}
        optimizer = make_optimizer("adamw-8bit", parameters, learning_rate=0.1, weight_decay=0.1)
        for step in range(6):
            if step == stop:
                saved = {name: value.clone() for name, value in optimizer_tensors(optimizer, parameters).items()}
                assert saved["a.exp_avg"].dtype == torch.uint8
                optimizer = make_optimizer("adamw-8bit", parameters, learning_rate=0.1, weight_decay=0.1)
                load_optimizer_tensors(optimizer, parameters, saved)
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in parameters.values()])

    assert torch.equal(run(None), run(3))


def test_a_run_resumed_from_disk_ends_in_the_same_bits(tmp_path):
    def model() -> nn.Module:
        return tiny_model("llama").requires_grad_(True)

    run_loop(model(), tmp_path / "whole", optimizer="adamw-8bit")
    part = tmp_path / "part"
    run_loop(model(), part, optimizer="adamw-8bit", save_steps=3)
    (part / "last" / "weights.safetensors").unlink()
    for folder in (part / "checkpoints").glob("step-*6"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    run_loop(model(), part, optimizer="adamw-8bit", save_steps=3, resume=True)
    whole, resumed = exported(tmp_path / "whole" / "last"), exported(part / "last")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_optimizer_changes_what_a_run_ends_in(tmp_path):
    ends = []
    for name in ("adamw", "adamw-8bit"):
        run_loop(tiny_model("llama").requires_grad_(True), tmp_path / name, optimizer=name)
        ends.append(exported(tmp_path / name / "last"))
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_bf16_masters_lose_small_updates_and_fp32_masters_lose_none():
    """A sweep of learning rates: what the share predicts is what a bf16 weight really does."""
    shares = []
    for rate in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(100, 100, generator=generator)
        gradient = torch.randn(100, 100, generator=generator)
        ends = {}
        for dtype in (torch.float32, torch.bfloat16):
            weight = nn.Parameter(start.to(dtype, copy=True))
            optimizer = make_optimizer("adamw", {"w": weight}, learning_rate=rate, weight_decay=0.0)
            weight.grad = gradient.to(dtype)
            optimizer.step()
            ends[dtype] = weight.detach()
        before, after = {"w": start}, {"w": ends[torch.float32]}
        share = vanishing_share(before, after)
        shares.append(share)
        assert share == pytest.approx(float((ends[torch.bfloat16] == start.bfloat16()).double().mean()), abs=0.01)
        assert vanishing_share(before, after, dtype=torch.float32) == 0.0
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99
    assert shares[-1] < 0.15


def test_weights_that_did_not_move_are_not_counted_as_lost():
    before = {"a": torch.ones(4), "b": torch.ones(2)}
    after = {"a": torch.tensor([1.0, 1.0, 1.0, 2.0]), "b": torch.tensor([1.0, 1.0001])}
    assert vanishing_share(before, after) == 0.5
    assert vanishing_share(before, before) == 0.0

"""What the loop promises: sums over whole steps, nothing broken is kept, every end is told."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from strop.config import Epochs, Minutes, Steps
from strop.data.batches import padded_batch
from strop.errors import TrainingError
from strop.layers.surgery import attach_fake_quant, attach_lora
from strop.numerics.scheme import parse_scheme
from strop.training.losses import token_loss_sum
from strop.training.metrics import read_metrics
from tests.tiny import FAMILIES, tiny_model
from tests.training.helpers import (
    KINDS,
    Notes,
    assert_equal,
    exported,
    prepared,
    ragged_samples,
    run_loop,
    stream_of,
    trained_tensors,
)

# --- accumulation -----------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, groups: list[list]) -> dict[str, torch.Tensor]:
    """The gradient of a step whose micro-batches are `groups`, as the loop forms it."""
    batches = [padded_batch(group, range(len(group)), pad_id=0) for group in groups]
    total = sum(batch.supervised_tokens for batch in batches)
    model.zero_grad()
    for batch in batches:
        loss_sum, _ = token_loss_sum(model, batch)
        (loss_sum / total).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


# transformers computes norms and rotations of these families in fp32 whatever the model's dtype is
ROUNDED = {family: 1e-5 for family in FAMILIES} | {"gpt2": 1e-10, "falcon": 1e-10}


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_micro_batches_of_one_are_one_batch_of_eight(family):
    tolerance = ROUNDED[family]
    model = tiny_model(family, dtype=torch.float32 if family == "mixtral" else torch.float64)
    samples = ragged_samples(8)
    one, eight = gradients(model, [samples]), gradients(model, [[sample] for sample in samples])
    for name, gradient in one.items():
        assert (eight[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


def test_a_mean_of_means_would_be_another_gradient():
    """The control: the difference that the sum avoids is far above the tolerance of the test before."""
    model = tiny_model("llama", dtype=torch.float64)
    samples = ragged_samples(8)
    one = gradients(model, [samples])
    model.zero_grad()
    for sample in samples:
        loss_sum, tokens = token_loss_sum(model, padded_batch([sample], [0], pad_id=0))
        (loss_sum / tokens / 8).backward()
    name, weight = next(iter(model.named_parameters()))
    assert (weight.grad - one[name]).abs().max() > 1e-3 * one[name].abs().max()


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_how_a_step_is_cut_does_not_change_what_is_trained(tmp_path, batch_size, accumulation):
    reference, cut = tiny_model("gpt2", dtype=torch.float64), tiny_model("gpt2", dtype=torch.float64)
    samples = ragged_samples(16)
    run_loop(reference, tmp_path / "a", samples=samples, batch={"batch_size": 8, "accumulation": 1}, valid=[])
    run_loop(
        cut, tmp_path / "b", samples=samples, batch={"batch_size": batch_size, "accumulation": accumulation}, valid=[]
    )
    for (name, left), right in zip(reference.named_parameters(), cut.parameters(), strict=True):
        assert torch.allclose(left, right, rtol=1e-8, atol=1e-8), name


# --- what is not a number ---------------------------------------------------------------------------------------------


def poison(model: nn.Module, at_call: int, value: float) -> None:
    """Make the model's last norm answer `value` from its `at_call`-th call in training on."""
    calls = 0

    def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += model.training
        return output * value if calls >= at_call and model.training else output

    model.model.norm.register_forward_hook(hook)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_a_number_stops_the_run_before_the_update(tmp_path, value):
    good = prepared("full")
    run_loop(good, tmp_path / "good", length=Steps(max_steps=6), save_steps=2)
    model = prepared("full")
    poison(model, 6, value)  # two micro-batches a step: in the third
    with pytest.raises(TrainingError, match=r"step 3: the loss is .* state after step 2 is kept in") as error:
        run_loop(model, tmp_path / "bad")
    assert "micro-batch of samples" in str(error.value)
    assert_equal(exported(tmp_path / "bad" / "last"), trained_tensors(model))
    assert all(torch.isfinite(value).all() for value in exported(tmp_path / "bad" / "last").values())
    from strop.training.checkpoints import load_checkpoint

    kept = load_checkpoint(tmp_path / "bad" / "checkpoints" / "step-000002")
    assert all(torch.isfinite(value).all() for value in kept.weights.values())
    assert len(read_metrics(tmp_path / "bad" / "metrics.jsonl")) == 2


def test_a_gradient_that_is_not_a_number_stops_the_run_before_the_update(tmp_path):
    model = prepared("full")
    weight = model.model.norm.weight
    calls = 0

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return gradient * math.nan if calls >= 6 else gradient

    weight.register_hook(spoil)
    with pytest.raises(TrainingError, match=r"step 3: the gradient's norm is nan"):
        run_loop(model, tmp_path)
    assert all(torch.isfinite(value).all() for value in trained_tensors(model).values())
    assert (tmp_path / "checkpoints" / "step-000002").is_dir()


def test_at_the_first_step_there_is_nothing_to_keep(tmp_path):
    model = prepared("full")
    poison(model, 1, math.nan)
    with pytest.raises(TrainingError, match="step 1: the loss is nan"):
        run_loop(model, tmp_path)
    assert not (tmp_path / "last").exists()


def test_a_validation_loss_that_is_not_a_number_stops_the_run_and_keeps_the_best(tmp_path):
    model = prepared("full")

    def spoil(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        late = len(read_metrics(tmp_path / "metrics.jsonl")) >= 3
        return output * math.nan if late and not model.training else output

    model.model.norm.register_forward_hook(spoil)
    with pytest.raises(TrainingError, match="step 4: the loss on the validation rows is nan"):
        run_loop(model, tmp_path, eval_steps=2, save_steps=2)
    assert (tmp_path / "best" / "weights.safetensors").is_file()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


# --- gradients that never arrive --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputing_activations_changes_no_bit(tmp_path, kind, family):
    results = []
    for checkpointing in ("none", "all"):
        model = tiny_model(family)
        if kind in ("full", "qat"):
            model.requires_grad_(True)
        if kind == "qat":
            attach_fake_quant(model, parse_scheme("int4-g32"))
        if kind == "lora":
            attach_lora(model, rank=4, alpha=8, dropout=0.1, generator=torch.Generator().manual_seed(0))
        if kind == "qlora":
            from strop.layers.surgery import quantize_linears

            quantize_linears(model, parse_scheme("int4-g32"))
            attach_lora(model, rank=4, alpha=8, dropout=0.1, generator=torch.Generator().manual_seed(0))
        folder = tmp_path / checkpointing
        run_loop(model, folder, checkpointing=checkpointing, length=Steps(max_steps=2), valid=[])
        results.append(trained_tensors(model))
        assert not any("forward" in vars(module) for module in model.modules())
    assert_equal(*results)


def test_a_trained_parameter_without_gradient_is_named(tmp_path):
    model = prepared("lora")
    model.register_parameter("idle", nn.Parameter(torch.zeros(3)))
    with pytest.raises(TrainingError, match=r"1 of \d+ trained parameters got no gradient(.|\n)*idle"):
        run_loop(model, tmp_path)


def test_a_model_without_trained_parameters_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="no parameter that is trained"):
        run_loop(tiny_model("llama").requires_grad_(False), tmp_path)


# --- evaluation, early end, files -------------------------------------------------------------------------------------


def test_best_holds_the_step_with_the_lowest_loss_and_last_the_last(tmp_path):
    model = prepared("full")
    states: dict[int, dict[str, torch.Tensor]] = {}
    notes = Notes(lambda step: states.update({step: trained_tensors(model)}))
    result = run_loop(model, tmp_path, eval_steps=1, learning_rate=0.05, reporter=notes)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    best = min(rows, key=lambda row: row["valid_loss"])
    assert (result.best_step, result.best_valid_loss) == (best["step"], best["valid_loss"])
    assert_equal(exported(tmp_path / "best"), states[best["step"]])
    assert_equal(exported(tmp_path / "last"), states[6])


def test_validation_loss_is_the_mean_over_tokens_and_not_over_rows(tmp_path):
    model, valid = prepared("full"), ragged_samples(5, seed=9)
    result = run_loop(model, tmp_path, valid=valid, eval_batch_size=2)
    sums = [token_loss_sum(model, padded_batch([sample], [0], pad_id=0)) for sample in valid]
    mean = sum(float(total.detach()) for total, _ in sums) / sum(count for _, count in sums)
    assert result.valid_loss == pytest.approx(mean, rel=1e-5)


def test_patience_stops_the_run(tmp_path):
    notes = Notes()
    result = run_loop(
        prepared("full"),
        tmp_path,
        eval_steps=1,
        patience=2,
        learning_rate=1.0,
        length=Steps(max_steps=30),
        reporter=notes,
    )
    assert result.steps < 30
    assert result.steps == result.best_step + 2
    assert any("stopped early" in note for note in notes.notes)
    assert (tmp_path / "last").is_dir()


def test_without_validation_rows_there_is_a_last_and_no_best(tmp_path):
    result = run_loop(prepared("full"), tmp_path, valid=[])
    assert (result.best_step, result.valid_loss) == (None, None)
    assert (tmp_path / "last").is_dir()
    assert not (tmp_path / "best").exists()


def test_metrics_have_a_line_a_step_with_the_named_figures(tmp_path):
    run_loop(prepared("lora"), tmp_path, eval_steps=3, warmup_ratio=0.5, schedule="linear")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "peak_bytes"):
        assert all(row[key] > 0 or key == "peak_bytes" for row in rows)
    assert [row["step"] for row in rows if "valid_loss" in row] == [3, 6]
    assert [round(row["learning_rate"], 6) for row in rows] == [0.003333, 0.006667, 0.01, 0.01, 0.006667, 0.003333]


def test_progress_is_told_with_loss_speed_and_memory(tmp_path):
    notes = Notes()
    run_loop(prepared("lora"), tmp_path, reporter=notes)
    assert (notes.title, notes.total) == ("training", 6)
    assert [done for done, _ in notes.steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "tokens_per_second", "peak_bytes"} <= notes.steps[0][1].keys()


def test_only_the_two_newest_checkpoints_stay(tmp_path):
    run_loop(prepared("lora"), tmp_path, save_steps=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000005", "step-000006"]


def test_clipping_bounds_the_step_and_zero_does_not_clip(tmp_path):
    moved = {}
    for clip in (0.0, 1e-6):
        model = prepared("full")
        before = trained_tensors(model)
        run_loop(model, tmp_path / str(clip), clip_norm=clip, length=Steps(max_steps=1), weight_decay=0.0, valid=[])
        after = trained_tensors(model)
        moved[clip] = sum(float((after[name] - before[name]).abs().sum()) for name in after)
    assert moved[1e-6] < 0.9 * moved[0.0]  # AdamW normalises, so only its epsilon shows the clip


@pytest.mark.parametrize(
    ("length", "steps"),
    [(Steps(max_steps=5), 5), (Epochs(epochs=1.0), 3), (Epochs(epochs=1.5), 5), (Epochs(epochs=0.1), 1)],
)
def test_length_in_steps_and_epochs(tmp_path, length, steps):
    stream = stream_of(ragged_samples(12))
    assert stream.steps_per_epoch == 3
    assert run_loop(prepared("lora"), tmp_path, stream=stream, length=length).steps == steps


def test_a_run_in_minutes_fixes_its_steps_and_leaves_the_data_where_it_was(tmp_path):
    notes = Notes()
    result = run_loop(
        prepared("lora", dropout=0.1), tmp_path / "a", length=Minutes(minutes=0.01), reporter=notes, valid=[]
    )
    assert any("0.01 minutes are about" in note for note in notes.notes)
    assert 1 <= result.steps <= result.total_steps
    straight = prepared("lora", dropout=0.1)
    run_loop(straight, tmp_path / "b", length=Steps(max_steps=result.total_steps), valid=[])
    if result.steps == result.total_steps:
        assert_equal(exported(tmp_path / "a" / "last"), exported(tmp_path / "b" / "last"))


def test_autocast_keeps_master_weights_and_moments_in_fp32(tmp_path):
    model = prepared("full")
    run_loop(model, tmp_path, compute_dtype=torch.bfloat16, save_steps=6)
    from strop.training.checkpoints import load_checkpoint

    saved = load_checkpoint(tmp_path / "checkpoints" / "step-000006")
    assert {tensor.dtype for tensor in (*saved.weights.values(), *saved.optimizer.values())} == {torch.float32}


def test_training_in_bf16_follows_training_in_fp32(tmp_path):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        run_loop(prepared("full"), tmp_path / str(dtype), compute_dtype=dtype)
        losses.append([row["loss"] for row in read_metrics(tmp_path / str(dtype) / "metrics.jsonl")])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)

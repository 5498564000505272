"""Distillation against a plain oracle over all logits: values, gradients, accumulation, packing, memory, resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from strop.config import Steps
from strop.data.batches import Batch, packed_batch, padded_batch
from strop.data.packing import packed_attention
from strop.errors import TrainingError
from strop.layers.surgery import attach_lora, lora_modules
from strop.memory import PeakMemory, release_unused_memory, steady_allocation
from strop.training import losses
from strop.training.losses import find_head
from strop.training.metrics import read_metrics
from strop.training.objective import LABELS, Objective
from strop.training.teachers import HiddenWanted, ModelTeacher, SwitchedOffTeacher
from tests.fresh import in_fresh_process
from tests.tiny import tiny_model
from tests.training.helpers import (
    KINDS,
    assert_equal,
    goes_on_after_a_kill,
    prepared,
    ragged_samples,
    run_loop,
    trained_tensors,
)


def student_and_teacher(
    *, trained_head: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, nn.Module]:
    student = tiny_model("llama", seed=0, dtype=dtype).requires_grad_(True)
    student.get_output_embeddings().requires_grad_(trained_head)  # type: ignore[operator]
    return student, tiny_model("llama", seed=1, dtype=dtype)


def oracle(student: nn.Module, teacher: nn.Module, batch: Batch, share: float) -> Tensor:
    """The loss from all logits at once, token by token of the rows as they lie."""
    labels = batch.labels[:, 1:]
    with torch.no_grad():
        expected = teacher(**batch.inputs()).logits[:, :-1].log_softmax(-1)
    found = student(**batch.inputs()).logits[:, :-1].log_softmax(-1)
    counts = labels != -100
    divergence = (expected.exp() * (expected - found)).sum(-1)[counts].sum()
    entropy = -found.gather(-1, labels.clamp(min=0)[..., None])[..., 0][counts].sum()
    return (1 - share) * entropy + share * divergence


def checked(teacher: Any, batch: Batch, share: float) -> Objective:
    objective = Objective(teacher, share)
    objective.check(batch)
    return objective


def gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("way", ["chunks", "one go", "no head"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_loss_and_gradient_are_those_of_all_logits_at_once(trained, way, share, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 304 * 7 if way == "chunks" else 2**24)
    student, teacher = student_and_teacher(trained_head=trained)
    batch = padded_batch(ragged_samples(6), range(6), pad_id=0)
    objective = checked(ModelTeacher(teacher), batch, share)
    head = None if way == "no head" else find_head(student, batch)
    loss = objective.loss_sum(student, batch, head=head)
    loss.backward()
    got = gradients(student)
    plain = oracle(student, teacher, batch, share)
    plain.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    for one, other in zip(got, gradients(student), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    measured = objective.measured(student, batch, head=head)
    assert measured["loss"] == pytest.approx(plain.item(), rel=1e-12)
    assert measured["label_loss"] == pytest.approx(oracle(student, teacher, batch, 0.0).item(), rel=1e-12)
    assert measured["divergence"] == pytest.approx(oracle(student, teacher, batch, 1.0).item(), rel=1e-12)


def test_the_divergence_has_the_gradient_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    expected, found = (torch.randn(5, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    wanted = HiddenWanted(lambda logits: logits, expected, supervised=4)  # the fifth is an addition
    assert torch.autograd.gradcheck(wanted.divergence_sum, (found.requires_grad_(),))


def test_a_student_that_answers_as_the_teacher_has_no_divergence_and_no_gradient():
    student, _ = student_and_teacher()
    batch = padded_batch(ragged_samples(4), range(4), pad_id=0)
    objective = checked(ModelTeacher(tiny_model("llama", dtype=torch.float64)), batch, 1.0)
    loss = objective.loss_sum(student, batch, head=find_head(student, batch))
    loss.backward()
    assert abs(loss.item()) < 1e-10
    assert max(float(one.abs().max()) for one in gradients(student)) < 1e-10


def test_with_the_teacher_alone_no_label_counts():
    student, teacher = student_and_teacher()
    batch = padded_batch(ragged_samples(4), range(4), pad_id=0)
    other = padded_batch(ragged_samples(4), range(4), pad_id=0)
    other.labels[other.labels > 0] = 7  # the same places, other answers
    objective, head = checked(ModelTeacher(teacher), batch, 1.0), find_head(student, batch)
    assert objective.loss_sum(student, batch, head=head).equal(objective.loss_sum(student, other, head=head))
    assert not LABELS.loss_sum(student, batch, head=head).equal(LABELS.loss_sum(student, other, head=head))


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_eight_micro_batches_of_one_are_one_batch_of_eight(share):
    """fp64 (GPT-2 computes its norms in it too), ragged lengths: gradients within 1e-10 of their largest value."""
    student, samples, results = tiny_model("gpt2", dtype=torch.float64).requires_grad_(True), ragged_samples(8), []
    for groups in ([samples], [[sample] for sample in samples]):
        batches = [padded_batch(group, range(len(group)), pad_id=0) for group in groups]
        objective = checked(ModelTeacher(tiny_model("gpt2", seed=1, dtype=torch.float64)), batches[0], share)
        total = sum(batch.supervised_tokens for batch in batches)
        for batch in batches:
            (objective.loss_sum(student, batch, head=find_head(student, batch)) / total).backward()
        results.append(gradients(student))
    for one, eight in zip(*results, strict=True):
        assert float((eight - one).abs().max()) <= 1e-10 * float(one.abs().max())


def test_packed_rows_are_taught_what_they_are_taught_alone():
    student, teacher = student_and_teacher()
    samples = ragged_samples(6)
    packed = packed_batch([[0, 1, 2], [3, 4, 5]], samples, pad_id=0, attention=packed_attention(student, 64))
    padded = padded_batch(samples, range(6), pad_id=0)
    objective, head = Objective(ModelTeacher(teacher, packed_attention(teacher, 64)), 1.0), find_head(student, padded)
    objective.check(packed)
    apart = objective.loss_sum(student, padded, head=head)
    torch.testing.assert_close(objective.loss_sum(student, packed, head=head), apart, rtol=1e-10, atol=0)


def test_a_teacher_whose_packed_rows_see_each_other_is_refused(tmp_path):
    teacher = tiny_model("falcon", alibi=True)  # its positions run on from document to document
    with pytest.raises(TrainingError, match="the teacher: packing"):
        run_loop(
            prepared("full"), tmp_path, packing=True,
            objective=Objective(ModelTeacher(teacher, packed_attention(teacher, 64)), 0.5),
        )  # fmt: skip


# --- the base as the teacher of its adapter ---------------------------------------------------------------------------


def test_the_base_under_an_adapter_teaches_what_a_copy_of_it_teaches():
    student = tiny_model("llama", dtype=torch.float64)
    attach_lora(student, ["all-linear"], rank=4, alpha=8, dropout=0.2, generator=torch.Generator().manual_seed(1))
    for adapter in lora_modules(student).values():
        nn.init.normal_(adapter.lora_B, std=0.1)
    student.train()
    batch = padded_batch(ragged_samples(5), range(5), pad_id=0)
    itself = checked(SwitchedOffTeacher(student), batch, 0.5)
    copy = checked(ModelTeacher(tiny_model("llama", dtype=torch.float64)), batch, 0.5)
    results = []
    for objective in (itself, copy):
        torch.manual_seed(3)
        objective.loss_sum(student, batch, head=find_head(student, batch)).backward()
        results.append(gradients(student))
    assert student.training
    assert all(one.equal(other) for one, other in zip(*results, strict=True))
    assert any(float(one.abs().max()) > 0 for one in results[0])


def a_large_model() -> nn.Module:
    """13 million parameters, 52 MB."""
    return tiny_model("llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=4)


def peaks_of_a_step() -> dict[str, int]:
    """Peak bytes of a step by who teaches."""

    def peak(teaching: str) -> int:
        release_unused_memory()
        with PeakMemory() as memory:
            student = a_large_model()
            attach_lora(student, "all-linear", rank=2, alpha=4, generator=torch.Generator().manual_seed(1))
            batch = padded_batch(ragged_samples(4), range(4), pad_id=0)
            teachers = {
                "none": lambda: None,
                "shared": lambda: SwitchedOffTeacher(student),
                "copy": lambda: ModelTeacher(a_large_model()),
            }
            teacher = teachers[teaching]()
            objective = Objective() if teacher is None else checked(teacher, batch, 0.5)
            objective.loss_sum(student, batch, head=find_head(student, batch)).backward()
            return memory.peak_bytes

    with steady_allocation():  # what an earlier peak freed serves no later one unseen
        peak("copy")  # what is held once by libraries is there now
        return {teaching: peak(teaching) for teaching in ("none", "shared", "copy")}


def test_the_base_as_teacher_takes_no_second_copy():
    """The shared teacher adds less than a tenth of the weights to a step's peak."""
    weights = 4 * sum(parameter.numel() for parameter in a_large_model().parameters())
    peaks = in_fresh_process(peaks_of_a_step)
    assert peaks["shared"] - peaks["none"] < 0.1 * weights
    assert peaks["copy"] - peaks["none"] > 0.8 * weights


# --- in the loop ------------------------------------------------------------------------------------------------------


def teaching(model: nn.Module, kind: str, *, packing: bool) -> Objective:
    if kind == "lora":
        return Objective(SwitchedOffTeacher(model), 0.5)
    teacher = tiny_model("llama", seed=5)
    return Objective(ModelTeacher(teacher, packed_attention(teacher, 64) if packing else None), 1.0)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_is_bit_for_bit_the_run_in_one_go(tmp_path, kind, packing):
    settings: dict[str, Any] = {
        "save_steps": 2, "eval_steps": 2, "packing": packing, "samples": ragged_samples(48 if packing else 12)
    }  # fmt: skip

    def run(name: str, **more: Any) -> nn.Module:
        model = prepared(kind, dropout=0.1 if "lora" in kind else 0.0)
        run_loop(model, tmp_path / name, objective=teaching(model, kind, packing=packing), **settings, **more)
        return model

    goes_on_after_a_kill(run, tmp_path)
    told = ("step", "loss", "valid_loss", "valid_divergence", "valid_label_loss")
    rows = [
        [{key: row.get(key) for key in told} for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("straight", "killed")
    ]
    assert rows[0] == rows[1]


def test_recomputed_blocks_change_no_bit(tmp_path):
    results = []
    for checkpointing in ("none", "all"):
        model = prepared("full")
        objective = teaching(model, "full", packing=False)
        run_loop(model, tmp_path / checkpointing, objective=objective, checkpointing=checkpointing)
        results.append(trained_tensors(model))
    assert_equal(*results)


def test_the_best_is_chosen_by_the_objective_and_both_parts_are_told(tmp_path):
    model = prepared("lora")
    result = run_loop(model, tmp_path, eval_steps=1, objective=Objective(SwitchedOffTeacher(model), 0.25))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    for row in rows:
        mixed = 0.75 * row["valid_label_loss"] + 0.25 * row["valid_divergence"]
        assert row["valid_loss"] == pytest.approx(mixed, rel=1e-9)
    assert result.best_valid_loss == min(row["valid_loss"] for row in rows)


def test_distillation_brings_the_student_to_its_teacher(tmp_path):
    student, teacher = prepared("full"), tiny_model("llama", seed=5)
    run_loop(
        student, tmp_path, samples=ragged_samples(16), valid=ragged_samples(16), eval_steps=10,
        length=Steps(max_steps=120), learning_rate=3e-3,
        objective=Objective(ModelTeacher(teacher), 1.0),
    )  # fmt: skip
    divergences = [row["valid_divergence"] for row in read_metrics(tmp_path / "metrics.jsonl") if "valid_loss" in row]
    assert divergences[-1] < 0.5 * divergences[0]


def test_an_interrupted_teacher_leaves_the_student_as_it_was():
    student = prepared("lora").train()
    teacher = SwitchedOffTeacher(student)
    batch = padded_batch(ragged_samples(2), range(2), pad_id=0)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    hook = student.get_input_embeddings().register_forward_hook(fail)  # type: ignore[operator]
    with pytest.raises(KeyboardInterrupt):
        teacher.wanted(batch)
    hook.remove()
    assert student.training
    assert not any(adapter.switched_off for adapter in lora_modules(student).values())

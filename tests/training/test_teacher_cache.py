"""A teacher's words on the disk: how near they are to the whole, found in whatever order, refused if changed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from strop.data.batches import Batch, packed_batch, padded_batch
from strop.data.packing import packed_attention
from strop.data.templates import Sample
from strop.errors import FileFormatError, TrainingError
from strop.training import teacher_cache
from strop.training.losses import find_head
from strop.training.objective import Objective
from strop.training.teacher_cache import CachedTeacher, TopWanted, cache_bytes, write_cache
from strop.training.teachers import ModelTeacher
from tests.tiny import tiny_model
from tests.training.helpers import (
    KINDS,
    Killed,
    Notes,
    goes_on_after_a_kill,
    prepared,
    ragged_samples,
    run_loop,
)

MADE_OF = {"teacher": "t", "rows": ["r"], "tokenizer": "k"}


class Reading:
    """Opens a tiny teacher and counts the batches that it reads; `fail_at` ends the pass there."""

    def __init__(self, *, fail_at: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.opened, self.read, self.fail_at, self.dtype = 0, 0, fail_at, dtype

    def __call__(self) -> tuple[torch.device, Any]:
        self.opened += 1
        teacher = ModelTeacher(tiny_model("llama", seed=5, dtype=self.dtype))
        teacher.check(padded_batch(ragged_samples(1), [0], pad_id=0))

        def wanted(batch: Batch) -> Any:
            if self.read == self.fail_at:
                raise Killed
            self.read += 1
            return teacher.wanted(batch)

        return torch.device("cpu"), wanted


def write(folder: Path, samples: list[Sample], reading: Reading | None = None, **changes: Any) -> float:
    settings: dict[str, Any] = {"batch_size": 2, "pad_id": 0, "compute_dtype": torch.float32} | changes
    return write_cache(folder, settings.pop("made_of", MADE_OF), [samples], reading or Reading(), **settings)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def all_logits(model: nn.Module, batch: Batch) -> Tensor:
    """At the supervised tokens, in their order."""
    kept = batch.labels[:, 1:] != -100
    with torch.no_grad():
        return model(**batch.inputs()).logits[:, :-1][kept]


def coarsened_oracle(teacher: Tensor, student: Tensor, top: int) -> float:
    """KL over the teacher's `top` likeliest tokens and all others as one, token by token, in fp64."""
    total = 0.0
    for expected, found in zip(teacher.double().softmax(-1), student.double().softmax(-1), strict=True):
        order = expected.argsort(descending=True)
        p = [*expected[order[:top]].tolist(), float(expected[order[top:]].sum())]
        q = [*found[order[:top]].tolist(), float(found[order[top:]].sum())]
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return total


@pytest.mark.parametrize("top", [1, 5, 64])
def test_the_divergence_is_that_of_the_likeliest_tokens_and_the_rest(tmp_path, top, monkeypatch):
    """Within fp16's rounding of log-probabilities; and exactly that of the outcomes that are held."""
    monkeypatch.setattr(teacher_cache, "TOP", top)
    samples = ragged_samples(5)
    write(tmp_path / "cache", samples, Reading(dtype=torch.float64))
    batch = padded_batch(samples, range(5), pad_id=0)
    student = tiny_model("llama", dtype=torch.float64)
    found = all_logits(student, batch)
    wanted = CachedTeacher(tmp_path / "cache").wanted(batch)
    assert torch.allclose(wanted.logs.exp().sum(1) + wanted.rest.exp(), torch.ones(1, dtype=torch.float64), atol=1e-12)
    expected = torch.zeros_like(found)  # a distribution that has the kept outcomes, the rest spread evenly
    expected += ((wanted.rest.exp()) / (found.shape[1] - top))[:, None]
    expected.scatter_(1, wanted.ids, wanted.logs.exp())
    held = float(wanted.divergence_sum(found))
    assert held == pytest.approx(coarsened_oracle(expected.log(), found, top), rel=1e-12)
    true = all_logits(tiny_model("llama", seed=5, dtype=torch.float64), batch)
    assert held == pytest.approx(coarsened_oracle(true, found, top), rel=2e-3)


def test_coarsening_never_raises_the_divergence():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(20, 100, generator=generator, dtype=torch.float64) for _ in range(2))
    logs, before = teacher.log_softmax(1), 0.0
    for top in (1, 2, 8, 32, 99, 100):
        kept = logs.topk(top, dim=1)
        rest = logs.scatter(1, kept.indices, -torch.inf).logsumexp(1)
        now = float(TopWanted.stored(kept.indices, kept.values, rest).divergence_sum(student))
        assert now >= before - 1e-12
        before = now
    whole = float((logs.exp() * (logs - student.log_softmax(1))).sum())
    assert before == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("top", [7, 100])
def test_its_gradient_is_that_of_finite_differences(top):
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(4, 100, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher[0, 3] = 60.0  # so sure that nothing is left over for the others
    kept = teacher.log_softmax(1).topk(top, dim=1)
    rest = teacher.log_softmax(1).scatter(1, kept.indices, -torch.inf).logsumexp(1)
    wanted = TopWanted.stored(kept.indices, kept.values, rest)
    assert torch.autograd.gradcheck(wanted.divergence_sum, (student.requires_grad_(),))


def test_nothing_left_over_asks_nothing_of_the_other_tokens():
    ids, logs, rest = torch.tensor([[2]]), torch.tensor([[0.0]]), torch.tensor([-torch.inf])
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = TopWanted.stored(ids, logs, rest).divergence_sum(logits)
    loss.backward()
    assert loss.item() == pytest.approx(-logits.log_softmax(1)[0, 2].item(), rel=1e-6)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_whole_vocabulary_on_disk_is_the_teacher_beside_within_fp16(tmp_path, monkeypatch):
    """Loss and gradient, relative: half a unit of fp16 at log-probabilities of up to 16 is 4e-3 nats a token."""
    monkeypatch.setattr(teacher_cache, "TOP", 10**6)
    samples = ragged_samples(6)
    write(tmp_path / "cache", samples)
    batch, student = padded_batch(samples, range(6), pad_id=0), prepared("full")
    beside = ModelTeacher(tiny_model("llama", seed=5))
    results = []
    for teacher in (beside, CachedTeacher(tmp_path / "cache")):
        objective = Objective(teacher, 1.0)
        objective.check(batch)
        loss = objective.loss_sum(student, batch, head=find_head(student, batch))
        loss.backward()
        results.append((loss.item(), [parameter.grad.clone() for parameter in student.parameters()]))
        student.zero_grad()
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-3)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert float((one - other).norm()) <= 5e-3 * float(one.norm())


@pytest.mark.parametrize("cut", ["another order", "packed", "one by one"])
def test_rows_are_found_however_they_are_batched(tmp_path, cut):
    samples = ragged_samples(9)
    write(tmp_path / "cache", samples)
    teacher, student = CachedTeacher(tmp_path / "cache"), prepared("full")
    whole = padded_batch(samples, range(9), pad_id=0)
    if cut == "packed":
        attention = packed_attention(student, 64)
        batches = [packed_batch([[8, 1, 2], [3, 7, 5], [0, 6, 4]], samples, pad_id=0, attention=attention)]
    else:
        order, size = [4, 8, 0, 2, 7, 1, 3, 6, 5], 3 if cut == "another order" else 1
        parts = [order[begin : begin + size] for begin in range(0, 9, size)]
        batches = [padded_batch([samples[row] for row in part], part, pad_id=0) for part in parts]

    def divergence(some: list[Batch]) -> float:
        head = find_head(student, some[0])
        return sum(Objective(teacher, 1.0).measured(student, batch, head=head)["divergence"] for batch in some)

    assert divergence(batches) == pytest.approx(divergence([whole]), rel=1e-5)


def test_a_row_that_comes_twice_is_kept_once(tmp_path):
    samples = ragged_samples(4)
    write(tmp_path / "once", samples)
    write(tmp_path / "twice", [*samples, *samples])
    assert files(tmp_path / "twice").keys() == files(tmp_path / "once").keys()
    assert (tmp_path / "twice/part-00000.safetensors").read_bytes() == (
        tmp_path / "once/part-00000.safetensors"
    ).read_bytes()


def test_the_bytes_are_those_announced(tmp_path):
    samples = ragged_samples(40)
    write(tmp_path / "cache", samples)
    announced = cache_bytes(sum(sample.supervised for sample in samples), 304)
    assert announced <= CachedTeacher(tmp_path / "cache").bytes <= announced + 40 * 40 + 2000


def test_a_row_that_was_never_read_is_refused(tmp_path):
    write(tmp_path / "cache", ragged_samples(4))
    other = ragged_samples(2, seed=8)
    with pytest.raises(TrainingError, match="never read by the teacher"):
        CachedTeacher(tmp_path / "cache").check(padded_batch(other, range(2), pad_id=0))


# --- a pass that is stopped, and what changed -------------------------------------------------------------------------


@pytest.mark.parametrize("fail_at", [0, 1, 5])
def test_a_killed_pass_goes_on_behind_its_last_part_and_ends_in_the_same_bytes(tmp_path, fail_at, monkeypatch):
    monkeypatch.setattr(teacher_cache, "PART_TOKENS", 20)
    samples = ragged_samples(14)
    write(tmp_path / "straight", samples)
    with pytest.raises(Killed):
        write(tmp_path / "killed", samples, Reading(fail_at=fail_at))
    with pytest.raises(TrainingError, match="not finished"):
        CachedTeacher(tmp_path / "killed")
    (tmp_path / "killed" / ".part-00009.safetensors.part").write_bytes(b"half")
    (tmp_path / "killed" / "part-00009.safetensors").write_bytes(b"whole, and no line of the index says so")
    again = Reading()
    write(tmp_path / "killed", samples, again)
    assert files(tmp_path / "killed") == files(tmp_path / "straight")
    assert (again.read < 7) == (fail_at == 5)  # of 7 batches; a part holds two or three


def test_a_finished_cache_is_not_read_again(tmp_path):
    samples, again = ragged_samples(4), Reading()
    left = write(tmp_path / "cache", samples)
    assert write(tmp_path / "cache", samples, again) == left
    assert 0 < left < 1
    assert again.opened == 0


@pytest.mark.parametrize("what", MADE_OF)
def test_a_cache_of_another_teacher_rows_or_tokenizer_is_refused_or_replaced(tmp_path, what):
    samples = ragged_samples(4)
    write(tmp_path / "cache", samples)
    with pytest.raises(TrainingError, match=f"before {what} changed"):
        write(tmp_path / "cache", samples, made_of=MADE_OF | {what: "other"})
    anew = Reading()
    write(tmp_path / "cache", samples, anew, made_of=MADE_OF | {what: "other"}, replace=True)
    assert anew.opened == 1
    assert json.loads((tmp_path / "cache" / "parts.json").read_text())["made_of"][what] == "other"


def test_a_changed_byte_is_found(tmp_path):
    samples = ragged_samples(4)
    write(tmp_path / "cache", samples)
    part = tmp_path / "cache" / "part-00000.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(FileFormatError, match="is not what was written there"):
        write(tmp_path / "cache", samples)


def test_a_part_outside_the_folder_is_refused(tmp_path):
    write(tmp_path / "cache", ragged_samples(4))
    index = json.loads((tmp_path / "cache" / "parts.json").read_text())
    index["parts"][0]["name"] = "../part-00000.safetensors"
    (tmp_path / "cache" / "parts.json").write_text(json.dumps(index))
    with pytest.raises(FileFormatError):
        CachedTeacher(tmp_path / "cache")


# --- in the loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_is_bit_for_bit_the_run_in_one_go(tmp_path, kind, packing):
    samples, valid = ragged_samples(48 if packing else 12), ragged_samples(4, seed=9)
    write_cache(
        tmp_path / "cache", MADE_OF, [samples, valid], Reading(), batch_size=4, pad_id=0, compute_dtype=torch.float32
    )

    def run(name: str, **more: Any) -> nn.Module:
        model = prepared(kind, dropout=0.1 if "lora" in kind else 0.0)
        run_loop(
            model, tmp_path / name, save_steps=2, eval_steps=2, packing=packing, samples=samples, valid=valid,
            objective=Objective(CachedTeacher(tmp_path / "cache"), 0.5), **more,
        )  # fmt: skip
        return model

    goes_on_after_a_kill(run, tmp_path)


def test_smaller_micro_batches_find_their_rows(tmp_path):
    samples = ragged_samples(12)
    write(tmp_path / "cache", samples)
    model, notes, failed = prepared("full"), Notes(), []

    def fail(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("out of memory")

    hook = model.register_forward_pre_hook(fail, with_kwargs=True)
    base_hook = model.base_model.register_forward_pre_hook(fail, with_kwargs=True)  # type: ignore[union-attr]
    result = run_loop(
        model, tmp_path / "run", samples=samples, valid=[], reporter=notes, batch={"batch_size": 4, "accumulation": 1},
        objective=Objective(CachedTeacher(tmp_path / "cache"), 1.0),
    )  # fmt: skip
    hook.remove()
    base_hook.remove()
    assert result.events[0]["kind"] == "micro_batch"
    assert result.steps == 6

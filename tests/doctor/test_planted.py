"""Each hazard planted into a run that is otherwise sound: found by its name, at its level, with its figure."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from strop.data import batches, templates
from strop.data.batches import Batch
from strop.data.packing import PackedAttention
from strop.data.templates import IGNORED
from strop.errors import TargetError
from strop.layers.surgery import lora_modules
from strop.recipes.checks import disk, learning
from strop.recipes.checks.collated import check_collated
from strop.recipes.checks.disk import cached_bytes, check_disk
from strop.recipes.checks.learning import check_coverage, check_learning, check_packing
from strop.recipes.checks.serving import check_template
from strop.training import loop, losses
from strop.training import trial as trials
from tests.data.chats import LLAMA3
from tests.doctor.rows import chat, chat_file, examined, one, seen_of, session_of
from tests.tiny import tiny_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_file(tmp_path_factory.mktemp("data") / "chats.jsonl")


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def collate_with(monkeypatch: pytest.MonkeyPatch, change) -> None:
    """Let the stream's collator do something else to the labels, which it is given with the ids."""
    sound = batches.padded_batch

    def wrong(samples, rows, *, pad_id: int) -> Batch:
        made = sound(samples, rows, pad_id=pad_id)
        return replace(made, labels=change(made.input_ids, made.labels))

    monkeypatch.setattr(batches, "padded_batch", wrong)


# --- 1: the mask ------------------------------------------------------------------------------------------------------


def test_an_empty_mask_is_refused(base, data, monkeypatch):
    collate_with(monkeypatch, lambda ids, labels: torch.full_like(labels, IGNORED))
    session = session_of(base, data)
    found = one(check_collated(session, seen_of(session)), "loss mask")
    assert (found.level, found.figures["supervised_tokens"]) == ("refuse", 0)


def test_labels_shifted_twice_are_refused(base, data, monkeypatch):
    collate_with(monkeypatch, lambda ids, labels: torch.roll(labels, -1, dims=1))
    session = session_of(base, data)
    found = one(check_collated(session, seen_of(session)), "loss mask")
    assert found.level == "refuse"
    assert found.figures["misplaced_labels"] > 0


def test_learning_the_questions_is_refused(base, data, monkeypatch):
    def everything(ids, labels):
        return torch.where((labels != IGNORED).any(dim=1, keepdim=True) & (ids != 0), ids, labels).index_fill(
            1, torch.tensor([0]), IGNORED
        )

    collate_with(monkeypatch, everything)
    session = session_of(base, data)
    found = one(check_collated(session, seen_of(session)), "loss mask")
    assert found.level == "refuse"
    assert "belong to no answer" in found.message
    session = session_of(base, data, train_on="all")
    assert one(check_collated(session, seen_of(session)), "loss mask").level == "fine"


def test_labels_in_the_padding_are_refused(base, data, monkeypatch):
    collate_with(monkeypatch, lambda ids, labels: torch.where(ids == 0, ids, labels))
    session = session_of(base, data)
    assert one(check_collated(session, seen_of(session)), "loss mask").level == "refuse"


def test_a_step_that_learns_nothing_is_refused(base, data, monkeypatch):
    first = seen_of(session_of(base, data, batch_size=1, max_steps=3))
    assert first.empty_steps == 0
    calls = iter(range(10**6))
    collate_with(monkeypatch, lambda ids, labels: torch.full_like(labels, IGNORED) if next(calls) == 1 else labels)
    session = session_of(base, data, batch_size=1, max_steps=3)
    found = one(check_collated(session, seen_of(session)), "loss mask")
    assert (found.level, found.figures["steps_without_loss"]) == ("refuse", 1)


# --- 2: stop tokens and padding ---------------------------------------------------------------------------------------


def test_stop_tokens_without_loss_are_refused(base, data, monkeypatch):
    collate_with(monkeypatch, lambda ids, labels: labels.masked_fill(ids == 4, IGNORED))
    session = session_of(base, data)
    found = one(check_collated(session, seen_of(session)), "stop tokens")
    assert found.level == "refuse"
    assert found.figures["without_stop"] == found.figures["answers"] > 0
    assert "masked by id" not in found.message


def test_padding_masked_by_id_is_named_where_pad_is_the_end_token(data, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    base = tiny_folder(tmp_path, "llama", tokenizer=tokenizer)
    collate_with(monkeypatch, lambda ids, labels: labels.masked_fill(ids == 4, IGNORED))
    session = session_of(base, data)
    found = one(check_collated(session, seen_of(session)), "stop tokens")
    assert found.level == "refuse"
    assert "masked by id" in found.message
    assert "by its place" in found.remedy


def test_a_few_answers_without_a_stop_are_a_warning(base, data, monkeypatch):
    first: list[torch.Tensor] = []

    def of_the_first_batch(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        first.append(ids)
        return labels.masked_fill(ids == 4, IGNORED) if torch.equal(ids, first[0]) else labels

    collate_with(monkeypatch, of_the_first_batch)
    session = session_of(base, data)
    assert one(check_collated(session, seen_of(session)), "stop tokens").level == "warn"


def test_an_answer_that_ends_where_serving_does_not_stop_is_found(base, data, monkeypatch):
    session = session_of(base, data)
    monkeypatch.setattr("strop.recipes.checks.collated.stop_ids", lambda tokenizer: [tokenizer.eos_token_id])
    found = one(check_collated(session, seen_of(session)), "stop tokens")
    assert found.level == "refuse"
    assert "<|im_end|>" in found.message


def test_much_padding_is_said_where_packing_would_fill_it(base, data):
    session = session_of(base, data, batch_size=16)
    assert "packing: true" in one(check_collated(session, seen_of(session)), "padding").message
    session = session_of(base, data, batch_size=1)
    assert "100% of the positions" in one(check_collated(session, seen_of(session)), "padding").message


def test_an_attention_mask_by_id_is_refused(base, data, monkeypatch):
    monkeypatch.setattr(Batch, "attention_mask", property(lambda batch: (batch.input_ids != 4).long()))
    session = session_of(base, data)
    found = one(check_collated(session, seen_of(session)), "padding")
    assert found.level == "refuse"
    assert found.figures["hidden"] > 0


# --- 3: the template --------------------------------------------------------------------------------------------------


def test_another_template_at_serving_is_refused_at_the_token_where_it_differs(base, data):
    session = session_of(base, data)
    assert one(check_template(session, rows=8), "template").level == "fine"
    template = str(session.tokenizer.chat_template)
    session.tokenizer.chat_template = template.replace("message['role'] + '\n'", "message['role'] + ' '")
    found = one(check_template(session, rows=8), "template")
    assert (found.level, found.figures["token"]) == ("refuse", 4)
    assert "instead of" in found.message


def test_a_base_without_a_template_is_refused_with_the_way_out(data, tmp_path):
    base = tiny_folder(tmp_path, "llama", tokenizer=tiny_tokenizer(chat_template=False))
    found = examined(base, data)
    assert found.refused
    assert "--chat-template" in found.findings[0].message


# --- 4: BOS -----------------------------------------------------------------------------------------------------------


def test_two_bos_from_template_and_tokenizer_are_mended_and_refused_if_not(data, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + LLAMA3
    base = tiny_folder(tmp_path, "llama", tokenizer=tokenizer)
    session = session_of(base, data)
    found = one(check_collated(session, seen_of(session)), "BOS")
    assert (found.level, found.figures["documents_by_leading_bos"]) == ("fine", {"1": 15})
    monkeypatch.setattr(templates, "_surplus_bos", lambda tokenizer, ids: 0)
    session = session_of(base, data)
    found = one(check_collated(session, seen_of(session)), "BOS")
    assert (found.level, found.figures["documents_by_leading_bos"]) == ("refuse", {"2": 15})


def test_a_template_that_leaves_out_the_bos_of_the_tokenizer_is_a_warning(base, data, monkeypatch):
    session = session_of(base, data)
    whole = type(session.tokenizer).__call__

    def adds_bos(tokenizer, text, **options):
        made = whole(tokenizer, text, **options)
        return {"input_ids": [1, *made["input_ids"]]} if not options else made

    monkeypatch.setattr(type(session.tokenizer), "__call__", adds_bos)
    assert one(check_collated(session, seen_of(session)), "BOS").level == "warn"


# --- 5: accumulation --------------------------------------------------------------------------------------------------


def test_a_mean_of_means_is_refused(base, data, monkeypatch):
    def mean_of_means(self, micro_batches):
        total = 0.0
        for batch in micro_batches:
            loss_sum, count = losses.token_loss_sum(self.model, batch, head=self.head)
            (loss_sum / count / len(micro_batches)).backward()
            total += float(loss_sum.detach())
        supervised = sum(batch.supervised_tokens for batch in micro_batches)
        return total / supervised, supervised

    monkeypatch.setattr(loop.Loop, "_backward", mean_of_means)
    session = session_of(base, data)
    found = one(check_learning(session, seen_of(session), steps=False), "accumulation")
    assert found.level == "refuse"
    assert found.figures["relative_difference"] > 0.05


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"batch_size": 1, "accumulation": 8}])
def test_a_sum_that_is_not_divided_by_the_step_is_refused(base, data, monkeypatch, settings):
    sound = loop.Loop._backward

    def each_alone(self, micro_batches):
        return [sound(self, [batch]) for batch in micro_batches][-1]

    monkeypatch.setattr(loop.Loop, "_backward", each_alone)
    session = session_of(base, data, **settings)
    assert one(check_learning(session, seen_of(session), steps=False), "accumulation").level == "refuse"


# --- 6: packing -------------------------------------------------------------------------------------------------------


def test_packed_documents_that_see_each_other_are_refused(base, data, monkeypatch):
    def causal(documents: torch.Tensor, attention: PackedAttention) -> torch.Tensor:
        width = documents.shape[1]
        return torch.full((width, width), torch.finfo(attention.dtype).min).triu(1)[None, None]

    session = session_of(base, data, packing=True)
    assert one(check_packing(session, seen_of(session)), "packing").level == "fine"
    monkeypatch.setattr(batches, "block_mask", causal)
    found = one(check_packing(session, seen_of(session)), "packing")
    assert found.level == "refuse"
    assert "see each other" in found.message


# --- 11: gradients and movement ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_that_no_gradient_reaches_are_refused_by_name(base, data, checkpointing):
    session = session_of(base, data, checkpointing=checkpointing)
    module = lora_modules(session.model)["model.layers.1.mlp.up_proj"]
    module.register_forward_hook(lambda adapter, inputs, output: adapter.base(*inputs))
    found = one(check_learning(session, seen_of(session), steps=True), "first steps")
    assert found.level == "refuse"
    assert "model.layers.1.mlp.up_proj.lora_A" in found.message


def test_recomputed_blocks_without_gradient_are_refused(base, data, monkeypatch):
    """Reentrant checkpointing over a frozen embedding gives adapters no gradient, without an error."""
    from torch.utils.checkpoint import checkpoint

    session = session_of(base, data)
    block = session.model.model.layers[0]
    sound = block.forward
    block.forward = lambda hidden, **options: checkpoint(lambda h: sound(h, **options), hidden, use_reentrant=True)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        found = one(check_learning(session, seen_of(session), steps=True), "first steps")
    assert found.level == "refuse"
    assert "14 of 28 trained parameters got no gradient" in found.message


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_tensor_that_the_optimizer_leaves_out_is_refused_by_name(base, data, monkeypatch, checkpointing):
    sound, left_out = loop.make_optimizer, "model.layers.0.self_attn.v_proj.lora_B"
    monkeypatch.setattr(
        loop,
        "make_optimizer",
        lambda name, parameters, **rest: sound(name, {k: v for k, v in parameters.items() if k != left_out}, **rest),
    )
    session = session_of(base, data, checkpointing=checkpointing)
    found = one(check_learning(session, seen_of(session), steps=True), "movement")
    assert (found.level, found.figures["unmoved"]) == ("refuse", [left_out])


def test_a_gradient_that_is_always_zero_is_a_warning(base, data):
    session = session_of(base, data)
    adapter = lora_modules(session.model)["model.layers.1.mlp.up_proj"]
    adapter.register_forward_hook(lambda adapter, inputs, output: adapter.base(*inputs) + 0 * output)
    found = one(check_learning(session, seen_of(session), steps=True), "movement")
    assert found.level == "warn"
    assert set(found.figures["without_gradient"]) == {
        "model.layers.1.mlp.up_proj.lora_A", "model.layers.1.mlp.up_proj.lora_B",
    }  # fmt: skip


def test_a_loss_that_is_not_a_number_is_refused(base, data):
    session = session_of(base, data)
    with torch.no_grad():
        session.model.model.embed_tokens.weight[7:200] = float("nan")
    found = check_learning(session, seen_of(session), steps=True)
    assert found[-1].level == "refuse"
    assert "the loss is nan" in found[-1].message


# --- 12: what is reached ----------------------------------------------------------------------------------------------


def test_experts_that_stay_as_they_are_are_a_warning_with_their_share(data, tmp_path):
    session = session_of(tiny_folder(tmp_path, "mixtral"), data)
    found = check_coverage(session)
    assert found.level == "warn"
    assert found.figures["expert_share"] > 0.5
    assert check_coverage(session_of(tmp_path / "mixtral", data, method="full")).level == "fine"


def test_a_target_that_is_not_there_is_refused_as_misuse(base, data):
    with pytest.raises(TargetError, match="no_proj"):
        examined(base, data, targets="no_proj")


# --- 15: vanishing updates --------------------------------------------------------------------------------------------


def test_updates_that_vanish_in_bfloat16_are_a_warning_with_their_share(base, data):
    wide = session_of(base, data, method="full", learning_rate=1e-5)
    found = one(check_learning(wide, seen_of(wide), steps=True), "updates")
    assert found.level == "fine"
    assert found.figures["vanished"] < 0.01
    expected = found.figures["vanished_in_bfloat16"]
    narrow = session_of(base, data, method="full", learning_rate=1e-5)
    narrow.model.to(torch.bfloat16)
    found = one(check_learning(narrow, seen_of(narrow), steps=True), "updates")
    assert found.level == "warn"
    assert found.figures["vanished"] > 0.5
    assert found.figures["vanished"] == pytest.approx(expected, abs=0.05)
    assert f"{found.figures['vanished']:.1%}" in found.message


def test_a_learning_rate_below_every_weights_resolution_is_a_warning(base, data):
    session = session_of(base, data, learning_rate=1e-12)
    found = one(check_learning(session, seen_of(session), steps=True), "movement")
    assert found.level == "warn"
    assert all("lora_A" in name for name in found.figures["too_small"])


# --- rows -------------------------------------------------------------------------------------------------------------


def test_lost_and_cut_answers_are_counted(base, data):
    found = one(examined(base, data, max_length=60).findings, "truncation")
    assert found.level == "warn"
    assert found.figures["lost_answers"] + found.figures["cut_answers"] > 0
    assert "raise max_length" in found.remedy


def test_rows_that_are_all_cut_before_their_answers_are_refused(base, data):
    found = examined(base, data, max_length=4)
    assert found.refused
    assert "raise max_length" in found.findings[0].message


def test_rows_left_out_are_told_with_the_reason(base, tmp_path):
    rows = [chat(row) for row in range(8)] + [{"messages": [{"role": "user", "content": "and?"}]}]
    found = one(examined(base, write_rows(tmp_path / "rows.jsonl", rows), valid_fraction=0).findings, "rows")
    assert found.level == "warn"
    assert found.figures["dropped"] == {"the conversation has no assistant turn": 1}


def test_duplicates_are_counted_by_tokens_and_by_text(base, tmp_path):
    loud = json.loads(json.dumps(chat(2)).replace("say", "  SAY "))
    rows = [*(chat(row) for row in range(8)), chat(0), chat(0), loud]
    found = one(examined(base, write_rows(tmp_path / "rows.jsonl", rows), valid_fraction=0).findings, "duplicates")
    assert (found.level, found.figures["same_tokens"], found.figures["same_text"]) == ("warn", 2, 3)


def test_rows_held_out_that_are_trained_on_are_counted(base, tmp_path):
    folder = tmp_path / "data"
    loud = json.loads(json.dumps(chat(3)).replace("say", "Say"))
    write_rows(folder / "train.jsonl", [chat(row) for row in range(8)])
    write_rows(folder / "valid.jsonl", [chat(1), chat(20), loud])
    write_rows(folder / "test.jsonl", [chat(2), chat(21)])
    found = examined(base, folder).findings
    valid, test = one(found, "valid rows"), one(found, "test rows")
    assert (valid.level, valid.figures) == ("warn", {"rows": 3, "same_tokens": 1, "same_text": 2})
    assert (test.level, test.figures) == ("warn", {"rows": 2, "same_tokens": 1, "same_text": 1})


# --- disk and memory --------------------------------------------------------------------------------------------------


def test_too_little_disk_is_refused_with_the_bytes_that_are_missing(base, data, tmp_path, monkeypatch):
    session = session_of(base, data)
    needed = check_disk(session, tmp_path / "run").figures["needed_bytes"]
    assert needed == (3 * 4 + 3 * 12) * session.trained.parameters + cached_bytes(session)
    usage = namedtuple("usage", "total used free")
    for free, level in ((needed - 4096, "refuse"), (needed + 1, "warn"), (2 * needed, "fine")):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: usage(0, 0, free))
        found = check_disk(session, tmp_path / "run")
        assert found.level == level
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, needed - 4096))
    assert "free 4.0 KiB more" in check_disk(session, tmp_path / "run").remedy
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_bytes(b"0" * 4096)  # what a resumed run holds already is not needed again
    assert check_disk(session, tmp_path / "run").level == "warn"


@pytest.mark.parametrize(("method", "format"), [("full", None), ("qat", "int4-g32")])
def test_the_disk_foreseen_is_that_of_what_is_written(base, data, tmp_path, method, format):
    session = session_of(base, data, method=method, format=format)
    session.base.exporter(session.config.method)(tmp_path / "export")
    written = sum(file.stat().st_size for file in (tmp_path / "export").glob("*.safetensors"))
    assert disk.exported_bytes(session) == pytest.approx(written, rel=0.05)


def test_a_step_that_fills_the_memory_is_a_warning(base, data, monkeypatch):
    session = session_of(base, data)
    monkeypatch.setattr(learning, "resident_bytes", lambda: 1 << 20)
    monkeypatch.setattr(learning, "this_machine", lambda: namedtuple("machine", "available_bytes")(1 << 20))
    found = one(check_learning(session, seen_of(session), steps=True), "memory")
    assert found.level == "warn"
    assert "checkpointing" in found.remedy


def test_a_step_that_does_not_fit_is_refused(base, data, monkeypatch):
    def full(self, places):
        raise torch.OutOfMemoryError("CUDA out of memory")

    session = session_of(base, data)
    monkeypatch.setattr(trials.Trial, "take_steps", full)
    found = one(check_learning(session, seen_of(session), steps=True), "memory")
    assert found.level == "refuse"
    assert "lower batch_size" in found.remedy


def test_a_trial_is_made_of_the_loops_own_steps():
    assert issubclass(trials.Trial, loop.Loop)
    assert trials.Trial._backward is loop.Loop._backward
    assert trials.Trial._train_step is loop.Loop._train_step

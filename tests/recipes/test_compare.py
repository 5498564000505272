"""Comparison: every figure against an oracle, verdicts on planted differences, requests that are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from strop.data.records import read_records
from strop.data.samples import prepare
from strop.errors import DataError, MissingInputError, ModelError, UsageError
from strop.evaluation.side_by_side import Place, Settings, SideBySide
from strop.files.peft_adapter import BaseRecord, save_adapter
from strop.layers.surgery import attach_lora
from strop.models import load
from strop.recipes.compare import compare, model_names
from strop.scratch import Scratch
from tests.evaluation.common import learned_by_heart
from tests.tiny import tiny_chat_file, tiny_config, tiny_folder, tiny_model, tiny_tokenizer

ROWS = 16


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows.jsonl and three models: base (random), tuned (knows half of the rows), near (plus noise)."""
    folder = tmp_path_factory.mktemp("compare")
    records = read_records(tiny_chat_file(folder / "rows.jsonl", rows=ROWS))
    samples = list(prepare(records, tiny_tokenizer(), max_length=64))
    save(tiny_model("llama"), folder / "base")
    tuned = learned_by_heart(samples[: ROWS // 2])
    save(tuned, folder / "tuned")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    save(tuned, folder / "near")
    return folder


@pytest.fixture(scope="module")
def compared(place: Path):
    return compare(
        [place / "tuned", place / "base", place / "near"],
        place / "rows.jsonl",
        task="exact-match",
        speed=False,
        batch_size=5,
        examples=3,
    )


def opened(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def samples_of(place: Path):
    return list(prepare(read_records(place / "rows.jsonl"), tiny_tokenizer(), max_length=256))


def logits_of(model, sample) -> torch.Tensor:
    """Logits that predict the supervised tokens [tokens, vocabulary], float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0].double()
    return logits[torch.tensor([t - 1 for t in range(1, len(sample)) if sample.labels[t] != -100])]


@pytest.mark.parametrize("name", ["tuned", "base", "near"])
def test_loss_and_perplexity_are_those_of_transformers_own_loss(compared, place: Path, name: str):
    model, total, tokens = opened(place / name), 0.0, 0
    for sample in samples_of(place):
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels])).loss
        total += float(loss) * sample.supervised
        tokens += sample.supervised
    assert compared.supervised_tokens == tokens
    assert compared.model(name).loss.estimate == pytest.approx(total / tokens, rel=1e-4)
    shown = {model["name"]: model for model in compared.to_dict()["models"]}[name]
    assert shown["perplexity"]["estimate"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert shown["perplexity"]["low"] < shown["perplexity"]["estimate"] < shown["perplexity"]["high"]


@pytest.mark.parametrize("name", ["base", "near"])
def test_divergence_and_agreement_are_those_worked_by_hand(compared, place: Path, name: str):
    reference, model = opened(place / "tuned"), opened(place / name)
    kls, same = [], []
    for sample in samples_of(place):
        expected, given = (logits_of(m, sample).log_softmax(dim=-1) for m in (reference, model))
        kls += (expected.exp() * (expected - given)).sum(dim=-1).tolist()
        same += (expected.argmax(dim=-1) == given.argmax(dim=-1)).tolist()
    result = compared.model(name)
    assert result.kl.estimate == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert result.kl_99th == pytest.approx(sorted(kls)[math.ceil(0.99 * len(kls)) - 1], rel=1e-3)
    assert result.top1_agreement.estimate == pytest.approx(sum(same) / len(same))
    assert result.kl_rows == ROWS


def test_scores_count_the_answers_that_generation_would_write(compared):
    assert compared.model("tuned").score.estimate == 0.5
    assert compared.model("base").score.estimate == 0.0
    assert compared.row_right["tuned"] == [True] * (ROWS // 2) + [False] * (ROWS // 2)


def test_a_planted_difference_gets_its_verdict_from_the_paired_test(compared):
    base = compared.model("base")
    assert base.score_difference.estimate == -0.5
    assert base.score_difference.p_value == pytest.approx(2 / 2**8)
    assert base.verdict == "worse"
    assert base.loss_difference.verdict == "worse"
    assert base.loss_difference.estimate == pytest.approx(base.loss.estimate - compared.reference.loss.estimate)


def test_bytes_are_those_of_the_weight_files_and_memory_holds_at_least_the_weights(compared, place: Path):
    for result in compared.models:
        assert result.weights_bytes == (place / result.name / "model.safetensors").stat().st_size
        assert result.adapter_bytes is None
        assert result.format == "float32"
        assert result.peak_bytes > 0


def test_error_by_layer_is_the_relative_squared_difference_of_the_weights(compared, place: Path):
    before = dict(opened(place / "tuned").named_modules())
    after = dict(opened(place / "near").named_modules())
    errors = compared.model("near").layer_errors
    assert len(errors) == 2 * 7
    for name, error in errors.items():
        expected, given = before[name].weight.detach().double(), after[name].weight.detach().double()
        assert error == pytest.approx(float((given - expected).square().sum() / expected.square().sum()), rel=1e-4)


def test_flipped_answers_stand_side_by_side_and_all_are_counted(compared):
    flips = compared.model("base").flips
    assert (flips.lost, flips.gained) == (ROWS // 2, 0)
    assert len(flips.examples) == 3
    for flip in flips.examples:
        assert flip.kind == "lost"
        assert flip.reference_answer == flip.expected
        assert flip.model_answer != flip.expected
        assert flip.prompt.startswith("say ")
    assert [flip.row for flip in flips.examples] == [1, 2, 3]


def test_rows_that_the_reference_gets_wrong_show_what_it_wrote(place: Path):
    comparison = compare(
        [place / "base", place / "tuned"], place / "rows.jsonl", task="exact-match", speed=False, examples=2
    )
    flips = comparison.model("tuned").flips
    assert (flips.lost, flips.gained) == (0, ROWS // 2)
    assert [flip.kind for flip in flips.examples] == ["gained", "gained"]
    for flip in flips.examples:
        assert flip.model_answer == flip.expected != flip.reference_answer
    assert comparison.model("tuned").verdict == "better"
    assert comparison.headline().startswith("Better than base: tuned (+50.0 points).")


def test_a_model_against_itself_differs_in_nothing(place: Path):
    comparison = compare([place / "tuned", place / "tuned"], place / "rows.jsonl", task="exact-match", speed=False)
    first, again = comparison.models
    assert (first.name, again.name) == ("tuned", "tuned (2)")
    assert (again.kl.estimate, again.kl_99th, again.top1_agreement.estimate) == (0, 0, 1)
    assert (again.loss_difference.estimate, again.score_difference.estimate) == (0, 0)
    assert again.verdict == "undecided"
    assert set(again.layer_errors.values()) == {0.0}
    assert (again.flips.lost, again.flips.gained) == (0, 0)
    assert "no difference was measured" in comparison.verdicts()[0]


def test_where_no_model_answers_a_row_the_loss_decides_and_it_is_said(place: Path, tmp_path: Path):
    save(tiny_model("llama", seed=5), tmp_path / "other")
    comparison = compare([place / "base", tmp_path / "other"], place / "rows.jsonl", task="exact-match", speed=False)
    other = comparison.model("other")
    assert (comparison.reference.score.estimate, other.score.estimate) == (0, 0)
    assert other.judged_by == "loss"
    assert other.difference is other.loss_difference
    assert "No model answers a single row exactly: the verdicts rest on the loss." in comparison.notes
    assert "(loss " in comparison.verdicts()[0]


def test_without_a_task_the_loss_decides_and_texts_may_be_scored(place: Path, tmp_path: Path):
    text = tmp_path / "rows.jsonl"
    lines = ["the quick brown fox jumps over the lazy dog " * count for count in range(1, 9)]
    text.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
    comparison = compare([place / "base", place / "tuned"], text, speed=False, max_length=40)
    tuned = comparison.model("tuned")
    assert tuned.score is None
    assert tuned.flips is None
    assert tuned.difference is tuned.loss_difference
    assert comparison.rows_scored == 8  # long texts make several windows, and stay one row
    assert tuned.loss_difference.rows == 8
    assert len(comparison.row_loss["tuned"]) == 8
    assert "exact %" not in comparison.headers()


def test_speed_is_measured_when_asked_for(place: Path):
    comparison = compare([place / "base"], place / "rows.jsonl", max_rows=2)
    assert comparison.reference.speed.decode.median > 0
    assert "decode tok/s" in comparison.headers()
    assert comparison.headline() == "base stands alone: there is nothing to compare it with."


def test_the_dictionary_is_json_without_nan_and_the_table_has_a_cell_for_each_header(compared):
    text = json.dumps(compared.to_dict(), allow_nan=False)
    back = json.loads(text)
    assert [model["name"] for model in back["models"]] == ["tuned", "base", "near"]
    assert back["reference"] == "tuned"
    assert back["models"][1]["verdict"] == "worse"
    assert back["models"][0]["kl"] is None
    for row in compared.rows():
        assert len(row) == len(compared.headers())
    assert len(compared.verdicts()) == 2
    assert compared.verdicts()[0].startswith("base against tuned: worse (exact match -50.0 points, 95% interval ")


def test_the_same_request_gives_the_same_figures(compared, place: Path):
    again = compare(
        [place / "tuned", place / "base", place / "near"],
        place / "rows.jsonl",
        task="exact-match",
        speed=False,
        batch_size=5,
        examples=3,
    )
    drop = {"peak_bytes"}
    assert [{k: v for k, v in m.items() if k not in drop} for m in again.to_dict()["models"]] == [
        {k: v for k, v in m.items() if k not in drop} for m in compared.to_dict()["models"]
    ]


def test_rows_are_drawn_by_the_seed(place: Path):
    def rows(seed: int) -> str:
        return compare([place / "base"], place / "rows.jsonl", max_rows=6, seed=seed, speed=False).rows_sha256

    assert rows(0) == rows(0) != rows(1)


def test_a_folder_gives_its_test_split_and_nothing_else(place: Path, tmp_path: Path):
    tiny_chat_file(tmp_path / "train.jsonl", rows=9)
    with pytest.raises(DataError, match="no test split"):
        compare([place / "base"], tmp_path, speed=False)
    tiny_chat_file(tmp_path / "test.jsonl", rows=4)
    assert compare([place / "base"], tmp_path, speed=False).rows_scored == 4


def test_rows_that_do_not_fit_are_left_out_whole_and_said(place: Path):
    lengths = [len(sample) for sample in samples_of(place)]
    limit = sorted(lengths)[len(lengths) // 2]
    comparison = compare([place / "base"], place / "rows.jsonl", task="exact-match", max_length=limit, speed=False)
    left_out = sum(length > limit for length in lengths)
    assert comparison.rows_scored == ROWS - left_out
    assert comparison.notes[0] == f"{left_out} rows are longer than {limit} tokens and were left out."
    with pytest.raises(DataError, match=r"no row fits 3 tokens \(the longest has"):
        compare([place / "base"], place / "rows.jsonl", task="exact-match", max_length=3, speed=False)


def test_a_small_temporary_file_narrows_the_divergence_and_says_so(place: Path):
    longest = max(samples_of(place), key=len)
    comparison = compare(
        [place / "base", place / "near"],
        place / "rows.jsonl",
        speed=False,
        batch_size=1,
        scratch_bytes=longest.supervised * 304 * 4 * 3,
    )
    near = comparison.model("near")
    assert 0 < near.kl_rows < ROWS
    assert near.layer_errors is None
    assert any("KL divergence and agreement rest on" in note for note in comparison.notes)
    assert any("no error by layer" in note for note in comparison.notes)


def test_an_adapter_counts_with_its_base(place: Path, tmp_path: Path):
    base = load(place / "base")
    attach_lora(base.model, "all-linear", rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    save_adapter(base.model, tmp_path / "adapter", base=BaseRecord(str(place / "base")))
    comparison = compare([place / "base", tmp_path / "adapter"], place / "rows.jsonl", speed=False)
    adapter = comparison.model("adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert adapter.adapter_bytes == size
    assert adapter.weights_bytes == comparison.reference.weights_bytes + size
    assert adapter.format == "float32 + lora r2"
    assert adapter.kl.estimate == pytest.approx(0, abs=1e-9)  # a fresh adapter changes nothing


def test_a_page_is_written_beside_the_result(place: Path, tmp_path: Path):
    compare(
        [place / "base", place / "near"], place / "rows.jsonl", speed=False, max_rows=4, page=tmp_path / "a" / "p.html"
    )
    assert "near against base" in (tmp_path / "a" / "p.html").read_text(encoding="utf-8")


def test_another_chat_template_is_noted_and_another_vocabulary_refused(place: Path, tmp_path: Path):
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("assistant", "model")
    tiny_folder(tmp_path, "qwen3", tokenizer=other)
    comparison = compare([place / "base", tmp_path / "qwen3"], place / "rows.jsonl", speed=False, max_rows=4)
    assert comparison.notes == ("qwen3 brings another chat template than base; all were scored with that of base.",)
    other.add_tokens(["<extra>"])
    tiny_folder(tmp_path, "gemma", tokenizer=other, vocab_size=305)
    with pytest.raises(ModelError, match=r"gemma: its tokenizer has 305 tokens, base's 304.*'<extra>'"):
        compare([place / "base", tmp_path / "gemma"], place / "rows.jsonl", speed=False)


def test_a_context_that_is_too_short_is_refused_with_what_to_do(place: Path, tmp_path: Path):
    tiny_folder(tmp_path, "gpt2", max_position_embeddings=16)
    with pytest.raises(ModelError, match=r"gpt2: its context is 16 tokens.*max_length=16"):
        compare([place / "base", tmp_path / "gpt2"], place / "rows.jsonl", speed=False)


def test_requests_that_cannot_be_carried_out_are_refused_before_work(place: Path, tmp_path: Path):
    rows = place / "rows.jsonl"
    with pytest.raises(UsageError, match=r"unknown task 'exact_match' \(did you mean 'exact-match'\?\)"):
        compare([place / "base"], rows, task="exact_match")
    with pytest.raises(UsageError, match="at least one model"):
        compare([], rows)
    with pytest.raises(UsageError, match="one for each, all different"):
        compare([place / "base", place / "near"], rows, names=["a", "a"])
    with pytest.raises(UsageError, match="max_rows 0"):
        compare([place / "base"], rows, max_rows=0)
    with pytest.raises(MissingInputError):
        compare([place / "base", place / "nowhere"], rows)
    with pytest.raises(MissingInputError):
        compare([place / "base"], place / "nothing.jsonl")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a plain text"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"row 1 .*plain text has no answer"):
        compare([place / "base"], text, task="exact-match")
    empty = tmp_path / "empty"
    empty.mkdir()
    tiny_config("llama").save_pretrained(empty)
    with pytest.raises(ModelError, match="weights"):
        compare([place / "base", empty], rows)


def test_names_are_the_folders_told_apart_where_they_are_the_same():
    assert model_names(["runs/full/best", "runs/lora/last", "base", "org/name"]) == ["full", "lora", "base", "name"]
    assert model_names(["a/x/int4", "b/x/int4", "c/int8"]) == ["a/x/int4", "b/x/int4", "int8"]
    assert model_names(["one/int4", "two/int4"]) == ["one/int4", "two/int4"]
    assert model_names(["same", "same", "same"]) == ["same", "same (2)", "same (3)"]
    assert model_names(["a", "b"], ["first", "second"]) == ["first", "second"]


def test_errors_by_layer_are_left_out_where_they_are_not_wanted(place: Path) -> None:
    records = read_records(place / "rows.jsonl")
    with Scratch() as scratch:
        run = SideBySide(records, Settings(speed=False, layer_errors=False), scratch)
        run.measure(Place("tuned", str(place / "tuned"), 0, None))
        near = run.measure(Place("near", str(place / "near"), 0, None))
    assert near.layer_errors is None
    assert near.kl is not None

"""Chat and predict: answers against transformers' own greedy generation, files that are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from strop.data.records import read_records
from strop.data.samples import prepare
from strop.errors import DataError, MissingInputError, ModelError, UsageError
from strop.files.peft_adapter import BaseRecord, save_adapter
from strop.layers.surgery import attach_lora, lora_modules
from strop.models import OpenedModel, load
from strop.recipes.generate import Chat, answer, predict
from tests.evaluation.common import learned_by_heart
from tests.tiny import END, tiny_chat_file, tiny_folder, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows.jsonl (8 rows) and a model that knows them by heart."""
    folder = tmp_path_factory.mktemp("generate")
    records = read_records(tiny_chat_file(folder / "rows.jsonl"))
    learned_by_heart(list(prepare(records, tiny_tokenizer(), max_length=64)), steps=70).save_pretrained(
        folder / "model"
    )
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def opened(place: Path) -> OpenedModel:
    return load(place / "model")


def by_transformers(folder: Path, turns: list[dict[str, str]], *, max_new_tokens: int = 20) -> str:
    """The same through transformers alone: its chat template, its greedy generation, its decoding."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tiny_tokenizer()
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    stops = [tokenizer.convert_tokens_to_ids(END), tokenizer.eos_token_id]
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=0,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_answer_is_that_of_transformers_own_greedy_generation(opened: OpenedModel, place: Path):
    for question in ("say red 0", "say blue 2", "the lazy dog"):
        turns = [{"role": "user", "content": question}]
        expected = by_transformers(place / "model", turns)
        assert answer(opened, question, max_new_tokens=20) == expected
        assert answer(opened, turns, max_new_tokens=20) == expected
    assert answer(opened, "say red 0") == "red 0"


def test_the_whole_conversation_is_asked(opened: OpenedModel, place: Path):
    turns = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "say red 0"},
        {"role": "assistant", "content": "red 0"},
        {"role": "user", "content": "say pink 6"},
    ]
    assert answer(opened, turns, max_new_tokens=12) == by_transformers(place / "model", turns, max_new_tokens=12)


def test_a_chat_remembers_its_turns_and_a_failed_one_leaves_it_as_it_was(opened: OpenedModel, place: Path):
    chat = Chat(opened, system="be short", max_new_tokens=8)
    first = chat.ask("say red 0")
    second = chat.ask("say blue 2")
    assert [(turn.role, turn.content) for turn in chat.turns] == [
        ("system", "be short"),
        ("user", "say red 0"),
        ("assistant", first),
        ("user", "say blue 2"),
        ("assistant", second),
    ]
    turns = [{"role": turn.role, "content": turn.content} for turn in chat.turns[:-1]]
    assert second == by_transformers(place / "model", turns, max_new_tokens=8)
    with pytest.raises(UsageError, match="context"):
        chat.ask("fox " * 300)
    assert len(chat.turns) == 5
    chat.forget()
    assert [turn.role for turn in chat.turns] == ["system"]


def test_streamed_pieces_are_the_answer(opened: OpenedModel):
    pieces: list[str] = []
    assert answer(opened, "say green 1", stream=pieces.append) == "".join(pieces) == "green 1"
    assert len(pieces) > 1


def test_temperature_draws_by_its_seed(opened: OpenedModel):
    drawn = [answer(opened, "the dog", temperature=3.0, seed=seed, max_new_tokens=12) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("asked", [[], [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])
def test_a_conversation_that_asks_nothing_is_refused(opened: OpenedModel, asked: list):
    with pytest.raises(UsageError, match="nothing is asked"):
        answer(opened, asked)


def test_predict_writes_a_line_per_row_with_what_was_asked_answered_and_expected(place: Path, tmp_path: Path):
    told: list[float] = []

    class Listener:
        def note(self, text): ...
        def start(self, title, total, unit):
            told.append(total)

        def advance(self, done, **fields):
            told.append(done)

        def finish(self):
            told.append(-1)

    target = tmp_path / "new" / "answers.jsonl"
    assert predict(place / "model", place / "rows.jsonl", target, batch_size=3, reporter=Listener()) == target
    lines = read(target)
    assert [line["row"] for line in lines] == list(range(1, 9))
    assert all(line["answer"] == line["expected"] for line in lines)  # the model knows them by heart
    assert lines[2] == {
        "row": 3,
        "messages": [{"role": "user", "content": "say blue 2"}],
        "answer": "blue 2",
        "expected": "blue 2",
    }
    assert (told[0], told[-2], told[-1]) == (8, 8, -1)
    assert told[1:-1] == sorted(set(told[1:-1]))  # rows are told of as they end


def test_predict_answers_rows_with_history_without_an_answer_and_texts(place: Path, tmp_path: Path):
    rows = [
        {"messages": [{"role": "user", "content": "say red 0"}]},
        {
            "messages": [
                {"role": "user", "content": "say red 0"},
                {"role": "assistant", "content": "red 0"},
                {"role": "user", "content": "say blue 2"},
                {"role": "assistant", "content": "blue 2"},
            ]
        },
        {"text": "the quick brown"},
    ]
    first, second, third = read(predict(place / "model", rows, tmp_path / "answers.jsonl", max_new_tokens=6))
    assert first["answer"] == "red 0"
    assert "expected" not in first
    assert [turn["role"] for turn in second["messages"]] == ["user", "assistant", "user"]
    assert second["expected"] == "blue 2"
    assert second["answer"] == by_transformers(place / "model", second["messages"], max_new_tokens=6)
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([tokenizer("the quick brown")["input_ids"]])
    output = load(place / "model").model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=[tokenizer.convert_tokens_to_ids(END), tokenizer.eos_token_id],
        pad_token_id=0,
    )
    assert third["prompt"] == "the quick brown"
    assert third["answer"] == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_predict_takes_the_first_rows_and_an_open_model(opened: OpenedModel, place: Path, tmp_path: Path):
    lines = read(predict(opened, place / "rows.jsonl", tmp_path / "answers.jsonl", max_rows=2))
    assert [line["answer"] for line in lines] == ["red 0", "green 1"]


def test_a_quantized_model_and_an_adapter_answer_like_the_layers_they_hold(place: Path, tmp_path: Path):
    rows = place / "rows.jsonl"
    eight = load(place / "model", "int8")
    lines = read(predict(eight, rows, tmp_path / "int8.jsonl"))
    assert sum(line["answer"] == line["expected"] for line in lines) >= 7  # int8 loses next to nothing

    adapted = load(place / "model")
    attach_lora(adapted.model, "all-linear", rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in lora_modules(adapted.model).values():
            module.lora_B += 0.3 * torch.randn(module.lora_B.shape, generator=generator)
    save_adapter(adapted.model, tmp_path / "adapter", base=BaseRecord(str(place / "model")))
    from_folder = read(predict(tmp_path / "adapter", rows, tmp_path / "adapter.jsonl", max_new_tokens=8))
    in_memory = read(predict(adapted, rows, tmp_path / "memory.jsonl", max_new_tokens=8))
    base = read(predict(place / "model", rows, tmp_path / "base.jsonl", max_new_tokens=8))
    assert from_folder == in_memory
    assert from_folder != base


def test_answers_appear_whole_or_not_at_all(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "answers.jsonl"
    target.write_text("what stood here\n", encoding="utf-8")
    long = [{"messages": [{"role": "user", "content": "fox " * 300}]}]
    with pytest.raises(UsageError, match="context"):
        predict(place / "model", long, target)
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        predict(place / "model", place / "rows.jsonl", target, max_rows=1, max_new_tokens=1)
    assert target.read_text(encoding="utf-8") == "what stood here\n"
    assert list(tmp_path.iterdir()) == [target]


def test_requests_that_cannot_be_carried_out_are_refused(place: Path, tmp_path: Path):
    rows = place / "rows.jsonl"
    with pytest.raises(UsageError, match="is a folder"):
        predict(place / "model", rows, tmp_path)
    with pytest.raises(UsageError, match="max_rows is 0"):
        predict(place / "model", rows, tmp_path / "a.jsonl", max_rows=0)
    with pytest.raises(MissingInputError):
        predict(place / "nowhere", rows, tmp_path / "a.jsonl")
    with pytest.raises(MissingInputError):
        predict(place / "model", place / "nothing.jsonl", tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="row 1: asks nothing"):
        predict(place / "model", [{"messages": [{"role": "assistant", "content": "b"}]}], tmp_path / "a.jsonl")
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="tokenizer"):
        predict(tmp_path / "bare", rows, tmp_path / "a.jsonl")
    plain = tiny_folder(tmp_path, "gemma", tokenizer=tiny_tokenizer(chat_template=False))
    with pytest.raises(DataError, match="no chat template"):
        predict(plain, rows, tmp_path / "a.jsonl")
    assert read(predict(plain, rows, tmp_path / "a.jsonl", max_rows=1, max_new_tokens=1, chat_template="chatml"))

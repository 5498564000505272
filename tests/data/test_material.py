"""Real files as they are: every one is read, or refused by name, and makes sound samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from strop.data.batches import BatchStream
from strop.data.records import read_data, read_records
from strop.data.samples import prepare
from strop.data.templates import prompt_ids, render
from strop.errors import DataError
from tests.tiny import tiny_tokenizer

COUNTS = {
    "lf_alpaca_en_demo.json": 999,
    "lf_v1_sft_demo.jsonl": 500,
    "lf_glaive_toolcall_en_demo.json": 300,
    "gsm8k_train.jsonl": 7_473,
    "banking77_train.csv": 10_003,
}

TEXTS = ("tinyshakespeare.txt", "tinystories_4M_lowercase.txt", "wikitext2_valid.txt")


@pytest.mark.parametrize("name", COUNTS)
def test_a_published_file_is_read_row_by_row(material: Path, name: str) -> None:
    records = read_records(material / "data" / name)
    assert len(records) == COUNTS[name]
    assert all(record.messages for record in records)
    tokenizer = tiny_tokenizer()
    chosen = records[:: len(records) // 20]
    prepared = prepare(chosen, tokenizer, max_length=100_000)
    assert len(prepared) == len(chosen)
    for record, sample in zip(chosen, prepared, strict=True):
        assert record.messages is not None
        answers = [message.content for message in record.messages if message.role == "assistant"]
        learned = [tokenizer.decode(sample.input_ids[start:end]) for start, end in sample.answers]
        assert learned == [f"{answer}<|im_end|>" for answer in answers]


@pytest.mark.parametrize("name", TEXTS)
def test_a_plain_text_is_read_to_the_last_character(material: Path, name: str) -> None:
    path = material / "data" / name
    records = read_records(path)
    whole, text = path.read_text(encoding="utf-8"), "".join(str(record.text) for record in records)
    assert whole.startswith(text)
    assert not whole[len(text) :].strip()
    assert len(records) > 100
    splits = read_data(path, seed=0, valid_fraction=0.1)
    assert len(splits.valid) == round(0.1 * len(records))


def test_the_first_tool_conversation_is_complete(material: Path) -> None:
    record = read_records(material / "data" / "lf_glaive_toolcall_en_demo.json")[0]
    assert record.messages is not None
    roles = [message.role for message in record.messages]
    assert roles[0] == "system"
    assert roles[1:] == ["user", "assistant", "user", "assistant", "tool", "assistant", "user", "assistant"]
    assert "search_recipes" in record.messages[0].content
    assert record.messages[4].content.startswith('{"name": "search_recipes"')
    tokenizer = tiny_tokenizer()
    sample = render(record, tokenizer)
    for turn, (start, _) in zip((2, 4, 6, 8), sample.answers, strict=True):
        assert prompt_ids(record.messages[:turn], tokenizer) == sample.input_ids[:start]


def test_preference_pairs_are_refused_by_name(material: Path) -> None:
    with pytest.raises(DataError, match=r"lf_dpo_en_demo\.json, each of the 300 rows: .*preference pairs .*not"):
        read_data(material / "data" / "lf_dpo_en_demo.json")


def test_real_conversations_pack_well(material: Path) -> None:
    records = read_records(material / "data" / "lf_alpaca_en_demo.json")[:300]
    prepared = prepare(records, tiny_tokenizer(), max_length=1024)
    stream = BatchStream(prepared, batch_size=4, packing=True, max_length=1024)
    assert prepared.report.tokens / (stream.rows_per_epoch * 1024) > 0.95


def test_a_real_model_has_documents_isolated(material: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from strop.data.packing import check_isolation, packed_attention

    folder = material / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    records = read_records(material / "data" / "lf_v1_sft_demo.jsonl")[:8]
    prepared = prepare(records, tokenizer, max_length=256, chat_template="plain")
    attention = packed_attention(model, 256)
    stream = BatchStream(prepared, batch_size=2, packing=True, max_length=256, attention=attention)
    check_isolation(model, stream.next_step()[0])


AS_THEY_ARE: dict[str, list[str]] = {
    "banking77_train.csv": ["--group-by-length"],
    "gsm8k_train.jsonl": ["--packing"],
    "lf_alpaca_en_demo.json": ["--packing"],
    "lf_v1_sft_demo.jsonl": ["--train-on", "custom"],
    "lf_glaive_toolcall_en_demo.json": ["--train-on", "last", "--max-length", "2048"],
    "tinyshakespeare.txt": ["--method", "full"],
}


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_published_files_are_tuned_on_as_they_are(
    material: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of the documentation, with a tiny model."""
    from typer.testing import CliRunner

    from strop.app.cli import app
    from tests.tiny import tiny_folder

    monkeypatch.chdir(tmp_path)
    base = tiny_folder(tmp_path, "llama", max_position_embeddings=2048)
    command = ["tune", str(base), "--data", str(material / "data" / name), "--max-steps", "2", "--batch-size", "2"]
    length = [] if "--max-length" in AS_THEY_ARE[name] else ["--max-length", "256"]
    result = CliRunner().invoke(app, [*command, "-o", "run", *length, *AS_THEY_ARE[name]])
    assert result.exit_code == 0, result.output
    assert "2 steps" in result.stdout
    assert "are learned" in result.stderr

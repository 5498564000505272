"""Every malformed input is refused with its place and the way out, or accepted with an account."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from strop.data import readers
from strop.data.records import read_data
from strop.data.samples import SampleSet, prepare
from strop.errors import DataError, MissingInputError, StropError
from strop.memory import PeakMemory, release_unused_memory
from tests.fresh import in_fresh_process
from tests.malformed.corpus import CASES, GOOD, QA, Accepted, Case, Refused, jsonl
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def prepared(path: Path, *, max_length: int = 64) -> SampleSet:
    """What `tune` does with data, before it touches the model."""
    return prepare(read_data(path, valid_fraction=0).train, TOKENIZER, max_length=max_length)


def test_the_corpus_is_large_and_every_case_has_a_name_of_its_own() -> None:
    assert len(CASES) >= 100
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_each_malformed_input_gets_what_it_should(case: Case, tmp_path: Path) -> None:
    path = tmp_path / case.file
    path.write_bytes(case.content)
    expected = case.expected
    if isinstance(expected, Refused):
        with pytest.raises(StropError) as caught:
            prepared(path)
        assert type(caught.value) is expected.error
        message = str(caught.value)
        if "no token is left" not in message and "no answer is marked" not in message:
            assert message.startswith(str(path))
        missing = [part for part in expected.parts if part not in message]
        assert not missing, message
        assert len(message) < 1_000
        return
    assert isinstance(expected, Accepted)
    rows = prepared(path)
    assert len(rows) == expected.samples
    account = "\n".join(rows.report.lines())
    assert not [part for part in expected.parts if part not in account], account
    said = "\n".join(TOKENIZER.decode(sample.input_ids) for sample in rows)
    assert all(words in said for words in expected.words), said


# --- what is too large to stand in a table ----------------------------------------------------------------------------


def test_a_line_of_fifty_megabytes_of_text_is_cut_into_rows_in_little_memory(tmp_path: Path) -> None:
    """A sixth of it here, for time: the pieces that are read at once are the same."""
    path = tmp_path / "long.jsonl"
    words = "word " * 1_600_000
    path.write_text(json.dumps({"text": words}) + "\n", encoding="utf-8")
    records = read_data(path, valid_fraction=0).train
    assert "".join(str(record.text) for record in records) == words
    assert max(len(str(record.text)) for record in records) <= 1_000_000
    assert [record.ends for record in records] == [False] * (len(records) - 1) + [True]
    assert {record.row for record in records} == {1}


def peak_of_preparing(path: Path) -> int:
    """Bytes of memory, in a fresh process: what other tests left in the allocator counts for nothing."""
    release_unused_memory()
    with PeakMemory() as memory:
        prepared(path)
    return memory.peak_bytes


def test_a_turn_of_fifty_megabytes_is_read_as_far_as_it_can_matter(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    turns = [("user", "q"), ("assistant", "word " * 10_000_000), ("user", "r"), ("assistant", "b")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path.write_bytes(jsonl(QA, row))
    assert path.stat().st_size > 50_000_000
    assert in_fresh_process(peak_of_preparing, path) < 8 * path.stat().st_size
    rows = prepared(path)
    account = "\n".join(rows.report.lines())
    assert "1 conversations are longer than 1,000,000 characters (as in row 2) and were read that far" in account
    assert "1 answers lost, 1 without their end" in account
    short = {**row, "messages": [*row["messages"][:1], {"role": "assistant", "content": "word " * 1_000}]}
    path.write_bytes(jsonl(QA, short))
    assert [sample.input_ids for sample in prepared(path)] == [sample.input_ids for sample in rows]


def test_a_file_without_line_ends_is_refused_by_the_size_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MOST_ROW_BYTES", 1 << 20)
    path = tmp_path / "one-line.jsonl"
    path.write_bytes(GOOD + b'{"text": "' + b"a" * (2 << 20) + b'"}')
    with pytest.raises(DataError, match=r"line 2: more than 1 MiB without a line end; write one row a line"):
        prepared(path)
    table = tmp_path / "open.csv"
    table.write_bytes(b'text,label\n"' + b"a\n" * (1 << 20))
    with pytest.raises(DataError, match=r"line 2: not valid csv"):
        prepared(table)


def test_a_list_that_is_too_large_to_be_held_says_how_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MOST_JSON_BYTES", 1 << 16)
    path = tmp_path / "large.json.gz"
    path.write_bytes(gzip.compress(b"[" + b" " * (1 << 20) + b"\n" + b" " * (1 << 20) + b"]"))
    with pytest.raises(DataError, match=r"a \.json list is read whole; write it as \.jsonl"):
        prepared(path)


# --- parquet ----------------------------------------------------------------------------------------------------------


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_parquet_is_read_by_row_groups_and_its_rows_are_numbered(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"question": ["a", "b", "c", "d", None], "answer": ["x"] * 5})
    with pytest.raises(DataError, match=r"a\.parquet, record 5: field 'question' is null"):
        prepared(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [1, 2]}, "each of the 2 rows: field 'text' is a number"),
        ({"text": [b"\xff"]}, "record 1: field 'text' is bytes; it must be a text"),
        ({"text": [[1.5]]}, r"record 1: field 'text'\[0\] is a number"),
        ({"messages": [["user: hi"]]}, r"record 1: messages\[0\] is a text"),
        ({"body": ["a"]}, "record 1: fields body are not a known kind of row"),
        ({"text": []}, "there is no row"),
    ],
)
def test_parquet_of_wrong_types_is_refused_by_record_and_field(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepared(parquet(tmp_path / "a.parquet", columns))


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.99])
def test_cut_or_changed_parquet_is_refused_by_name(tmp_path: Path, kept: float) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": [f"row {row} " * 20 for row in range(50)]})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file"):
        prepared(path)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "outside.jsonl").write_bytes(GOOD)
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


@pytest.mark.parametrize("where", ["train.jsonl", "data/train-00000-of-00001.jsonl"])
@pytest.mark.parametrize("target", ["../outside.jsonl", "/etc/hostname"])
def test_a_link_that_leads_out_of_its_folder_is_refused(folder: Path, where: str, target: str) -> None:
    link = folder / where
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(Path(target) if target.startswith("/") else folder / target)
    with pytest.raises(DataError, match=r"leads out of .* through a link; refused; put the file itself there"):
        read_data(folder)


def test_a_linked_folder_of_shards_is_refused_and_a_link_inside_is_not(folder: Path) -> None:
    (folder / "real.bin").write_bytes(GOOD)
    (folder / "train.jsonl").symlink_to("real.bin")
    assert len(read_data(folder, valid_fraction=0).train) == 1
    (folder / "train.jsonl").unlink()
    outside = folder.parent / "elsewhere"
    outside.mkdir()
    (outside / "train-00000-of-00001.jsonl").write_bytes(GOOD)
    (folder / "data").symlink_to(outside)
    with pytest.raises(DataError, match="leads out of"):
        read_data(folder)


@pytest.mark.parametrize("name", ["../outside.jsonl", "/etc/hostname", "a/../../outside.jsonl", "https://x.y/z.csv"])
def test_a_card_that_names_files_elsewhere_is_refused(folder: Path, name: str) -> None:
    card = (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {json.dumps(name)}\n---\n"
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    with pytest.raises(DataError, match=r"refused|fetch it yourself"):
        read_data(folder)


@pytest.mark.parametrize("splits", [["../outside"], ["/etc"], ["a\0b"], ["a/../../b"]])
def test_an_index_that_names_splits_elsewhere_is_refused(folder: Path, splits: list[str]) -> None:
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}), encoding="utf-8")
    with pytest.raises(DataError, match="refused"):
        read_data(folder)


def test_a_saved_set_whose_state_names_files_elsewhere_is_refused(folder: Path) -> None:
    state = {"_data_files": [{"filename": "../outside.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(DataError, match="not a relative path below its folder"):
        read_data(folder)
    (folder / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"state\.json: not valid JSON"):
        read_data(folder)


def test_a_folder_without_train_an_empty_one_and_a_nul_are_refused(folder: Path) -> None:
    with pytest.raises((DataError, MissingInputError), match="set"):
        read_data(folder)
    (folder / "test.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match=r"no train file beside test\.jsonl; name it train\.jsonl"):
        read_data(folder)
    (folder / "train.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError, match=r"train\.jsonl: the file is empty"):
        read_data(folder)
    with pytest.raises(MissingInputError, match="cannot hold a NUL"):
        read_data("a\0b.jsonl")


def test_shards_are_read_in_order_and_a_missing_one_is_named(folder: Path) -> None:
    (folder / "data").mkdir()
    for shard in (2, 0, 1):
        row = {"question": f"q{shard}", "answer": "a"}
        (folder / "data" / f"train-0000{shard}-of-00003.jsonl.gz").write_bytes(gzip.compress(jsonl(row)))
    parquet(folder / "data" / "test-00000-of-00001.parquet", QA and {"question": ["q"], "answer": ["a"]})
    splits = read_data(folder, valid_fraction=0)
    assert [record.messages and record.messages[0].content for record in splits.train] == ["q0", "q1", "q2"]
    assert len(splits.test) == 1
    (folder / "data" / "train-00001-of-00003.jsonl.gz").unlink()
    with pytest.raises(DataError, match=r"the train split has 2 of its 3 shards; 00001 is missing; fetch the rest"):
        read_data(folder)


def test_no_pickle_and_no_script_of_a_folder_is_run(folder: Path) -> None:
    import pickle

    canary = folder.parent / "canary"

    class Payload:
        def __reduce__(self) -> Any:
            return open, (str(canary), "w")

    (folder / "train.pkl").write_bytes(pickle.dumps(Payload()))
    (folder / "set.py").write_text(f"open({str(canary)!r}, 'w')\n", encoding="utf-8")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- data_files: train.pkl\n  config_name: x\n---\n", encoding="utf-8"
    )
    with pytest.raises((DataError, MissingInputError)):
        read_data(folder)
    (folder / "train.jsonl").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(DataError, match=r"train\.jsonl, line 1"):
        read_data(folder)
    tag = f"---\nconfigs: !!python/object/apply:builtins.open ['{canary}', 'w']\n---\n"
    (folder / "train.jsonl").unlink()
    (folder / "README.md").write_text(tag, encoding="utf-8")
    with pytest.raises(DataError, match="not valid YAML"):
        read_data(folder)
    assert not canary.exists()

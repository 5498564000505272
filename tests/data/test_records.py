"""Every kind of file and row that people have, and what is said of those that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.data.pieces import text_pieces
from strop.data.records import Message, Record, read_data, read_records
from strop.errors import DataError, MissingInputError

QA = (Message("user", "q"), Message("assistant", "a"))


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Rows as the extension asks for them."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        raise ValueError(path)
    return path


SHAPES = {
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "message parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "a"}]},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "sharegpt roles": {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "alpaca without input": {"instruction": "q", "output": "a"},
    "prompt": {"prompt": "q", "completion": "a"},
    "prompt of messages": {
        "prompt": [{"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "a"}],
    },
    "question": {"question": "q", "answer": "a"},
    "category": {"text": "q", "category": "a"},
    "label": {"text": "q", "label": "a"},
    "null columns": {"messages": None, "text": "q", "category": None, "label": "a"},
    "other columns": {"id": 3, "question": "q", "answer": "a", "split": "x"},
}


@pytest.mark.parametrize("extension", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_recognised_by_its_fields(tmp_path: Path, shape: str, extension: str) -> None:
    path = write_rows(tmp_path / f"data{extension}", [SHAPES[shape]] * 2)
    first, second = read_records(path)
    assert first.messages == second.messages == QA
    assert (first.source, first.row, second.row) == (str(path), 1, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_in_memory_are_read_like_a_file(shape: str) -> None:
    assert [record.messages for record in read_records([SHAPES[shape]])] == [QA]
    assert read_data([SHAPES[shape]] * 10, valid_fraction=0.2).valid[0].messages == QA


@pytest.mark.parametrize("extension", [".csv", ".tsv"])
@pytest.mark.parametrize("shape", ["alpaca", "prompt", "question", "category", "label", "other columns"])
def test_a_table_is_recognised_by_its_header(tmp_path: Path, shape: str, extension: str) -> None:
    path = write_rows(tmp_path / f"data{extension}", [SHAPES[shape]])
    [record] = read_records(path)
    assert record.messages == QA
    assert record.row == 2


def test_a_csv_with_semicolons_and_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('question;answer\n"a;b";"c, ""d"""\n', encoding="utf-8-sig")
    [record] = read_records(path)
    assert record.messages == (Message("user", "a;b"), Message("assistant", 'c, "d"'))


def test_csv_cells_of_several_lines_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('question,answer\n"a\nb",c\nd,\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"data\.csv, line 4: field 'answer' is empty"):
        read_records(path)


def test_a_json_file_with_one_object_a_line_or_one_named_list_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("\n".join(json.dumps(SHAPES["alpaca"]) for _ in range(3)), encoding="utf-8")
    assert [record.row for record in read_records(path)] == [1, 2, 3]
    path.write_text(json.dumps({"data": [SHAPES["alpaca"]]}), encoding="utf-8")
    assert [record.messages for record in read_records(path)] == [QA]
    path.write_text(json.dumps(SHAPES["alpaca"]), encoding="utf-8")
    assert [record.messages for record in read_records(path)] == [QA]


def test_alpaca_takes_input_system_and_history() -> None:
    row = {"instruction": "q", "input": "x", "output": "a", "system": "s", "history": [["h", "i"]]}
    [record] = read_records([row])
    assert record.messages == (
        Message("system", "s"),
        Message("user", "h"),
        Message("assistant", "i"),
        Message("user", "q\nx"),
        Message("assistant", "a"),
    )


def test_sharegpt_keeps_calls_observations_and_the_list_of_functions_as_text() -> None:
    row = {
        "conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": "weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
            {"from": "observation", "value": '{"sky": "blue"}'},
            {"from": "gpt", "value": "It is clear."},
        ],
        "tools": '[{"name": "weather"}]',
    }
    [record] = read_records([row])
    call, told = '{"name": "weather", "arguments": {}}', "be brief\n\nFunctions that can be called:\n"
    tools = '[{"type": "function", "function": {"name": "weather"}}]'
    assert record.messages == (
        Message("system", told + '[{"name": "weather"}]', tools=tools, said="be brief"),
        Message("user", "weather?"),
        Message("assistant", call, calls=(call,)),
        Message("tool", '{"sky": "blue"}'),
        Message("assistant", "It is clear."),
    )


def test_tool_calls_of_a_message_become_its_text() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    [record] = read_records([row])
    assert record.messages is not None
    text = '{"name": "weather", "arguments": {"city": "Köln"}}'
    assert record.messages[1] == Message("assistant", text, calls=(text,))


def test_a_loss_weight_of_zero_makes_an_answer_context() -> None:
    turns = [
        {"role": "user", "content": "q", "loss_weight": 0.0},
        {"role": "assistant", "content": "a", "loss_weight": 0.0},
        {"role": "assistant", "content": "b", "weight": 1},
    ]
    [record] = read_records([{"messages": turns}])
    assert record.messages is not None
    assert [message.supervise for message in record.messages] == [False, False, True]
    turns[1]["loss_weight"] = 0.5
    with pytest.raises(DataError, match=r"record 1: messages\[1\]\.loss_weight is 0\.5; only 0 .* and 1"):
        read_records([{"messages": turns}])


def test_an_empty_system_turn_is_left_out() -> None:
    turns = [{"role": "system", "content": " "}, *SHAPES["messages"]["messages"]]
    assert read_records([{"messages": turns}])[0].messages == QA


WRONG_ROWS = {
    "missing beside": ({"instruction": "x"}, r"field 'output' is missing beside 'instruction' \(fields: instruction\)"),
    "unknown fields": ({"promt": "x"}, r"fields promt are not a known kind of row \(did you mean 'prompt'\?\)"),
    "no fields": ({}, r"fields \(none\) are not a known kind"),
    "number": ({"question": "x", "answer": 3}, r"field 'answer' is a number; it must be a text"),
    "null": ({"question": "x", "answer": None}, r"field 'answer' is null; it must be a text"),
    "no label": ({"text": "x", "label": None}, r"field 'label' is null; it must be a text"),
    "empty": ({"prompt": "x", "completion": "  "}, r"field 'completion' is empty"),
    "empty text": ({"text": ""}, r"field 'text' is empty"),
    "not turns": ({"messages": "hi"}, r"field 'messages' is a text; it must be a list of turns"),
    "no turns": ({"messages": []}, r"field 'messages' is empty; it needs at least one turn"),
    "turn": ({"messages": ["hi"]}, r"messages\[0\] is a text; it must be an object"),
    "no role": ({"messages": [{"content": "x"}]}, r"messages\[0\] has no role \(fields: content\)"),
    "role": (
        {"messages": [{"role": "asistant", "content": "x"}]},
        r"messages\[0\]\.role is 'asistant'; known roles: .*did you mean 'assistant'",
    ),
    "role of number": ({"messages": [{"role": 3, "content": "x"}]}, r"messages\[0\]\.role is 3"),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content is missing"),
    "empty content": ({"messages": [{"role": "user", "content": " "}]}, r"messages\[0\]\.content is empty"),
    "content": ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]\.content is a number"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        r"messages\[0\]\.content\[0\] is a part of type 'image'; only text",
    ),
    "sharegpt value": ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\]\.value is null"),
    "history": ({"instruction": "x", "output": "y", "history": ["a"]}, r"history\[0\] must be a pair"),
    "surrogate": ({"text": "a\ud800b"}, r"field 'text' holds half of a surrogate pair at character 1"),
    "preference": (
        {"conversations": [{"from": "human", "value": "x"}], "chosen": {}, "rejected": {}},
        r"preference pairs .* are not supported yet",
    ),
}


@pytest.mark.parametrize("extension", [".jsonl", ".json"])
@pytest.mark.parametrize("kind", WRONG_ROWS)
def test_a_broken_row_is_named_by_file_row_and_field(tmp_path: Path, kind: str, extension: str) -> None:
    row, message = WRONG_ROWS[kind]
    path = write_rows(tmp_path / f"data{extension}", [SHAPES["messages"], row])
    unit = "line" if extension == ".jsonl" else "record"
    with pytest.raises(DataError, match=rf"data\{extension}, {unit} 2: .*{message}"):
        read_records(path)


def test_ten_problems_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a" if row == 0 else " " * row} for row in range(15)]
    path = write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError) as caught:
        read_records(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert f"{path}, line 2: " in lines[0]
    assert lines[-1] == f"... and 4 more of {path}"


def test_what_is_wrong_with_every_row_is_said_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", [{"foo": "x"}] * 15)
    with pytest.raises(DataError, match=r"each of the 15 rows: fields foo are not") as caught:
        read_records(path)
    assert len(str(caught.value).splitlines()) == 1


def test_broken_json_lines_and_rows_are_collected_together(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n[1]\n{"text": 3}\n{"text": "b"}', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_records(path)
    text = str(caught.value)
    assert "line 3: not valid JSON: Expecting value at column" in text
    assert "line 4: got a list; each line must be one JSON object" in text
    assert "line 5: field 'text' is a number" in text


BROKEN_FILES = {
    "empty.jsonl": (b"", r"empty\.jsonl: the file is empty"),
    "blank.json": (b" \n\n", r"the file is empty"),
    "list.json": (b"[]", r"there is no row in it"),
    "cut.json": (b'[{"text": "a"},\n{"text": ', r"line 2: not valid JSON.*list of objects"),
    "number.json": (b"3", r"got a number; the file must be a list"),
    "texts.json": (b'["a"]', r"record 1: got a text; each record must be an object"),
    "deep.json": (b"[" * 100_000, r"not valid JSON"),
    "header.csv": (b"text,label\n", r"header\.csv: there is no row"),
    "wide.csv": (b"text,label\na,b,c\n", r"wide\.csv, line 2: 3 cells under a header of 2 \(text, label\).*double"),
    "quote.csv": (b'text,label\n"a,b\n', r"quote\.csv, line 2: not valid csv"),
    "double.csv": (b"text,text\na,b\n", r"header names 'text' more than once"),
    "narrow.csv": (b"text,label\na\n", r"narrow\.csv, line 2|fields text"),
    "latin.txt": ("erste\ngröße\n".encode("latin-1"), r"latin\.txt, line 2: byte 0xf6 is not UTF-8.*iconv"),
    "utf16.jsonl": ('{"text": "a"}\n'.encode("utf-16"), r"byte order mark says UTF-16.*UTF-8"),
    "utf16be.csv": (b"\xfe\xff" + "text\na".encode("utf-16-be"), r"UTF-16"),
    "broken.parquet": (b"PAR1....PAR1", r"not a readable parquet file"),
}


@pytest.mark.parametrize("name", [name for name in BROKEN_FILES if name != "narrow.csv"])
def test_a_broken_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    content, message = BROKEN_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(path)


def test_a_csv_row_that_lacks_cells_lacks_fields(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("question,answer\na,b\nc\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 3: field 'answer' is missing beside 'question'"):
        read_records(path)


def test_a_missing_or_unreadable_path_is_named_with_what_is_near(tmp_path: Path) -> None:
    write_rows(tmp_path / "train_data.jsonl", [SHAPES["alpaca"]])
    with pytest.raises(MissingInputError, match=r"train_dat\.jsonl: no such file.*did you mean 'train_data\.jsonl'"):
        read_data(tmp_path / "train_dat.jsonl")
    (tmp_path / "data.xlsx").write_bytes(b"x")
    with pytest.raises(MissingInputError, match=r"extension \.xlsx .* known: \.jsonl"):
        read_data(tmp_path / "data.xlsx")
    with pytest.raises(MissingInputError, match=r"missing\.parquet"):
        read_records(tmp_path / "missing.parquet")


def test_rows_in_memory_are_checked_too() -> None:
    with pytest.raises(DataError, match="list is empty"):
        read_records([])
    with pytest.raises(DataError, match="record 2: got a text"):
        read_records([SHAPES["alpaca"], "x"])  # type: ignore[list-item]


@pytest.mark.parametrize("extension", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("valid", ["valid", "validation", "dev"])
def test_a_folder_of_split_files_gives_its_splits(tmp_path: Path, valid: str, extension: str) -> None:
    for name, count in (("train", 4), (valid, 3), ("test", 2)):
        write_rows(tmp_path / f"{name}{extension}", [SHAPES["question"]] * count)
    (tmp_path / "notes.md").write_text("not data", encoding="utf-8")
    splits = read_data(tmp_path, seed=1, valid_fraction=0.5)
    assert [len(splits.train), len(splits.valid), len(splits.test)] == [4, 3, 2]
    assert splits.test[0].source.endswith(f"test{extension}")


def test_a_folder_without_train_or_with_two_or_an_empty_split_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.jsonl", [SHAPES["question"]])
    with pytest.raises(DataError, match=r"no train file beside test\.jsonl"):
        read_data(tmp_path)
    judged = read_data(tmp_path, need_train=False)
    assert (judged.train, judged.valid, len(judged.test)) == ([], [], 1)
    write_rows(tmp_path / "train.jsonl", [SHAPES["question"]])
    (tmp_path / "valid.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"valid\.json: there is no row"):
        read_data(tmp_path)
    write_rows(tmp_path / "dev.csv", [SHAPES["question"]])
    with pytest.raises(DataError, match=r"dev\.csv, valid\.json all claim to be the valid split"):
        read_data(tmp_path)


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 40), seed=st.integers(0, 5), fraction=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
def test_the_held_out_rows_are_drawn_by_the_seed_and_together_with_the_rest_are_all(count, seed, fraction) -> None:
    rows = [{"text": f"row {row}"} for row in range(count)]
    splits = read_data(rows, seed=seed, valid_fraction=fraction)
    again = read_data(rows, seed=seed, valid_fraction=fraction)
    assert splits == again
    assert sorted(r.row for r in splits.train + splits.valid) == list(range(1, count + 1))
    assert [r.row for r in splits.train] == sorted(r.row for r in splits.train)
    assert splits.train
    assert bool(splits.valid) == (fraction > 0 and count > 1)


def test_another_seed_holds_other_rows_out() -> None:
    rows = [{"text": f"row {row}"} for row in range(100)]
    held = {tuple(r.row for r in read_data(rows, seed=seed, valid_fraction=0.1).valid) for seed in range(5)}
    assert len(held) == 5


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text("ab \n\r\t", min_size=0, max_size=30), max_size=12), st.integers(1, 40))
def test_the_pieces_of_a_text_are_the_text(lines: list[str], characters: int) -> None:
    text = "\n".join(lines)
    pieces = text_pieces(text, characters=characters)
    joined = "".join(piece for _, piece in pieces)
    assert text.startswith(joined)
    assert not text[len(joined) :].strip()
    for line, piece in pieces:
        assert piece.strip()
        assert "".join(text.splitlines(keepends=True)[line - 1 :]).startswith(piece)


def test_a_text_file_is_cut_at_blank_lines_and_only_its_last_piece_ends(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    stories = [f"story {number} " + "word " * 500 for number in range(5)]
    path.write_text("\n\n".join(stories), encoding="utf-8")
    records = read_records(path)
    assert len(records) == 3
    assert [record.ends for record in records] == [False, False, True]
    assert "".join(str(record.text) for record in records) == path.read_text(encoding="utf-8")
    assert [record.row for record in records] == [1, 5, 9]


def test_a_text_row_of_another_file_is_whole() -> None:
    assert read_records([{"text": "a b"}]) == [Record("rows", 1, text="a b")]


@pytest.fixture
def dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path


def test_a_dataset_folder_is_opened_through_datasets(dataset_cache: Path) -> None:
    folder = dataset_cache / "set"
    (folder / "data").mkdir(parents=True)
    write_rows(folder / "data" / "train-00000-of-00001.parquet", [SHAPES["messages"]] * 3)
    write_rows(folder / "data" / "validation-00000-of-00001.parquet", [SHAPES["messages"]] * 2)
    splits = read_data(folder)
    assert [len(splits.train), len(splits.valid), len(splits.test)] == [3, 2, 0]
    assert splits.train[2].messages == QA
    assert splits.train[2].row == 3


def test_a_saved_dataset_gives_its_class_labels_by_name(dataset_cache: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    part = Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    DatasetDict({"train": part, "test": part}).save_to_disk(str(dataset_cache / "saved"))
    splits = read_data(dataset_cache / "saved", valid_fraction=0)
    assert [record.messages and record.messages[1].content for record in splits.train] == ["yes", "no"]
    assert len(splits.test) == 2


def test_a_hub_id_with_a_configuration_is_opened_through_datasets(
    dataset_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dataset_cache / "owner" / "name"
    folder.mkdir(parents=True)
    write_rows(folder / "a.jsonl", [SHAPES["question"]] * 4)
    write_rows(folder / "b.jsonl", [SHAPES["question"]] * 5)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl\n---\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(dataset_cache)
    assert len(read_data("owner/name:b", valid_fraction=0).train) == 5
    with pytest.raises(DataError, match=r"owner/name: the datasets library cannot read it .*[Cc]onfig"):
        read_data("owner/name")


def test_a_dataset_with_a_script_is_not_run(dataset_cache: Path) -> None:
    folder = dataset_cache / "evil"
    folder.mkdir()
    canary = dataset_cache / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n", encoding="utf-8")
    with pytest.raises((DataError, MissingInputError)):
        read_data(folder)
    assert not canary.exists()


def test_an_unknown_hub_id_says_that_neither_path_nor_dataset_was_found(dataset_cache: Path) -> None:
    with pytest.raises(MissingInputError, match=r"nobody/nothing: no such file or folder here, and no dataset"):
        read_data("nobody/nothing")

"""Rendered rows on the disk: the same samples, found again, checked, and little memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strop.data import records as records_module
from strop.data.batches import BatchStream, eval_batches
from strop.data.mixing import open_mixture
from strop.data.records import open_data, read_data
from strop.data.samples import prepare
from strop.data.store import TokenStore, rendered, samples_digest, tokenizer_digest
from strop.data.templates import Sample
from strop.memory import PeakMemory, release_unused_memory
from tests.fresh import in_fresh_process
from tests.tiny import tiny_chat_file, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as a large one."""
    monkeypatch.setattr(records_module, "KEPT_BYTES", 0)


def mixed_file(path: Path) -> Path:
    rows: list[dict[str, Any]] = [{"text": f"text {row} " * row} for row in range(1, 20)]
    rows += [{"question": f"q{row}", "answer": "a" * row} for row in range(1, 20)]
    rows += [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 3}] * 3
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def render(path: Path, cache: Path | None, notes: list[str] | None = None, *, max_length: int = 24, **changes: Any):
    data = open_mixture(str(path), seed=3, valid_fraction=0.2)
    settings = {"max_length": max_length, "train_on": "answers", "version": "1"} | changes
    return rendered(
        {"train": data.train, "valid": data.valid},
        TOKENIZER,
        cache=cache,
        data_sha256=data.sha256,
        held=data.held,
        note=(notes if notes is not None else []).append,
        **settings,
    )


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("cached", [True, False])
def test_samples_from_the_disk_are_those_from_memory(tmp_path: Path, cached: bool) -> None:
    path = mixed_file(tmp_path / "rows.jsonl")
    splits = read_data(path, seed=3, valid_fraction=0.2)
    sets = render(path, tmp_path / "cache" if cached else None)
    for name, records in (("train", splits.train), ("valid", splits.valid)):
        memory, disk = prepare(records, TOKENIZER, max_length=24), sets[name]
        assert isinstance(disk.samples, TokenStore)
        assert list(disk) == memory.samples
        assert disk.report == memory.report
        assert samples_digest(disk.samples) == samples_digest(memory.samples)
        assert disk.samples[-1] == memory.samples[-1]
        assert disk.samples[2:9:3] == memory.samples[2:9:3]
    for packing in (False, True):
        streams = [
            BatchStream(rows, batch_size=3, packing=packing, max_length=24, seed=1)
            for rows in (sets["train"].samples, prepare(splits.train, TOKENIZER, max_length=24).samples)
        ]
        assert streams[0].state_dict() == streams[1].state_dict()
        for _ in range(4):
            for one, other in zip(streams[0].next_step(), streams[1].next_step(), strict=True):
                assert one.input_ids.equal(other.input_ids)
                assert one.labels.equal(other.labels)
    held = prepare(splits.valid, TOKENIZER, max_length=24)
    for one, other in zip(eval_batches(sets["valid"].samples, 4), eval_batches(held, 4), strict=True):
        assert one.rows == other.rows
        assert one.input_ids.equal(other.input_ids)


def test_a_temporary_store_goes_with_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: None
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = mixed_file(tmp_path / "rows.jsonl")
    sets = render(path, None)
    assert list(tmp_path.glob("strop-rows-*"))
    del sets
    release_unused_memory()
    assert not list(tmp_path.glob("strop-rows-*"))


def test_rows_are_rendered_once_and_anew_when_anything_changes(tmp_path: Path) -> None:
    path, cache, notes = mixed_file(tmp_path / "rows.jsonl"), tmp_path / "cache", list[str]()
    first = render(path, cache, notes)
    assert notes == []
    again = render(path, cache, notes)
    assert "the rows were rendered before and are read from" in notes.pop()
    assert list(again["train"]) == list(first["train"])
    assert again["train"].report == first["train"].report
    for changes in ({"max_length": 23}, {"train_on": "all"}, {"version": "2"}):
        render(path, cache, notes, **changes)
        assert notes == []
        assert len(list(cache.iterdir())) == 1  # what nobody will read again is removed
    render(path, cache)
    path.write_text(path.read_text(encoding="utf-8").replace("text 5", "text 6"), encoding="utf-8")
    render(path, cache, notes)
    assert notes == []


def test_another_tokenizer_is_another_key() -> None:
    other = tiny_tokenizer()
    other.add_tokens(["zebra"])
    assert tokenizer_digest(other) != tokenizer_digest(TOKENIZER)
    assert tokenizer_digest(tiny_tokenizer()) == tokenizer_digest(TOKENIZER)


@pytest.mark.parametrize("file", ["train.tokens", "train.safetensors", "header.json", "valid.tokens", "manifest.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_store_is_noticed_and_made_again(tmp_path: Path, file: str, damage: str) -> None:
    path, cache, notes = mixed_file(tmp_path / "rows.jsonl"), tmp_path / "cache", list[str]()
    first = list(render(path, cache)["train"])
    target = next(cache.iterdir()) / file
    content = target.read_bytes()
    if damage == "gone":
        target.unlink()
    else:
        middle = len(content) // 2
        changed = bytes([content[middle] ^ 1]) + content[middle + 1 :]
        target.write_bytes(content[:middle] + (changed if damage == "changed" else b""))
    assert list(render(path, cache, notes)["train"]) == first
    assert "cannot be used and is made again" in notes[0]
    notes.clear()
    render(path, cache, notes)
    assert "rendered before" in notes[0]


def test_an_interrupted_rendering_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = mixed_file(tmp_path / "rows.jsonl"), tmp_path / "cache"

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("strop.data.samples.render_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render(path, cache)
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_streamed_file_gives_the_same_splits_as_lists(tmp_path: Path, rows: int) -> None:
    path = tiny_chat_file(tmp_path / "chats.jsonl", rows=rows)
    opened, lists = open_data(path, seed=4, valid_fraction=0.3), read_data(path, seed=4, valid_fraction=0.3)
    assert list(opened.train) == list(opened.train) == lists.train
    assert list(opened.valid) == lists.valid
    assert [opened.train[row] for row in range(len(opened.train))] == lists.train
    assert opened.train[::-1] == lists.train[::-1]
    assert opened.drawn == bool(lists.valid)
    with pytest.raises(IndexError):
        opened.train[len(opened.train)]


def prepared_in(path: Path, cache: Path) -> tuple[int, int]:
    """Peak bytes and tokens of preparing a file."""
    records_module.KEPT_BYTES = 0  # in a process of its own: every file counts as a large one
    peak_bytes = tokens = 0
    for rows in (path.with_name("first.jsonl"), path):  # the first warms up
        release_unused_memory()
        with PeakMemory() as memory:
            sets = render(rows, cache, max_length=512)
        peak_bytes, tokens = memory.peak_bytes, sets["train"].report.tokens
    return peak_bytes, tokens


def test_a_large_file_is_rendered_in_less_memory_than_its_lists_take(tmp_path: Path) -> None:
    row = json.dumps({"text": "x" * 1500 + " the quick brown fox" * 100}) + "\n"
    path = tmp_path / "rows.jsonl"
    path.write_text(row * 2_000, encoding="utf-8")
    path.with_name("first.jsonl").write_text(row * 400, encoding="utf-8")
    assert path.stat().st_size > 6_000_000
    peak_bytes, tokens = in_fresh_process(prepared_in, path, tmp_path / "cache")
    assert peak_bytes < 8 * tokens  # lists of ids and labels alone take sixteen bytes a token


def test_a_sample_is_stored_whatever_its_labels(tmp_path: Path) -> None:
    from strop.data.samples import DataReport
    from strop.data.store import write_store

    samples = [
        Sample([0, 1, 2], [-100, 1, 2], 0, ((1, 3),)),
        Sample([5, 0], [-100, 0], 7, ()),
        Sample([2**31 - 1, 3], [-100, -100], 8, ((1, 1), (1, 2))),
    ]
    write_store(tmp_path / "s", "k", {"train": ([samples[:2], [], samples[2:]], DataReport(max_length=4))})
    assert list(TokenStore(tmp_path / "s", "train", "d")) == samples

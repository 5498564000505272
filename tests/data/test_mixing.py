"""Several data sets: what an epoch takes of each, and that it is always the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from strop.app.verbs.common import data_sets
from strop.config import TuneConfig, load_config, to_yaml
from strop.config.settings import DataPart
from strop.data.batches import BatchStream
from strop.data.mixing import open_mixture
from strop.data.samples import prepare
from strop.errors import ConfigError, MissingInputError
from strop.recipes.tune import tune, tune_from_config
from tests.recipes.helpers import Killed, Notes
from tests.tiny import tiny_folder, tiny_tokenizer


def rows_file(path: Path, word: str, count: int) -> str:
    rows = [json.dumps({"question": f"{word} {row}", "answer": f"{word}"}) for row in range(count)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return str(path)


def taken(parts: list[DataPart], *, seed: int = 0, valid_fraction: float = 0.0) -> Counter[str]:
    """How often an epoch takes each row."""
    data = open_mixture(parts, seed=seed, valid_fraction=valid_fraction)
    prepared = prepare(data.train, tiny_tokenizer(), max_length=64)
    drawn = data.draw(prepared.samples)
    stream = BatchStream(drawn, batch_size=4, max_length=64)
    counts: Counter[str] = Counter()
    for _ in range(stream.steps_per_epoch):
        for batch in stream.next_step():
            for (row,) in batch.rows:
                messages = data.train[drawn[row].index].messages
                assert messages is not None
                counts[messages[0].content] += 1
    return counts


def test_a_weight_is_how_often_an_epoch_takes_each_row(tmp_path: Path) -> None:
    a, b, c = (rows_file(tmp_path / f"{word}.jsonl", word, 10) for word in ("a", "b", "c"))
    counts = taken([DataPart(path=a, weight=1.0), DataPart(path=b, weight=2.5), DataPart(path=c, weight=0.3)])
    assert {counts[f"a {row}"] for row in range(10)} == {1}
    assert Counter(counts[f"b {row}"] for row in range(10)) == {2: 5, 3: 5}
    assert Counter(counts[f"c {row}"] for row in range(10)) == {1: 3, 0: 7}


def test_sets_without_weights_are_one_after_the_other(tmp_path: Path) -> None:
    a, b = rows_file(tmp_path / "a.jsonl", "a", 3), rows_file(tmp_path / "b.jsonl", "b", 4)
    assert set(taken([DataPart(path=a), DataPart(path=b)]).values()) == {1}


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path: Path) -> None:
    part = [DataPart(path=rows_file(tmp_path / "a.jsonl", "a", 40), weight=0.5)]
    assert taken(part) == taken(part)
    assert taken(part, seed=1) != taken(part)


def test_each_set_brings_its_own_validation_rows(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    rows_file(folder / "train.jsonl", "a", 5)
    rows_file(folder / "valid.jsonl", "av", 2)
    other = rows_file(tmp_path / "b.jsonl", "b", 20)
    data = open_mixture([DataPart(path=str(folder), weight=3.0), DataPart(path=other)], valid_fraction=0.1)
    held = [str(record.messages and record.messages[0].content).split()[0] for record in data.valid]
    assert held == ["av", "av", "b", "b"]
    assert [one.drawn for one in data.sets] == [False, True]
    prepared = prepare(data.train, tiny_tokenizer(), max_length=64)
    first, second = data.lines(prepared.samples)
    assert "5 samples, 2 rows to choose by; weight 3: 15 samples an epoch, 45.5% of it" in first
    assert "18 samples, 2 rows to choose by; weight 1: 18 samples an epoch, 54.5% of it" in second


def test_a_run_says_its_shares_resumes_exactly_and_keeps_its_settings(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path, "llama")
    data = [rows_file(tmp_path / "a.jsonl", "a", 12), {"path": rows_file(tmp_path / "b.jsonl", "b", 6), "weight": 1.5}]
    settings = {"max_steps": 4, "save_steps": 1, "batch_size": 4, "dtype": "float32", "packing": True, "max_length": 64}
    notes = Notes()
    straight = tune(base, data, output=tmp_path / "one", reporter=notes, **settings)
    assert notes.said("weight 1.5")

    def kill(step: int) -> None:
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        tune(base, data, output=tmp_path / "two", reporter=Notes(kill), **settings)
    assert (tmp_path / "two" / "cache").is_dir()
    notes = Notes()
    config = load_config(tmp_path / "two" / "config.yaml", {"resume": True})
    resumed = tune_from_config(config, reporter=notes)
    assert notes.said("the rows were rendered before")
    assert [row["loss"] for row in resumed.metrics] == [row["loss"] for row in straight.metrics]
    assert not (tmp_path / "two" / "cache").exists()
    assert "are unchanged" in resumed.verify().lines()[-1]


def test_a_list_of_sets_is_written_and_read_back(tmp_path: Path) -> None:
    config = TuneConfig.from_flat({"model": "m", "data": ["a.jsonl", {"path": "b.jsonl", "weight": 2}]})
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file) == config
    assert TuneConfig.from_flat({"model": "m", "data": ["a.jsonl"]}).data == "a.jsonl"
    assert TuneConfig.from_flat({"model": "m", "data": [Path("a.jsonl")]}).data == "a.jsonl"


WRONG = {
    "nothing": ([], "name at least one file"),
    "empty": ("", "name a file, a folder or a hub id"),
    "twice": (["a.jsonl", "a.jsonl"], "names a.jsonl more than once; give it a weight"),
    "zero": ([{"path": "a", "weight": 0}], "weight: Input should be greater than 0"),
    "negative": ([{"path": "a", "weight": -1}], "greater than 0"),
    "infinite": ([{"path": "a", "weight": float("inf")}], "finite"),
    "text": ([{"path": "a", "weight": "much"}], "valid number"),
    "unknown": ([{"path": "a", "wieght": 2}], "wieght: Extra inputs"),
    "no path": ([{"weight": 2}], "path: Field required"),
    "number": ([3], "needs a path, or {path, weight}"),
    "scalar": (3, "data: got 3"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_lists_of_sets_are_refused_with_what_is_needed(kind: str) -> None:
    value, message = WRONG[kind]
    with pytest.raises(ConfigError) as caught:
        TuneConfig.from_flat({"model": "m", "data": value})
    assert message in str(caught.value)


def test_a_set_that_is_missing_is_named(tmp_path: Path) -> None:
    a = rows_file(tmp_path / "a.jsonl", "a", 3)
    with pytest.raises(MissingInputError, match=r"b\.jsonl: no such file"):
        open_mixture([DataPart(path=a), DataPart(path=str(tmp_path / "b.jsonl"))])


def test_the_command_line_takes_a_weight_behind_an_equals_sign(tmp_path: Path) -> None:
    assert data_sets(None) is None
    assert data_sets(["a.jsonl"]) == "a.jsonl"
    assert data_sets(["owner/name:config"]) == "owner/name:config"
    assert data_sets(["a.jsonl", "b.jsonl=2"]) == ["a.jsonl", {"path": "b.jsonl", "weight": 2.0}]
    assert data_sets(["date=x.jsonl"]) == "date=x.jsonl"
    folder = tmp_path / "year=2024"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"reads as .*year' with the weight 2024; write .*year=2024=1"):
        data_sets([str(folder)])
    assert data_sets([f"{folder}=1"]) == [{"path": str(folder), "weight": 1.0}]
